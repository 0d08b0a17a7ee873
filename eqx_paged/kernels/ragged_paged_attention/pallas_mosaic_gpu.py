"""Ragged paged attention for Hopper GPUs, in Mosaic GPU.

Rows of one token go to the decode kernel, and pay for nothing else. For longer ones:

Grid      (groups, items): a group is up to 8 query heads that share a kv head; an item is a
          tile of tokens of one row, a row's last tile, which sees the most, first.
Programs  of one warpgroup that fetches and two that compute, each for half of the tokens.
          The 64 rows of a product are a head's tokens, then the next head's: so a tile's
          queries are fetched from where they lie, a copy a head.
Reads     for each tile the pages that any of its tokens sees. Without a window, only blocks
          that some of its tokens do not see are masked.
State     running max `m`, running sum `l`, accumulator `acc`: float32, in registers.
Writes    a copy a head, or where a tile is not full a copy a token and head: what follows
          is the next row's. Tokens that belong to no row are a row without keys.
Limits    those of `_mosaic_gpu.unsupported`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, Real

from .. import _mosaic_gpu as mosaic_gpu
from .._blocked import Results, split_rows
from .._gpu import MosaicGPUConfig
from .._mosaic_gpu import (
    add_block,
    by_row,
    clear_hidden,
    COLUMN,
    empty_state,
    factors_of,
    fetch,
    HIDDEN,
    keys_of,
    launch,
    logits_by,
    MATRIX,
    operand,
    plain,
    plgpu,
    Ring,
    ring_of,
    ROWS,
    TILE_ROWS,
)
from .._pages import page_size_of
from .._pallas import result_of
from ..paged_attention import pallas_mosaic_gpu as decode_gpu
from .mosaic_gpu_tiles import (
    by_token,
    COMPUTING,
    Items,
    items_of,
    sinks_by_row,
    tile_of,
)


# --- Limits


unsupported = decode_gpu.unsupported


# --- Block sizes


class Sizes(NamedTuple):
    num_heads: int
    num_kv_heads: int
    heads: int  # of a program
    head_dim: int
    page_size: int
    block_size: int
    stages: int
    windowed: bool

    @property
    def groups(self) -> int:
        return self.num_heads // self.heads

    @property
    def tokens(self) -> int:
        """Of a warpgroup; whole tiles of its rows, and a power of two."""
        tokens = ROWS
        while tokens * self.heads > ROWS:
            tokens //= 2
        return tokens

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that fetches, so that neither spills. The
        three warpgroups together have what they begin with, three times 168: asked for
        more, they would wait for it without end."""
        if self.head_dim < 256:
            return 224, 56
        # What fetches smaller pages has more numbers to hold; under a window, what computes
        # has the first position of each row.
        spared = ({8: 8} if self.windowed else {8: 16, 16: 16}).get(self.page_size, 0)
        return 240 - spared, 24 + 2 * spared

    @property
    def columns(self) -> int:
        """Of results that are written at a time."""
        return 64 if self.head_dim == 256 else self.head_dim


def sizes_of(q: Array, k_pages: Array, config: MosaicGPUConfig, *, windowed: bool) -> Sizes:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    # A head has at least a tile of rows. With a large accumulator there are no registers
    # for the places of more than 4 heads.
    most = 4 if head_dim == 256 else ROWS // TILE_ROWS
    heads = max(n for n in range(1, most + 1) if group % n == 0)
    page_size = page_size_of(k_pages, head_dim)
    # Up to 8 pages: the numbers and places of more do not fit the registers.
    block_size = config.block_size or min(64 if head_dim == 256 else 128, 8 * page_size)
    sizes = Sizes(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        heads=heads,
        head_dim=head_dim,
        page_size=page_size,
        block_size=block_size,
        stages=config.num_stages or 2,
        windowed=windowed,
    )
    numbers = COMPUTING * ROWS * (head_dim + sizes.columns)
    numbers += 2 * sizes.stages * block_size * head_dim
    mosaic_gpu.check_shared_bytes(block_size, sizes.stages, numbers * q.dtype.itemsize)
    return sizes


# --- Body


class Scratch(NamedTuple):
    """Of each warpgroup that computes, but the ring."""

    ring: Ring
    cleared: Any
    q: Any  # [COMPUTING, ROWS, head_dim]
    q_there: Any
    out: Any  # [COMPUTING, ROWS, columns]
    per_row: Any  # [COMPUTING, 2, ROWS], in float32: sinks; m and l
    sinks_there: Any
    p: Any  # [COMPUTING, ROWS, block_size], interpreted; else None


class Options(NamedTuple):
    """What differs by head."""

    factors: Any  # [num_kv_heads]
    v_scales: Any  # [num_kv_heads], or None
    sinks: Any  # [groups, ROWS], in powers of two, or None


def _kernel(
    items: Items,
    options: Options,
    page_indices_ref,  # [num_seqs, pages_per_seq]
    q_ref,  # [num_tokens, num_heads, head_dim]
    k_ref,  # [num_pages, num_kv_heads, page_size, head_dim]
    v_ref,
    out_ref,  # [num_tokens, num_heads, head_dim]
    ml_ref=None,  # [num_items, groups, COMPUTING, 2, ROWS]
    *,
    scratch: Scratch,
    sizes: Sizes,
    soft_cap: float | None,
    sliding_window: int | None,
):
    item, group = jax.lax.axis_index("item"), jax.lax.axis_index("group")
    warpgroup = jax.lax.axis_index("warpgroup")
    kv_head = jax.lax.div(group, jnp.int32(sizes.groups // sizes.num_kv_heads))
    count, position = items.counts[item], items.positions[item]
    seen_from = jnp.int32(0)
    if sliding_window is not None:
        seen_from = jnp.maximum(position - sliding_window + 1, 0)
    keys = keys_of(
        seen_from,
        position + count,
        block_size=sizes.block_size,
        page_size=sizes.page_size,
        windowed=sizes.windowed,
    )

    @pl.when((warpgroup == COMPUTING) & (count > 0))
    def _fetch():
        # Also where there are no keys: the others wait for the registers.
        plgpu.set_max_registers(sizes.registers[1], action="decrease")
        pool = (slice(None), kv_head)
        pools, row = (k_ref.at[pool], v_ref.at[pool]), items.rows[item]
        fetch(scratch.ring, keys, *pools, page_indices_ref.at[row], ahead=False)

    @pl.when((warpgroup < COMPUTING) & (count > 0))
    def _compute():
        plgpu.set_max_registers(sizes.registers[0], action="increase")
        tile = tile_of(sizes, warpgroup, items, item, q_ref.shape[0])
        _fetch_queries(sizes, scratch, warpgroup, tile, group, q_ref)
        logits_of = logits_by(options.factors[kv_head], soft_cap)
        state = _attend(sizes, scratch, warpgroup, tile, keys, logits_of, sliding_window)
        of_part = scratch.per_row.at[warpgroup]
        sinks = v_scale = None
        if options.sinks is not None:
            sinks = _fetched(options.sinks.at[group], of_part.at[0], scratch, warpgroup)
        if options.v_scales is not None:
            v_scale = options.v_scales[kv_head]
        out = _normalised(state, sinks, v_scale)
        # Read again: while it attends there is no register left to keep it in.
        tile = tile_of(sizes, warpgroup, items, item, q_ref.shape[0])
        _write(sizes, scratch, warpgroup, tile, group, out, out_ref)
        if ml_ref is not None:
            _write_residuals(of_part, state, ml_ref.at[item, group, warpgroup])


def _fetch_queries(sizes, scratch, warpgroup, tile, group, q_ref):
    """By way of the memory for results, since a copy to where products read can only begin
    at a multiple of 8 tokens."""
    smem, there = scratch.out.at[warpgroup], scratch.q_there.at[warpgroup]
    for column in range(0, sizes.head_dim, sizes.columns):
        columns = pl.ds(column, sizes.columns)
        for head in range(sizes.heads):
            tokens = pl.ds(tile.first, sizes.tokens)
            plgpu.copy_gmem_to_smem(
                q_ref.at[tokens, group * sizes.heads + head, columns],
                smem.at[pl.ds(head * sizes.tokens, sizes.tokens)],
                there,
            )
        plgpu.barrier_wait(there)
        q = plgpu.load(smem, layout=MATRIX, optimized=False)
        scratch.q.at[warpgroup, :, columns][...] = q
        plgpu.commit_smem()


def _attend(sizes, scratch, warpgroup, tile, keys, logits_of, sliding_window):
    ring = scratch.ring
    clear_hidden(ring, keys, lambda i: warpgroup == i % COMPUTING)
    plgpu.barrier_arrive(scratch.cleared.at[0])
    plgpu.barrier_wait(scratch.cleared.at[0])

    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
    here = tile.position + (row & (sizes.tokens - 1))
    first = None if sliding_window is None else here - (sliding_window - 1)
    seen = first, jnp.minimum(here + 1, keys.end)

    def add(seen, is_edge=False):
        return functools.partial(
            add_block,
            ring,
            scratch.q.at[warpgroup],
            None if scratch.p is None else scratch.p.at[warpgroup],
            keys,
            logits_of=logits_of,
            seen=seen,
            is_edge=is_edge,
        )

    num_turns = keys.num_blocks
    edges = jnp.minimum(keys.num_edges, num_turns)
    state = empty_state(sizes.head_dim)
    state = jax.lax.fori_loop(0, edges, add(seen, is_edge=True), state)
    whole_to = edges
    if sliding_window is None and sizes.head_dim <= 128:
        # Up to this turn, all tokens see all keys. With a window, or a large accumulator,
        # another loop would leave too few registers for each.
        block = jax.lax.div(tile.position + tile.begin + 1, jnp.int32(keys.block_size))
        whole_to = jnp.clip(block + 1, edges, num_turns)
        state = jax.lax.fori_loop(edges, whole_to, add(None), state)
    return jax.lax.fori_loop(whole_to, num_turns, add(seen), state)


def _fetched(ref, smem, scratch, warpgroup):
    plgpu.copy_gmem_to_smem(ref, smem, scratch.sinks_there.at[warpgroup])
    plgpu.barrier_wait(scratch.sinks_there.at[warpgroup])
    return plgpu.load(smem, layout=COLUMN)


def _normalised(state, sinks, v_scale):
    if sinks is None:
        factor = 1 / state.l
    else:
        top = jnp.maximum(state.m, sinks)
        old = jnp.exp2(state.m - top)
        factor = old / (state.l * old + jnp.exp2(sinks - top))
    # A query that saw hidden keys only counted these; one that saw none has no sum.
    factor = jnp.where(state.m > HIDDEN, factor, 0.0)
    if v_scale is not None:
        factor = factor * v_scale
    return state.acc * by_row(factor, state.acc.shape)


def _write(sizes, scratch, warpgroup, tile, group, out, out_ref):
    """Writes the rows of tokens that there are."""
    smem = scratch.out.at[warpgroup]
    is_full = tile.end - tile.begin == sizes.tokens

    def write(row, count, columns):
        for head in range(sizes.heads):
            plgpu.copy_smem_to_gmem(
                smem.at[pl.ds(head * sizes.tokens + row, count)],
                out_ref.at[
                    pl.ds(tile.first + row, count), group * sizes.heads + head, columns
                ],
            )

    for column in range(0, sizes.head_dim, sizes.columns):
        columns = pl.ds(column, sizes.columns)
        if column > 0:
            plgpu.wait_smem_to_gmem(0)
        smem[...] = out[:, column : column + sizes.columns].astype(out_ref.dtype)
        plgpu.commit_smem()

        @pl.when(is_full)
        def _(columns=columns):
            write(0, sizes.tokens, columns)

        @pl.when(jnp.logical_not(is_full))
        def _(columns=columns):
            pl.loop(tile.begin, tile.end)(lambda row: write(row, 1, columns))

    plgpu.wait_smem_to_gmem(0)


def _write_residuals(smem, state, ml_ref):
    smem.at[0][...] = state.m
    smem.at[1][...] = jnp.where(state.m > HIDDEN, state.l, 0.0)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, ml_ref)
    plgpu.wait_smem_to_gmem(0)


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
    return_residuals: bool,
    interpret: Any,
    config: MosaicGPUConfig,
    **options: Any,
) -> Results:
    """Returns `(out, m, l)`, or `(out,)`."""
    num_tokens = q.shape[0]
    windowed = options["sliding_window"] is not None
    sizes = sizes_of(q, k_pages, config, windowed=windowed)

    def decode(queries, kv_lens):
        return decode_gpu.paged_attention(
            queries,
            k_pages,
            v_pages,
            kv_lens,
            page_indices,
            return_residuals=return_residuals,
            interpret=interpret,
            config=config,
            **options,
        )

    def prefill(q_starts, q_lens):
        # What belongs to no row is one more, without keys.
        total = cu_q_lens[num_seqs]
        q_starts, q_lens, ends = (
            jnp.append(x, last)
            for x, last in ((q_starts, total), (q_lens, num_tokens - total), (kv_lens, 0))
        )
        items = items_of(sizes, num_tokens, q_starts, q_lens, ends)
        results = _launch(
            sizes,
            items,
            page_indices,
            q,
            k_pages,
            v_pages,
            with_residuals=return_residuals,
            interpret=interpret,
            **options,
        )
        if not return_residuals:
            return results
        out, ml = results
        return out, *by_token(sizes, items, ml, num_tokens)

    return split_rows(q, kv_lens, cu_q_lens, num_seqs, decode=decode, prefill=prefill)


def _launch(
    sizes: Sizes,
    items: Items,
    page_indices: Array,
    q: Array,
    k_pages: Array,
    v_pages: Array,
    *,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Array | None,
    k_scale: Array | None,
    v_scale: Array | None,
    with_residuals: bool,
    interpret: Any,
) -> tuple[Array, ...]:
    num_tokens = q.shape[0]
    # At least as many tokens as a warpgroup fetches.
    q = jnp.pad(q, ((0, max(0, sizes.tokens - num_tokens)), (0, 0), (0, 0)))
    factors = factors_of(sm_scale, soft_cap, k_scale, sizes.num_kv_heads)
    results = [result_of(q.shape, q.dtype)]
    if with_residuals:
        shape = (items.rows.shape[0], sizes.groups, COMPUTING, 2, ROWS)
        results.append(result_of(shape, jnp.float32))
    block = (sizes.stages, sizes.block_size, sizes.head_dim)
    of_each = (COMPUTING, ROWS)
    scratch = Scratch(
        ring=ring_of(block, sizes.page_size, q.dtype, num_users=COMPUTING),
        cleared=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=1),
        q=operand((*of_each, sizes.head_dim), q.dtype),
        q_there=plgpu.Barrier(num_arrivals=sizes.heads, num_barriers=COMPUTING),
        out=plgpu.SMEM((*of_each, sizes.columns), q.dtype),
        per_row=plgpu.SMEM((COMPUTING, 2, ROWS), jnp.float32),
        sinks_there=plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTING),
        p=operand((*of_each, sizes.block_size), q.dtype) if interpret else None,
    )
    out, *ml = launch(
        functools.partial(
            _kernel, sizes=sizes, soft_cap=soft_cap, sliding_window=sliding_window
        ),
        items,
        Options(factors, v_scale, sinks_by_row(sizes, sinks)),
        page_indices,
        q,
        plain(k_pages, sizes.head_dim),
        plain(v_pages, sizes.head_dim),
        results=results,
        scratch=dict(scratch=scratch),
        grid=dict(group=sizes.groups, item=items.rows.shape[0]),
        num_warpgroups=COMPUTING + 1,
        name="ragged_paged_attention",
        interpret=interpret,
    )
    return out[:num_tokens], *ml
