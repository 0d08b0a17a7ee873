"""Paged decode attention for NVIDIA GPUs, in Pallas-Triton.

Grid      (parts, groups): a part is some of a row's blocks of keys, as the plan cut them; a
          group is the query heads that share a kv head. Then, for rows of several parts,
          (rows, heads).
Reads     each live page once; pages past the end of a row, or before its window, are
          skipped. The queries of a group are the rows of one matrix product.
State     running max `m`, running sum `l`, accumulator `acc`: float32, in registers. A row
          of one part is finished where it was computed; the parts of others are merged by
          a second kernel, always in the same order.
Limits    those of `_triton.unsupported`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, Real

from .._gpu import cdiv, num_splits_of, Splits, splits_of, TritonConfig
from .._pallas import result_of
from .._triton import (
    attend,
    compiler_params,
    empty_state,
    finished,
    lanes_of,
    load,
    logits_by,
    LOWEST,
    Options,
    Pools,
    pools_of,
    queries_of,
    Seen,
    State,
    store,
    Tile,
    tile_of,
)


# --- Block sizes


# Of queries in a tile, beyond which a group is several.
_MAX_ROWS = 64
# Programs a core, all rows together: a few more than it runs at once, so that no core is
# idle long before the last is done.
_PROGRAMS_PER_CORE = 8


# --- Body


def _kernel(
    splits: Splits,  # of refs, as its arrays
    kv_lens_ref,  # [num_seqs]
    q_ref,  # [num_seqs, num_heads, head_dim]
    pools: Pools,
    options: Options,
    out_ref,  # [num_seqs, num_heads, head_dim]
    m_ref,  # [num_seqs, num_heads]
    l_ref,
    part_acc_ref=None,  # [num_parts, num_heads, head_dim], in float32
    part_m_ref=None,  # [num_parts, num_heads], in powers of two
    part_l_ref=None,
    *,
    tile: Tile,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
):
    part, group = pl.program_id(0), pl.program_id(1)
    row = load(splits.rows, part)

    @pl.when(row < kv_lens_ref.shape[0])
    def _():
        kv_head, _, head, there = queries_of(tile, group)
        lane, lane_there = lanes_of(tile)
        mask = there[:, None] & lane_there
        q = load(q_ref, row, head[:, None], lane, mask=mask)
        start, end = load(splits.starts, part), load(splits.ends, part)
        first = start
        if sliding_window is not None:
            first = jnp.maximum(start, load(kv_lens_ref, row) - sliding_window)
        state = attend(
            tile,
            q,
            pools,
            row,
            kv_head,
            empty_state(tile),
            (start // tile.block_size, cdiv(end, tile.block_size)),
            logits_of=logits_by(sm_scale, soft_cap, options, kv_head),
            seen=Seen(first, end, lambda at: (at >= first) & (at < end)),
        )
        whole = load(splits.counts, row) == 1

        @pl.when(whole)
        def _finish():
            out, m, l = finished(state, options, kv_head, head, there)
            store(out_ref, row, head[:, None], lane, value=out, mask=mask)
            store(m_ref, row, head, value=m, mask=there)
            store(l_ref, row, head, value=l, mask=there)

        if part_acc_ref is not None:

            @pl.when(jnp.logical_not(whole))
            def _put_aside():
                store(part_acc_ref, part, head[:, None], lane, value=state.acc, mask=mask)
                store(part_m_ref, part, head, value=state.m, mask=there)
                store(part_l_ref, part, head, value=state.l, mask=there)


# Of parts that are merged at a time.
_MERGED = 16


def _merge_kernel(
    first_parts_ref,  # [num_seqs]
    counts_ref,  # [num_seqs]
    part_acc_ref,  # [num_parts, num_heads, head_dim]
    part_m_ref,  # [num_parts, num_heads]
    part_l_ref,
    options: Options,
    rows_of_one_part,  # out, m and l, where rows of one part are already
    out_ref,  # [num_seqs, num_heads, head_dim]
    m_ref,  # [num_seqs, num_heads]
    l_ref,
    *,
    tile: Tile,
):
    del rows_of_one_part
    row, head = pl.program_id(0), pl.program_id(1)
    count = load(counts_ref, row)

    @pl.when(count > 1)
    def _():
        first = load(first_parts_ref, row)
        lane, lane_there = lanes_of(tile)

        def add_parts(i, state):
            place = i * _MERGED + jnp.arange(_MERGED, dtype=jnp.int32)
            there = place < count
            part = first + place
            mask = there[:, None] & lane_there
            part_acc = load(part_acc_ref, part[:, None], head, lane, mask=mask)
            part_m = load(part_m_ref, part, head, mask=there)
            part_l = load(part_l_ref, part, head, mask=there)
            part_m = jnp.where(there, part_m, LOWEST)
            m = jnp.maximum(state.m, jnp.max(part_m))
            old, weights = jnp.exp2(state.m - m), jnp.exp2(part_m - m[None])
            acc = state.acc * old + jnp.sum(part_acc * weights[:, None], axis=0)
            return State(m, state.l * old + jnp.sum(part_l * weights), acc)

        empty = State(
            jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(tile.lanes, jnp.float32)
        )
        state = jax.lax.fori_loop(0, cdiv(count, _MERGED), add_parts, empty)
        out, m, l = finished(State(*state), options, head // tile.group, head, None)
        store(out_ref, row, head, lane[0], value=out, mask=lane_there[0])
        store(m_ref, row, head, value=m, mask=None)
        store(l_ref, row, head, value=l, mask=None)


# --- Launch


def paged_attention(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
    *,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
    return_residuals: bool,
    interpret: bool,
    config: TritonConfig | None,
) -> tuple[Array, ...]:
    config = TritonConfig() if config is None else config
    tile = tile_of(q, k_pages, config, max_rows=_MAX_ROWS, one_token=True)
    num_splits = num_splits_of(
        config, programs_per_core=_PROGRAMS_PER_CORE, num_groups=tile.groups
    )
    splits = splits_of(
        kv_lens,
        block_size=tile.block_size,
        num_splits=num_splits,
        sliding_window=sliding_window,
    )
    options = Options(sinks, k_scale, v_scale)
    num_parts = splits.rows.shape[0]
    computed = pl.pallas_call(
        functools.partial(
            _kernel,
            tile=tile,
            sm_scale=sm_scale,
            soft_cap=soft_cap,
            sliding_window=sliding_window,
        ),
        grid=(num_parts, tile.groups),
        out_shape=[
            *_results(q.shape, q.dtype),
            *(_results((num_parts, *q.shape[1:]), jnp.float32) if num_splits > 0 else ()),
        ],
        compiler_params=compiler_params(tile),
        interpret=interpret,
        name="paged_attention",
    )(splits, kv_lens, q, pools_of(q, k_pages, v_pages, page_indices), options)
    results, parts = computed[:3], computed[3:]
    if num_splits > 0:
        results = _merge(tile, splits, options, results, parts, interpret)
    return tuple(results) if return_residuals else (results[0],)


def _merge(tile, splits, options, results, parts, interpret):
    """Puts the rows of several parts with the others."""
    arguments = (splits.first_parts, splits.counts, *parts, options, results)
    first = len(jax.tree.leaves(arguments)) - len(results)
    return pl.pallas_call(
        functools.partial(_merge_kernel, tile=tile),
        grid=results[0].shape[:2],
        out_shape=_results(results[0].shape, results[0].dtype),
        input_output_aliases={first + i: i for i in range(len(results))},
        compiler_params=compiler_params(tile._replace(num_warps=4, num_stages=1)),
        interpret=interpret,
        name="merge_parts",
    )(*arguments)


def _results(shape, dtype):
    """An output, its largest logits and its denominators."""
    per_head = result_of(shape[:2], jnp.float32)
    return [result_of(shape, dtype), per_head, per_head]
