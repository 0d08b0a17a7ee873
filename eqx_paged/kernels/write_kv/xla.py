"""Writing keys and values into pages in plain XLA: one scatter, in place if donated."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from .._pages import pack, padded, page_size_of


def write_kv(
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int32[Array, " num_tokens"],
) -> tuple[
    Real[Array, "num_pages num_kv_heads rows lanes"],
    Real[Array, "num_pages num_kv_heads rows lanes"],
]:
    return _write(k_pages, k, slots), _write(v_pages, v, slots)


def _write(pages, values, slots):
    page_size = page_size_of(pages, values.shape[2])
    values = padded(values, pages.shape[3])
    page, offset = jnp.divmod(slots, page_size)
    # A reshape of rows into tokens is free here, and lets one index name a token.
    tokens = pages.reshape(*pages.shape[:2], page_size, values.shape[2])
    tokens = tokens.at[page, :, offset].set(pack(values, pages.dtype), mode="drop")
    return tokens.reshape(pages.shape)
