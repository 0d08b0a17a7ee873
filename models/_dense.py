"""Causal attention without a cache, for training."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def causal_attention(
    q: Float[Array, "batch length num_heads head_dim"],
    k: Float[Array, "batch length num_kv_heads head_dim"],
    v: Float[Array, "batch length num_kv_heads head_dim"],
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    block_size: int = 256,
) -> Float[Array, "batch length num_heads head_dim"]:
    """Attends from every position to itself and all earlier ones.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values, in order of position.
    - `sm_scale`, `soft_cap`, `sliding_window`, `sinks`: as in
        `eqx_paged.PagedAttention`.
    - `block_size`: how many queries go together. A block reads no keys past its own
        end, which saves half the work of a long sequence, and none before its window.

    **Returns:**

    One output a query, in its dtype. The softmax is float32.
    """
    length = q.shape[1]
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    outs = []
    attend = functools.partial(
        _attend,
        sm_scale=q.shape[3] ** -0.5 if sm_scale is None else sm_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
    )
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        first = 0 if sliding_window is None else max(start - sliding_window + 1, 0)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        outs.append(attend(q[:, start:end], keys, values))
    return jnp.concatenate(outs, axis=1)


def _attend(
    q: Float[Array, "batch num_queries num_heads head_dim"],
    k: Float[Array, "batch num_kv_heads length head_dim"],
    v: Float[Array, "batch num_kv_heads length head_dim"],
    *,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
) -> Float[Array, "batch num_queries num_heads head_dim"]:
    batch, num_queries, num_heads, head_dim = q.shape
    _, num_kv_heads, length, _ = k.shape
    group = num_heads // num_kv_heads
    # The query heads of one key head side by side, so that they share one product.
    q = q.reshape(batch, num_queries, num_kv_heads, group, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)
    logits = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, num_kv_heads, group, num_queries, length) * sm_scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # Queries and keys end at the same position.
    own = jnp.arange(length - num_queries, length)[:, None]
    keys = jnp.arange(length)[None, :]
    keep = keys <= own
    if sliding_window is not None:
        keep &= keys > own - sliding_window
    logits = jnp.where(keep[None, None, None], logits, -jnp.inf)
    if sinks is not None:
        shape = (*logits.shape[:-1], 1)
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, group, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sink, shape)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :length].astype(v.dtype)
    weights = weights.reshape(batch, num_kv_heads, -1, length)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, v)
    out = out.reshape(batch, num_kv_heads, group, num_queries, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, head_dim)
