"""Ragged paged attention in plain XLA.

Rows of one token go through the worklist of pages of a decode step; longer rows are
worked off in tiles of queries.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from .._blocked import blocked_attention, Results, split_rows
from .._pages import page_size_of, unpack
from ..paged_attention.xla import paged_attention


def ragged_paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
    **options: Any,
) -> Results:
    page_size = page_size_of(k_pages, q.shape[2])
    options = dict(options, sinks=sinks, k_scale=k_scale, v_scale=v_scale)

    def decode(queries, kv_lens):
        return paged_attention(queries, k_pages, v_pages, kv_lens, page_indices, **options)

    def prefill(q_starts, q_lens):
        return blocked_attention(
            q,
            _fetch_pages(k_pages, v_pages, page_indices, kv_lens, q.shape[2]),
            q_starts,
            q_lens,
            jnp.zeros_like(kv_lens),
            kv_lens,
            num_kv_heads=k_pages.shape[1],
            max_len=page_indices.shape[1] * page_size,
            align=page_size,
            **options,
        )

    return split_rows(q, kv_lens, cu_q_lens, num_seqs, decode=decode, prefill=prefill)


def _fetch_pages(k_pages, v_pages, page_indices, kv_lens, head_dim):
    page_size = page_size_of(k_pages, head_dim)

    def fetch(row, start, num_keys):
        offsets = jnp.arange(num_keys // page_size, dtype=jnp.int32)
        page = start // page_size + offsets
        index = page_indices.at[row, page].get(mode="clip")
        index = jnp.where(page * page_size < kv_lens[row], index, 0)
        return _tokens(k_pages[index], head_dim), _tokens(v_pages[index], head_dim)

    return fetch


def _tokens(pages, head_dim):
    # [pages, num_kv_heads, ...] -> [num_kv_heads, tokens, head_dim]
    values = jnp.swapaxes(unpack(pages, head_dim).astype(jnp.float32), 0, 1)
    return values.reshape(values.shape[0], -1, head_dim)
