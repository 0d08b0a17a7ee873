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
Limits    lanes a multiple of 128, one dtype for K and V, no float16, and two rows' tables
          within the scalar memory.

What makes it fast is in docs/tpu.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from .._online_softmax import normalise
from .._pages import LANES, tokens_per_row, values_of
from .._tpu import (
    compiler_params,
    Generation,
    generation,
    INT8_SUBLANES,
    iota,
    LOG2_E,
    PageFetch,
    PAGES_PER_TURN,
    result_of,
    rolled,
    rows_on_all_cores,
    SMEM_BYTES,
    TPUConfig,
    whole_tiles,
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


# --- Limits


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_indices: Array
) -> str | None:
    """Why this kernel cannot run, or None."""
    if jnp.float16 in (q.dtype, k_pages.dtype):
        return "a TPU does not compute with float16"
    lanes = k_pages.shape[3]
    if lanes % LANES != 0:
        return f"its pages must have a multiple of {LANES} lanes, not {lanes}"
    if k_pages.dtype != v_pages.dtype:
        return f"K and V must have one dtype, not {k_pages.dtype} and {v_pages.dtype}"
    page_rows = k_pages.shape[2]
    if LANES % page_rows != 0 and page_rows % LANES != 0:
        return f"its pages must have rows that divide {LANES}, or the reverse: {page_rows}"
    pages_per_seq = page_indices.shape[1]
    if _rows_of_tables(pages_per_seq) < 2:  # one for each of two cores
        return f"a table of {pages_per_seq} pages a row is too wide for its memory"
    chip = generation()
    try:
        plan_of(q, k_pages, pages_per_seq, rows_on_all_cores(chip), chip)
    except ValueError as error:
        return f"on a TPU {chip.name}: {error}"
    return None


def _rows_of_tables(pages_per_seq: int) -> int:
    """How many rows' tables fit the scalar memory, which is the same on all TPUs."""
    return SMEM_BYTES // 2 // (4 * (pages_per_seq + 2))


# --- Block sizes


# Of a block's keys as they are multiplied: as much as a program of modest size works off.
_BLOCK_BYTES = 2**21
# Of each row, that are worked on at once in a large block that is not full.
_PART_ROWS = 512


class Plan(NamedTuple):
    """Sizes. A row of lanes holds `streams` tokens, each a softmax of its own."""

    num_kv_heads: int  # of a core
    group: int
    head_dim: int
    lanes: int
    page_rows: int
    rows: int  # sequences that are worked on together
    pages: int  # of each of them in a block
    masked_pages: int  # of these worked on at a time where some are not there
    heads: int  # of a tile of queries
    # Eighths of the keys whose scores are computed turned, in even and in odd tiles.
    streamed: tuple[int, int]
    int8: bool  # whether keys and values are multiplied as such
    by_bytes: bool  # whether int8 is converted four rows at a time
    groups_per_step: int
    steps: int
    num_calls: int  # each with as much of the table as fits
    row_cores: int  # that share the rows
    head_cores: int  # that share the heads
    vmem_bytes: int

    @property
    def streams(self) -> int:
        return tokens_per_row(self.lanes, self.head_dim)

    @property
    def queries(self) -> int:
        """Rows of a tile: `[heads, streams, group]`, padded."""
        return whole_tiles(self.heads * self.streams * self.group)

    @property
    def tiles(self) -> int:
        return self.num_kv_heads // self.heads

    @property
    def page_size(self) -> int:
        return self.page_rows * self.streams

    @property
    def block_size(self) -> int:
        """Tokens of each row in a block."""
        return self.pages * self.page_size

    @property
    def rows_per_call(self) -> int:
        return self.steps * self.row_cores * self.groups_per_step * self.rows


def plan_of(
    q: Array, k_pages: Array, pages_per_seq: int, config: TPUConfig, chip: Generation
) -> Plan:
    """The sizes for these shapes and this TPU."""
    num_seqs, num_heads, head_dim = q.shape
    _, num_kv_heads, page_rows, lanes = k_pages.shape
    row_cores, head_cores = cores_of(config, chip, num_kv_heads)
    group, num_kv_heads = num_heads // num_kv_heads, num_kv_heads // head_cores
    streams = tokens_per_row(lanes, head_dim)
    heads = _heads_of_tile(num_kv_heads, group * streams, lanes)
    tiles = num_kv_heads // heads
    # Several softmaxes at once hide each other's latency: those of a row's heads, and
    # those of several rows, which short rows need the more.
    rows = min(4 if tiles == 1 else 2, pl.next_power_of_2(num_seqs))
    row_bytes = 4 * num_kv_heads * lanes * k_pages.dtype.itemsize
    max_rows = _rows_of_tables(pages_per_seq) // row_cores
    while rows > 1 and (
        rows > max_rows or max(LANES, page_rows) * rows * row_bytes > chip.vmem_bytes // 2
    ):
        rows //= 2
    row_bytes *= rows
    is_int8 = k_pages.dtype == jnp.int8
    int8 = is_int8 and chip.int8 == "multiplies"
    token_bytes = num_kv_heads * rows * lanes * q.dtype.itemsize
    # With half of all keys streamed, larger blocks take fewer cycles; but short rows more,
    # so only where else the instructions would set the pace.
    large = is_int8 and chip.int8 == "unpacks"
    pages = config.pages_per_compute_block
    if pages is None:
        length = _BLOCK_BYTES * (2 if large else 1) // token_bytes
        length = min(length, pages_per_seq * page_rows)
        length = max(LANES, pl.next_power_of_2(length))
        while length > LANES and length * row_bytes > chip.vmem_bytes // 2:
            length //= 2
        pages = max(1, length // page_rows)
    elif pages < 1 or pages * page_rows % LANES != 0:
        raise ValueError(
            f"pages_per_compute_block={pages} makes blocks of {pages * page_rows} rows of "
            f"{lanes} lanes, which must be a multiple of {LANES}."
        )
    large &= pages * page_rows > _PART_ROWS
    # Queries and results of a step, which the pipeline holds twice.
    queries = whole_tiles(heads * streams * group)
    query_bytes = heads * 4 + 4 if int8 else heads * q.dtype.itemsize
    group_bytes = 2 * rows * tiles * queries * lanes * (query_bytes + 8)
    fitting = max(1, chip.vmem_bytes // 8 // group_bytes)
    needed = pages * page_rows * row_bytes + group_bytes
    limit = chip.usable_vmem_bytes
    if needed > limit:
        raise ValueError(
            f"Blocks of {pages} pages of {rows} rows need {needed} bytes of VMEM, but "
            f"there are {limit}: choose a smaller pages_per_compute_block."
        )
    groups = pl.cdiv(num_seqs, rows * row_cores)  # of a core
    num_calls = pl.cdiv(groups, max_rows // rows)
    groups = pl.cdiv(groups, num_calls)
    steps = pl.cdiv(groups, fitting) if config.inline_seq_dim else groups
    return Plan(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        lanes=lanes,
        page_rows=page_rows,
        rows=rows,
        pages=pages,
        masked_pages=_masked_pages(pages, page_rows) if large else pages,
        heads=heads,
        streamed=_streamed(chip, tiles, queries, large, int8),
        int8=int8,
        by_bytes=is_int8 and chip.int8 is None and page_rows % INT8_SUBLANES == 0,
        groups_per_step=pl.cdiv(groups, steps),
        steps=steps,
        num_calls=num_calls,
        row_cores=row_cores,
        head_cores=head_cores,
        vmem_bytes=limit,
    )


def cores_of(config: TPUConfig, chip: Generation, num_kv_heads: int) -> tuple[int, int]:
    """How many cores share the rows, and how many the heads."""
    mode = config.megacore_mode
    if mode is None:
        return 1, 1
    if chip.num_cores == 1:
        raise ValueError(f"megacore_mode is {mode!r}, but a TPU {chip.name} has one core.")
    if mode == "batch":
        return chip.num_cores, 1
    if num_kv_heads % chip.num_cores != 0:
        raise ValueError(
            f"megacore_mode 'kv_head' shares {num_kv_heads} kv heads among "
            f"{chip.num_cores} cores, which does not divide them."
        )
    return 1, chip.num_cores


def _masked_pages(pages: int, page_rows: int) -> int:
    """So many that short rows of a wide table are not worked on as if they were long."""
    part = _PART_ROWS // page_rows
    return part if part > 0 and pages % part == 0 else pages


def _streamed(
    chip: Generation, tiles: int, queries: int, large: bool, int8: bool
) -> tuple[int, int]:
    if chip.mxu_size != 256 or tiles == 1 or queries > LANES or int8:
        return 0, 0
    return 4, 4 if large else 0


def _heads_of_tile(num_kv_heads: int, rows: int, lanes: int) -> int:
    """Two, if they fit a tile of queries and the 256 rows of a matrix unit."""
    pair = num_kv_heads % 2 == 0 and 2 * rows <= 16 and 2 * lanes <= 256
    return 2 if pair else 1


# --- Body


def _kernel(
    starts_ref,  # [num_seqs] in SMEM
    ends_ref,  # [num_seqs]
    table_ref,  # [num_seqs * pages_per_seq]
    q_refs,  # of [groups_per_step * rows, tiles, queries, heads * lanes], or see _in_int8
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
    fetches = [
        (
            PageFetch(lambda page: k_hbm.at[page, heads], k, semaphores.at[slot, 0]),
            PageFetch(lambda page: v_hbm.at[page, heads], v, semaphores.at[slot, 1]),
        )
        for slot, (k, v) in enumerate(((k0, v0), (k1, v1)))
    ]
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
    # What there should not be: more tokens than the table has places for.
    kv_lens = jnp.minimum(kv_lens, page_indices.shape[1] * plan.page_size)
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
    tiles = _tiles_of_queries(plan, q_sorted, factor, k_scale)
    queries = _in_int8(tiles) if plan.int8 else (tiles.astype(dtype),)
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
    out, m, l = _merged(plan, out, ml[0], sinks)
    if v_scale is not None:
        out = out * jnp.repeat(v_scale, plan.group)[None, :, None]
    return (out.astype(q.dtype), m, l) if return_residuals else (out.astype(q.dtype),)


def _orders(kv_lens, sliding_window):
    """From the longest row to the shortest, and back."""
    seen = kv_lens if sliding_window is None else jnp.minimum(kv_lens, sliding_window)
    order = jnp.argsort(-seen)
    return order, jnp.argsort(order)


def _tiles_of_queries(plan, q, factor, k_scale):
    """`[num_seqs, tiles, queries, heads * lanes]`: each query in the lanes of its head
    and stream, and 0 elsewhere."""
    num_seqs = q.shape[0]
    q = q.astype(jnp.float32) * factor
    q = q.reshape(num_seqs, -1, plan.group, plan.head_dim)
    if k_scale is not None:
        q = q * k_scale[None, :, None, None]
    width = plan.lanes // plan.streams
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, width - plan.head_dim)))
    q = q.reshape(num_seqs, -1, plan.heads, 1, plan.group, 1, 1, width)
    own = jnp.eye(plan.heads)[:, None, :, None] * jnp.eye(plan.streams)[None, :, None, :]
    q = q * own[None, None, :, :, None, :, :, None]
    rows = plan.heads * plan.streams * plan.group
    q = q.reshape(num_seqs, -1, rows, plan.heads * plan.lanes)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.queries - rows), (0, 0)))


def _in_int8(tiles):
    """Queries in parts of 8 bits, and the largest number of each in all lanes."""
    largest = jnp.max(jnp.abs(tiles), axis=-1, keepdims=True)
    parts = int8_parts(tiles / jnp.where(largest > 0, largest, 1))
    padding = -parts.shape[2] % INT8_SUBLANES
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return parts, jnp.broadcast_to(largest, (*largest.shape[:3], LANES))


def _merged(plan, out, ml, sinks):
    """Output, largest logit and denominator of each query, its streams put together."""
    num_seqs = out.shape[0]

    def by_stream(x):  # [num_seqs, tiles * heads, streams, group, ...]
        x = x[:, :, : plan.heads * plan.streams * plan.group]
        return x.reshape(num_seqs, -1, plan.streams, plan.group, x.shape[-1])

    def by_head(x):
        return x.reshape(num_seqs, -1, *x.shape[3:])

    out, m, l = by_stream(out), by_stream(ml)[..., 0], by_stream(ml)[..., 1]
    width = plan.lanes // plan.streams
    out = jnp.stack(
        [
            out[:, :, s, :, s * width : s * width + plan.head_dim]
            for s in range(plan.streams)
        ],
        axis=2,
    )
    top = jnp.max(m, axis=2)
    weights = l * jnp.exp2(m - top[:, :, None])
    acc = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=2)
    acc, m, l = by_head(acc), by_head(top / LOG2_E), by_head(jnp.sum(weights, axis=2))
    return normalise(acc, m, l, None if sinks is None else sinks[None]), m, l


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
