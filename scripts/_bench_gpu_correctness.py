"""Whether the kernels compute attention on this device, before anything is timed.

Each result is compared with plain attention in float64, row by row, which shares no code
with the library. Pages are in random places; slots that hold no token are NaN, and page
numbers of pages that a row does not have are out of range.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import eqx_paged
import jax
import jax.numpy as jnp
import numpy as np

from ._bench_gpu_candidates import as_run, IMPLEMENTATIONS
from ._bench_gpu_data import random_numbers
from ._bench_gpu_record import Row


# Of results of size 1, whose queries, keys and values are exact in bfloat16: its rounding,
# of the result and of the probabilities, with some room.
TOLERANCE = 2e-2
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window, soft cap": dict(sliding_window=37, soft_cap=2.0),
    "sinks, scales": dict(sinks=True, k_scale=0.5, v_scale=2.0),
}
# Of a head, a page, the query heads that share a kv head, and a stored number. Few, since
# each takes seconds to compile.
SIZES = (
    (64, 16, 4, "bfloat16"),
    (128, 16, 4, "bfloat16"),
    (128, 64, 1, "bfloat16"),
    (256, 64, 8, "bfloat16"),
    (128, 64, 8, "int8"),
    (128, 16, 4, "float8_e4m3fn"),
)


@dataclasses.dataclass(frozen=True)
class Check:
    """A call whose result is known."""

    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    page_size: int
    group: int
    head_dim: int
    dtype: str
    options: str

    @property
    def is_decode(self) -> bool:
        return set(self.q_lens) == {1}

    @property
    def name(self) -> str:
        kind = "decode" if self.is_decode else "mixed"
        sizes = f"d{self.head_dim}-p{self.page_size}-g{self.group}-{self.dtype}"
        return f"{kind}-{sizes}, {self.options}"


def checks(*, dry_run: bool) -> Iterator[Check]:
    sizes = SIZES[:1] if dry_run else SIZES
    for (head_dim, page_size, group, dtype), options in itertools.product(sizes, OPTIONS):
        # Lengths on the edges of a page, and such as several programs share.
        edges = (0, 1, page_size - 1, page_size, page_size + 1)
        decode = (*edges, *((70,) if dry_run else (1000, 5000)))
        prompts = (1, page_size + 1, 3, 40 if dry_run else 300)
        common = (page_size, group, head_dim, dtype, options)
        yield Check(decode, (1,) * len(decode), *common)
        yield Check((1, page_size + 1, page_size + 3, 700), prompts, *common)


def checked(check: Check, row: Row, *, interpret: bool) -> Row:
    """With the largest error of an implementation, or with what is wrong."""
    options = as_run(IMPLEMENTATIONS[row.implementation], interpret=interpret)
    rows, arrays = _arrays(check)
    static, sinks = dict(OPTIONS[check.options]), None
    if static.pop("sinks", False):
        sinks = jnp.linspace(-1, 2, arrays["q"].shape[1])
    function = (
        eqx_paged.paged_attention if check.is_decode else eqx_paged.ragged_paged_attention
    )
    call = jax.jit(functools.partial(function, **static, **options))
    out = np.asarray(call(**arrays, sinks=sinks), np.float64)
    again = np.asarray(call(**arrays, sinks=sinks), np.float64)
    wanted = _attention(rows, static, None if sinks is None else np.asarray(sinks))
    row = row.compared(out[: len(wanted)], wanted, TOLERANCE)
    if row.status == "failed":
        return row
    if not np.array_equal(out, again):
        return dataclasses.replace(row, status="failed", reason="it differs the next time")
    return dataclasses.replace(row, status="right")


def _arrays(check: Check) -> tuple[tuple, dict[str, jax.Array]]:
    """Queries, keys and values of each row, and the arguments that hold the same."""
    rng = np.random.default_rng(0)
    kv_heads, heads, num_seqs = 2, 2 * check.group, len(check.kv_lens)
    held = [math.ceil(n / check.page_size) for n in check.kv_lens]
    num_pages, order = sum(held) + 2, rng.permutation(sum(held) + 2)
    whole = check.dtype != "bfloat16"  # numbers that 8 bits hold exactly

    def numbers(n, num_heads):
        shape = (n, num_heads, check.head_dim)
        values = rng.integers(-2, 3, shape) if whole else rng.standard_normal(shape)
        return np.asarray(values).astype(jnp.bfloat16).astype(np.float64)

    qs = [numbers(n, heads) for n in check.q_lens]
    ks, vs = ([numbers(n, kv_heads) for n in check.kv_lens] for _ in range(2))
    pools = np.full((2, num_pages, kv_heads, check.page_size, check.head_dim), np.nan)
    if check.dtype == "int8":  # which has no NaN
        pools[:] = 100
    table = np.full((num_seqs, max(held) + 1), num_pages + 7)
    first = 0
    for i, n in enumerate(held):
        table[i, :n] = order[first : first + n]
        first += n
        for t in range(check.kv_lens[i]):
            page, slot = table[i, t // check.page_size], t % check.page_size
            pools[:, page, :, slot] = ks[i][t], vs[i][t]
    dtype = jnp.dtype(check.dtype)
    arrays = dict(
        q=jnp.asarray(np.concatenate(qs), jnp.bfloat16),
        k_pages=jnp.asarray(pools[0].astype(dtype)),
        v_pages=jnp.asarray(pools[1].astype(dtype)),
        kv_lens=jnp.asarray(check.kv_lens, jnp.int32),
        page_indices=jnp.asarray(table, jnp.int32),
    )
    if not check.is_decode:
        arrays["cu_q_lens"] = jnp.asarray(np.cumsum([0, *check.q_lens]), jnp.int32)
        arrays["num_seqs"] = jnp.asarray(num_seqs, jnp.int32)
    return (qs, ks, vs), arrays


def _attention(rows: tuple, options: dict[str, Any], sinks) -> np.ndarray:
    """Plain attention of each row, in float64; nothing attended to gives 0."""
    out = []
    for q, k, v in zip(*rows, strict=True):
        group = q.shape[1] // k.shape[1]
        if not len(k):
            out.append(np.zeros_like(q))
            continue
        k = np.repeat(k * options.get("k_scale", 1.0), group, axis=1)
        v = np.repeat(v * options.get("v_scale", 1.0), group, axis=1)
        logits = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
        if (cap := options.get("soft_cap")) is not None:
            logits = cap * np.tanh(logits / cap)
        ages = np.arange(len(k) - len(q), len(k))[:, None] - np.arange(len(k))
        keep = (ages >= 0) & (ages < options.get("sliding_window", math.inf))
        logits = np.where(keep, logits, -np.inf)
        top = logits.max(2, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, sinks[:, None, None])
        weights = np.exp(logits - top)
        total = weights.sum(2, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - top)
        out.append(np.einsum("hqk,khd->qhd", weights / total, v))
    return np.concatenate(out)


SHAPE = NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM = 8, 64, 128
NUM_HELD = 4  # the last pages, which a row of one token less than they have room for holds
# More than 2**31 numbers, so that an offset of 32 bits, with a sign, is not enough.
NUM_PAGES = 2**31 // (NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM) + NUM_HELD
REHEARSED_PAGES = 3 * NUM_HELD


def checked_large(row: Row, *, dry_run: bool) -> Row:
    """Whether a pool of more numbers than 32 bits can count is read at the right places:
    the same row in a small pool and in a large one gives the same, bit for bit of the
    kernels, and about the same of XLA, which may sum in another order."""
    num_pages = REHEARSED_PAGES if dry_run else NUM_PAGES
    q_key, *keys = jax.random.split(jax.random.key(0), 3)
    q = random_numbers(q_key, (1, 32, HEAD_DIM), "bfloat16")
    small = [random_numbers(key, (NUM_HELD, *SHAPE), "bfloat16") for key in keys]
    large = [_at_the_end(pages, num_pages) for pages in small]
    kv_lens = jnp.array([NUM_HELD * PAGE_SIZE - 1], jnp.int32)
    first = jnp.arange(NUM_HELD, dtype=jnp.int32)[None]
    options = as_run(IMPLEMENTATIONS[row.implementation], interpret=dry_run)
    call = jax.jit(functools.partial(eqx_paged.paged_attention, **options))
    wanted = np.asarray(call(q, *small, kv_lens, first), np.float32)
    out = call(q, *large, kv_lens, first + num_pages - NUM_HELD)
    tolerance = TOLERANCE if row.implementation == "xla" else 0.0
    row = row.compared(np.asarray(out, np.float32), wanted, tolerance)
    return row if row.status == "failed" else dataclasses.replace(row, status="right")


@functools.partial(jax.jit, static_argnums=1)
def _at_the_end(pages: jax.Array, num_pages: int) -> jax.Array:
    pool = jnp.zeros((num_pages, *SHAPE), pages.dtype)
    return pool.at[-NUM_HELD:].set(pages)
