"""Paged decode attention for Hopper GPUs, in Mosaic GPU.

Grid      (kv heads, parts): a part is some of a row's blocks of keys, as the plan cut them.
Programs  of one warpgroup that fetches and one that computes; two such programs fit a core
          where neither takes more than 128 registers a thread.
Reads     each live page once; pages past the end of a row, or before its window, are
          skipped. The queries that share a kv head are the first of the 64 rows of a
          product, and the others are not used.
State     running max `m`, running sum `l`, accumulator `acc`: float32, in registers. This
          is a part's result; the parts of a row are merged afterwards.
Limits    those of `_mosaic_gpu.unsupported`; at most 64 query heads a kv head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, Real

from .. import _mosaic_gpu as mosaic_gpu
from .._gpu import cdiv, MosaicGPUConfig, num_splits_of, Splits, splits_of
from .._mosaic_gpu import (
    add_block,
    clear_hidden,
    COLUMN,
    empty_state,
    factors_of,
    fetch,
    HIDDEN,
    keys_of,
    launch,
    logits_by,
    operand,
    plain,
    plgpu,
    Ring,
    ring_of,
    ROWS,
    TILE_ROWS,
)
from .._online_softmax import normalise
from .._pages import page_size_of
from .._pallas import LOG2_E, result_of


# --- Limits


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_indices: Array
) -> str | None:
    """Why this kernel cannot run, or None."""
    group = q.shape[1] // k_pages.shape[1]
    if group > ROWS:
        return f"a kv head can have at most {ROWS} query heads, not {group}"
    return mosaic_gpu.unsupported(q, k_pages, v_pages)


# --- Block sizes


# Programs a core, all rows together: twice as many as it runs at once.
_PROGRAMS_PER_CORE = 4
# Columns of a result that are put aside at a time.
_COLUMNS = 64


class Sizes(NamedTuple):
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    block_size: int
    stages: int

    @property
    def group_rows(self) -> int:
        """Rows of queries that are fetched, and of results: whole tiles."""
        return cdiv(self.group, TILE_ROWS) * TILE_ROWS


def sizes_of(q: Array, k_pages: Array, config: MosaicGPUConfig) -> Sizes:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pages.shape[1]
    block_size = config.block_size or 64
    fixed = head_dim * ROWS * q.dtype.itemsize + ROWS * _COLUMNS * 4
    stage = 2 * block_size * head_dim * q.dtype.itemsize
    # As many as two programs, or one of the largest heads, find room for.
    room = mosaic_gpu.SHARED_BYTES // (2 if head_dim <= 128 else 1)
    stages = config.num_stages or max(2, min(4, (room - fixed) // stage))
    mosaic_gpu.check_shared_bytes(block_size, stages, fixed + stages * stage)
    return Sizes(
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        page_size=page_size_of(k_pages, head_dim),
        block_size=block_size,
        stages=stages,
    )


# --- Body


class Scratch(NamedTuple):
    ring: Ring
    q: Any  # [ROWS, head_dim]
    q_there: Any
    acc: Any  # [ROWS, _COLUMNS]
    m: Any  # [ROWS]
    l: Any
    p: Any  # [ROWS, block_size], interpreted; else None


class Results(NamedTuple):
    acc: Any  # [num_parts, num_kv_heads, group_rows, head_dim]
    m: Any  # [num_parts, num_kv_heads, group_rows], in powers of two
    l: Any


def _kernel(
    rows_ref,  # [num_parts]
    starts_ref,  # [num_parts]
    ends_ref,  # [num_parts]
    factors_ref,  # [num_kv_heads]
    page_indices_ref,  # [num_seqs, pages_per_seq]
    q_ref,  # [num_seqs, num_kv_heads, group_rows, head_dim]
    k_ref,  # [num_pages, num_kv_heads, page_size, head_dim]
    v_ref,
    *result_refs,  # as `Results`
    scratch: Scratch,
    sizes: Sizes,
    soft_cap: float | None,
    windowed: bool,
):
    part, head = jax.lax.axis_index("part"), jax.lax.axis_index("head")
    warpgroup = jax.lax.axis_index("warpgroup")
    row = rows_ref[part]
    keys = keys_of(
        starts_ref[part],
        ends_ref[part],
        block_size=sizes.block_size,
        page_size=sizes.page_size,
        windowed=windowed,
    )

    @pl.when((warpgroup == 1) & (keys.num_blocks > 0))
    def _fetch():
        pool = (slice(None), head)
        pools = k_ref.at[pool], v_ref.at[pool]
        fetch(scratch.ring, keys, *pools, page_indices_ref.at[row], ahead=True)

    @pl.when((warpgroup == 0) & (keys.num_blocks > 0))
    def _compute():
        state = _attend(
            keys, q_ref.at[row, head], scratch, logits_by(factors_ref[head], soft_cap)
        )
        refs = Results(*(ref.at[part, head] for ref in result_refs))
        _put_aside(state, scratch, refs)


def _attend(keys, q_ref, scratch, logits_of):
    queries = scratch.q.at[pl.ds(0, q_ref.shape[0])]
    plgpu.copy_gmem_to_smem(q_ref, queries, scratch.q_there.at[0])
    clear_hidden(scratch.ring, keys)
    plgpu.barrier_wait(scratch.q_there.at[0])

    seen = tuple(
        plgpu.layout_cast(jnp.full((ROWS,), x, jnp.int32), COLUMN)
        for x in (keys.start, keys.end)
    )

    def add(is_edge):
        return functools.partial(
            add_block,
            scratch.ring,
            scratch.q,
            scratch.p,
            keys,
            logits_of=logits_of,
            seen=seen if is_edge else None,
            is_edge=is_edge,
        )

    edges = jnp.minimum(keys.num_edges, keys.num_blocks)
    state = empty_state(q_ref.shape[1])
    state = jax.lax.fori_loop(0, edges, add(is_edge=True), state)
    return jax.lax.fori_loop(edges, keys.num_blocks, add(is_edge=False), state)


def _put_aside(state, scratch, refs):
    """Writes the rows of queries that there are."""
    rows, head_dim = refs.acc.shape
    rows = pl.ds(0, rows)
    for column in range(0, head_dim, _COLUMNS):
        if column > 0:
            plgpu.wait_smem_to_gmem(0)
        scratch.acc[...] = state.acc[:, column : column + _COLUMNS]
        plgpu.commit_smem()
        columns = pl.ds(column, _COLUMNS)
        plgpu.copy_smem_to_gmem(scratch.acc.at[rows], refs.acc.at[:, columns])
    scratch.m[...], scratch.l[...] = state.m, state.l
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.m.at[rows], refs.m)
    plgpu.copy_smem_to_gmem(scratch.l.at[rows], refs.l)
    plgpu.wait_smem_to_gmem(0)


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
    interpret: Any,
    config: MosaicGPUConfig,
) -> tuple[Array, ...]:
    """Returns `(out, m, l)`, or `(out,)`."""
    sizes = sizes_of(q, k_pages, config)
    num_splits = num_splits_of(
        config, programs_per_core=_PROGRAMS_PER_CORE, num_groups=sizes.num_kv_heads
    )
    splits = splits_of(
        kv_lens,
        block_size=sizes.block_size,
        num_splits=num_splits,
        sliding_window=sliding_window,
    )
    ends = jnp.where(splits.rows < kv_lens.shape[0], splits.ends, 0)
    splits = splits._replace(ends=ends)  # a part that does not exist has no keys
    if sliding_window is not None:
        seen_from = jnp.append(kv_lens - sliding_window, 0)[splits.rows]
        splits = splits._replace(starts=jnp.maximum(splits.starts, seen_from))
    acc, m, l = _launch(
        sizes,
        splits,
        factors_of(sm_scale, soft_cap, k_scale, sizes.num_kv_heads),
        page_indices,
        _by_kv_head(sizes, q),
        plain(k_pages, sizes.head_dim),
        plain(v_pages, sizes.head_dim),
        soft_cap=soft_cap,
        windowed=sliding_window is not None,
        interpret=interpret,
    )
    acc, m, l = (
        x[:, :, : sizes.group].reshape(x.shape[0], q.shape[1], *x.shape[3:])
        for x in (acc, m, l)
    )
    acc, m, l = merged(splits, acc, m, l)
    m = m / LOG2_E
    out = normalise(acc, m, l, sinks if sinks is None else sinks[None])
    if v_scale is not None:
        out = out * jnp.repeat(v_scale, sizes.group)[None, :, None]
    out = out.astype(q.dtype)
    return (out, m, l) if return_residuals else (out,)


def _by_kv_head(sizes, q):
    """`[num_seqs, num_kv_heads, group_rows, head_dim]`."""
    q = q.reshape(q.shape[0], sizes.num_kv_heads, sizes.group, sizes.head_dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, sizes.group_rows - sizes.group), (0, 0)))


def _launch(
    sizes,
    splits,
    factors,
    page_indices,
    q,
    k_pages,
    v_pages,
    *,
    soft_cap,
    windowed,
    interpret,
):
    shape = (splits.rows.shape[0], sizes.num_kv_heads, sizes.group_rows)
    block = (sizes.stages, sizes.block_size, sizes.head_dim)
    scratch = Scratch(
        ring=ring_of(block, sizes.page_size, q.dtype, num_users=1),
        q=operand((ROWS, sizes.head_dim), q.dtype),
        q_there=plgpu.Barrier(num_arrivals=1, num_barriers=1),
        acc=plgpu.SMEM((ROWS, _COLUMNS), jnp.float32),
        m=plgpu.SMEM((ROWS,), jnp.float32),
        l=plgpu.SMEM((ROWS,), jnp.float32),
        p=operand((ROWS, sizes.block_size), q.dtype) if interpret else None,
    )
    return launch(
        functools.partial(_kernel, sizes=sizes, soft_cap=soft_cap, windowed=windowed),
        *(splits.rows, splits.starts, splits.ends, factors, page_indices),
        *(q, k_pages, v_pages),
        results=[
            result_of((*shape, sizes.head_dim), jnp.float32),
            result_of(shape, jnp.float32),
            result_of(shape, jnp.float32),
        ],
        scratch=dict(scratch=scratch),
        grid=dict(head=sizes.num_kv_heads, part=shape[0]),
        num_warpgroups=2,
        name="paged_attention",
        interpret=interpret,
    )


def merged(splits: Splits, acc, m, l):
    """Accumulator, largest logit and denominator of each row, from those of its parts.

    One product of a matrix that says which part belongs to which row: a sum by scattering
    would differ from run to run.
    """
    num_seqs = splits.counts.shape[0]
    # What no program has written may be anything.
    exists = splits.starts < splits.ends
    acc = jnp.where(exists[:, None, None], acc, 0)
    rows = jnp.arange(num_seqs, dtype=jnp.int32)
    belongs = ((splits.rows[None] == rows[:, None]) & exists[None])[..., None]
    part_m = jnp.where(belongs, m[None], HIDDEN)  # [num_seqs, num_parts, num_heads]
    m = jnp.max(part_m, axis=1)
    weights = jnp.where(belongs, jnp.exp2(part_m - m[:, None]), 0)
    acc = jnp.einsum("sph,phd->shd", weights, acc, precision=jax.lax.Precision.HIGHEST)
    return acc, m, jnp.sum(jnp.where(belongs, weights * l[None], 0), axis=1)
