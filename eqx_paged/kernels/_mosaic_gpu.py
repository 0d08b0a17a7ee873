"""Attention of queries to blocks of keys on Hopper: what the Mosaic GPU kernels share.

A program is one warpgroup (128 threads) that fetches, and one or two that compute. Copies
are asynchronous, a page each (TMA); products are of 64 rows (`wgmma`), of matrices in
shared memory. Between them is a ring of blocks of keys and of values. The warpgroup that
fetches waits until a block was used and starts to overwrite it; those that compute wait
until it is there.

A row's last block, and under a window its first one, may have slots that were never
written. They are worked on first, when no register is in use yet: their values are
cleared before the loop begins.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

from ._gpu import chip_or_default, dotted
from ._pages import page_size_of, unpack, value_dtype, values_of
from ._pallas import LOG2_E


# As jax 0.11 has it, while types may be checked with an earlier one.
plgpu: Any = mosaic_gpu

# What `m` starts from, and what a hidden logit is: finite, so that no difference is NaN.
HIDDEN = -1e30
# Rows of a product of one warpgroup.
ROWS = 64
# A tile of shared memory as products read it: 8 rows of 128 bytes.
TILE_ROWS = 8
TILE_BYTES = 128
# Shared memory that a program may have, less what Mosaic takes for itself.
SHARED_BYTES = 227 * 1024 - 4096

# Matrices in registers that were or will be multiplied, and one value a row of them.
MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(1)


# --- Limits


def unsupported(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> str | None:
    """Why the Mosaic GPU kernels cannot run, or None."""
    if jax.__version_info__ < (0, 11):
        return f"the Mosaic GPU kernels need jax 0.11, but this is {jax.__version__}"
    chip = chip_or_default()
    if chip.capability != 90:
        return (
            "the Mosaic GPU kernels need compute capability 9.0 (Hopper), but a "
            f"{chip.name} has {dotted(chip)}"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries must be bfloat16 or float16, but are {q.dtype}"
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if value_dtype(pages.dtype) != q.dtype:
            return f"{name} must be {q.dtype} as the queries are, but are {pages.dtype}"
    if q.shape[2] not in (64, 128, 256):
        return f"head_dim must be 64, 128 or 256, not {q.shape[2]}"
    page_size = page_size_of(k_pages, q.shape[2])
    if page_size < TILE_ROWS or page_size & (page_size - 1) != 0:
        return f"page_size must be a power of two from {TILE_ROWS} on, not {page_size}"
    return None


# --- Block sizes


def operand(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory for matrices that are multiplied."""
    columns = TILE_BYTES // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((TILE_ROWS, columns))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(TILE_BYTES)))


def check_shared_bytes(block_size: int, stages: int, needed: int) -> None:
    if needed > SHARED_BYTES:
        raise ValueError(
            f"{stages} stages of blocks of {block_size} keys need {needed} bytes of shared "
            f"memory, but there are {SHARED_BYTES}: choose a smaller num_stages or "
            "block_size."
        )


class Ring(NamedTuple):
    """`stages` blocks of keys and as many of values; of each a barrier that says that it is
    there, and one that says that it was used."""

    k: Any  # [stages, block_size, head_dim]
    v: Any  # [stages, block_size, head_dim]
    k_there: Any  # [stages]
    v_there: Any  # [stages]
    k_used: Any  # [stages]
    v_used: Any  # [stages]

    @property
    def stages(self) -> int:
        return self.k.shape[0]

    @property
    def block_size(self) -> int:
        return self.k.shape[1]

    def slot(self, turn: Any) -> Any:
        return jax.lax.rem(turn, jnp.int32(self.stages))


def ring_of(
    shape: tuple[int, int, int], page_size: int, dtype: DTypeLike, num_users: int
) -> Ring:
    """What to allocate for a ring that so many warpgroups compute from."""
    stages, block_size, _ = shape
    parts = block_size // part_size(block_size, page_size)
    there = plgpu.Barrier(num_arrivals=parts, num_barriers=stages)
    used = plgpu.Barrier(num_arrivals=num_users, num_barriers=stages)
    block = operand(shape, dtype)
    return Ring(block, block, there, there, used, used)


def part_size(block_size: int, page_size: int) -> int:
    """Tokens of a copy: a page, or a block's part of it."""
    return min(block_size, page_size)


# --- Body: what is worked on


class Keys(NamedTuple):
    """A row's tokens `[start, end)`, in blocks from a `base` on where a part begins."""

    start: Any
    end: Any
    base: Any
    num_blocks: Any
    block_size: int
    num_edges: int  # blocks that may have hidden tokens: the last, and first, or not

    def first(self, turn: Any) -> Any:
        """The position of the first token of the block that is worked on in a turn: the
        last block, then of two edges the first block, and then those after it."""
        block = jnp.where(turn == 0, self.num_blocks - 1, turn - 1)
        return self.base + block * self.block_size


def keys_of(
    start: Any, end: Any, *, block_size: int, page_size: int, windowed: bool
) -> Keys:
    base = start
    if windowed:
        size = jnp.int32(part_size(block_size, page_size))
        base = jax.lax.div(start, size) * size
    num_blocks = jax.lax.div(end - base + (block_size - 1), jnp.int32(block_size))
    num_blocks = jnp.where(start < end, num_blocks, 0)
    return Keys(start, end, base, num_blocks, block_size, 2 if windowed else 1)


def fetch(
    ring: Ring,
    keys: Keys,
    k_ref: Any,  # [num_pages, page_size, head_dim], of one kv head
    v_ref: Any,  # [num_pages, page_size, head_dim]
    pages_ref: Any,  # [pages_per_seq], of one row
    *,
    ahead: bool,
) -> None:
    """Fetches the blocks in turn. Of the pages past the last token nothing is fetched, and
    their slots hold anything.

    A page's number takes long to arrive. It is asked for before there is room for the page,
    or `ahead`, a block earlier, which takes more registers.
    """
    page_size = jnp.int32(k_ref.shape[1])
    size = part_size(ring.block_size, k_ref.shape[1])
    offsets = range(0, ring.block_size, size)
    last = jnp.int32(pages_ref.shape[0] - 1)

    def pages_of(turn):
        first = keys.first(turn)
        places = [jax.lax.div(first + offset, page_size) for offset in offsets]
        return [pages_ref[jnp.minimum(place, last)] for place in places]

    def wait_for_room(used, turn):
        pl.when(turn >= ring.stages)(lambda: plgpu.barrier_wait(used.at[ring.slot(turn)]))

    def fetch_parts(pool, buffer, there, used, turn, pages):
        slot, first = ring.slot(turn), keys.first(turn)
        wait_for_room(used, turn)
        for offset, page in zip(offsets, pages, strict=True):
            position = first + offset
            within = 0
            if size < k_ref.shape[1]:
                within = pl.multiple_of(jax.lax.rem(position, page_size), size)

            @pl.when(position < keys.end)
            def _(offset=offset, page=page, within=within):
                plgpu.copy_gmem_to_smem(
                    pool.at[page, pl.ds(within, size)],
                    buffer.at[slot, pl.ds(offset, size)],
                    there.at[slot],
                )

            @pl.when(position >= keys.end)
            def _():
                plgpu.barrier_arrive(there.at[slot])

    def fetch_block(turn, pages):
        if ahead:
            next_pages = pages_of(turn + 1)
        else:
            pages, next_pages = pages_of(turn), []
        fetch_parts(k_ref, ring.k, ring.k_there, ring.k_used, turn, pages)
        fetch_parts(v_ref, ring.v, ring.v_there, ring.v_used, turn, pages)
        return next_pages

    @pl.when(keys.num_blocks > 0)
    def _():
        pages = pages_of(jnp.int32(0)) if ahead else []
        jax.lax.fori_loop(0, keys.num_blocks, fetch_block, pages)

        # Until all is used: no barrier is left behind in the middle of its phases.
        @pl.loop(keys.num_blocks, keys.num_blocks + ring.stages)
        def _(turn):
            wait_for_room(ring.k_used, turn)
            wait_for_room(ring.v_used, turn)


# --- Body: computation


class State(NamedTuple):
    """Of a warpgroup's queries, `m` in powers of two."""

    acc: jax.Array  # [ROWS, head_dim]
    m: jax.Array  # [ROWS]
    l: jax.Array  # [ROWS]


def empty_state(head_dim: int) -> State:
    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    return State(
        full((ROWS, head_dim), 0.0, MATRIX),
        full((ROWS,), HIDDEN, COLUMN),
        full((ROWS,), 0.0, COLUMN),
    )


def clear_hidden(
    ring: Ring, keys: Keys, share: Callable[[int], Any] = lambda tile: True
) -> None:
    """Waits for the values of the edges and puts zeros where none of the tokens are: what
    lies there may be NaN, and 0 * NaN is not 0.

    Of warpgroups that use one ring each clears its share of the tiles.
    """
    tiles = [
        (row, column)
        for row in range(0, ring.block_size, ROWS)
        for column in range(0, ring.v.shape[2], ROWS)
    ]

    def clear(turn, row, column):
        tile = ring.v.at[turn, pl.ds(row, ROWS), pl.ds(column, ROWS)]
        v = plgpu.load(tile, layout=MATRIX)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=MATRIX) + row
        position = keys.first(jnp.int32(turn)) + row
        keep = (position >= keys.start) & (position < keys.end)
        tile[...] = jnp.where(keep, v, jnp.zeros_like(v))

    for turn in range(keys.num_edges):

        @pl.when(turn < keys.num_blocks)
        def _(turn=turn):
            plgpu.barrier_wait(ring.v_there.at[turn])
            for i, (row, column) in enumerate(tiles):
                pl.when(share(i))(lambda row=row, column=column: clear(turn, row, column))

    plgpu.commit_smem()


def add_block(
    ring: Ring,
    q_smem: Any,  # [ROWS, head_dim]
    staged_p: Any,  # [ROWS, block_size], or None
    keys: Keys,
    turn: Any,
    state: State,
    *,
    logits_of: Callable[[jax.Array], jax.Array],
    seen: tuple[jax.Array | None, jax.Array] | None,
    is_edge: bool,
) -> State:
    """Adds a block of keys and values. `seen` are the first position that each row of
    queries sees, or None, and the first that it does not; without it they see all."""
    acc, m, l = state
    slot = ring.slot(turn)
    plgpu.barrier_wait(ring.k_there.at[slot])
    logits = logits_of(_product(q_smem, ring.k.at[slot].transpose((1, 0))))
    plgpu.barrier_arrive(ring.k_used.at[slot])
    if seen is not None:
        logits = jnp.where(_keep(*seen, keys.first(turn), logits.shape), logits, HIDDEN)
    new_m = jnp.maximum(m, logits.max(axis=1))
    p = jnp.exp2(logits - by_row(new_m, logits.shape))
    old = jnp.exp2(m - new_m)
    l = l * old + p.sum(axis=1)
    acc = acc * by_row(old, acc.shape)
    if not is_edge:  # whose values were waited for when they were cleared
        plgpu.barrier_wait(ring.v_there.at[slot])
    acc = _add_product(acc, p.astype(ring.v.dtype), ring.v.at[slot], staged_p)
    plgpu.barrier_arrive(ring.v_used.at[slot])
    return State(acc, new_m, l)


def _keep(first, end, block, shape):
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    if first is None:
        return column + block < by_row(end, shape)
    # Bounds of each row are moved, since two comparisons take more registers.
    kept = column < by_row(end - block, shape)
    return kept & (column >= by_row(first - block, shape))


def _product(a: Any, b: Any) -> jax.Array:
    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _add_product(acc, p, v_smem, staged_p):
    """`acc + p @ v`, with `p` in registers."""
    if staged_p is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_smem))(plgpu.ACC.init(acc))
    # The interpreter multiplies only what lies in shared memory, and begins from 0.
    staged_p[...] = p
    plgpu.commit_smem()
    return acc + _product(staged_p, v_smem)


def by_row(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcast_in_dim(column, shape, (0,))


def logits_by(factor: Any, soft_cap: float | None) -> Callable[[jax.Array], jax.Array]:
    """Makes products logits, in powers of two. Under a cap, the factor makes them what tanh
    is applied to."""
    if soft_cap is None:
        return lambda products: products * factor
    cap = soft_cap * LOG2_E
    # Not `tanh`, whose instruction is off by 5e-4.
    return lambda products: (
        cap - 2 * cap / (1 + jnp.exp2(products * (factor * (2 * LOG2_E))))
    )


# --- Launch


def factors_of(
    sm_scale: float, soft_cap: float | None, k_scale: jax.Array | None, num_kv_heads: int
) -> jax.Array:
    """What `logits_by` takes, `[num_kv_heads]`."""
    factor = sm_scale * (LOG2_E if soft_cap is None else 1 / soft_cap)
    factors = jnp.full((num_kv_heads,), factor, jnp.float32)
    return factors if k_scale is None else factors * k_scale


def plain(pages: jax.Array, head_dim: int) -> jax.Array:
    """The values of pages with a token a row, which costs nothing on a GPU."""
    return values_of(unpack(pages, head_dim))


def interpreter() -> Any:
    """What `interpret=True` stands for. Each warpgroup takes a thread of XLA's: where there
    are fewer, of cores and of CPU devices, it waits without end."""
    return plgpu.InterpretGPUParams()


def launch(
    kernel: Callable[..., None],
    *operands: Any,
    results: list[jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    grid: dict[str, int],
    num_warpgroups: int,
    name: str,
    interpret: Any,
) -> list[jax.Array]:
    """Runs a kernel: references of operands and results, and scratch by name."""
    return plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        # Faster divisions and powers of two, exact to the last bits of float32.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=name,
    )(*operands)
