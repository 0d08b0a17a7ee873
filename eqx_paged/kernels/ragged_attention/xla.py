"""Ragged attention over contiguous keys and values in plain XLA.

Rows advance in step, a block of positions at a time, from the first block that any row
needs to the last: the cost follows the span of all windows together, not the buffer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from .._blocked import blocked_attention, Results, split_rows
from .._online_softmax import accumulate, DEFAULT_MASK_VALUE, normalise, partial_softmax
from .._pages import values_of


# Keys of a block, in numbers: with as many values they fit the L2 caches of two cores. Of
# many rows and heads that is few positions, each of which takes its turn of the loop.
BLOCK_NUMBERS = 2**18
MIN_BLOCK = 16
# Of the rows of one token in a mixed step, as in a decode step where nothing is asked for.
DECODE_BLOCK = 256


def ragged_gqa(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    *,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
    block_size: int,
) -> Results:
    num_seqs, num_heads, head_dim = q.shape
    max_len, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    room = BLOCK_NUMBERS // (num_seqs * num_kv_heads * head_dim)
    block = min(max(room, MIN_BLOCK), block_size, max_len)
    starts = jnp.maximum(starts, 0)
    if sliding_window is not None:
        starts = jnp.maximum(starts, lengths - sliding_window)
    queries = q.astype(jnp.float32).reshape(num_seqs, num_kv_heads, group, head_dim)
    factor = jnp.full(num_kv_heads, sm_scale, jnp.float32)
    if k_scale is not None:
        factor = factor * k_scale

    def add_block(carry):
        j, *so_far = carry
        # The last block is moved back to end with the buffer; what it sees again is hidden.
        at = jnp.minimum(j * block, max_len - block)
        position = (at + jnp.arange(block, dtype=jnp.int32))[None]
        keep = (position >= starts[:, None]) & (position < lengths[:, None])
        keep &= position >= j * block
        block_k, block_v = (
            values_of(jax.lax.dynamic_slice_in_dim(x, at, block, axis=1)) for x in (k, v)
        )
        block_k, block_v = block_k.astype(jnp.float32), block_v.astype(jnp.float32)
        block_k = _heads_first(block_k * factor[None, None, :, None])
        # 0 * NaN is not 0.
        block_v = _heads_first(jnp.where(keep[:, :, None, None], block_v, 0.0))
        logits = jnp.einsum("bkgd,bksd->bkgs", queries, block_k)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        p, block_m, block_l = partial_softmax(logits, keep[:, None, None])
        block_acc = jnp.einsum("bkgs,bksd->bkgd", p, block_v)
        return j + 1, *accumulate(tuple(so_far), (block_m, block_l, block_acc))

    per_query = (num_seqs, num_kv_heads, group)
    in_use = lengths > starts
    first = jnp.min(jnp.where(in_use, starts, max_len), initial=max_len)
    last = jnp.minimum(jnp.max(jnp.where(in_use, lengths, 0), initial=0), max_len)
    _, m, l, acc = jax.lax.while_loop(
        lambda carry: carry[0] * block < last,
        add_block,
        (
            first // block,
            jnp.full(per_query, DEFAULT_MASK_VALUE, jnp.float32),
            jnp.zeros(per_query, jnp.float32),
            jnp.zeros((*per_query, head_dim), jnp.float32),
        ),
    )
    sinks = None if sinks is None else sinks.reshape(1, num_kv_heads, group)
    out = normalise(acc, m, l, sinks)
    if v_scale is not None:
        out = out * v_scale[None, :, None, None]
    per_head = (num_seqs, num_heads)
    return (
        out.reshape(q.shape).astype(q.dtype),
        m.reshape(per_head),
        l.reshape(per_head),
    )


def _heads_first(
    block: Float[Array, "num_seqs block num_kv_heads head_dim"],
) -> Float[Array, "num_seqs num_kv_heads block head_dim"]:
    # Behind the barrier a copy of whole heads in vector code; the product would make its
    # own, a number at a time over a stride of all heads, which takes three times as long.
    return jax.lax.optimization_barrier(jnp.swapaxes(block, 1, 2))


def ragged_chunk_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    **options: Any,
) -> Results:
    """Packed rows of queries, as in `ragged_paged_attention`."""

    def fetch(row, start, num_keys):
        # Positions past the buffer repeat its last one, and are hidden by its length.
        position = start + jnp.arange(num_keys, dtype=jnp.int32)
        block_k, block_v = (values_of(x.at[row, position].get(mode="clip")) for x in (k, v))
        return _by_head(block_k), _by_head(block_v)

    def decode(queries, lengths):
        return ragged_gqa(
            queries, k, v, lengths, starts, block_size=DECODE_BLOCK, **options
        )

    def prefill(q_starts, q_lens):
        return blocked_attention(
            q,
            fetch,
            q_starts,
            q_lens,
            starts,
            lengths,
            num_kv_heads=k.shape[2],
            max_len=k.shape[1],
            align=1,
            **options,
        )

    return split_rows(q, lengths, cu_q_lens, num_seqs, decode=decode, prefill=prefill)


def _by_head(tokens):
    # [tokens, num_kv_heads, head_dim] -> [num_kv_heads, tokens, head_dim]
    return jnp.swapaxes(tokens.astype(jnp.float32), 0, 1)
