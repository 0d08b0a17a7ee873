"""What the mixed kernel for the TPU can run, which is what the decode kernel can, and the
sizes that it runs with."""

import math
from typing import NamedTuple

from jax.experimental import pallas as pl
from jaxtyping import Array

from .._pages import LANES, tokens_per_row
from .._tpu import Generation, generation, TPUConfig
from ..paged_attention import tpu_plan as decode


# --- Limits


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_indices: Array
) -> str | None:
    """Why this kernel cannot run, or None."""
    why = decode.unsupported(q, k_pages, v_pages, page_indices)
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


# Rows of a head's queries that meet a block together.
_TILE_ROWS = 512
# Rows that are computed at once of an item that has no more.
_FEW_ROWS = 128
# Of a tile of bfloat16, which has the most.
ALIGNED_ROWS = 16
# Rows of keys of a block, and those that are computed at once where some are hidden.
_BLOCK_ROWS = 1024
_UNIT_KEYS = 256


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
    row_cores, head_cores = decode.cores_of(config, chip, num_kv_heads)
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
        queries = max(ALIGNED_ROWS, queries)
    elif queries < 1 or queries % ALIGNED_ROWS != 0:
        raise ValueError(
            "num_queries_per_block must be a positive multiple of "
            f"{ALIGNED_ROWS}, but is {queries}."
        )
    unit_rows = queries * group
    while unit_rows > _TILE_ROWS and unit_rows % (2 * ALIGNED_ROWS) == 0:
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
    else:
        decode.check_pages_of_block(pages, page_rows, lanes)
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
