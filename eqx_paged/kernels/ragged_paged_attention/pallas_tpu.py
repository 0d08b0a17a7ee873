"""Ragged paged attention for the TPU.

Rows      of one token go to the decode kernel, and longer ones to the kernel here.
Items     Tokens are cut into tiles of `num_queries_per_block`. A tile and a row that has
          tokens in it are an item: a row of any length, anywhere, fills its tiles but for
          the first and last, and nothing is gathered.
Grid      (cores, items); an item works off the blocks of pages that its tokens may see.
Reads     those blocks only, each page once an item, all heads in one copy. While a block is
          computed the next one arrives in the other slot, across items. An item's pages
          are looked up in a copy of its row's table, which arrives two items ahead.
Scratch   K and V of two blocks, each slot an array of its own: with one array and a
          traced slot number the compiler lets no copy start beside a load.
State     running max `m`, running sum `l` (one partial sum a lane), accumulator `acc`;
          float32, in scratch.
Limits    in `tpu_plan.py`, with the block sizes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from .._blocked import Results, split_rows
from .._pages import LANES, values_of
from .._pallas import result_of
from .._tpu import (
    compiler_params,
    fetches_of,
    generation,
    iota,
    PAGES_PER_TURN,
    rolled,
    TPUConfig,
)
from .._tpu_attend import (
    clear,
    dtype_of_products,
    finished,
    logit_factors,
    within,
)
from ..paged_attention import pallas_tpu as decode_tpu
from .tpu_plan import ALIGNED_ROWS, default_config, Plan, plan_of
from .tpu_queries import items_of, merged, per_token, tiles_of_queries, tiles_per_core
from .tpu_units import attend, few_units, Item, Seen, units_of


# --- Body


def _kernel(
    items_ref,  # [cores + 1] in SMEM: each core's first item
    tiles_ref,  # [items]
    rows_ref,  # [items]
    q_starts_ref,  # [num_seqs]
    q_ends_ref,  # [num_seqs]
    kv_lens_ref,  # [num_seqs]
    q_ref,  # [num_kv_heads, streams, stream_rows, lanes]
    table_hbm,  # [num_seqs, 1, pages_per_seq]
    k_hbm,  # [num_pages, num_kv_heads, page_rows, lanes]
    v_hbm,
    out_ref,  # as q_ref
    *refs,
    plan: Plan,
    cap: float | None,
    window: int | None,
):
    # As out_ref: lane 0 is m, the others l.
    *ml_ref, tables, k0, k1, v0, v1, m_ref, l_ref, acc_ref, semaphores = refs[:-2]
    arrivals, slot_ref = refs[-2:]
    ml_ref = ml_ref[0] if ml_ref else None
    state, kv = (m_ref, l_ref, acc_ref), ((k0, v0), (k1, v1))
    core, step = pl.program_id(0), pl.program_id(1)
    share = core if plan.row_cores > 1 else 0
    heads = pl.ds(
        0 if plan.head_cores == 1 else core * plan.num_kv_heads, plan.num_kv_heads
    )
    fetches = fetches_of(k_hbm, v_hbm, heads, kv, semaphores)
    first_item, end_item = items_ref[share], items_ref[share + 1]

    def item_of(index):
        exists = index < end_item
        at = jnp.minimum(index, end_item - 1)
        row, first = rows_ref[at], tiles_ref[at] * plan.queries
        begin = jnp.maximum(q_starts_ref[row] - first, 0)
        end = jnp.minimum(q_ends_ref[row] - first, plan.queries)
        base = kv_lens_ref[row] - q_ends_ref[row] + first
        seen_to = base + end
        seen_from = 0
        if window is not None:
            seen_from = jnp.maximum(base + begin - window + 1, 0)
        first_page = seen_from // plan.page_size
        num_pages = pl.cdiv(seen_to, plan.page_size) - first_page
        num_pages = jnp.where(exists, num_pages, 0)
        few_from = begin * plan.group // ALIGNED_ROWS * ALIGNED_ROWS
        few_from = jnp.minimum(few_from, plan.stream_rows - plan.few_rows)
        return Item(
            index=at,
            base=base,
            begin=begin,
            end=end,
            seen_from=seen_from,
            seen_to=seen_to,
            first_page=first_page,
            num_pages=num_pages,
            num_blocks=pl.cdiv(num_pages, plan.pages),
            few_from=few_from,
            is_few=end * plan.group <= few_from + plan.few_rows,
        )

    def table_copy(index):
        place = jax.lax.rem(index, 3)
        source = table_hbm.at[rows_ref[index]]
        return pltpu.make_async_copy(source, tables.at[place], arrivals.at[place])

    def start_table(index):
        @pl.when(index < end_item)
        def _():
            table_copy(index).start()

    def wait_for_table(index):
        @pl.when(index < end_item)
        def _():
            table_copy(index).wait()

    def live_pages(item, block):
        return jnp.clip(item.num_pages - block * plan.pages, 0, plan.pages)

    def start_of(item, block, slot):
        """What starts the copy of the `i`-th page of a block."""
        place = jax.lax.rem(item.index, 3)
        first = item.first_page + block * plan.pages

        def start_page(i):
            page = tables[place, 0, first + i]
            for fetch in fetches[slot]:
                fetch.start(page, i)

        return start_page

    def start_live(item, block, slot):
        turn = min(plan.pages, PAGES_PER_TURN)
        rolled(live_pages(item, block), start_of(item, block, slot), turn)

    def work_off(item, following):
        def after(block):
            last = block + 1 >= item.num_blocks
            chosen = jax.tree.map(lambda a, b: jnp.where(last, a, b), following, item)
            return chosen, jnp.where(last, 0, block + 1)

        def is_steady(block):
            """Whether all queries see all of a block, and the next one is as full."""
            begin = item.first_page * plan.page_size + block * plan.block_size
            steady = begin + plan.block_size <= item.base + item.begin + 1
            if window is not None:
                steady &= item.base + item.end - window <= begin
            return steady & (live_pages(*after(block)) == plan.pages)

        def steady(slot, block):
            for fetch in fetches[slot]:
                fetch.wait_all()
            start_page = start_of(*after(block), 1 - slot)
            # In one straight line with the computation, so that each start finds a place
            # in an instruction that has none for its scalar unit.
            turns = plan.num_kv_heads // plan.heads
            starts = pl.cdiv(plan.pages, turns)
            spread = starts * turns == plan.pages
            if not spread:
                for i in range(plan.pages):
                    start_page(i)

            def work_off_heads(turn, _):
                if spread:
                    for i in range(starts):
                        start_page(turn * starts + i)
                pages = pl.ds(0, plan.pages)
                for units in units_of(plan, turn):
                    attend(plan, cap, q_ref, kv[slot], state, units, pages)
                return 0

            jax.lax.fori_loop(0, turns, work_off_heads, 0)

        def masked(units_of_turn, unit, slot, block):
            start_live(*after(block), 1 - slot)
            live = live_pages(item, block)
            for fetch in fetches[slot]:
                fetch.wait(live)
            begin = item.first_page * plan.page_size + block * plan.block_size
            first_live = jnp.maximum(item.seen_from - begin, 0) // plan.page_size // unit

            def work_off_keys(i, _):
                pages = pl.ds(i * unit, unit)
                seen = Seen(plan, item, window, begin + i * unit * plan.page_size)

                def work_off_heads(turn, _):
                    for units in units_of_turn(plan, turn):
                        attend(plan, cap, q_ref, kv[slot], state, units, pages, seen)
                    return 0

                turns = plan.num_kv_heads // plan.heads
                return jax.lax.fori_loop(0, turns, work_off_heads, 0)

            jax.lax.fori_loop(first_live, pl.cdiv(live, unit), work_off_keys, 0)

        kinds = [functools.partial(masked, units_of, plan.unit_pages), steady]
        if plan.few_rows:
            few = functools.partial(few_units, item.few_from)
            kinds.append(functools.partial(masked, few, plan.pages))
        bodies = [functools.partial(kind, slot) for kind in kinds for slot in (0, 1)]

        def work_off_block(block, count):
            kind = is_steady(block).astype(jnp.int32)
            if plan.few_rows:
                kind = jnp.where(item.is_few, 2, kind)
            jax.lax.switch(2 * kind + jax.lax.rem(count, 2), bodies, block)
            return count + 1

        clear(state)
        slot_ref[0] = jax.lax.fori_loop(0, item.num_blocks, work_off_block, slot_ref[0]) % 2
        _finish(plan, state, item, out_ref, ml_ref)

    index = first_item + step

    @pl.when(index < end_item)
    def _():
        item = item_of(index)

        @pl.when(step == 0)
        def _():
            slot_ref[0] = 0
            start_table(index)
            start_table(index + 1)
            wait_for_table(index)
            start_live(item, 0, 0)

        wait_for_table(index + 1)
        start_table(index + 2)
        work_off(item, item_of(index + 1))


def _finish(plan, state, item, out_ref, ml_ref):
    """Puts the item's tokens into the tile's results, and leaves the others."""
    m_ref, l_ref, acc_ref = state

    def of_head(head, _):
        for stream in range(plan.streams):
            at = (head, stream)
            out, ml = finished(m_ref[at], l_ref[at], acc_ref[at])
            bounds = (item.begin * plan.group, item.end * plan.group)
            live = within(iota(out.shape, 0), bounds)
            out_ref[at] = jnp.where(live, out.astype(out_ref.dtype), out_ref[at])
            if ml_ref is not None:
                ml_ref[at] = jnp.where(live[:, :LANES], ml, ml_ref[at])
        return 0

    jax.lax.fori_loop(0, plan.num_kv_heads, of_head, 0)


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
    config: TPUConfig | None,
    **options: Any,
) -> Results:
    how = dict(interpret=interpret, config=config)

    def decode(queries, kv_lens):
        return decode_tpu.paged_attention(
            queries,
            k_pages,
            v_pages,
            kv_lens,
            page_indices,
            return_residuals=return_residuals,
            **options,
            **how,
        )

    def prefill(q_starts, q_lens):
        return _prefill(
            q,
            values_of(k_pages),
            values_of(v_pages),
            kv_lens,
            page_indices,
            q_starts,
            q_lens,
            return_residuals=return_residuals,
            **options,
            **how,
        )

    return split_rows(q, kv_lens, cu_q_lens, num_seqs, decode=decode, prefill=prefill)


def _prefill(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    q_starts,
    q_lens,
    *,
    sm_scale,
    soft_cap,
    sliding_window,
    sinks,
    k_scale,
    v_scale,
    return_residuals,
    interpret,
    config,
):
    chip = generation()
    config = default_config(k_pages.shape[1], chip) if config is None else config
    pages_per_seq = page_indices.shape[1]
    plan = plan_of(q, k_pages, pages_per_seq, config, chip)
    factor, cap = logit_factors(sm_scale, soft_cap)
    dtype = dtype_of_products(q, k_pages)
    plain = plan.streams == 1 and v_scale is None and sinks is None
    # Queries before a row's first token see nothing.
    early = jnp.maximum(q_lens - kv_lens, 0)
    q_starts, q_ends = q_starts + early, q_starts + q_lens
    out, *ml = _launch(
        plan,
        *items_of(plan, q.shape[0], q_starts, q_ends),
        q_starts,
        q_ends,
        kv_lens,
        tiles_of_queries(plan, q, factor, k_scale).astype(dtype),
        jnp.pad(page_indices, ((0, 0), (0, -pages_per_seq % LANES)))[:, None],
        k_pages,
        v_pages,
        tiles_per_core=tiles_per_core(plan, q.shape[0]),
        cap=cap,
        window=sliding_window,
        dtype=q.dtype if plain else jnp.float32,
        with_ml=return_residuals or not plain,
        interpret=interpret,
    )
    out, *ml = (per_token(plan, q.shape[0], x) for x in (out, *ml))
    if ml:
        out, *ml = merged(plan, out, ml[0], sinks)
        if v_scale is not None:
            out = out * jnp.repeat(v_scale, plan.group)[None, :, None]
    else:
        out = out[0, ..., : plan.head_dim]
    token = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    after = token >= q_starts[None]
    exists = jnp.any(after & (token < q_ends[None]), axis=1)
    results = (out.astype(q.dtype), *ml)[: 3 if return_residuals else 1]
    return tuple(jnp.where(exists.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in results)


def _launch(
    plan,
    items,
    tiles,
    rows,
    q_starts,
    q_ends,
    kv_lens,
    q,
    table,
    k_pages,
    v_pages,
    *,
    tiles_per_core,
    cap,
    window,
    dtype,
    with_ml,
    interpret,
):
    def of_tile(lanes):
        def block(core, step, items, tiles, *_):
            share = core if plan.row_cores > 1 else 0
            item = jnp.clip(items[share] + step, 0, jnp.maximum(items[share + 1] - 1, 0))
            works = items[share + 1] > items[share]
            tile = jnp.where(works, tiles[item], share * tiles_per_core)
            return core if plan.head_cores > 1 else 0, tile, 0, 0, 0

        shape = (plan.num_kv_heads, None, plan.streams, plan.stream_rows, lanes)
        return pl.BlockSpec(shape, block)

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    results = [result_of(q.shape, dtype)]
    if with_ml:
        results.append(result_of((*q.shape[:4], LANES), jnp.float32))
    buffer = (plan.pages, plan.num_kv_heads, plan.page_rows, plan.lanes)
    state = (plan.num_kv_heads, plan.streams, plan.stream_rows)
    num_steps = jnp.maximum(1, jnp.max(items[1:] - items[:-1]))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, cap=cap, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            # As many steps as a core has items.
            grid=(plan.row_cores * plan.head_cores, num_steps),
            in_specs=[of_tile(plan.lanes), in_hbm, in_hbm, in_hbm],
            out_specs=[of_tile(result.shape[4]) for result in results],
            scratch_shapes=[
                pltpu.SMEM((3, *table.shape[1:]), jnp.int32),
                *[pltpu.VMEM(buffer, k_pages.dtype)] * 4,
                *[pltpu.VMEM((*state, LANES), jnp.float32)] * 2,
                pltpu.VMEM((*state, plan.lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((3,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=results,
        compiler_params=compiler_params(
            plan.vmem_bytes, dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(items, tiles, rows, q_starts, q_ends, kv_lens, q, table, k_pages, v_pages)
