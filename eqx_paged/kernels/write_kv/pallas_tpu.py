"""Writing keys and values into pages for the TPU.

Work      a list of the tiles that new tokens fall into, made outside from the slots alone,
          so that all layers of a step share it. What is smaller than a tile cannot be
          copied, so a tile is read, its new tokens are put in, and it is written.
          A tile is in the list once, since two writes of it in flight would race.
Runs      the tokens of a tile that follow each other, in the pool and among the new ones,
          are put in at once: one token in a decode step, a whole tile in prefill.
Reads     tiles that are not overwritten whole, all heads in one copy; the new tokens once.
Scratch   a ring of batches of tiles, half of them being read and half being written; the
          new tokens with room on both sides, so that a run is read as if it were a tile.
Limits    lanes a multiple of 128, one dtype for K and V.

All numbers are moved as bits, in words of 32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from .._pages import LANES, pack, padded, tokens_per_row, value_dtype
from .._pallas import result_of
from .._tpu import (
    compiler_params,
    Generation,
    generation,
    iota,
    rolled,
    SMEM_BYTES,
    SUBLANES,
    TPUConfig,
    wait_for,
)


WORD_BYTES = 4
# Of tiles in VMEM: 2 MiB read and as much written keep the memory of any TPU busy for the
# microsecond or so that a copy takes. A quarter of what a TPU has at least, as is the next.
RING_BYTES = 2**22
ROOM_BYTES = 2**22  # on both sides of the new tokens
WORK_BYTES = 32  # of the work list, a token


# --- Limits


def unsupported(k_pages: Array, v_pages: Array, head_dim: int) -> str | None:
    """Why this kernel cannot run, or None."""
    _, num_kv_heads, page_rows, lanes = k_pages.shape
    if lanes % LANES != 0:
        return f"its pages must have a multiple of {LANES} lanes, not {lanes}"
    if k_pages.dtype != v_pages.dtype:
        return f"K and V must have one dtype, not {k_pages.dtype} and {v_pages.dtype}"
    if value_dtype(k_pages.dtype) not in (jnp.float32, jnp.bfloat16):
        return f"its pages must be float32 or bfloat16, not {k_pages.dtype}"
    if page_rows % SUBLANES != 0:
        return f"its pages must have a multiple of {SUBLANES} rows, not {page_rows}"
    tile_size = SUBLANES * tokens_per_row(lanes, head_dim)
    if 2 * tile_size * _token_bytes(k_pages) > ROOM_BYTES:
        return f"{tile_size} tokens of {num_kv_heads} heads are too large for its memory"
    return None


def _token_bytes(pages: Array) -> int:
    """Of a new key and value."""
    _, num_kv_heads, _, lanes = pages.shape
    return 2 * max(pages.dtype.itemsize, WORD_BYTES // 2) * num_kv_heads * lanes


# --- Block sizes


class Plan(NamedTuple):
    """Sizes. A row of lanes holds `streams` tokens, and a word `packing` rows."""

    num_kv_heads: int
    page_rows: int
    lanes: int
    streams: int
    packing: int
    tile_rows: int
    tiles: int  # of a batch
    batches: int  # of the ring
    ahead: int  # batches that are being read at a time
    tokens_per_call: int
    vmem_bytes: int

    @property
    def tile_size(self) -> int:
        """Tokens of a tile."""
        return self.tile_rows * self.streams

    @property
    def bits(self) -> int:
        """Of a number."""
        return 8 * WORD_BYTES // self.packing

    @property
    def arrays(self) -> int:
        """Words in which a number of K and the one of V lie."""
        return 1 if self.packing > 1 else 2

    @property
    def token_rows(self) -> int:
        """Rows of a new token: `[arrays, num_kv_heads, lanes / 128]`."""
        return self.arrays * self.num_kv_heads * (self.lanes // LANES)


def plan_of(
    k_pages: Array, head_dim: int, num_tokens: int, config: TPUConfig, chip: Generation
) -> Plan:
    """The sizes for these shapes and this TPU."""
    _, num_kv_heads, page_rows, lanes = k_pages.shape
    itemsize = k_pages.dtype.itemsize
    tile_bytes = 2 * num_kv_heads * SUBLANES * lanes * itemsize
    ring_tiles = RING_BYTES // tile_bytes
    tiles = config.pages_per_compute_block
    if tiles is None:
        # Enough that what a batch costs in itself is small.
        tiles = min(16, ring_tiles // 2)
    elif not 1 <= tiles <= ring_tiles // 2:
        raise ValueError(
            f"pages_per_compute_block, for write_kv how many tiles are a batch, must be "
            f"from 1 to {ring_tiles // 2} for these pages, but is {tiles}."
        )
    tiles = min(tiles, pl.next_power_of_2(num_tokens))
    batches = ring_tiles // tiles
    # A ring that holds all is read at once.
    needed = pl.cdiv(num_tokens, tiles)
    batches, ahead = (needed, needed) if needed <= batches else (batches, batches // 2)
    fitting = min(
        chip.vmem_bytes // 4 // _token_bytes(k_pages), SMEM_BYTES // 4 // WORK_BYTES
    )
    return Plan(
        num_kv_heads=num_kv_heads,
        page_rows=page_rows,
        lanes=lanes,
        streams=tokens_per_row(lanes, head_dim),
        packing=WORD_BYTES // itemsize,
        tile_rows=SUBLANES,
        tiles=tiles,
        batches=batches,
        ahead=ahead,
        tokens_per_call=min(num_tokens, fitting),
        vmem_bytes=chip.usable_vmem_bytes,
    )


# --- Body


def _kernel(
    num_tiles_ref,  # [1] in SMEM
    pages_ref,  # [num_tokens]: the page of each tile
    rows_ref,  # [num_tokens]: its first row
    num_kept_ref,  # [num_tokens + 1]: how many of the tiles before are not wholly new
    num_runs_ref,  # [num_tokens + 1]: how many runs the tiles before have
    tiles_ref,  # [num_tokens]: the tile of each run
    sources_ref,  # [num_tokens]: the row of new_ref that would hold the tile's first token
    bounds_ref,  # [num_tokens]: the run's first token in the tile, and 2**16 times its end
    new_hbm,  # [num_tokens * token_rows, 128], padded
    k_before,  # the memory of k_hbm and v_hbm, which are read and written in its stead
    v_before,
    k_hbm,  # [num_pages, num_kv_heads, page_rows, lanes]
    v_hbm,
    new_ref,  # [(tile_size + num_tokens + tile_size) * token_rows, 128], padded
    ring_ref,  # [batches, tiles, K and V, num_kv_heads, tile_rows, lanes]
    arrival,
    reads,  # [batches]
    writes,
    *,
    plan: Plan,
):
    num_tiles = num_tiles_ref[0]
    num_batches = pl.cdiv(num_tiles, plan.tiles)
    arriving = pltpu.make_async_copy(
        new_hbm,
        new_ref.at[pl.ds(plan.tile_size * plan.token_rows, new_hbm.shape[0])],
        arrival,
    )

    def tiles_of(batch):
        first = batch * plan.tiles
        return first, jnp.minimum(first + plan.tiles, num_tiles)

    def in_ring(batch, i):
        """The places of a batch's tile in the pools and in the ring."""
        tile = batch * plan.tiles + i
        row = pl.multiple_of(rows_ref[tile], plan.tile_rows)
        place = (pages_ref[tile], slice(None), pl.ds(row, plan.tile_rows))
        slot = jax.lax.rem(batch, plan.batches)
        return [
            (pool.at[place], ring_ref.at[slot, i, which])
            for which, pool in enumerate((k_hbm, v_hbm))
        ]

    def start_reads(batch):
        first, end = tiles_of(batch)
        semaphore = reads.at[jax.lax.rem(batch, plan.batches)]

        def start(i):
            @pl.when(num_kept_ref[first + i + 1] > num_kept_ref[first + i])
            def _():
                for stored, tile in in_ring(batch, i):
                    pltpu.make_async_copy(stored, tile, semaphore).start()

        rolled(end - first, start, unroll=4)

    def start_writes(batch):
        first, end = tiles_of(batch)
        semaphore = writes.at[jax.lax.rem(batch, plan.batches)]

        def start(i):
            for stored, tile in in_ring(batch, i):
                pltpu.make_async_copy(tile, stored, semaphore).start()

        rolled(end - first, start, unroll=4)

    def wait(batch, semaphores, count):
        slot = jax.lax.rem(batch, plan.batches)
        wait_for(ring_ref.at[slot], semaphores.at[slot], count)

    def wait_reads(batch):
        first, end = tiles_of(batch)
        wait(batch, reads, num_kept_ref[end] - num_kept_ref[first])

    def wait_writes(batch):
        first, end = tiles_of(batch)
        wait(batch, writes, end - first)

    def put_runs(batch):
        first, end = tiles_of(batch)
        first_run = num_runs_ref[first]
        slot = jax.lax.rem(batch, plan.batches)

        def put(i):
            run = first_run + i
            tiles = [ring_ref.at[slot, tiles_ref[run] - first, which] for which in (0, 1)]
            bounds = (bounds_ref[run] & 0xFFFF, bounds_ref[run] >> 16)
            _put_run(plan, new_ref, tiles, sources_ref[run], *bounds)

        rolled(num_runs_ref[end] - first_run, put, unroll=2)

    ahead = jnp.minimum(plan.ahead, num_batches)

    # A batch is read in its turn, filled `ahead` turns later, and is out, and its place in
    # the ring free, after as many again.
    def turn(t, _):
        @pl.when(t >= 2 * ahead)
        def _():
            wait_writes(t - 2 * ahead)

        @pl.when(t < num_batches)
        def _():
            start_reads(t)

        @pl.when(t == ahead)
        def _():
            arriving.wait()

        @pl.when((t >= ahead) & (t < num_batches + ahead))
        def _():
            wait_reads(t - ahead)
            put_runs(t - ahead)
            start_writes(t - ahead)

        return 0

    @pl.when(num_tiles > 0)
    def _():
        arriving.start()

    jax.lax.fori_loop(0, num_batches + 2 * ahead, turn, 0)


def _put_run(plan, new_ref, tiles, source, lower, upper):
    """Puts new tokens into tiles of K and V, from the tile's token `lower` to before
    `upper`; `source` is the row of `new_ref` that would hold the tile's first token."""
    shape = (plan.tile_rows // plan.packing, LANES)  # of the words of a head's tile
    stream = jax.lax.div(iota(shape, 1), LANES // plan.streams)

    def load(first, row):
        """A row of each of the tokens that begin a word, or of those `first` after them."""
        at = source + first * plan.token_rows + row
        stride = plan.packing * plan.streams * plan.token_rows
        return new_ref[pl.ds(at, shape[0], stride=stride)]

    def part_of_tile(part, row):
        """The words whose part belongs into this part of the tile's words."""
        of_stream = [load(part * plan.streams + s, row) for s in range(plan.streams)]
        return functools.reduce(
            lambda words, s: jnp.where(stream == s, of_stream[s], words),
            range(1, plan.streams),
            of_stream[0],
        )

    keep = functools.reduce(
        jnp.bitwise_or,
        [
            jnp.where((token >= lower) & (token < upper), mask, 0)
            for token, mask in (
                (
                    (iota(shape, 0) * plan.packing + part) * plan.streams + stream,
                    _mask(part * plan.bits, plan.bits),
                )
                for part in range(plan.packing)
            )
        ],
    )
    rows = plan.token_rows // plan.arrays
    for row in range(rows):
        head, group = divmod(row, plan.lanes // LANES)
        at = (head, slice(None), pl.ds(group * LANES, LANES))
        words = [
            [part_of_tile(part, row + array * rows) for part in range(plan.packing)]
            for array in range(plan.arrays)
        ]
        for i, tile in enumerate(tiles):
            # Where K and V share a word, V has its upper bits.
            array, first = (0, i * plan.bits) if plan.arrays == 1 else (i, 0)
            new = functools.reduce(
                jnp.bitwise_or,
                [
                    _moved(word, first, part * plan.bits, plan.bits)
                    for part, word in enumerate(words[array])
                ],
            )
            old = pltpu.bitcast(tile[at], jnp.int32)
            tile[at] = pltpu.bitcast((old & ~keep) | (new & keep), tile.dtype)


def _mask(first, bits):
    """Ones in `bits` bits from the `first` on."""
    mask = ((1 << bits) - 1) << first
    return mask - 2**32 if mask >= 2**31 else mask  # as an int32


def _moved(word, source, target, bits):
    """The bits from `source` on at `target`, and zeros elsewhere."""
    if bits == 8 * WORD_BYTES:
        return word
    if target >= source:
        word = word << (target - source)
    else:
        word = jax.lax.shift_right_logical(word, source - target)
    return word & _mask(target, bits)


# --- Launch


def write_kv(
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int32[Array, " num_tokens"],
    *,
    interpret: Any,
    config: TPUConfig | None,
) -> tuple[
    Real[Array, "num_pages num_kv_heads rows lanes"],
    Real[Array, "num_pages num_kv_heads rows lanes"],
]:
    num_tokens, _, head_dim = k.shape
    if num_tokens == 0:
        return k_pages, v_pages
    config = TPUConfig() if config is None else config
    plan = plan_of(k_pages, head_dim, num_tokens, config, generation())
    new = _words(plan, *(pack(x, k_pages.dtype) for x in (k, v)))
    for i in range(0, num_tokens, plan.tokens_per_call):
        part = slice(i, i + plan.tokens_per_call)
        work = _work_list(plan, k_pages.shape[0], slots[part])
        k_pages, v_pages = _launch(plan, work, new[part], k_pages, v_pages, interpret)
    return k_pages, v_pages


def _words(plan, k, v):
    """`[num_tokens, token_rows, 128]`: each number of K in a word with that of V, or in a
    word of its own; each token as often as there are tokens in a row of lanes."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[k.dtype.itemsize]
    k, v = (
        jax.lax.bitcast_convert_type(
            jnp.tile(padded(x, plan.lanes), plan.streams), bits
        ).astype(jnp.uint32)
        for x in (k, v)
    )
    new = k | v << plan.bits if plan.arrays == 1 else jnp.stack([k, v], axis=1)
    new = jax.lax.bitcast_convert_type(new, jnp.int32)
    return new.reshape(-1, plan.token_rows, LANES)


def _work_list(plan, num_pages, slots):
    """The tiles and their runs, as the references of the kernel say it."""
    num_tokens = slots.shape[0]
    index = iota(slots.shape, 0)
    slots, sources = jax.lax.sort_key_val(slots, index)
    tiles = slots // plan.tile_size
    is_valid = tiles < num_pages * (plan.page_rows // plan.tile_rows)

    def differs(x, step):
        """Whether an entry is not the one before it plus a step; true of the first."""
        return jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1] + step])

    starts_tile = is_valid & differs(tiles, 0)
    starts_run = starts_tile | (is_valid & (differs(slots, 1) | differs(sources, 1)))
    # How many began up to a token, itself included.
    tiles_begun, runs_begun = (
        jnp.cumsum(x, dtype=jnp.int32) for x in (starts_tile, starts_run)
    )
    num_valid = jnp.sum(is_valid, dtype=jnp.int32)
    tile_at, run_at = (
        jnp.nonzero(x, size=num_tokens + 1, fill_value=num_valid)[0].astype(jnp.int32)
        for x in (starts_tile, starts_run)
    )
    lengths = jnp.diff(run_at)
    run_at = run_at[:-1]
    lower = jax.lax.rem(slots[run_at], plan.tile_size)
    upper = lower + lengths
    num_runs = jnp.where(
        tile_at < num_valid, runs_begun.at[tile_at].get(mode="clip") - 1, runs_begun[-1]
    )
    first_slots = slots[tile_at[:-1]]
    is_kept = (index < tiles_begun[-1]) & (lengths[num_runs[:-1]] < plan.tile_size)
    rows = first_slots // plan.streams
    return (
        tiles_begun[-1:],
        rows // plan.page_rows,
        rows % plan.page_rows // plan.tile_rows * plan.tile_rows,
        jnp.append(0, jnp.cumsum(is_kept, dtype=jnp.int32)),
        num_runs,
        tiles_begun[run_at] - 1,
        (sources[run_at] - lower + plan.tile_size) * plan.token_rows,
        lower | upper << 16,
    )


def _launch(plan, work, new, k_pages, v_pages, interpret):
    new = new.reshape(-1, LANES)
    new = jnp.pad(new, ((0, -new.shape[0] % SUBLANES), (0, 0)))
    pool = pl.BlockSpec(memory_space=pl.ANY)
    ring = (plan.batches, plan.tiles, 2, plan.num_kv_heads, plan.tile_rows, plan.lanes)
    rows = new.shape[0] + 2 * plan.tile_size * plan.token_rows
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            in_specs=[pool] * 3,
            out_specs=[pool] * 2,
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.int32),
                pltpu.VMEM(ring, k_pages.dtype),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((plan.batches,)),
                pltpu.SemaphoreType.DMA((plan.batches,)),
            ],
        ),
        out_shape=[result_of(x.shape, x.dtype) for x in (k_pages, v_pages)],
        input_output_aliases={len(work) + 1: 0, len(work) + 2: 1},
        compiler_params=compiler_params(plan.vmem_bytes),
        interpret=interpret,
        name="write_kv",
    )(*work, new, k_pages, v_pages)
