"""The definition of ragged attention over contiguous keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from ..._types import Scale
from .._arguments import scale_per_head, sm_scale_or_default
from .._definition import attend
from .._online_softmax import DEFAULT_MASK_VALUE


def ragged_gqa(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    """As [`eqx_paged.ragged_gqa`][], over the whole buffer."""
    num_kv_heads = k.shape[2]
    position = jnp.arange(k.shape[1], dtype=jnp.int32)

    def one_row(q, k, v, length, start):
        keep = (position >= start) & (position < length)
        if sliding_window is not None:
            keep &= position >= length - sliding_window
        return attend(
            q,
            k,
            v,
            keep,
            sm_scale=sm_scale_or_default(sm_scale, q.shape[1]),
            soft_cap=soft_cap,
            sinks=sinks,
            k_scale=scale_per_head("k_scale", k_scale, num_kv_heads),
            v_scale=scale_per_head("v_scale", v_scale, num_kv_heads),
            mask_value=mask_value,
        )

    return jax.vmap(one_row)(q, k, v, lengths, starts)


def ragged_chunk_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    sliding_window: int | None,
    **options: Any,
) -> tuple[
    Float[Array, "num_tokens num_heads head_dim"],
    Float[Array, "num_tokens num_heads"],
    Float[Array, "num_tokens num_heads"],
]:
    """Packed rows of queries, as in `ragged_paged_attention`."""
    position = jnp.arange(k.shape[1], dtype=jnp.int32)
    rows = jnp.arange(k.shape[0], dtype=jnp.int32)

    def one_token(q, token):
        row = jnp.sum((token >= cu_q_lens[1:]) & (rows < num_seqs), dtype=jnp.int32)
        exists = row < num_seqs
        row = jnp.minimum(row, rows[-1])
        here = lengths[row] - cu_q_lens[row + 1] + token
        keep = exists & (position >= starts[row]) & (position <= here)
        if sliding_window is not None:
            keep &= here - position < sliding_window
        return attend(q, k[row], v[row], keep, **options)

    return jax.vmap(one_token)(q, jnp.arange(q.shape[0], dtype=jnp.int32))


def ragged_mha(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    """[`eqx_paged.reference.ragged_gqa`][] with as many kv heads as heads."""
    return ragged_gqa(q, k, v, lengths, starts, **options)


def ragged_mqa(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len head_dim"],
    v: Real[Array, "num_seqs max_len head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    """[`eqx_paged.reference.ragged_gqa`][] with one kv head, which has no axis."""
    return ragged_gqa(q, k[:, :, None], v[:, :, None], lengths, starts, **options)
