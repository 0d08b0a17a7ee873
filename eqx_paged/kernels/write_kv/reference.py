"""The definition of writing: one token after another, each into its slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from .._pages import pack, padded, page_size_of, tokens_per_row


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
    """As [`eqx_paged.write_kv`][], one token after another."""
    num_pages, _, _, lanes = k_pages.shape
    tokens = tokens_per_row(lanes, k.shape[2])
    page_size = page_size_of(k_pages, k.shape[2])
    k, v = padded(k, lanes), padded(v, lanes)

    def write_token(t, pages):
        page, offset = jnp.divmod(slots[t], page_size)
        row, place = jnp.divmod(offset, tokens)
        lane = place * (lanes // tokens)

        def write(stored, new):
            new = pack(new[t], stored.dtype)[None, :, None]
            written = jax.lax.dynamic_update_slice(stored, new, (page, page * 0, row, lane))
            return jnp.where(page < num_pages, written, stored)

        return write(pages[0], k), write(pages[1], v)

    return jax.lax.fori_loop(0, k.shape[0], write_token, (k_pages, v_pages))
