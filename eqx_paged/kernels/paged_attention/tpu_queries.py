"""How the decode kernel for the TPU holds its queries and results.

A tile of queries is `[heads * streams * group, heads * lanes]`: each query stands in the
lanes of its kv head and stream, and 0 in the others, so that one product with the keys of
several heads, side by side, gives the scores of all.
"""

import jax.numpy as jnp

from .._online_softmax import normalise
from .._pages import LANES
from .._pallas import LOG2_E
from .._tpu import INT8_SUBLANES
from .._tpu_attend import int8_parts


def tiles_of_queries(plan, q, factor, k_scale):
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


def in_int8(tiles):
    """Queries in parts of 8 bits, and the largest number of each in all lanes."""
    largest = jnp.max(jnp.abs(tiles), axis=-1, keepdims=True)
    parts = int8_parts(tiles / jnp.where(largest > 0, largest, 1))
    padding = -parts.shape[2] % INT8_SUBLANES
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return parts, jnp.broadcast_to(largest, (*largest.shape[:3], LANES))


def merged(plan, out, ml, sinks):
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
