"""Ragged decode attention over contiguous keys and values for the TPU.

Grid      (cores, steps); a step works off a number of rows, and a row the blocks of its
          window, in order. A core's rows are contiguous.
Reads     each block once, in copies of `block_size` positions; those outside a row's
          window are skipped. While a block is computed the next one arrives in the other
          slot, across rows and steps.
Compute   all heads at once: every query meets the keys of every kv head, and what is not
          of its own head is hidden. A matrix unit is busy with taking keys in, however
          many queries they meet, so this costs less than sorting the keys by head, which
          lie side by side in the sublanes of a token.
Scratch   K and V of two blocks, each slot an array of its own: with one array and a
          traced slot number the compiler lets no copy start beside a load.
State     running max `m`, running sum `l` (one partial sum a lane), accumulator `acc`;
          float32, carried as values.
Limits    head_dim a multiple of 128, one dtype for K and V, no float16. A value that is
          not finite in a window spoils all heads of the row.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from .._online_softmax import normalise
from .._pages import LANES, values_of
from .._pallas import LOG2_E, result_of
from .._tpu import (
    compiler_params,
    Generation,
    generation,
    INT8_SUBLANES,
    iota,
    lane_tiles,
    rows_on_all_cores,
    SMEM_BYTES,
    SUBLANES,
    TPUConfig,
    whole_tiles,
)
from .._tpu_attend import (
    add_softmax,
    dot,
    dtype_of_products,
    finished,
    HIDDEN,
    logit_factors,
    scale,
    scores_of,
    within,
)
from .cost import mha_cost_estimate


# --- Limits


def unsupported(k: Array, v: Array) -> str | None:
    """Why this kernel cannot run, or None."""
    num_seqs, max_len, num_kv_heads, head_dim = k.shape
    if head_dim % LANES != 0:
        return f"head_dim must be a multiple of {LANES}, not {head_dim}"
    if k.dtype != v.dtype:
        return f"K and V must have one dtype, not {k.dtype} and {v.dtype}"
    if k.dtype == jnp.float16:
        return "a TPU does not compute with float16"
    tile_rows = _tile_rows(k.dtype)
    if not _by_token(num_kv_heads, k.dtype) and max_len % tile_rows != 0:
        return (
            f"max_len must be a multiple of {tile_rows} with {num_kv_heads} kv heads of "
            f"{k.dtype}, not {max_len}"
        )
    if num_seqs * 3 * 4 > SMEM_BYTES // 2:
        return f"the windows of {num_seqs} rows are too many for its memory"
    return None


def _tile_rows(dtype: jnp.dtype) -> int:
    """Rows of a tile, of 8 bits and of up to 32: the most that a copy is aligned to."""
    return INT8_SUBLANES if dtype.itemsize == 1 else 2 * SUBLANES


def _by_token(num_kv_heads: int, dtype: jnp.dtype) -> bool:
    """Whether the heads of a token are a tile, or a whole part of one. XLA then stores
    them together, as the array says, and else the tokens of a head, which wastes less: so
    the kernel takes the one as it is and the other with the axes swapped, both without a
    copy."""
    whole_parts = (4,) if dtype.itemsize == 1 else (2, 4)
    return num_kv_heads in whole_parts or num_kv_heads % SUBLANES == 0


# --- Block sizes


class Plan(NamedTuple):
    """Sizes."""

    num_heads: int
    num_kv_heads: int
    max_len: int
    by_token: bool
    align: int  # what the first position of a block is a multiple of
    piece: int  # positions that are copied together
    pieces: int  # of a block
    chunk: int  # positions that are computed together where a window begins or ends
    rows_per_step: int
    steps: int
    cores: int
    vmem_bytes: int
    interpreted: bool

    @property
    def queries(self) -> int:
        return whole_tiles(self.num_heads)

    @property
    def block(self) -> int:
        """Positions of a block; more than there are where the buffer is short."""
        return self.piece * self.pieces


# What a block is meant to hold of K, and a chunk of keys.
_BLOCK_BYTES = 2**21
_CHUNK_KEYS = 2048


def plan_of(
    q: Array,
    k: Array,
    block_size: int,
    config: TPUConfig,
    chip: Generation,
    interpreted: bool,
) -> Plan:
    """The sizes for these shapes and this TPU."""
    num_seqs, num_heads, head_dim = q.shape
    _, max_len, num_kv_heads, _ = k.shape
    by_token = _by_token(num_kv_heads, k.dtype)
    cores = _cores_of(config, chip)
    queries = whole_tiles(num_heads)
    # Whole registers of scores.
    unit = LANES // math.gcd(LANES, num_kv_heads) if by_token else LANES
    piece = -(-min(block_size, max_len) // unit) * unit
    # Two slots of K and of V, of 8 bits also unpacked to 16; and scores and probabilities
    # with as much again at work.
    value_bytes = 2 * k.dtype.itemsize if k.dtype.itemsize > 1 else 2 + 2
    position_bytes = num_kv_heads * (2 * head_dim * value_bytes + 16 * queries)
    limit = chip.usable_vmem_bytes
    pieces = config.pages_per_compute_block
    if pieces is None:
        fitting = chip.vmem_bytes // 2 // position_bytes
        wanted = _BLOCK_BYTES // (num_kv_heads * head_dim * k.dtype.itemsize)
        pieces = min(wanted, fitting, max_len) // piece
        while pieces == 0 and piece > unit and piece > fitting:
            piece = -(-piece // 2 // unit) * unit
        pieces = max(1, pieces)
    elif pieces < 1:
        raise ValueError(f"pages_per_compute_block must be at least 1, but is {pieces}.")
    pieces = min(pieces, max(1, max_len // piece))
    needed = piece * pieces * position_bytes
    if needed > limit:
        raise ValueError(
            f"Blocks of {pieces} times {piece} positions need {needed} bytes of VMEM, but "
            f"there are {limit}: choose a smaller block_size."
        )
    chunk = piece * max(
        n
        for n in range(1, pieces + 1)
        if pieces % n == 0 and (n == 1 or n * piece * num_kv_heads <= _CHUNK_KEYS)
    )
    # Queries and results of a step, which the pipeline holds twice.
    row_bytes = 2 * queries * (head_dim * (q.dtype.itemsize + 4) + 4 * LANES)
    fitting = max(1, chip.vmem_bytes // 8 // row_bytes)
    rows = -(-num_seqs // cores)
    steps = -(-rows // (min(rows, fitting) if config.inline_seq_dim else 1))
    return Plan(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_len=max_len,
        by_token=by_token,
        align=1 if by_token else _tile_rows(k.dtype),
        piece=piece,
        pieces=pieces,
        chunk=chunk,
        rows_per_step=-(-rows // steps),
        steps=steps,
        cores=cores,
        vmem_bytes=limit,
        interpreted=interpreted,
    )


def _cores_of(config: TPUConfig, chip: Generation) -> int:
    """How many cores share the rows."""
    mode = config.megacore_mode
    if mode is None:
        return 1
    if mode != "batch":
        raise ValueError(f"megacore_mode is {mode!r}, but only rows can be shared here.")
    if chip.num_cores == 1:
        raise ValueError(f"megacore_mode is {mode!r}, but a TPU {chip.name} has one core.")
    return chip.num_cores


# --- Body


def _kernel(
    starts_ref,  # [num_seqs] in SMEM
    ends_ref,  # [num_seqs]
    next_ref,  # [num_seqs + cores]: the next row that sees something, or -1; then firsts
    q_ref,  # [rows_per_step, queries, head_dim]
    k_hbm,  # [num_seqs, max_len, num_kv_heads, head_dim], or with the axes swapped
    v_hbm,
    out_ref,  # [rows_per_step, queries, head_dim]
    ml_ref,  # [rows_per_step, queries, 128]: lane 0 is m, the others l
    k0,  # [block, num_kv_heads, head_dim], or with the axes swapped
    k1,
    v0,
    v1,
    semaphores,  # [2 slots, K and V]
    slot_ref,  # [1] in SMEM
    *,
    plan: Plan,
    cap: float | None,
):
    core, step = pl.program_id(0), pl.program_id(1)
    slots = ((k0, v0), (k1, v1))
    positions = min(plan.piece, plan.max_len)  # of a copy

    def place_of(row, block):
        """Where a block starts, and which of its positions are seen for the first time.
        The last block is moved back to end with the buffer."""
        first = starts_ref[row] // plan.align * plan.align + block * plan.block
        at = jnp.minimum(first, max(plan.max_len - plan.block, 0))
        lo = jnp.maximum(starts_ref[row], first) - at
        return at, lo, jnp.minimum(ends_ref[row] - at, plan.block)

    def live(place, size):
        """Of a block's parts of a size, the first that holds something seen, and the
        end."""
        _, lo, hi = place
        return lo // size, pl.cdiv(hi, size)

    def copies(slot, row, at, i):
        for x, (hbm, buffer) in enumerate(zip((k_hbm, v_hbm), slots[slot], strict=True)):
            source = pl.ds(pl.multiple_of(at + i * plan.piece, plan.align), positions)
            target = pl.ds(pl.multiple_of(i * plan.piece, plan.align), positions)
            yield pltpu.make_async_copy(
                _at_positions(plan, hbm.at[row], source),
                _at_positions(plan, buffer, target),
                semaphores.at[slot, x],
            )

    def each_piece(row, place, slot, act):
        def one(i, _):
            for copy in copies(slot, row, place[0], i):
                act(copy)
            return 0

        jax.lax.fori_loop(*live(place, plan.piece), one, 0)

    def start(row, block, slot):
        @pl.when(row >= 0)
        def _():
            each_piece(row, place_of(row, block), slot, lambda copy: copy.start())

    def work_off_row(i, count):
        row = (core * plan.steps + step) * plan.rows_per_step + i
        seen = ends_ref[row] - starts_ref[row] // plan.align * plan.align
        num_blocks = pl.cdiv(seen, plan.block)

        def work_off_block(block, carry):
            count, state = carry
            last = block + 1 >= num_blocks
            after = (jnp.where(last, next_ref[row], row), jnp.where(last, 0, block + 1))
            place = _, lo, hi = place_of(row, block)

            def arrive(slot):
                start(*after, 1 - slot)
                each_piece(row, place, slot, lambda copy: copy.wait())

            def whole(slot, state):
                arrive(slot)
                return _attend(plan, cap, slots[slot], q_ref[i], state)

            def masked(slot, state):
                arrive(slot)

                def attend(chunk, state):
                    bounds = (lo - chunk * plan.chunk, hi - chunk * plan.chunk)
                    return _attend(plan, cap, slots[slot], q_ref[i], state, chunk, bounds)

                return jax.lax.fori_loop(*live(place, plan.chunk), attend, state)

            bodies = [
                functools.partial(body, slot) for body in (masked, whole) for slot in (0, 1)
            ]
            is_whole = (lo <= 0) & (hi >= plan.block)
            kind = 2 * is_whole.astype(jnp.int32) + jax.lax.rem(count, 2)
            return count + 1, jax.lax.switch(kind, bodies, state)

        empty = (
            jnp.full((plan.queries, LANES), HIDDEN, jnp.float32),
            jnp.zeros((plan.queries, LANES), jnp.float32),
            jnp.zeros((plan.queries, q_ref.shape[2]), jnp.float32),
        )
        count, state = jax.lax.fori_loop(0, num_blocks, work_off_block, (count, empty))
        out, ml_ref[i] = finished(*state)
        out_ref[i] = out.astype(out_ref.dtype)
        return count

    @pl.when(step == 0)
    def _():
        slot_ref[0] = 0
        start(next_ref[ends_ref.shape[0] + core], 0, 0)

    slot_ref[0] = jax.lax.fori_loop(0, plan.rows_per_step, work_off_row, slot_ref[0]) % 2


def _at_positions(plan, ref, positions):
    return ref.at[positions] if plan.by_token else ref.at[:, positions]


def _attend(plan, cap, refs, q, state, chunk=None, bounds=None):
    """Adds a block to the state, or those positions of a chunk of it within bounds."""
    k_ref, v_ref = refs
    m, l, acc = state
    scores = scores_of(cap, q, _flat(plan, k_ref, chunk, q.dtype), 0)
    p, m, l, alpha = add_softmax(_hide(plan, scores, bounds), m, l, q.dtype)
    v = _flat(plan, v_ref, chunk, q.dtype)
    if bounds is not None:
        v = jnp.where(_seen(plan, v.shape, bounds), v, jnp.zeros_like(v))
    return m, l, scale(acc, alpha) + dot(p, v, 0)


def _flat(plan, ref, chunk, dtype):
    """`[positions * num_kv_heads, head_dim]`, in the order of the buffer."""
    if chunk is not None:
        first = pl.multiple_of(chunk * plan.chunk, plan.chunk)
        ref = _at_positions(plan, ref, pl.ds(first, plan.chunk))
    shape = (ref.shape[0] * ref.shape[1], ref.shape[2])
    if plan.by_token and not plan.interpreted:
        # With less than a tile of heads, a reshaped array would be moved row by row; but
        # the interpreter knows no reshaped reference.
        return ref.reshape(shape)[...].astype(dtype)
    return ref[...].reshape(shape).astype(dtype)


def _seen(plan, shape, bounds):
    """Which rows of `_flat` lie within the bounds."""
    if plan.by_token:
        return within(iota(shape, 0), [x * plan.num_kv_heads for x in bounds])
    tokens = (shape[0] // plan.num_kv_heads, shape[1])
    return jnp.concatenate([within(iota(tokens, 0), bounds)] * plan.num_kv_heads, axis=0)


def _hide(plan, scores, bounds):
    """What is not of a query's own kv head, or not within the bounds."""
    num_kv_heads, num_keys = plan.num_kv_heads, scores.shape[1]
    group = plan.num_heads // num_kv_heads
    tiles = []
    for i, tile in enumerate(lane_tiles(scores)):
        first, lane = i * LANES, iota(tile.shape, 1)
        own_head = iota(tile.shape, 0) // group
        keep = []
        if plan.by_token:
            # The same for all tiles, where a tile holds whole tokens: computed once.
            keep.append(jax.lax.rem(lane + first % num_kv_heads, num_kv_heads) == own_head)
        elif num_kv_heads > 1:
            keep.append(own_head == first * num_kv_heads // num_keys)
        if bounds is not None:
            if plan.by_token:
                limits = [x * num_kv_heads - first for x in bounds]
            else:
                limits = [x - first % (num_keys // num_kv_heads) for x in bounds]
            keep.append(within(lane, limits))
        if keep:
            tile = jnp.where(functools.reduce(jnp.logical_and, keep), tile, HIDDEN)
        tiles.append(tile)
    return jnp.concatenate(tiles, axis=1)


# --- Launch


def ragged_gqa(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    *,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
    block_size: int,
    interpret: Any,
    config: TPUConfig | None,
) -> tuple[Array, Array, Array]:
    chip = generation()
    config = rows_on_all_cores(chip) if config is None else config
    plan = plan_of(q, k, block_size, config, chip, bool(interpret))
    num_seqs, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    ends = jnp.minimum(lengths, plan.max_len)
    starts = jnp.maximum(starts, 0)
    if sliding_window is not None:
        starts = jnp.maximum(starts, lengths - sliding_window)
    ends = jnp.where(starts < ends, ends, 0)
    starts = jnp.where(starts < ends, starts, 0)
    factor, cap = logit_factors(sm_scale, soft_cap)
    factors = jnp.full(num_heads, factor, jnp.float32)
    if k_scale is not None:
        factors = factors * jnp.repeat(k_scale, group)
    k, v = values_of(k), values_of(v)
    dtype = dtype_of_products(q, k)
    queries = (q.astype(jnp.float32) * factors[None, :, None]).astype(dtype)
    padding = plan.cores * plan.steps * plan.rows_per_step - num_seqs
    plain = v_scale is None and sinks is None and q.dtype == dtype
    if not plan.by_token:
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out, ml = _launch(
        plan,
        jnp.pad(starts, (0, padding)),
        jnp.pad(ends, (0, padding)),
        jnp.pad(queries, ((0, padding), (0, plan.queries - num_heads), (0, 0))),
        k,
        v,
        cap=cap,
        dtype=q.dtype if plain else jnp.float32,
        cost=mha_cost_estimate(
            num_seqs=num_seqs,
            num_heads=num_heads,
            num_kv_heads=plan.num_kv_heads,
            head_dim=head_dim,
            kv_len=min(plan.max_len, sliding_window or plan.max_len),
            dtype=k.dtype,
        ),
        interpret=interpret,
    )
    out = out[:num_seqs, :num_heads]
    m, l = ml[:num_seqs, :num_heads, 0] / LOG2_E, ml[:num_seqs, :num_heads, 1]
    if sinks is not None:
        out = normalise(out * l[..., None], m, l, sinks[None])
    if v_scale is not None:
        out = out * jnp.repeat(v_scale, group)[None, :, None]
    return out.astype(q.dtype), m, l


def _next_rows(ends, cores):
    """For each row the next one of its core that sees something, or -1; then the first
    such row of each core."""
    rows = jnp.arange(ends.shape[0], dtype=jnp.int32)
    nowhere = jnp.int32(ends.shape[0])
    seeing = jnp.where(ends > 0, rows, nowhere).reshape(cores, -1)
    here = jax.lax.cummin(seeing, axis=1, reverse=True)
    after = jnp.pad(here[:, 1:], ((0, 0), (0, 1)), constant_values=nowhere)
    found = jnp.concatenate([after.reshape(-1), here[:, 0]])
    return jnp.where(found < nowhere, found, -1)


def _launch(plan, starts, ends, q, k, v, *, cap, dtype, cost, interpret):
    def of_step(lanes):
        return pl.BlockSpec(
            (plan.rows_per_step, plan.queries, lanes),
            lambda core, step, *_: (core * plan.steps + step, 0, 0),
        )

    num_kv_heads, head_dim = plan.num_kv_heads, q.shape[2]
    buffer = (plan.block, num_kv_heads) if plan.by_token else (num_kv_heads, plan.block)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.cores, plan.steps),
            in_specs=[of_step(head_dim), *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
            out_specs=[of_step(head_dim), of_step(LANES)],
            scratch_shapes=[
                *[pltpu.VMEM((*buffer, head_dim), k.dtype)] * 4,
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[
            result_of(q.shape, dtype),
            result_of((*q.shape[:2], LANES), jnp.float32),
        ],
        compiler_params=compiler_params(
            plan.vmem_bytes, dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="ragged_attention",
    )(starts, ends, _next_rows(ends, plan.cores), q, k, v)
