"""Ragged paged attention for NVIDIA GPUs, in Pallas-Triton.

Rows of one token go to the decode kernel, and pay for nothing else. For longer ones:

Grid      (items, groups): an item is a tile of tokens of one row, a row's last tile, which
          sees the most, first; a group is the query heads that share a kv head.
Reads     for each tile the pages that any of its tokens sees, from the first of its window
          to its last token's. Only blocks that some of its tokens do not see are masked.
State     running max `m`, running sum `l`, accumulator `acc`: float32, in registers.
Limits    those of `_triton.unsupported`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, Real

from .._blocked import Results, split_rows
from .._gpu import cdiv, TritonConfig, work_list
from .._pallas import result_of
from .._triton import (
    attend,
    compiler_params,
    empty_state,
    finished,
    lanes_of,
    load,
    logits_by,
    Options,
    Pools,
    pools_of,
    queries_of,
    Seen,
    store,
    Tile,
    tile_of,
)
from ..paged_attention.pallas_triton import paged_attention


# --- Block sizes


# Of numbers in the accumulator of a tile: 8 warps hold it in 64 registers a thread.
_MAX_ACC = 2**14


def max_rows_of(q: jax.Array, num_kv_heads: int) -> int:
    """Of queries in a tile, and no more than there are."""
    num_tokens, num_heads, head_dim = q.shape
    most = _MAX_ACC // max(128, pl.next_power_of_2(head_dim))
    return min(most, pl.next_power_of_2(max(16, num_tokens * num_heads // num_kv_heads)))


# --- Body


def _kernel(
    rows_ref,  # [num_items]
    offsets_ref,  # [num_items]: of the item's first token in its row
    q_starts_ref,  # [num_seqs]
    q_lens_ref,
    kv_lens_ref,
    q_ref,  # [num_tokens, num_heads, head_dim]
    pools: Pools,
    options: Options,
    padding,  # out, m and l with 0 everywhere
    out_ref,  # [num_tokens, num_heads, head_dim]
    m_ref,  # [num_tokens, num_heads]
    l_ref,
    *,
    tile: Tile,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
):
    del padding
    item, group = pl.program_id(0), pl.program_id(1)
    row = load(rows_ref, item)

    @pl.when(row < kv_lens_ref.shape[0])
    def _():
        offset, q_len = load(offsets_ref, item), load(q_lens_ref, row)
        kv_head, token, head, there = queries_of(tile, group)
        there &= offset + token < q_len
        token_at = load(q_starts_ref, row) + offset + token
        lane, lane_there = lanes_of(tile)
        mask = there[:, None] & lane_there
        q = load(q_ref, token_at[:, None], head[:, None], lane, mask=mask)

        first = load(kv_lens_ref, row) - q_len + offset
        last = first + jnp.minimum(tile.tokens, q_len - offset) - 1
        here = first + token
        seen_from = jnp.int32(0)
        if sliding_window is not None:
            seen_from = jnp.maximum(first - sliding_window + 1, 0)

        def keep(position):
            kept = position <= here[:, None]
            if sliding_window is not None:
                kept &= position > here[:, None] - sliding_window
            return kept

        # Between these blocks, all tokens see all keys.
        begin = seen_from // tile.block_size
        end = jnp.maximum(cdiv(last + 1, tile.block_size), begin)
        whole_to = jnp.clip((first + 1) // tile.block_size, begin, end)
        whole_from = begin
        if sliding_window is not None:
            whole_from = cdiv(last - sliding_window + 1, tile.block_size)
            whole_from = jnp.clip(whole_from, begin, whole_to)
        add_blocks = functools.partial(
            attend,
            tile,
            q,
            pools,
            row,
            kv_head,
            logits_of=logits_by(sm_scale, soft_cap, options, kv_head),
        )
        some = Seen(seen_from, last + 1, keep)
        state = empty_state(tile)
        if sliding_window is not None:
            state = add_blocks(state, (begin, whole_from), seen=some)
        state = add_blocks(state, (whole_from, whole_to), seen=None)
        state = add_blocks(state, (whole_to, end), seen=some)

        out, m, l = finished(state, options, kv_head, head, there)
        store(out_ref, token_at[:, None], head[:, None], lane, value=out, mask=mask)
        store(m_ref, token_at, head, value=m, mask=there)
        store(l_ref, token_at, head, value=l, mask=there)


# --- Launch


def ragged_paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
    return_residuals: bool,
    interpret: bool,
    config: TritonConfig | None,
    **options: Any,
) -> Results:
    config = TritonConfig() if config is None else config
    max_rows = max_rows_of(q, k_pages.shape[1])
    tile = tile_of(q, k_pages, config, max_rows=max_rows, one_token=False)

    def decode(queries, kv_lens):
        return paged_attention(
            queries,
            k_pages,
            v_pages,
            kv_lens,
            page_indices,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            return_residuals=True,
            interpret=interpret,
            config=config,
            **options,
        )

    def prefill(q_starts, q_lens):
        return _launch(
            tile,
            q,
            pools_of(q, k_pages, v_pages, page_indices),
            Options(sinks, k_scale, v_scale),
            q_starts,
            q_lens,
            kv_lens,
            interpret=interpret,
            **options,
        )

    results = split_rows(q, kv_lens, cu_q_lens, num_seqs, decode=decode, prefill=prefill)
    return results if return_residuals else results[:1]


def _launch(
    tile: Tile,
    q: Array,
    pools: Pools,
    options: Options,
    q_starts: Array,
    q_lens: Array,
    kv_lens: Array,
    *,
    interpret: bool,
    **sizes: Any,
) -> tuple[Array, ...]:
    num_tokens, num_heads, _ = q.shape
    # Each row ends in a tile that may not be full, and there are two tokens in each row.
    num_items = num_tokens // tile.tokens + max(1, min(len(kv_lens), num_tokens // 2))
    counts = cdiv(q_lens, tile.tokens)
    rows, place = work_list(counts, num_items)
    last = counts[jnp.minimum(rows, len(kv_lens) - 1)] - 1
    padding = [
        jnp.zeros(q.shape, q.dtype),
        jnp.zeros((num_tokens, num_heads), jnp.float32),
        jnp.zeros((num_tokens, num_heads), jnp.float32),
    ]
    offsets = (last - place) * tile.tokens
    arguments = (rows, offsets, q_starts, q_lens, kv_lens, q, pools, options, padding)
    first = len(jax.tree.leaves(arguments)) - len(padding)
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, tile=tile, **sizes),
            grid=(num_items, tile.groups),
            out_shape=[result_of(x.shape, x.dtype) for x in padding],
            input_output_aliases={first + i: i for i in range(len(padding))},
            compiler_params=compiler_params(tile),
            interpret=interpret,
            name="ragged_paged_attention",
        )(*arguments)
    )
