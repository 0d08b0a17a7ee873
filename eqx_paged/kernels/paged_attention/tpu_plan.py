"""What the decode kernel for the TPU can run, and the sizes that it runs with.

It runs with lanes a multiple of 128, one dtype for K and V, no float16, and two rows'
tables within the scalar memory.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from .._pages import LANES, tokens_per_row
from .._tpu import (
    Generation,
    generation,
    INT8_SUBLANES,
    rows_on_all_cores,
    SMEM_BYTES,
    TPUConfig,
    whole_tiles,
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
    else:
        check_pages_of_block(pages, page_rows, lanes)
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


def check_pages_of_block(pages: int, page_rows: int, lanes: int) -> None:
    """Whether a config's blocks are whole tiles of scores."""
    if pages < 1 or pages * page_rows % LANES != 0:
        raise ValueError(
            f"pages_per_compute_block={pages} makes blocks of {pages * page_rows} rows of "
            f"{lanes} lanes, which must be a multiple of {LANES}."
        )


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
