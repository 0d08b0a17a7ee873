"""Causal attention of packed query rows in plain XLA, a tile of queries at a time.

Only blocks of keys that a tile may see are fetched, and nothing of the size tokens x
context is ever made. Where the keys come from is the caller's: pages or a buffer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ._online_softmax import accumulate, DEFAULT_MASK_VALUE, normalise, partial_softmax


class Tile(NamedTuple):
    """How many queries of a row meet how many of its keys at a time, at most."""

    queries: int
    keys: int


# XLA works on the products of 3 heads a kv head with all cores from some 100 queries on,
# and many keys at a time are faster in a long row. Where there are few of either, most of
# such a tile would be padding and keys that no query sees. A usual page is 64 keys.
LARGE, SMALL = Tile(128, 256), Tile(32, 64)
FEW_KEYS = 256

# Takes a row, its first position and how many keys.
Fetch = Callable[
    [Int32[Array, ""], Int32[Array, ""], int],
    tuple[
        Float[Array, "num_kv_heads block head_dim"],
        Float[Array, "num_kv_heads block head_dim"],
    ],
]


# Output, largest logit and denominator of each query, or the first of these.
Results = tuple[Float[Array, "num_queries num_heads *head_dim"], ...]


def split_rows(
    q: Float[Array, "num_tokens num_heads head_dim"],
    kv_lens: Int32[Array, " num_seqs"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    decode: Callable[[Array, Array], Results],
    prefill: Callable[[Array, Array], Results],
) -> Results:
    """Sends rows of one token to `decode` and longer ones to `prefill`.

    Neither pays for the other: `decode(queries, kv_lens)` has length 0 for the longer
    rows, `prefill(q_starts, q_lens)` has length 0 for the rows of one token.
    """
    rows = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    q_starts = cu_q_lens[:-1]
    q_lens = jnp.where(rows < num_seqs, cu_q_lens[1:] - q_starts, 0)
    in_decode = q_lens == 1
    token = jnp.where(in_decode, q_starts, q.shape[0])
    prefilled = prefill(q_starts, jnp.where(in_decode, 0, q_lens))
    decoded = decode(q.at[token].get(mode="clip"), jnp.where(in_decode, kv_lens, 0))
    return tuple(
        whole.at[token].set(part, mode="drop")
        for whole, part in zip(prefilled, decoded, strict=True)
    )


def blocked_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    fetch: Fetch,
    q_starts: Int32[Array, " num_seqs"],
    q_lens: Int32[Array, " num_seqs"],
    kv_starts: Int32[Array, " num_seqs"],
    kv_lens: Int32[Array, " num_seqs"],
    *,
    num_kv_heads: int,
    max_len: int,
    align: int,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
) -> Results:
    """Attends from rows of `q_lens` tokens at `q_starts`; the other tokens get 0.

    `fetch(row, start, num_keys)` gives the keys and values of positions `[start, start +
    num_keys)` of a row, which has at most `max_len`, unscaled, as float32; `start` and
    `num_keys` are multiples of `align`. What it gives outside `[kv_starts, kv_lens)` may be
    anything.
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    heads = (num_kv_heads, group)
    large, small = (_cut(tile, num_tokens, max_len, align) for tile in (LARGE, SMALL))
    # The padding is what the last tile may reach past the end.
    queries = jnp.pad(q.astype(jnp.float32), ((0, large.queries), (0, 0), (0, 0)))
    queries = queries.reshape(-1, *heads, head_dim) * sm_scale
    if k_scale is not None:  # the keys' factor as well, and there are fewer queries
        queries = queries * k_scale[None, :, None, None]
    sinks = None if sinks is None else sinks.reshape(1, *heads)

    work_off = functools.partial(
        _work_off,
        queries=queries,
        rows=_Rows(q_starts, q_lens, kv_starts, kv_lens),
        fetch=fetch,
        align=align,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
    )
    per_query = queries.shape[:-1]
    whole = (
        jnp.zeros((*per_query, head_dim), jnp.float32),
        jnp.full(per_query, DEFAULT_MASK_VALUE, jnp.float32),
        jnp.zeros(per_query, jnp.float32),
    )
    in_large = none = jnp.zeros_like(q_lens)
    # What a program never does is not compiled.
    if large.queries > SMALL.queries and max_len > FEW_KEYS:
        is_long = kv_lens - kv_starts > FEW_KEYS
        in_large = jnp.where(is_long, _in_tiles(q_lens, large.queries), 0)
        whole = work_off(large, none, in_large, whole)
    whole = work_off(small, in_large, q_lens, whole)
    acc, m, l = (x[:num_tokens] for x in whole)
    out = normalise(acc, m, l, sinks)
    if v_scale is not None:
        out = out * v_scale[None, :, None, None]
    per_head = (num_tokens, num_heads)
    return out.reshape(q.shape).astype(q.dtype), m.reshape(per_head), l.reshape(per_head)


def _cut(tile: Tile, num_tokens: int, max_len: int, align: int) -> Tile:
    """As much of a tile as there is work for, and keys in multiples of `align`."""
    num_keys = max(min(tile.keys, max_len) // align, 1) * align
    return Tile(min(tile.queries, num_tokens), num_keys)


def _in_tiles(q_lens: Int32[Array, " num_seqs"], size: int) -> Int32[Array, " num_seqs"]:
    """How many of each row's queries are in tiles of such a size, if the last of these is
    to be more than half full."""
    num_tiles = (q_lens + (size - 1) // 2) // size
    return jnp.minimum(num_tiles * size, q_lens)


class _Rows(NamedTuple):
    q_starts: Int32[Array, " num_seqs"]
    q_lens: Int32[Array, " num_seqs"]
    kv_starts: Int32[Array, " num_seqs"]
    kv_lens: Int32[Array, " num_seqs"]


def _work_off(
    tile: Tile,
    begins: Int32[Array, " num_seqs"],
    ends: Int32[Array, " num_seqs"],
    whole: Sequence[Array],
    *,
    queries: Float[Array, "padded_tokens num_kv_heads group head_dim"],
    rows: _Rows,
    fetch: Fetch,
    align: int,
    **options: Any,
) -> Sequence[Array]:
    """Puts into `whole` what the queries `[begins, ends)` of each row give: the output
    before it is divided, the largest logit and the denominator."""
    num_tiles = -(-(ends - begins) // tile.queries)
    item_ends = jnp.cumsum(num_tiles)
    item_starts = item_ends - num_tiles

    def add_tile(carry):
        item, *whole = carry
        row = jnp.sum(item >= item_ends, dtype=jnp.int32)
        offset = begins[row] + (item - item_starts[row]) * tile.queries
        token = offset + jnp.arange(tile.queries, dtype=jnp.int32)
        start = rows.q_starts[row] + offset
        # A kv head's queries are the rows of one product.
        q_tile = jax.lax.dynamic_slice_in_dim(queries, start, tile.queries)
        parts = _attend_tile(
            q_tile.transpose(1, 2, 0, 3),
            functools.partial(fetch, row),
            rows.kv_lens[row] - rows.q_lens[row] + token,
            rows.kv_starts[row],
            rows.kv_lens[row],
            num_keys=tile.keys,
            align=align,
            **options,
        )
        put = functools.partial(_put, token < ends[row], start)
        return item + 1, *map(put, whole, parts)

    _, *whole = jax.lax.while_loop(
        lambda carry: carry[0] < item_ends[-1], add_tile, (jnp.int32(0), *whole)
    )
    return whole


def _attend_tile(
    q: Float[Array, "num_kv_heads group tile head_dim"],
    fetch: Callable[[Int32[Array, ""], int], tuple[Array, Array]],
    here: Int32[Array, " tile"],
    kv_start: Int32[Array, ""],
    kv_len: Int32[Array, ""],
    *,
    num_keys: int,
    align: int,
    soft_cap: float | None,
    sliding_window: int | None,
) -> tuple[Array, Array, Array]:
    """Attends from the queries at positions `here` of a row, a block of keys at a time.
    Gives the output before it is divided, the largest logit and the denominator."""
    seen_from = kv_start
    if sliding_window is not None:
        first = jnp.maximum(here[0], 0) - sliding_window + 1
        seen_from = jnp.maximum(seen_from, first)
    seen_to = jnp.minimum(here[-1] + 1, kv_len)

    def add_block(carry):
        at, *so_far = carry
        k, v = fetch(at, num_keys)
        position = (at + jnp.arange(num_keys, dtype=jnp.int32))[None]
        keep = (position <= here[:, None]) & (position >= kv_start)
        if sliding_window is not None:
            keep &= here[:, None] - position < sliding_window
        logits = jnp.einsum("kgqd,ksd->kgqs", q, k)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        p, block_m, block_l = partial_softmax(logits, keep[None, None])
        seen = (position >= seen_from) & (position < seen_to)
        v = jnp.where(seen[..., None], v, 0.0)  # 0 * NaN is not 0
        block_acc = jnp.einsum("kgqs,ksd->kgqd", p, v)
        return at + num_keys, *accumulate(tuple(so_far), (block_m, block_l, block_acc))

    _, m, l, acc = jax.lax.while_loop(
        lambda carry: carry[0] < seen_to,
        add_block,
        (
            seen_from - seen_from % align,
            jnp.full(q.shape[:-1], DEFAULT_MASK_VALUE, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        ),
    )
    return acc, m, l


def _put(exists, start, whole, part):
    # A tile may reach into the next row's tokens, which stay as they are.
    part = jnp.moveaxis(part, 2, 0)
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[0])
    exists = exists.reshape(-1, *(1,) * (part.ndim - 1))
    new = jnp.where(exists, part, old)
    return jax.lax.dynamic_update_slice_in_dim(whole, new, start, axis=0)
