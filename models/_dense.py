"""Causal attention without a cache, for training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def causal_attention(
    q: Float[Array, "batch length num_heads head_dim"],
    k: Float[Array, "batch length num_kv_heads head_dim"],
    v: Float[Array, "batch length num_kv_heads head_dim"],
    block_size: int = 256,
) -> Float[Array, "batch length num_heads head_dim"]:
    """Attends from every position to itself and all earlier ones.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values, in order of position.
    - `block_size`: how many queries go together. A block reads no keys past its own
        end, which saves half the work of a long sequence.

    **Returns:**

    One output a query, in its dtype. The softmax is float32.
    """
    length = q.shape[1]
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    outs = []
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        outs.append(_attend(q[:, start:end], k[:, :, :end], v[:, :, :end]))
    return jnp.concatenate(outs, axis=1)


def _attend(
    q: Float[Array, "batch num_queries num_heads head_dim"],
    k: Float[Array, "batch num_kv_heads length head_dim"],
    v: Float[Array, "batch num_kv_heads length head_dim"],
) -> Float[Array, "batch num_queries num_heads head_dim"]:
    batch, num_queries, num_heads, head_dim = q.shape
    _, num_kv_heads, length, _ = k.shape
    group = num_heads // num_kv_heads
    # The query heads of one key head side by side, so that they share one product.
    q = q.reshape(batch, num_queries, num_kv_heads, group, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)
    logits = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, num_kv_heads, group, num_queries, length)
    last_key = jnp.arange(length - num_queries, length)
    keep = jnp.arange(length)[None, :] <= last_key[:, None]
    logits = jnp.where(keep[None, None, None], logits * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, num_kv_heads, -1, length)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, v)
    out = out.reshape(batch, num_kv_heads, group, num_queries, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, head_dim)
