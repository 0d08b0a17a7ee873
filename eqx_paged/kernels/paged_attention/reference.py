"""The definition of paged decode attention: gather each row's pages, attend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from ..._types import Scale
from .._arguments import scale_per_head, sm_scale_or_default
from .._definition import attend
from .._online_softmax import DEFAULT_MASK_VALUE
from .._pages import page_size_of, unpack


def paged_attention(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
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
    Float[Array, "num_seqs num_heads head_dim"]
    | tuple[
        Float[Array, "num_seqs num_heads head_dim"],
        Float[Array, "num_seqs num_heads"],
        Float[Array, "num_seqs num_heads"],
    ]
):
    """As [`eqx_paged.paged_attention`][], slowly: the whole context of each row is
    gathered, whatever its length."""
    num_kv_heads, head_dim = k_pages.shape[1], q.shape[2]
    position = jnp.arange(
        page_indices.shape[1] * page_size_of(k_pages, head_dim), dtype=jnp.int32
    )

    def one_row(q, kv_len, indices):
        keep = position < kv_len
        if sliding_window is not None:
            keep &= position >= kv_len - sliding_window
        return attend(
            q,
            tokens_of(k_pages, indices, head_dim),
            tokens_of(v_pages, indices, head_dim),
            keep,
            sm_scale=sm_scale_or_default(sm_scale, head_dim),
            soft_cap=soft_cap,
            sinks=sinks,
            k_scale=scale_per_head("k_scale", k_scale, num_kv_heads),
            v_scale=scale_per_head("v_scale", v_scale, num_kv_heads),
            mask_value=mask_value,
        )

    out, m, l = jax.vmap(one_row)(q, kv_lens, page_indices)
    return (out, m, l) if return_residuals else out


def tokens_of(
    pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    indices: Int32[Array, " pages_per_seq"],
    head_dim: int,
) -> Real[Array, "context num_kv_heads head_dim"]:
    """The stored tokens of a row, in order."""
    values = unpack(pages[indices], head_dim)
    return jnp.swapaxes(values, 1, 2).reshape(-1, pages.shape[1], head_dim)
