"""The definition of ragged paged attention: every token attends to its row's past."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from ..._types import Scale
from .._arguments import scale_per_head, sm_scale_or_default
from .._definition import attend
from .._online_softmax import DEFAULT_MASK_VALUE
from .._pages import page_size_of
from ..paged_attention.reference import tokens_of


def ragged_paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    return_residuals: bool = False,
) -> (
    Float[Array, "num_tokens num_heads head_dim"]
    | tuple[
        Float[Array, "num_tokens num_heads head_dim"],
        Float[Array, "num_tokens num_heads"],
        Float[Array, "num_tokens num_heads"],
    ]
):
    """As [`eqx_paged.ragged_paged_attention`][], slowly: the whole context of its row is
    gathered for each token."""
    num_kv_heads, head_dim = k_pages.shape[1], q.shape[2]
    position = jnp.arange(
        page_indices.shape[1] * page_size_of(k_pages, head_dim), dtype=jnp.int32
    )
    rows = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)

    def one_token(q, token):
        row = jnp.sum((token >= cu_q_lens[1:]) & (rows < num_seqs), dtype=jnp.int32)
        exists = row < num_seqs
        row = jnp.minimum(row, rows[-1])
        here = kv_lens[row] - cu_q_lens[row + 1] + token
        keep = exists & (position <= here)
        if sliding_window is not None:
            keep &= here - position < sliding_window
        return attend(
            q,
            tokens_of(k_pages, page_indices[row], head_dim),
            tokens_of(v_pages, page_indices[row], head_dim),
            keep,
            sm_scale=sm_scale_or_default(sm_scale, head_dim),
            soft_cap=soft_cap,
            sinks=sinks,
            k_scale=scale_per_head("k_scale", k_scale, num_kv_heads),
            v_scale=scale_per_head("v_scale", v_scale, num_kv_heads),
            mask_value=mask_value,
        )

    out, m, l = jax.vmap(one_token)(q, jnp.arange(q.shape[0], dtype=jnp.int32))
    return (out, m, l) if return_residuals else out
