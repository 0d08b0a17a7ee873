"""Attention of queries to a block of keys: what the TPU kernels share."""

import functools

import jax
import jax.numpy as jnp

from ._pages import LANES
from ._pallas import LOG2_E
from ._tpu import iota, lane_tiles


# What `m` starts from, and what a hidden logit is: finite, so that no difference is NaN.
HIDDEN = -1e30


def logit_factors(sm_scale: float, soft_cap: float | None) -> tuple[float, float | None]:
    """The factor of the queries, and the cap: so that logits are in powers of two. Under a
    cap, queries give what tanh is applied to."""
    if soft_cap is None:
        return sm_scale * LOG2_E, None
    return sm_scale / soft_cap, soft_cap * LOG2_E


def scores_of(cap, q, k, eighths):
    """`[queries, rows]`. The unit that multiplies takes a matrix in by one port and
    streams the other through by a second. Where pushing keys in is the bottleneck, part
    of them is streamed instead, and the scores of these are turned."""
    streamed = k.shape[0] * eighths // 8 // LANES * LANES
    if streamed == 0:
        scores = dot(q, k, 1)
    else:
        padding = jnp.zeros((LANES - q.shape[0], q.shape[1]), q.dtype)
        turned = dot(k[:streamed], jnp.concatenate([q, padding], axis=0), 1)
        pushed = dot(q, k[streamed:], 1) if streamed < k.shape[0] else None
        scores = turned.T[: q.shape[0]]
        if pushed is not None:
            scores = jnp.concatenate([scores, pushed], axis=1)
    return capped(cap, scores)


def capped(cap, scores):
    return scores if cap is None else cap * jnp.tanh(scores)


def dot(a, b, axis):
    """Contracts the last axis of `a` with `axis` of `b`, in float32, or int8 in int32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else jnp.float32,
    )


# Of 8 bits each. As many give what float32 does.
_NUM_PARTS = 3


def int8_parts(x):
    """Rows of numbers in [-1, 1] as rows of int8: those of the largest parts first. Each
    further part has what is left of the one before, at most a half, 254 times."""
    x = 127 * x
    parts = [jnp.round(x)]
    while len(parts) < _NUM_PARTS:
        x = 254 * (x - parts[-1])
        parts.append(jnp.round(x))
    return jnp.concatenate(parts, axis=-2).astype(jnp.int8)


def sum_of_parts(product, rows):
    """A product with the parts of so many rows, as one with the rows themselves."""
    parts = [
        product[i * rows : (i + 1) * rows].astype(jnp.float32) * (1 / (127 * 254**i))
        for i in range(_NUM_PARTS)
    ]
    return functools.reduce(jnp.add, reversed(parts))


def within(token, bounds):
    lo, hi = bounds
    return (token < hi) if lo is None else (token >= lo) & (token < hi)


def clear(state):
    """No keys seen: `m`, `l` and `acc` of any queries."""
    m_ref, l_ref, acc_ref = state
    m_ref[...] = jnp.full(m_ref.shape, HIDDEN, jnp.float32)
    l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)


def add_softmax(s, m, l, dtype):
    tiles = lane_tiles(s)
    largest = functools.reduce(jnp.maximum, tiles)
    largest = jnp.max(largest, axis=1, keepdims=True)
    new_m = jnp.maximum(m, jnp.broadcast_to(largest, m.shape))
    alpha = jnp.exp2(m - new_m)
    ps = [jnp.exp2(tile - new_m) for tile in tiles]
    p = jnp.concatenate([p.astype(dtype) for p in ps], axis=1)
    return p, new_m, l * alpha + functools.reduce(jnp.add, ps), alpha


def scale(acc, alpha):
    tiles = [tile * alpha for tile in lane_tiles(acc)]
    return jnp.concatenate(tiles, axis=1) if len(tiles) > 1 else tiles[0]


def finished(m, l, acc):
    """The output, and the largest logit in lane 0 with the denominator in the others."""
    # A query that saw hidden keys only counted these.
    l = jnp.where(m > HIDDEN, l, 0.0)
    total = jnp.broadcast_to(jnp.sum(l, axis=1, keepdims=True), l.shape)
    out = scale(acc, 1.0 / jnp.where(total > 0, total, 1.0))
    return out, jnp.where(iota(m.shape, 1) == 0, m, total)


def dtype_of_products(q, pages):
    """That of both, where it is one, and else float32."""
    kept = float_of(pages.dtype)
    return kept if q.dtype == kept else jnp.float32


def float_of(dtype):
    """What 8-bit keys and values are computed in."""
    return (
        dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
        else jnp.bfloat16
    )
