"""The suite `attention`: one query a sequence over all its keys and values, as in each
layer of a decode step. Pages against contiguous buffers, ours against PyTorch."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from eqx_paged import KVPages, paged_attention, ragged_gqa
from jaxtyping import Array, Float, Int32, Real

from .agree import Wrong
from .contexts import CASES, Context, QUICK, REHEARSAL
from .measure import in_turn, timed
from .process import Broken, Process
from .record import Row


# Two of our forms in float32 differ by what the order of additions rounds; in bfloat16 one
# of the two also rounds the softmax.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-3}

Pool = Real[Array, "num_pages num_kv_heads page_size head_dim"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the suite does.

    - `size`: "full", "quick", or "tiny" to see that it works.
    - `torch`: a command that serves PyTorch's forms; None if there is none, for `absent`.
    - `out`: where its stderr goes.
    - `about`: gives the ceiling, and takes PyTorch's version.
    """

    size: str
    torch: list[str] | None
    absent: str
    out: pathlib.Path
    about: dict[str, Any]

    @property
    def cases(self) -> tuple[Context, ...]:
        return {"full": CASES, "quick": QUICK, "tiny": REHEARSAL}[self.size]

    @property
    def seconds(self) -> float:
        """Of each case, about."""
        return {"full": 20.0, "quick": 3.0, "tiny": 0.1}[self.size]


def run(plan: Plan) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        torch = None
        if plan.torch is not None:
            process = Process("torch", plan.torch, plan.out / "attention_torch.log")
            torch = stack.enter_context(process)
            try:
                torch.ready()
                plan.about.update(torch.ask("versions"))
            except Broken as error:
                torch = None
                yield Row("all", {}, "torch", reason=str(error))
        for case in plan.cases:
            ceiling = plan.about["read_ceiling_gb_s"]
            yield from time_case(case, torch, plan.seconds, ceiling)
    if plan.torch is None:
        yield Row("all", {}, "torch", reason=plan.absent)


def time_case(
    case: Context, torch: Process | None, seconds: float, ceiling_gb_s: float
) -> list[Row]:
    """Times all sides in turn. They must agree before."""
    reasons: dict[str, str] = {}
    sides = our_sides(case)
    runs = {name: functools.partial(timed, side) for name, side in sides.items()}
    wanted = np.asarray(sides["gather used"](), np.float32)
    outs = {name: np.asarray(side(), np.float32) for name, side in sides.items()}
    if torch is not None:
        try:
            theirs = torch.ask("prepare", **dataclasses.asdict(case))
        except Broken as error:
            reasons["torch"] = str(error)
        else:
            outs |= {name: np.array(out, np.float32) for name, out in theirs.items()}
            runs |= {x: functools.partial(torch.ask, "time", side=x) for x in theirs}
    for name, out in outs.items():
        # Of the others only the first sequence is looked at: it went through a pipe.
        error = np.abs(out - wanted[: len(out)]).max()
        if not error <= TOLERANCE[case.dtype]:
            text = f"{name} is {error:.1e} off in {case.name}"
            if name in sides:
                raise Wrong(text)
            reasons[name] = text
            del runs[name]
    times = in_turn(runs, rounds=40, seconds=seconds, lost=reasons)
    shape = dataclasses.asdict(case)
    rows = [Row(case.name, shape, name, {"call": times[name]}) for name in times]
    for row in rows:
        row.figures["gb_per_s"] = case.num_bytes / row.median("call") / 1e9
        row.figures["of_roofline"] = row.figures["gb_per_s"] / ceiling_gb_s
    absent = [Row(case.name, shape, x, reason=reason) for x, reason in reasons.items()]
    return rows + absent


def our_sides(case: Context) -> dict[str, Callable[[], Array]]:
    """Each reads the same keys and values, and waits for its result."""
    data = case.data()
    stored = jax.eval_shape(
        functools.partial(
            KVPages.empty,
            num_pages=case.num_pages,
            page_size=case.page_size,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            dtype=jnp.dtype(case.dtype),
        )
    )
    q = jnp.asarray(data.q, jnp.dtype(case.dtype))
    lens, table = jnp.asarray(data.lens), jnp.asarray(data.table)
    pools = [_stored(x, stored.k_pages.dtype) for x in data.pools()]
    used = table[:, : case.pages_used]
    sides: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "paged": (
            paged_attention,
            (q, *(x.reshape(stored.k_pages.shape) for x in pools), lens, table),
        ),
        "gather all": (gather_attention, (q, *pools, lens, table)),
        "gather used": (gather_attention, (q, *pools, lens, used)),
    }
    buffers = [_stored(x, stored.k_pages.dtype) for x in data.buffers()]
    starts = jnp.zeros_like(lens)
    sides["contiguous"] = (_contiguous, (q, *buffers, lens, starts))
    return {name: _compiled(f, args) for name, (f, args) in sides.items()}


def _compiled(function: Callable[..., Array], args: tuple[Any, ...]) -> Callable:
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def _stored(x: np.ndarray, dtype: Any) -> Array:
    """As the library stores it: on a CPU bfloat16 is kept as its bits."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.bfloat16), jnp.uint16)
    return jnp.asarray(x, dtype)


def _contiguous(q, k, v, lens, starts):
    return ragged_gqa(q, k, v, lens, starts)[0]


def gather_attention(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k_pages: Pool,
    v_pages: Pool,
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
) -> Float[Array, "num_seqs num_heads head_dim"]:
    """The plain form: a contiguous copy of all pages of the table, then attention."""

    def gathered(pages: Pool) -> Array:
        pages = pages[page_indices]  # [num_seqs, pages_per_seq, num_kv_heads, ...]
        if pages.dtype == jnp.uint16:
            pages = jax.lax.bitcast_convert_type(pages, jnp.bfloat16)
        num_seqs, _, num_kv_heads, _, head_dim = pages.shape
        return pages.swapaxes(1, 2).reshape(num_seqs, num_kv_heads, -1, head_dim)

    num_seqs, num_heads, head_dim = q.shape
    k, v = gathered(k_pages), gathered(v_pages)
    q = q.reshape(num_seqs, k.shape[1], -1, head_dim)
    logits = jnp.einsum("bhgd,bhtd->bhgt", q, k, preferred_element_type=jnp.float32)
    keep = jnp.arange(k.shape[2])[None, :] < kv_lens[:, None]
    logits = jnp.where(keep[:, None, None], logits * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhgt,bhtd->bhgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(num_seqs, num_heads, head_dim).astype(q.dtype)
