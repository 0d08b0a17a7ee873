"""What attention means here: one query against the keys it may see.

Every `reference.py` gathers its keys and calls this, and every fast path is held to it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from ._online_softmax import DEFAULT_MASK_VALUE, normalise, partial_softmax
from ._pages import values_of


def attend(
    q: Float[Array, "num_heads head_dim"],
    k: Real[Array, "keys num_kv_heads head_dim"],
    v: Real[Array, "keys num_kv_heads head_dim"],
    keep: Bool[Array, " keys"],
    *,
    sm_scale: float,
    soft_cap: float | None,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
    mask_value: float = DEFAULT_MASK_VALUE,
) -> tuple[
    Float[Array, "num_heads head_dim"],
    Float[Array, " num_heads"],
    Float[Array, " num_heads"],
]:
    """Returns the output in q's dtype, the largest logit and the denominator."""
    group = q.shape[0] // k.shape[1]
    k = _seen_by_each_head(k, keep, k_scale, group)
    v = _seen_by_each_head(v, keep, v_scale, group)
    logits = jnp.einsum("hd,shd->hs", q.astype(jnp.float32), k) * sm_scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    p, m, l = partial_softmax(logits, keep[None])
    m = jnp.where(l == 0, mask_value, m)
    out = normalise(jnp.einsum("hs,shd->hd", p, v), m, l, sinks)
    return out.astype(q.dtype), m, l


def _seen_by_each_head(x, keep, scale, group):
    # Hidden slots become 0 first: they may hold NaN, and 0 * NaN is not 0.
    x = jnp.where(keep[:, None, None], values_of(x).astype(jnp.float32), 0.0)
    if scale is not None:
        x = x * scale[None, :, None]
    return jnp.repeat(x, group, axis=1)
