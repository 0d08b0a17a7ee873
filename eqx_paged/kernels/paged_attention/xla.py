"""Paged decode attention in plain XLA.

The pages in use form a worklist, row after row, which a loop works off a tile of pages
at a time: its cost follows the sum of the lengths, not the capacity. The pages of a tile
and the kv heads are the batch axes of two matrix products; each page yields a partial
softmax, merged into its row's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from .._online_softmax import DEFAULT_MASK_VALUE, normalise, partial_softmax
from .._pages import page_size_of, unpack


# Keys of a tile, in numbers and in tokens: many, since each tile takes some 50 us besides
# its products, but few enough that it stays in the caches.
TILE_SIZE = 2**19
MAX_TILE_TOKENS = 1024


def paged_attention(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
    *,
    sm_scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
    k_scale: Float[Array, " num_kv_heads"] | None,
    v_scale: Float[Array, " num_kv_heads"] | None,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], page_size_of(k_pages, head_dim)
    group = num_heads // num_kv_heads
    tile_tokens = min(TILE_SIZE // (num_kv_heads * head_dim), MAX_TILE_TOKENS)
    pages_per_tile = max(1, min(tile_tokens // page_size, page_indices.size))
    first = jnp.zeros_like(kv_lens)
    if sliding_window is not None:
        first = jnp.maximum(kv_lens - sliding_window, 0)
    ends = jnp.cumsum(-(-kv_lens // page_size) - first // page_size)
    offsets = jnp.arange(page_size, dtype=jnp.int32)[None]
    queries = q.astype(jnp.float32).reshape(num_seqs, num_kv_heads, group, head_dim)
    factor = jnp.full(num_kv_heads, sm_scale, jnp.float32)
    if k_scale is not None:
        factor = factor * k_scale

    def tile_from(item):
        """Of the pages from `item` of the worklist on: the row, the index in the pool, and
        the first and the end of what is seen of each. Past its end nothing is seen."""
        item = item + jnp.arange(pages_per_tile, dtype=jnp.int32)
        row = jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32)
        exists = row < num_seqs
        row = jnp.minimum(row, num_seqs - 1)
        # Counted back from the row's last page, which is where the worklist of a row ends.
        page = -(-kv_lens[row] // page_size) - (ends[row] - item)
        page = jnp.where(exists, page, 0)
        index = jnp.where(exists, page_indices[row, page], 0)
        start = page * page_size
        seen = (first[row] - start, jnp.where(exists, kv_lens[row] - start, 0))
        return row, index, *seen

    def accumulate_pages(carry):
        done, (row, index, seen_from, seen_to), m, l, acc = carry
        keep = (offsets >= seen_from[:, None]) & (offsets < seen_to[:, None])
        # Turned and scaled as they are fetched: the product of keys in this order is
        # three times as fast, and a copy that also multiplies becomes vector code.
        k = unpack(k_pages[index], head_dim).astype(jnp.float32)
        k = jnp.swapaxes(k * factor[None, :, None, None], 2, 3)
        k = jax.lax.optimization_barrier(k)  # or the product would turn them back
        logits = jnp.einsum("nkgd,nkds->nkgs", queries[row], k)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        p, page_m, page_l = partial_softmax(logits, keep[:, None, None])
        v = unpack(v_pages[index], head_dim).astype(jnp.float32)
        v = jnp.where(keep[:, None, :, None], v, 0.0)  # 0 * NaN is not 0
        page_acc = jnp.einsum("nkgs,nksd->nkgd", p, v)

        new_m = m.at[row].max(page_m)
        old, new = jnp.exp(m - new_m), jnp.exp(page_m - new_m[row])
        l = (l * old).at[row].add(page_l * new)
        acc = (acc * old[..., None]).at[row].add(page_acc * new[..., None])
        # The next tile is found here, or it would be again for each number it fetches.
        done += pages_per_tile
        return done, tile_from(done), new_m, l, acc

    per_query = (num_seqs, num_kv_heads, group)
    *_, m, l, acc = jax.lax.while_loop(
        lambda carry: carry[0] < ends[-1],
        accumulate_pages,
        (
            jnp.int32(0),
            tile_from(0),
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
