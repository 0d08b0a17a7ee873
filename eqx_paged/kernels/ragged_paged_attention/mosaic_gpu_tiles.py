"""How the mixed kernel for Hopper cuts its queries into tiles, and what lies in which row
of one.

An item is a tile of tokens of one sequence. Each warpgroup that computes has its part of
these, for some heads: a head's tokens are consecutive rows of its products, and then come
the next head's.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from .._gpu import cdiv, work_list
from .._mosaic_gpu import ROWS
from .._pallas import LOG2_E


# Warpgroups that compute.
COMPUTING = 2


class Items(NamedTuple):
    """Tiles of tokens; of one that does not exist, `counts` is 0."""

    rows: Any  # [num_items]
    firsts: Any  # the first token's place among all
    counts: Any  # how many tokens there are
    positions: Any  # the first token's position in its row


class Tile(NamedTuple):
    """The tokens of a warpgroup: rows `[begin, end)` of each head, from place `first` on,
    whose position is `position`. Where it would reach past the last of all tokens, it
    begins earlier, and there are rows before `begin`."""

    first: Any
    begin: Any
    end: Any
    position: Any


def items_of(sizes, num_tokens, q_starts, q_lens, kv_lens):
    size = COMPUTING * sizes.tokens
    num_items = num_tokens // size + min(len(kv_lens), num_tokens)
    counts = cdiv(q_lens, size)
    rows, place = work_list(counts, num_items)
    exists = rows < len(kv_lens)
    rows = jnp.minimum(rows, len(kv_lens) - 1)
    offsets = (counts[rows] - 1 - place) * size
    live = jnp.clip(q_lens[rows] - offsets, 0, size)
    return Items(
        rows,
        q_starts[rows] + offsets,
        jnp.where(exists, live, 0),
        kv_lens[rows] - q_lens[rows] + offsets,
    )


def tile_of(sizes, warpgroup, items, item, num_tokens):
    passed = warpgroup * sizes.tokens
    first = items.firsts[item] + passed
    position = items.positions[item] + passed
    live = jnp.clip(items.counts[item] - passed, 0, sizes.tokens)
    shift = jnp.maximum(first - (num_tokens - sizes.tokens), 0)
    return Tile(first - shift, shift, shift + live, position - shift)


def sinks_by_row(sizes, sinks):
    """`[groups, ROWS]`, in powers of two: those of each row of a warpgroup."""
    if sinks is None:
        return None
    sinks = sinks.astype(jnp.float32).reshape(sizes.groups, sizes.heads) * LOG2_E
    sinks = jnp.repeat(sinks, sizes.tokens, axis=1)
    return jnp.pad(sinks, ((0, 0), (0, ROWS - sinks.shape[1])))


def by_token(sizes, items, ml, num_tokens):
    """`m` and `l`, `[num_tokens, num_heads]`, from where each program put its own."""
    ml = ml[..., : sizes.heads * sizes.tokens]
    ml = ml.reshape(*ml.shape[:-1], sizes.heads, sizes.tokens)
    # [2, num_items, groups, COMPUTING, heads, tokens], and then the heads last.
    ml = jnp.moveaxis(ml, 3, 0)
    ml = jnp.moveaxis(ml, (2, 4), (4, 5))
    ml = ml.reshape(2, -1, sizes.num_heads)
    warpgroup = jnp.arange(COMPUTING, dtype=jnp.int32)[None]
    all_items = (slice(None), None)
    tile = tile_of(sizes, warpgroup, items, all_items, max(num_tokens, sizes.tokens))
    row = jnp.arange(sizes.tokens, dtype=jnp.int32)[None, None]
    tile = Tile(*(x[..., None] for x in tile))
    live = (row >= tile.begin) & (row < tile.end)
    place = jnp.where(live, tile.first + row, num_tokens).reshape(-1)
    m, l = jnp.zeros((2, num_tokens, sizes.num_heads)).at[:, place].set(ml, mode="drop")
    return m / LOG2_E, l
