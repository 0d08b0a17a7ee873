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
Limits    as the decode kernel has them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from .._blocked import Results, split_rows
from .._online_softmax import merge_residuals, normalise
from .._pages import LANES, tokens_per_row, values_of
from .._tpu import (
    compiler_params,
    Generation,
    generation,
    iota,
    LOG2_E,
    PageFetch,
    PAGES_PER_TURN,
    result_of,
    rolled,
    TPUConfig,
)
from .._tpu_attend import (
    add_softmax,
    clear,
    dot,
    dtype_of_products,
    finished,
    HIDDEN,
    logit_factors,
    scale,
    within,
)
from ..paged_attention import pallas_tpu as decode_tpu


# Rows of a head's queries that meet a block together.
_TILE_ROWS = 512
# Rows that are computed at once of an item that has no more.
_FEW_ROWS = 128
# Of a tile of bfloat16, which has the most.
_ALIGNED_ROWS = 16
# Rows of keys of a block, and those that are computed at once where some are hidden.
_BLOCK_ROWS = 1024
_UNIT_KEYS = 256


# --- Limits


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_indices: Array
) -> str | None:
    """Why this kernel cannot run, or None."""
    why = decode_tpu.unsupported(q, k_pages, v_pages, page_indices)
    if why is not None:
        return why
    chip = generation()
    config = default_config(k_pages.shape[1], chip)
    try:
        plan_of(q, k_pages, page_indices.shape[1], config, chip)
    except ValueError as error:
        return f"on a TPU {chip.name}: {error}"
    return None


# --- Block sizes


class Plan(NamedTuple):
    """Sizes. A row of lanes holds `streams` tokens, each a softmax of its own."""

    num_kv_heads: int  # of a core
    group: int
    head_dim: int
    lanes: int
    page_rows: int
    queries: int  # tokens of a tile
    pages: int  # of a block
    few_rows: int  # of queries in a stream, where an item has not more; 0 if it never has
    heads: int  # that are computed at once
    unit_rows: int  # of queries that are computed at once
    unit_pages: int  # and of keys, where some are hidden
    row_cores: int  # that share the items
    head_cores: int  # that share the heads
    vmem_bytes: int

    @property
    def streams(self) -> int:
        return tokens_per_row(self.lanes, self.head_dim)

    @property
    def stream_rows(self) -> int:
        """Rows of a tile's queries in one stream: `[queries, group]`."""
        return self.queries * self.group

    @property
    def page_size(self) -> int:
        return self.page_rows * self.streams

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.pages * self.page_size


def default_config(num_kv_heads: int, chip: Generation) -> TPUConfig:
    """All cores of a chip share the heads, or else the tiles."""
    if chip.num_cores == 1:
        return TPUConfig()
    shared = num_kv_heads % chip.num_cores == 0
    return TPUConfig(megacore_mode="kv_head" if shared else "batch")


def plan_of(
    q: Array, k_pages: Array, pages_per_seq: int, config: TPUConfig, chip: Generation
) -> Plan:
    """The sizes for these shapes and this TPU."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_rows, lanes = k_pages.shape
    row_cores, head_cores = decode_tpu.cores_of(config, chip, num_kv_heads)
    group, num_kv_heads = num_heads // num_kv_heads, num_kv_heads // head_cores
    streams = tokens_per_row(lanes, head_dim)
    heads = 2 if num_kv_heads % 2 == 0 else 1
    # A tile's queries and results, which the pipeline holds twice, and its state.
    query_bytes = lanes * (2 * q.dtype.itemsize + 2 * 4 + 4) + 4 * LANES * (2 * 1 + 2)
    query_bytes *= num_kv_heads * group * streams
    queries = config.num_queries_per_block
    if queries is None:
        # Products of float32 are many of bfloat16 each.
        queries = _power_of_2(2 * _TILE_ROWS // (q.dtype.itemsize * group * streams))
        queries = min(queries, pl.next_power_of_2(num_tokens))
        while queries * query_bytes > chip.vmem_bytes // 3:
            queries //= 2
        queries = max(_ALIGNED_ROWS, queries)
    elif queries < 1 or queries % _ALIGNED_ROWS != 0:
        raise ValueError(
            "num_queries_per_block must be a positive multiple of "
            f"{_ALIGNED_ROWS}, but is {queries}."
        )
    unit_rows = queries * group
    while unit_rows > _TILE_ROWS and unit_rows % (2 * _ALIGNED_ROWS) == 0:
        unit_rows //= 2
    limit = chip.usable_vmem_bytes
    # K and V of two blocks, and scores and probabilities of what is computed at once.
    key_bytes = 4 * num_kv_heads * lanes * k_pages.dtype.itemsize
    key_bytes += 2 * 4 * heads * unit_rows
    pages = config.pages_per_compute_block
    if pages is None:
        length = pl.next_power_of_2(pages_per_seq * page_rows)
        length = min(length, 2 * _BLOCK_ROWS // q.dtype.itemsize)
        room = min(chip.vmem_bytes // 2, limit - queries * query_bytes)
        while length > LANES and length * key_bytes > room:
            length //= 2
        pages = max(1, max(LANES, length) // page_rows)
    elif pages < 1 or pages * page_rows % LANES != 0:
        raise ValueError(
            f"pages_per_compute_block={pages} makes blocks of {pages * page_rows} rows of "
            f"{lanes} lanes, which must be a multiple of {LANES}."
        )
    needed = queries * query_bytes + pages * page_rows * key_bytes
    if needed > limit:
        raise ValueError(
            f"Tiles of {queries} queries with blocks of {pages} pages of {page_rows} rows "
            f"need {needed} bytes of VMEM, but there are {limit}: choose a smaller "
            "num_queries_per_block or pages_per_compute_block."
        )
    return Plan(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        lanes=lanes,
        page_rows=page_rows,
        queries=queries,
        pages=pages,
        few_rows=_FEW_ROWS if queries * group > _FEW_ROWS else 0,
        heads=heads,
        unit_rows=unit_rows,
        unit_pages=math.gcd(pages, max(1, _UNIT_KEYS // page_rows)),
        row_cores=row_cores,
        head_cores=head_cores,
        vmem_bytes=limit,
    )


def _power_of_2(n: int) -> int:
    """The largest one that is not above `n`."""
    return 1 << max(n.bit_length() - 1, 0)


# --- Body


class _Item(NamedTuple):
    """A row's tokens in a tile, as scalars."""

    index: Any
    base: Any  # position of the tile's first token, if it were of the row
    begin: Any  # the row's first token in the tile
    end: Any
    seen_from: Any  # positions that one of them sees
    seen_to: Any
    first_page: Any
    num_pages: Any
    num_blocks: Any
    few_from: Any  # the first of the few rows of queries that hold all its tokens
    is_few: Any  # if these exist


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
    fetches = [
        (
            PageFetch(lambda page: k_hbm.at[page, heads], k, semaphores.at[slot, 0]),
            PageFetch(lambda page: v_hbm.at[page, heads], v, semaphores.at[slot, 1]),
        )
        for slot, (k, v) in enumerate(kv)
    ]
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
        few_from = begin * plan.group // _ALIGNED_ROWS * _ALIGNED_ROWS
        few_from = jnp.minimum(few_from, plan.stream_rows - plan.few_rows)
        return _Item(
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
                for units in _units(plan, turn):
                    _attend(plan, cap, q_ref, kv[slot], state, units, pages)
                return 0

            jax.lax.fori_loop(0, turns, work_off_heads, 0)

        def masked(units_of, unit, slot, block):
            start_live(*after(block), 1 - slot)
            live = live_pages(item, block)
            for fetch in fetches[slot]:
                fetch.wait(live)
            begin = item.first_page * plan.page_size + block * plan.block_size
            first_live = jnp.maximum(item.seen_from - begin, 0) // plan.page_size // unit

            def work_off_keys(i, _):
                pages = pl.ds(i * unit, unit)
                seen = _Seen(plan, item, window, begin + i * unit * plan.page_size)

                def work_off_heads(turn, _):
                    for units in units_of(plan, turn):
                        _attend(plan, cap, q_ref, kv[slot], state, units, pages, seen)
                    return 0

                turns = plan.num_kv_heads // plan.heads
                return jax.lax.fori_loop(0, turns, work_off_heads, 0)

            jax.lax.fori_loop(first_live, pl.cdiv(live, unit), work_off_keys, 0)

        kinds = [functools.partial(masked, _units, plan.unit_pages), steady]
        if plan.few_rows:
            few_units = functools.partial(_few_units, item.few_from)
            kinds.append(functools.partial(masked, few_units, plan.pages))
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


class _Seen(NamedTuple):
    """Which keys a unit of rows sees."""

    plan: Plan
    item: _Item
    window: int | None
    begin: Any  # position of the first key

    def of_scores(self, unit, shape):
        """A query of `row` is `row // group` tokens after the first of the tile."""
        plan, item = self.plan, self.item
        row = unit.first + iota(shape, 0)
        token = self.begin + iota(shape, 1) * plan.streams + unit.stream - item.base
        seen = row >= token * plan.group
        if self.window is not None:
            seen &= row < (token + self.window) * plan.group
        return seen

    def of_keys(self, shape):
        """Seen by some query."""
        plan, item = self.plan, self.item
        token = self.begin + iota(shape, 0) * plan.streams
        if plan.streams > 1:
            token += iota(shape, 1) // plan.head_dim
        return within(token, (item.seen_from, item.seen_to))


class _Unit(NamedTuple):
    """Rows of queries of a head, in one stream."""

    head: Any
    stream: int
    first: Any
    rows: int

    @property
    def place(self):
        return self.head, self.stream, pl.ds(self.first, self.rows)


def _units(plan, turn):
    """All rows of some heads: lists of those that are computed at once."""
    for stream in range(plan.streams):
        for first in range(0, plan.stream_rows, plan.unit_rows):
            yield [
                _Unit(turn * plan.heads + i, stream, first, plan.unit_rows)
                for i in range(plan.heads)
            ]


def _few_units(first, plan, turn):
    """The few rows, from `first` on, that an item's tokens have, if these are few."""
    first = pl.multiple_of(first, _ALIGNED_ROWS)
    yield [
        _Unit(turn * plan.heads + i, stream, first, plan.few_rows)
        for i in range(plan.heads)
        for stream in range(plan.streams)
    ]


def _attend(plan, cap, q_ref, kv_refs, state, units, pages, seen=None):
    """Adds some keys to the state of some heads' rows of queries: first all scores, then
    each head's softmax and values."""
    k_ref, v_ref = kv_refs
    m_ref, l_ref, acc_ref = state
    dtype = q_ref.dtype

    def keys(ref, head):
        return ref[pages, head].reshape(-1, plan.lanes).astype(dtype)

    all_scores = []
    for unit in units:
        k = keys(k_ref, unit.head)
        if seen is not None and plan.streams > 1:
            # A token that was written may share its row of lanes with one that was not.
            k = jnp.where(seen.of_keys(k.shape), k, jnp.zeros_like(k))
        scores = dot(q_ref[unit.place], k, 1)
        if cap is not None:
            scores = cap * jnp.tanh(scores)
        if seen is not None:
            scores = jnp.where(seen.of_scores(unit, scores.shape), scores, HIDDEN)
        all_scores.append(scores)
    for unit, scores in zip(units, all_scores, strict=True):
        at, v = unit.place, keys(v_ref, unit.head)
        if seen is not None:
            v = jnp.where(seen.of_keys(v.shape), v, jnp.zeros_like(v))
        p, m_ref[at], l_ref[at], alpha = add_softmax(scores, m_ref[at], l_ref[at], dtype)
        acc_ref[at] = scale(acc_ref[at], alpha) + dot(p, v, 0)


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
    window = sliding_window
    if window is not None:  # none sees more, and so no product with it overflows
        window = min(window, pages_per_seq * plan.page_size)
    # What there should not be: more tokens than the table has places for, and queries
    # before a row's first token, which see nothing.
    kv_lens = jnp.minimum(kv_lens, pages_per_seq * plan.page_size)
    early = jnp.maximum(q_lens - kv_lens, 0)
    q_starts, q_ends = q_starts + early, q_starts + q_lens
    out, *ml = _launch(
        plan,
        *_items(plan, q.shape[0], q_starts, q_ends),
        q_starts,
        q_ends,
        kv_lens,
        _tiles_of_queries(plan, q, factor, k_scale).astype(dtype),
        jnp.pad(page_indices, ((0, 0), (0, -pages_per_seq % LANES)))[:, None],
        k_pages,
        v_pages,
        tiles_per_core=_tiles_per_core(plan, q.shape[0]),
        cap=cap,
        window=window,
        dtype=q.dtype if plain else jnp.float32,
        with_ml=return_residuals or not plain,
        interpret=interpret,
    )
    out, *ml = (_per_token(plan, q.shape[0], x) for x in (out, *ml))
    if ml:
        out, *ml = _merged(plan, out, ml[0], sinks)
        if v_scale is not None:
            out = out * jnp.repeat(v_scale, plan.group)[None, :, None]
    else:
        out = out[0, ..., : plan.head_dim]
    token = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    after = token >= q_starts[None]
    exists = jnp.any(after & (token < q_ends[None]), axis=1)
    results = (out.astype(q.dtype), *ml)[: 3 if return_residuals else 1]
    return tuple(jnp.where(exists.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in results)


def _tiles_per_core(plan, num_tokens):
    return pl.cdiv(num_tokens, plan.queries * plan.row_cores)


def _num_tiles(plan, num_tokens):
    """A core without items has a tile to write back, which is not used."""
    return _tiles_per_core(plan, num_tokens) * plan.row_cores


def _items(plan, num_tokens, q_starts, q_ends):
    """Each core's first item, and the tile and the row of each item."""
    num_tiles = _num_tiles(plan, num_tokens)
    num_items = num_tiles + min(q_ends.shape[0], num_tokens // 2)
    first_tile = q_starts // plan.queries
    last_tile = (q_ends - 1) // plan.queries
    spans = jnp.where(q_ends > q_starts, last_tile - first_tile + 1, 0)
    ends = jnp.cumsum(spans, dtype=jnp.int32)
    item = jnp.arange(num_items, dtype=jnp.int32)
    row = jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, q_ends.shape[0] - 1)
    tile = jnp.clip((first_tile - ends + spans)[row] + item, 0, num_tiles - 1)
    of_core = jnp.arange(plan.row_cores + 1, dtype=jnp.int32)
    before = tile[None] < of_core[:, None] * _tiles_per_core(plan, num_tokens)
    exists = (item < ends[-1])[None]
    return jnp.sum(before & exists, axis=1, dtype=jnp.int32), tile, row


def _tiles_of_queries(plan, q, factor, k_scale):
    """`[num_kv_heads, tiles, streams, stream_rows, lanes]`: each query in the lanes of its
    stream, and 0 elsewhere."""
    num_tiles, streams = _num_tiles(plan, q.shape[0]), plan.streams
    width = plan.lanes // streams
    q = q.astype(jnp.float32) * factor
    q = q.reshape(q.shape[0], -1, plan.group, plan.head_dim)
    if k_scale is not None:
        q = q * k_scale[None, :, None, None]
    padding = (num_tiles * plan.queries - q.shape[0], width - plan.head_dim)
    q = jnp.pad(q, ((0, padding[0]), (0, 0), (0, 0), (0, padding[1])))
    q = q.reshape(num_tiles, 1, plan.queries, -1, plan.group, 1, width)
    own = jnp.eye(streams).reshape(1, streams, 1, 1, 1, streams, 1)
    q = jnp.moveaxis(q * own if streams > 1 else q, 3, 0)
    return q.reshape(*q.shape[:3], plan.stream_rows, plan.lanes)


def _per_token(plan, num_tokens, x):
    """`[streams, num_tokens, num_heads, lanes]`."""
    x = x.reshape(*x.shape[:3], plan.queries, plan.group, x.shape[-1])
    x = x.transpose(2, 1, 3, 0, 4, 5)
    return x.reshape(plan.streams, -1, x.shape[3] * plan.group, x.shape[-1])[:, :num_tokens]


def _merged(plan, out, ml, sinks):
    """Output, largest logit and denominator of each query, its streams put together."""
    width = plan.lanes // plan.streams
    outs = [x[..., i * width :][..., : plan.head_dim] for i, x in enumerate(out)]
    ms, ls = ml[..., 0] / LOG2_E, ml[..., 1]
    out, m, l = merge_residuals(outs, ms, ls)
    if sinks is not None:
        out = normalise(out * l[..., None], m, l, sinks[None])
    return out, m, l


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
