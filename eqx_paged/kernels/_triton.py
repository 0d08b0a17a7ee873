"""Attention of queries to blocks of keys: what the Pallas-Triton kernels share.

JAX has deprecated the Triton backend of Pallas since 0.11; only this file and the two
kernels that use it know of it.

Blocks are powers of two, so what is there is told by masks: a masked load neither touches
the memory nor follows a page number, and gives 0, also where the slot holds NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._gpu import cdiv, chip_or_default, dotted, GPU, gpu, named_kind, TritonConfig
from ._online_softmax import normalise
from ._pages import lanes_per_token, page_size_of, value_dtype
from ._pallas import LOG2_E


try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # of a JAX that has dropped it
    plgpu: Any = None


# What `m` starts from, in powers of two, and what a hidden logit is: finite, so that no
# difference is NaN, and so far below that it counts for nothing in a row without keys.
LOWEST = -1e30
HIDDEN = 2 * LOWEST
MIN_ROWS = 16  # of a matrix product, in each axis


# --- Limits


_QUERIES = (jnp.float32, jnp.bfloat16, jnp.float16)
_STORED = (*_QUERIES, jnp.uint16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def unsupported(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_indices: jax.Array
) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    del page_indices
    if plgpu is None:
        return f"Pallas has no Triton backend in JAX {jax.__version__}"
    chip = chip_or_default()
    if chip.capability < 80:
        return f"it needs compute capability 8.0, but a {chip.name} has {dotted(chip)}"
    if q.dtype not in _QUERIES:
        return f"queries must be of {_names(_QUERIES)}, not {q.dtype}"
    if q.shape[2] > 256:
        return f"head_dim must be at most 256, not {q.shape[2]}"
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if (why := _unsupported_pages(chip, pages)) is not None:
            return f"{name} {why}"
    return None


def not_here() -> str | None:
    """Why they cannot be lowered here, or None."""
    if gpu() is not None or (named_kind() is None and jax.__version_info__ < (0, 11)):
        return None
    return (
        "it must be known which GPU it is for, but there is no such GPU here or in an "
        f"abstract mesh in scope: {named_kind() or jax.devices()[0].device_kind!r}"
    )


def _unsupported_pages(chip: GPU, pages: jax.Array) -> str | None:
    dtype = pages.dtype
    if dtype not in _STORED:
        return f"must be of {_names(_STORED)}, not {dtype}"
    if dtype == jnp.float8_e4m3fn and chip.capability < 89:
        return f"are {dtype}, which a {chip.name} ({dotted(chip)}) does not convert"
    # Pallas counts in 64 bits from 2**32 bytes on and else in 32, with a sign.
    if 2**31 < pages.size and pages.size * dtype.itemsize <= 2**32:
        return (
            f"have {pages.size} numbers of 8 bits; more than {2**31}, and no more than "
            f"{2**32}, cannot be addressed"
        )
    return None


def _names(dtypes):
    return ", ".join(str(jnp.dtype(dtype)) for dtype in dtypes)


# --- Block sizes


# Of a block's keys as they are multiplied: a few such blocks, and as many of values, fit
# the memory that the programs of a core share.
_BLOCK_BYTES = 2**14
# float32 is multiplied without tensor cores, its numbers in registers. So few are spilled.
_EXACT_BYTES = 2**13
_EXACT_ACC = 2**12
_EXACT_ROWS = 32
# Keys and values that become float32 as they are multiplied are held in registers as well.
_CONVERTED_ACC = 2**11
# The tensor cores of a warp, all there are but on Hopper and its successors for servers,
# take what they multiply from registers, which are full the sooner; and queries share the
# memory of a core, of which these GPUs have as little as 99 KiB, with keys and values.
_WARP_ROWS = 64
_WARP_NUMBERS = 2**13


class Tile(NamedTuple):
    """Sizes. A tile of queries is `[rows, lanes]`: of each of its tokens, the heads that
    share a kv head."""

    num_kv_heads: int
    group: int
    heads: int  # of a group in a tile, of which some may not be there
    rows: int
    head_dim: int
    lanes: int  # head_dim as a power of two
    page_size: int
    block_size: int
    num_warps: int
    num_stages: int

    @property
    def tiles_per_group(self) -> int:
        return cdiv(self.group, self.heads)

    @property
    def tokens(self) -> int:
        return self.rows // self.heads

    @property
    def groups(self) -> int:
        """Of queries, over all heads: an axis of the grid."""
        return self.num_kv_heads * self.tiles_per_group


def tile_of(
    q: jax.Array,
    k_pages: jax.Array,
    config: TritonConfig,
    *,
    max_rows: int,
    one_token: bool,
) -> Tile:
    """The sizes for these shapes and this GPU, with at most `max_rows` rows where the
    config does not say how many."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    lanes = max(MIN_ROWS, pl.next_power_of_2(head_dim))
    dtype = jnp.dtype(dtype_of_products(q.dtype, k_pages.dtype))
    exact = dtype == jnp.float32
    by_warp = not 90 <= chip_or_default().capability < 120
    if exact:
        most = _EXACT_ACC if value_dtype(k_pages.dtype) == dtype else _CONVERTED_ACC
        max_rows = min(max_rows, _EXACT_ROWS, max(MIN_ROWS, most // lanes))
    elif by_warp:
        max_rows = min(max_rows, _WARP_ROWS, _WARP_NUMBERS // lanes)
    rows = config.num_queries_per_block or max_rows
    if one_token:
        rows = min(rows, max(MIN_ROWS, pl.next_power_of_2(group)))
    block_size = (_EXACT_BYTES if exact else _BLOCK_BYTES) // (lanes * dtype.itemsize)
    block_size = max(MIN_ROWS, min(64 if by_warp else 128, block_size))
    block_size = config.block_size or block_size
    large = exact or rows * max(lanes, block_size) >= (2**12 if by_warp else 2**14)
    return Tile(
        num_kv_heads=num_kv_heads,
        group=group,
        heads=rows if one_token else min(group, rows),
        rows=rows,
        head_dim=head_dim,
        lanes=lanes,
        page_size=page_size_of(k_pages, head_dim),
        block_size=block_size,
        num_warps=config.num_warps or (8 if large else 4),
        # Of 5 stages, a page number is two ahead of its page, and that two of its use.
        num_stages=config.num_stages or 5,
    )


# --- Body


class Pools(NamedTuple):
    """What of a row's keys and values lies where."""

    k: Any  # [num_pages, num_kv_heads, page_size, lanes]
    v: Any
    page_indices: Any  # [num_seqs, pages_per_seq]


class Options(NamedTuple):
    """What else there is by head, or None."""

    sinks: Any  # [num_heads]
    k_scale: Any  # [num_kv_heads]
    v_scale: Any  # [num_kv_heads]


class Seen(NamedTuple):
    """Which positions some of the queries see."""

    first: Any
    end: Any  # none of them sees this one
    keep: Callable[[jax.Array], jax.Array]  # of [1, positions]: which queries see each


class State(NamedTuple):
    """Of a tile of queries, `m` in powers of two."""

    m: jax.Array  # [rows]
    l: jax.Array  # [rows]
    acc: jax.Array  # [rows, lanes]


def empty_state(tile: Tile) -> State:
    return State(
        jnp.full((tile.rows,), LOWEST, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
        jnp.zeros((tile.rows, tile.lanes), jnp.float32),
    )


def queries_of(tile: Tile, group: Any) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """The kv head of a group of queries; and of each row of a tile its token, its head, and
    whether there is such a head."""
    kv_head, part = _divmod(group, tile.tiles_per_group)
    row = jnp.arange(tile.rows, dtype=jnp.int32)
    token, head = _divmod(row, tile.heads)
    head = head + part * tile.heads
    # The others have places of their own too: interpreted, a masked store puts back what it
    # found.
    there = (head < tile.group) & (token < tile.tokens)
    return kv_head, token, kv_head * tile.group + head, there


def load(ref: Any, *index: Any, mask: Any = None) -> Any:
    """What is at an index; 0 where it is masked."""
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[index], mask=mask, other=other)


def store(ref: Any, *index: Any, value: Any, mask: Any) -> None:
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def lanes_of(tile: Tile) -> tuple[jax.Array, jax.Array]:
    """`[1, lanes]`: the lanes, and which of them there are."""
    lane = jnp.arange(tile.lanes, dtype=jnp.int32)[None]
    return lane, lane < tile.head_dim


def attend(
    tile: Tile,
    q: jax.Array,  # [rows, lanes]
    pools: Pools,
    row: Any,
    kv_head: Any,
    state: State,
    blocks: tuple[Any, Any],
    *,
    logits_of: Callable[[jax.Array], jax.Array],
    seen: Seen | None,
) -> State:
    """Adds the keys and values of a row's blocks from one to another. If `seen` is None,
    all queries see all of them."""
    lane, lane_there = lanes_of(tile)

    def add_block(block, state):
        position = block * tile.block_size + _block(tile)
        there = None
        if seen is not None:
            there = (position >= seen.first) & (position < seen.end)
        page, offset = _places(tile, pools.page_indices, row, block, position, there)
        mask = None if tile.lanes == tile.head_dim else lane_there
        if there is not None:
            mask = there[:, None] & lane_there
        if mask is not None:
            mask = jnp.broadcast_to(mask, (tile.block_size, tile.lanes))
        at = (page, kv_head, offset[:, None], lane)
        k = _values(load(pools.k, *at, mask=mask))
        logits = logits_of(_dot(q, k, 1))
        if seen is not None:
            logits = jnp.where(seen.keep(position[None]), logits, HIDDEN)
        m = jnp.maximum(state.m, jnp.max(logits, axis=1))
        p = jnp.exp2(logits - m[:, None])
        old = jnp.exp2(state.m - m)
        v = _values(load(pools.v, *at, mask=mask))
        dtype = dtype_of_products(q.dtype, v.dtype)
        acc = state.acc * old[:, None] + _dot(p.astype(dtype), v, 0)
        return State(m, state.l * old + jnp.sum(p, axis=1), acc)

    return State(*jax.lax.fori_loop(*blocks, add_block, state))


def _places(tile, page_indices, row, block, position, there):
    """The pages of positions, one or `[block_size, 1]`, and where in a page each is."""
    if tile.page_size % tile.block_size == 0:
        page, first = _divmod(block * tile.block_size, tile.page_size)
        return load(page_indices, row, page), first + _block(tile)
    page, offset = _divmod(position, tile.page_size)
    return load(page_indices, row, page, mask=there)[:, None], offset


def _block(tile):
    return jnp.arange(tile.block_size, dtype=jnp.int32)


def _divmod(x, y):
    """Of numbers that are not negative, which takes fewer instructions."""
    y = jnp.int32(y)
    return jax.lax.div(x, y), jax.lax.rem(x, y)


def dtype_of_products(q_dtype: Any, stored_dtype: Any) -> Any:
    """In which queries, or probabilities, are multiplied with what is stored."""
    dtype = value_dtype(stored_dtype)
    return q_dtype if dtype.itemsize == 1 or dtype == q_dtype else jnp.float32


def _values(stored):
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored


def _dot(a, b, axis):
    """Contracts the last axis of `a` with one of `b`, in float32."""
    dtype = dtype_of_products(a.dtype, b.dtype)
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def logits_by(
    sm_scale: float, soft_cap: float | None, options: Options, kv_head: Any
) -> Callable[[jax.Array], jax.Array]:
    """Makes products of queries and stored keys logits, in powers of two."""
    factor = jnp.float32(sm_scale * (LOG2_E if soft_cap is None else 1 / soft_cap))
    if options.k_scale is not None:
        factor = factor * load(options.k_scale, kv_head)

    def logits_of(products):
        if soft_cap is None:
            return products * factor
        return soft_cap * LOG2_E * jnp.tanh(products * factor)

    return logits_of


def finished(
    state: State, options: Options, kv_head: Any, head: Any, there: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, largest logit and denominator."""
    m = state.m / LOG2_E
    sinks = None
    if options.sinks is not None:
        sinks = load(options.sinks, head, mask=there)
    out = normalise(state.acc, m, state.l, sinks)
    if options.v_scale is not None:
        out = out * load(options.v_scale, kv_head)
    return out, m, state.l


# --- Launch


def compiler_params(tile: Tile) -> Any:
    return plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)


def pools_of(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_indices: jax.Array
) -> Pools:
    """With a token a row, which costs nothing on a GPU."""
    head_dim = q.shape[2]
    width = lanes_per_token(k_pages.shape[3], head_dim)
    shape = (*k_pages.shape[:2], page_size_of(k_pages, head_dim), width)
    return Pools(k_pages.reshape(shape), v_pages.reshape(shape), page_indices)
