"""The suite `update`: a decode step on caches that differ in size alone.

A step is what a model does with its cache for one token of each row: make room, and in
each layer store a key and a value, and attend. All caches hold the same tokens, so each
must take the same time: a step that copied its cache would take as much longer as the cache
is larger.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from eqx_paged import PagedAttention, PagedKVCache, RESULTS
from jaxtyping import Array, Float

from .measure import in_turn, timed
from .record import Row
from .shapes import itemsize


MIB = 2**20
NUM_SEQS = 8
NUM_LAYERS = 2
NUM_HEADS = 32
NUM_KV_HEADS = 8
HEAD_DIM = 128
# Of the smallest cache: most of it, as where paging pays.
SHARE_STORED = 0.75
WARM_UP = 3

QueriesKeysValues = tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_kv_heads head_dim"],
    Float[Array, "num_seqs num_kv_heads head_dim"],
]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the suite does.

    - `cache_mib`: sizes of caches, the smallest first.
    - `page_sizes`, `dtypes`: all of them with each other.
    - `rounds`: timed steps of each: in float32 the rest of a cache of 64 MiB holds 128
        tokens more a row.
    """

    cache_mib: tuple[int, ...] = (64, 256, 1024, 4096)
    page_sizes: tuple[int, ...] = (16, 64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 50


QUICK = Plan(cache_mib=(64, 1024), page_sizes=(64,), rounds=20)
REHEARSAL = Plan(cache_mib=(4, 8), page_sizes=(16,), dtypes=("float32",), rounds=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One cache to time a step on.

    - `small_mib`: the size of the smallest cache, most of which the rows take.
    """

    cache_mib: int
    small_mib: int
    page_size: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Bytes of all keys and values of a token."""
        return 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * itemsize(self.dtype)

    @property
    def tokens_per_row(self) -> int:
        stored = SHARE_STORED * self.small_mib * MIB / self.token_bytes
        return int(stored / NUM_SEQS)


def run(plan: Plan) -> Iterator[Row]:
    for dtype, page_size in itertools.product(plan.dtypes, plan.page_sizes):
        cases = [Case(mib, plan.cache_mib[0], page_size, dtype) for mib in plan.cache_mib]
        for side, step in (("store", store_step), ("store and attend", attend_step)):
            yield from time_cases(cases, side, step, plan.rounds)


def time_cases(cases: Sequence[Case], side: str, step: Callable, rounds: int) -> list[Row]:
    """Times steps on caches of one dtype and page size, in turn."""
    inputs = jax.block_until_ready(queries_keys_values(cases[0].dtype))
    caches = [filled_cache(case) for case in cases]

    def step_on(i: int) -> None:
        _, caches[i] = jax.block_until_ready(step(inputs, caches[i]))

    runs = {
        str(i): functools.partial(timed, functools.partial(step_on, i))
        for i in range(len(cases))
    }
    in_turn(runs, rounds=WARM_UP)
    times = in_turn(runs, rounds=rounds)
    for i, case in enumerate(cases):
        last_len = case.tokens_per_row + WARM_UP + len(times[str(i)])
        assert (caches[i].kv_lens == last_len).all(), "each step had room for its tokens"
    return _rows(cases, side, [times[str(i)] for i in range(len(cases))])


def _rows(cases: Sequence[Case], side: str, times: list[list[float]]) -> list[Row]:
    shape = {
        "num_seqs": NUM_SEQS,
        "num_layers": NUM_LAYERS,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    rows = [
        Row(_name(case), {**dataclasses.asdict(case), **shape}, side, {"step": seconds})
        for case, seconds in zip(cases, times, strict=True)
    ]
    for case, row in zip(cases, rows, strict=True):
        row.figures["of_smallest"] = row.median("step") / rows[0].median("step")
        if side == "store and attend":
            num_bytes = NUM_SEQS * case.tokens_per_row * case.token_bytes
            row.figures["gb_per_s"] = num_bytes / row.median("step") / 1e9
    return rows


def _name(case: Case) -> str:
    return f"{case.dtype}, pages of {case.page_size}, cache of {case.cache_mib} MiB"


def filled_cache(case: Case) -> PagedKVCache:
    """A cache of the case's size, with room made for its tokens, on pages in a mixed order.
    What lies there, zeros, does not matter to the time."""
    num_pages = case.cache_mib * MIB // (case.token_bytes * case.page_size)
    cache = PagedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_pages=num_pages,
        page_size=case.page_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_seqs=NUM_SEQS,
        max_len=2 * case.tokens_per_row,
        dtype=jnp.dtype(case.dtype),
    )
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    cache = eqx.tree_at(lambda c: c.table.free_pages, cache, jnp.asarray(order))
    q_lens = jnp.full(NUM_SEQS, case.tokens_per_row, jnp.int32)
    cache, _, result = cache.append(q_lens, NUM_SEQS * case.tokens_per_row)
    assert result == RESULTS.successful, "the small cache has room"
    return cache


@eqx.filter_jit(donate="all-except-first")
def store_step(qkv: QueriesKeysValues, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
    """One token a row, stored in all layers."""
    _, k, v = qkv
    cache, batch, _ = cache.append(jnp.ones(NUM_SEQS, jnp.int32))
    layers = tuple(pages.write(k, v, batch.slots) for pages in cache.layers)
    return batch.slots, dataclasses.replace(cache, layers=layers)


@eqx.filter_jit(donate="all-except-first")
def attend_step(qkv: QueriesKeysValues, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
    """The same, and each layer attends, with the output of the last one as queries."""
    q, k, v = qkv
    cache, batch, _ = cache.append(jnp.ones(NUM_SEQS, jnp.int32))
    layers = []
    for pages in cache.layers:
        q, pages = PagedAttention()(q, k, v, pages, batch)
        layers.append(pages)
    return q, dataclasses.replace(cache, layers=tuple(layers))


def queries_keys_values(dtype: str) -> QueriesKeysValues:
    """One random token a row."""
    q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
    kv_shape = NUM_SEQS, NUM_KV_HEADS, HEAD_DIM
    return (
        jax.random.normal(q_key, (NUM_SEQS, NUM_HEADS, HEAD_DIM), jnp.dtype(dtype)),
        jax.random.normal(k_key, kv_shape, jnp.dtype(dtype)),
        jax.random.normal(v_key, kv_shape, jnp.dtype(dtype)),
    )
