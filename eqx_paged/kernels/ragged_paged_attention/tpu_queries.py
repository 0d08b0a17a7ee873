"""How the mixed kernel for the TPU holds its queries and results: in tiles, worked off in
items.

Tokens are cut into tiles, `[num_kv_heads, tiles, streams, queries * group, lanes]`. A tile
and a row that has tokens in it are an item: nothing is gathered.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._online_softmax import merge_residuals, normalise
from .._pallas import LOG2_E


def tiles_per_core(plan, num_tokens):
    return pl.cdiv(num_tokens, plan.queries * plan.row_cores)


def _num_tiles(plan, num_tokens):
    """A core without items has a tile to write back, which is not used."""
    return tiles_per_core(plan, num_tokens) * plan.row_cores


def items_of(plan, num_tokens, q_starts, q_ends):
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
    before = tile[None] < of_core[:, None] * tiles_per_core(plan, num_tokens)
    exists = (item < ends[-1])[None]
    return jnp.sum(before & exists, axis=1, dtype=jnp.int32), tile, row


def tiles_of_queries(plan, q, factor, k_scale):
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


def per_token(plan, num_tokens, x):
    """`[streams, num_tokens, num_heads, lanes]`."""
    x = x.reshape(*x.shape[:3], plan.queries, plan.group, x.shape[-1])
    x = x.transpose(2, 1, 3, 0, 4, 5)
    return x.reshape(plan.streams, -1, x.shape[3] * plan.group, x.shape[-1])[:, :num_tokens]


def merged(plan, out, ml, sinks):
    """Output, largest logit and denominator of each query, its streams put together."""
    width = plan.lanes // plan.streams
    outs = [x[..., i * width :][..., : plan.head_dim] for i, x in enumerate(out)]
    ms, ls = ml[..., 0] / LOG2_E, ml[..., 1]
    out, m, l = merge_residuals(outs, ms, ls)
    if sinks is not None:
        out = normalise(out * l[..., None], m, l, sinks[None])
    return out, m, l
