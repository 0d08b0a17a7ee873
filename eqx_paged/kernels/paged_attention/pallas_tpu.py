"""Paged decode attention for the TPU.

Grid      (cores, steps); a step works off groups of rows, and a group its blocks of pages,
          in order. Rows are sorted by length, so that those of a group end together.
Reads     each live page once, all heads in one copy; pages past the end of a row, or
          before its window, are skipped. While a block is computed the next one arrives
          in the other slot, across groups and steps.
Scratch   K and V of two blocks, each slot an array of its own: with one array and a
          traced slot number the compiler lets no copy start beside a load.
          Running max `m`, running sum `l` (one partial sum a lane), accumulator `acc`:
          float32, not carried as values, which every branch would move.
Limits    in `tpu_plan.py`, with the block sizes.

What makes it fast is in docs/tpu.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from .._pages import LANES, values_of
from .._pallas import result_of
from .._tpu import (
    compiler_params,
    fetches_of,
    generation,
    iota,
    PAGES_PER_TURN,
    rolled,
    rows_on_all_cores,
    TPUConfig,
)
from .._tpu_attend import (
    add_softmax,
    capped,
    clear,
    dot,
    dtype_of_products,
    finished,
    HIDDEN,
    int8_parts,
    logit_factors,
    scale,
    scores_of,
    sum_of_parts,
    within,
)
from .tpu_plan import Plan, plan_of
from .tpu_queries import in_int8, merged, tiles_of_queries


# --- Body


def _kernel(
    starts_ref,  # [num_seqs] in SMEM
    ends_ref,  # [num_seqs]
    table_ref,  # [num_seqs * pages_per_seq]
    q_refs,  # of [groups_per_step * rows, tiles, queries, heads * lanes], or see in_int8
    k_hbm,  # [num_pages, num_kv_heads, page_rows, lanes]
    v_hbm,
    out_ref,  # [groups_per_step * rows, tiles, queries, lanes]
    *refs,
    plan: Plan,
    cap: float | None,
    windowed: bool,
):
    # As out_ref: lane 0 is m, the others l.
    *ml_ref, k0, k1, v0, v1, m_ref, l_ref, acc_ref, semaphores, slot_ref = refs
    ml_ref = ml_ref[0] if ml_ref else None
    state = (m_ref, l_ref, acc_ref)
    core, step = pl.program_id(0), pl.program_id(1)
    # A core's place among those that share the rows, and its heads.
    place = core if plan.row_cores > 1 else 0
    heads = pl.ds(
        0 if plan.head_cores == 1 else core * plan.num_kv_heads, plan.num_kv_heads
    )
    fetches = fetches_of(k_hbm, v_hbm, heads, ((k0, v0), (k1, v1)), semaphores)
    num_rows = ends_ref.shape[0]
    pages_per_seq = table_ref.shape[0] // num_rows
    page_size, block_size = plan.page_size, plan.block_size

    def first_page(row):
        return starts_ref[row] // page_size if windowed else 0

    def rows_of(group):
        """The group's rows; past the last group of all, the last rows."""
        first = jnp.minimum(group * plan.rows, num_rows - plan.rows)
        return [first + i for i in range(plan.rows)]

    def num_pages(group, block):
        """Pages of each row in a block."""
        return [
            jnp.clip(
                pl.cdiv(ends_ref[row], page_size) - first_page(row) - block * plan.pages,
                0,
                jnp.where(group * plan.rows < num_rows, plan.pages, 0),
            )
            for row in rows_of(group)
        ]

    def starts_of(group, block, slot):
        """For each row, what starts the copy of its `i`-th page of a block."""

        def of_row(first, row):
            base = row * pages_per_seq + first_page(row) + block * plan.pages

            def start_page(i):
                page = table_ref[base + i]
                for fetch in fetches[slot]:
                    fetch.start(page, first + i)

            return start_page

        return [of_row(i * plan.pages, row) for i, row in enumerate(rows_of(group))]

    def start_live(group, block, slot):
        counts = num_pages(group, block)
        for start_page, count in zip(starts_of(group, block, slot), counts, strict=True):
            rolled(count, start_page, min(plan.pages, PAGES_PER_TURN))

    def work_off_group(i, slot):
        group = (step * plan.row_cores + place) * plan.groups_per_step + i
        # This core's next one; with the last of a step, the first of its next step.
        jump = (plan.row_cores - 1) * plan.groups_per_step
        next_group = group + 1 + jnp.where(i + 1 == plan.groups_per_step, jump, 0)
        rows = rows_of(group)
        origins = [first_page(row) * page_size for row in rows]
        lengths = [
            ends_ref[row] - origin for row, origin in zip(rows, origins, strict=True)
        ]
        pages_of_rows = [pl.cdiv(length, page_size) for length in lengths]
        num_blocks = pl.cdiv(functools.reduce(jnp.maximum, lengths), block_size)
        q = functools.partial(_queries, q_refs, i * plan.rows)

        def after(block):
            last = block + 1 >= num_blocks
            return jnp.where(last, next_group, group), jnp.where(last, 0, block + 1)

        def bounds_of(block):
            """For each row, which of the block's tokens it sees."""
            passed = block * block_size
            return [
                (
                    starts_ref[row] - origin - passed if windowed else None,
                    length - passed,
                )
                for row, origin, length in zip(rows, origins, lengths, strict=True)
            ]

        # The blocks of which all rows see all, while the next one is as full.
        hidden = [lo > 0 for lo, _ in bounds_of(0) if lo is not None]
        steady_from = jnp.int32(functools.reduce(jnp.logical_or, hidden, False))
        num_whole = functools.reduce(jnp.minimum, lengths) // block_size
        num_full = functools.reduce(jnp.minimum, pages_of_rows) // plan.pages
        is_next_full = [count == plan.pages for count in num_pages(next_group, 0)]
        steady_to = jnp.where(
            functools.reduce(jnp.logical_and, [num_whole == num_blocks, *is_next_full]),
            num_blocks,
            jnp.minimum(num_whole, num_full - 1),
        )

        def steady(slot, block):
            for fetch in fetches[slot]:
                fetch.wait_all()
            # In one straight line with the computation, so that each start finds a place
            # in an instruction that has none for its scalar unit.
            for start_page in starts_of(*after(block), 1 - slot):
                for i in range(plan.pages):
                    start_page(i)
            _attend(plan, cap, (k0, k1)[slot], (v0, v1)[slot], q, state, None)

        def masked(slot, block):
            start_live(*after(block), 1 - slot)
            live = functools.reduce(jnp.add, num_pages(group, block))
            for fetch in fetches[slot]:
                fetch.wait(live)
            bounds = bounds_of(block)
            attend = functools.partial(
                _attend, plan, cap, (k0, k1)[slot], (v0, v1)[slot], q, state
            )
            if plan.masked_pages == plan.pages:
                attend(bounds)
            else:
                _attend_by_parts(plan, attend, bounds)

        bodies = [
            functools.partial(body, slot) for body in (masked, steady) for slot in (0, 1)
        ]

        def work_off_blocks(place):
            """As many pairs of steady blocks as there are, and then one block more."""
            block, slot = place
            pairs = jnp.where(block < steady_from, 0, (steady_to - block) // 2)
            pairs = jnp.where(slot == 0, jnp.maximum(pairs, 0), 0)

            def work_off_pair(i, _):
                for slot in (0, 1):
                    steady(slot, block + 2 * i + slot)
                return 0

            jax.lax.fori_loop(0, pairs, work_off_pair, 0)
            block = block + 2 * pairs

            @pl.when(block < num_blocks)
            def _():
                is_steady = (block >= steady_from) & (block < steady_to)
                jax.lax.switch(2 * is_steady.astype(jnp.int32) + slot, bodies, block)

            return block + 1, jnp.where(block < num_blocks, 1 - slot, slot)

        clear(state)
        _, slot = jax.lax.while_loop(
            lambda place: place[0] < num_blocks, work_off_blocks, (jnp.int32(0), slot)
        )
        _finish(plan, state, i * plan.rows, out_ref, ml_ref)
        return slot

    @pl.when(step == 0)
    def _():
        slot_ref[0] = 0
        start_live(place * plan.groups_per_step, 0, 0)

    slot_ref[0] = jax.lax.fori_loop(0, plan.groups_per_step, work_off_group, slot_ref[0])


def _queries(q_refs, first, row, tile):
    return [ref[first + row, tile] for ref in q_refs]


def _attend(plan, cap, k_ref, v_ref, q, state, bounds, first=0):
    """Adds a block, or some pages of it from the `first` on, to the state. First all
    scores, then each tile's softmax and values."""
    pages = (first, plan.pages if bounds is None else plan.masked_pages)
    m_ref, l_ref, acc_ref = state
    parts = [(row, tile) for row in range(plan.rows) for tile in range(plan.tiles)]
    dtype = q.args[0][0].dtype
    scores = []
    for row, tile in parts:
        k = _side_by_side(plan, k_ref, row, tile, pages, dtype)
        if bounds is not None and plan.streams > 1:
            # A token that was written may share its row of lanes with one that was not.
            k = jnp.where(_written(plan, bounds[row], k.shape), k, jnp.zeros_like(k))
        scores.append(_scores(plan, cap, q(row, tile), k, plan.streamed[tile % 2]))
    softmaxes = []
    for part, ((row, _), s) in enumerate(zip(parts, scores, strict=True)):
        if bounds is not None:
            s = jnp.where(_visible(plan, bounds[row], s.shape), s, HIDDEN)
        p, m_ref[part], l_ref[part], alpha = add_softmax(
            s, m_ref[part], l_ref[part], jnp.float32 if plan.int8 else dtype
        )
        softmaxes.append((int8_parts(p) if plan.int8 else p, alpha))
    for part, ((row, tile), (p, alpha)) in enumerate(zip(parts, softmaxes, strict=True)):
        v = _side_by_side(plan, v_ref, row, tile, pages, dtype)
        if bounds is not None:
            v = jnp.where(_written(plan, bounds[row], v.shape), v, jnp.zeros_like(v))
        product = dot(p, v, 0)
        if plan.int8:
            product = sum_of_parts(product, plan.queries)
        acc_ref[part] = scale(acc_ref[part], alpha) + _own_lanes(plan, product)


def _scores(plan, cap, q, k, eighths):
    if not plan.int8:
        return scores_of(cap, q[0], k, eighths)
    parts, largest = q
    product = sum_of_parts(dot(parts, k, 1), plan.queries)
    return capped(cap, scale(product, largest))


def _attend_by_parts(plan, attend, bounds):
    """`attend(bounds, first)` to as many parts of a block as the longest row has."""
    size = plan.masked_pages * plan.page_size
    longest = functools.reduce(jnp.maximum, [hi for _, hi in bounds])

    def attend_part(i, _):
        passed = i * size
        attend(
            [(None if lo is None else lo - passed, hi - passed) for lo, hi in bounds],
            i * plan.masked_pages,
        )
        return 0

    num_parts = pl.cdiv(jnp.minimum(longest, plan.block_size), size)
    jax.lax.fori_loop(0, num_parts, attend_part, 0)


def _side_by_side(plan, ref, row, tile, pages, dtype):
    """The keys or values of a row and a tile's heads, `[page_rows, heads * lanes]`."""
    first, count = pages
    parts = [
        ref[pl.ds(row * plan.pages + first, count), tile * plan.heads + head].reshape(
            count * plan.page_rows, plan.lanes
        )
        for head in range(plan.heads)
    ]
    convert = _by_bytes if plan.by_bytes else jnp.astype
    parts = [convert(part, dtype) for part in parts]
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _by_bytes(x, dtype):
    """Rows of int8 in another dtype, in the order of `_place`: the first bytes of all
    words, each of which holds four rows, then the second ones."""
    words = pltpu.bitcast(x, jnp.int32)
    rows = [(words << (24 - 8 * byte)) >> 24 for byte in range(4)]
    return jnp.concatenate([x.astype(jnp.float32).astype(dtype) for x in rows], axis=0)


def _place(plan, i, size):
    """Where the `i`-th of as many rows of lanes is stored."""
    return i % (size // 4) * 4 + i // (size // 4) if plan.by_bytes else i


def _visible(plan, bounds, shape):
    row = iota(shape, 0)
    stream = jax.lax.rem(row // plan.group, plan.streams) if plan.streams > 1 else 0
    token = _place(plan, iota(shape, 1), shape[1]) * plan.streams + stream
    return within(token, bounds)


def _written(plan, bounds, shape):
    token = _place(plan, iota(shape, 0), shape[0]) * plan.streams
    if plan.streams > 1:
        token += jax.lax.rem(iota(shape, 1), plan.lanes) // plan.head_dim
    return within(token, bounds)


def _own_lanes(plan, product):
    """Of `[queries, heads * lanes]` each head's queries take that head's lanes."""
    own = product[:, : plan.lanes]
    row = iota(own.shape, 0)
    for head in range(1, plan.heads):
        here = row >= head * plan.streams * plan.group
        at = head * plan.lanes
        own = jnp.where(here, product[:, at : at + plan.lanes], own)
    return own


def _finish(plan, state, first, out_ref, ml_ref):
    for part in range(plan.rows * plan.tiles):
        at = (first + part // plan.tiles, part % plan.tiles)
        out, ml = finished(*(ref[part] for ref in state))
        out_ref[at] = out.astype(out_ref.dtype)
        if ml_ref is not None:
            ml_ref[at] = ml


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
    config: TPUConfig | None,
) -> tuple[Array, ...]:
    chip = generation()
    config = rows_on_all_cores(chip) if config is None else config
    plan = plan_of(q, k_pages, page_indices.shape[1], config, chip)
    order, unsorted = _orders(kv_lens, sliding_window)
    padding = plan.num_calls * plan.rows_per_call - q.shape[0]
    q_sorted, ends, table = (
        jnp.pad(x[order], [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        for x in (q, kv_lens, page_indices)
    )
    starts = jnp.zeros_like(ends)
    if sliding_window is not None:
        starts = jnp.maximum(ends - sliding_window, 0)
    factor, cap = logit_factors(sm_scale, soft_cap)
    dtype = dtype_of_products(q, values_of(k_pages))
    tiles = tiles_of_queries(plan, q_sorted, factor, k_scale)
    queries = in_int8(tiles) if plan.int8 else (tiles.astype(dtype),)
    plain = plan.streams == 1 and v_scale is None and sinks is None
    launch = functools.partial(
        _launch,
        plan,
        values_of(k_pages),
        values_of(v_pages),
        cap=cap,
        windowed=sliding_window is not None,
        dtype=q.dtype if plain else jnp.float32,
        with_ml=return_residuals or not plain,
        interpret=interpret,
    )
    by_row = (starts, ends, table, queries)
    if plan.num_calls == 1:
        results = launch(*by_row)
    else:
        by_call = jax.tree.map(
            lambda x: x.reshape(plan.num_calls, plan.rows_per_call, *x.shape[1:]), by_row
        )
        results = jax.lax.map(lambda of_call: launch(*of_call), by_call)
        results = [x.reshape(-1, *x.shape[2:]) for x in results]
    out, *ml = (x[unsorted] for x in results)
    if not ml:
        rows = plan.heads * plan.group
        return (out[:, :, :rows, : plan.head_dim].reshape(q.shape),)
    out, m, l = merged(plan, out, ml[0], sinks)
    if v_scale is not None:
        out = out * jnp.repeat(v_scale, plan.group)[None, :, None]
    return (out.astype(q.dtype), m, l) if return_residuals else (out.astype(q.dtype),)


def _orders(kv_lens, sliding_window):
    """From the longest row to the shortest, and back."""
    seen = kv_lens if sliding_window is None else jnp.minimum(kv_lens, sliding_window)
    order = jnp.argsort(-seen)
    return order, jnp.argsort(order)


def _launch(
    plan,
    k_pages,
    v_pages,
    starts,
    ends,
    table,
    q,
    *,
    cap,
    windowed,
    dtype,
    with_ml,
    interpret,
):
    rows = plan.groups_per_step * plan.rows

    def of_step(shape):
        def block(core, step, *_):
            place = core if plan.row_cores > 1 else 0
            tile = core if plan.head_cores > 1 else 0
            return step * plan.row_cores + place, tile, 0, 0

        return pl.BlockSpec((rows, plan.tiles, *shape[2:]), block)

    pool = pl.BlockSpec(memory_space=pl.ANY)
    shape = (*q[0].shape[:2], plan.queries)
    results = [result_of((*shape, plan.lanes), dtype)]
    if with_ml:
        results.append(result_of((*shape, LANES), jnp.float32))
    state = (plan.rows * plan.tiles, plan.queries)
    buffer = (plan.rows * plan.pages, plan.num_kv_heads, plan.page_rows, plan.lanes)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, cap=cap, windowed=windowed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.row_cores * plan.head_cores, plan.steps),
            in_specs=[tuple(of_step(x.shape) for x in q), pool, pool],
            out_specs=[of_step(result.shape) for result in results],
            scratch_shapes=[
                *[pltpu.VMEM(buffer, k_pages.dtype)] * 4,
                *[pltpu.VMEM((*state, LANES), jnp.float32)] * 2,
                pltpu.VMEM((*state, plan.lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=results,
        compiler_params=compiler_params(
            plan.vmem_bytes, dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        name="paged_attention",
    )(starts, ends, table.reshape(-1), q, k_pages, v_pages)
