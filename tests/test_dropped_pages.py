"""Rows much longer than the pool, whose pages behind a sliding window are free again."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import oracle
from .helpers import ints, poison_free_pages, quick_jit
from .test_generate import HEAD_DIM, MAX_LEN, Model, normed, prompt, weights
from .test_page_table import Pair


PAGE_SIZE, WINDOW, CHUNK = 8, 11, 16
# A window and a chunk begin and end within pages: four, and one that is written to.
NUM_PAGES = 5
LENGTH = 20 * NUM_PAGES * PAGE_SIZE


def test_whole_pages_before_a_position_are_released():
    pair = Pair()
    pair.append(25, 8, 3, 0)
    for starts in ((7, 7, 2, 0), (8, 7, 3, 5), (17, 8, 3, -9), (9, 0, 0, 0)):
        pair.drop_before(*starts)
    assert pair.table.starts.tolist() == [16, 8, 0, 0]
    assert pair.append(1, 1, 0, 1) == "successful"
    pair.drop_before(*[2**31 - 1] * 4)
    assert pair.table.starts.tolist() == [24, 8, 0, 0]
    assert pair.append(6, 7, 0, 1) == "successful"
    pair.drop_before(32, 16, 0, 0)
    assert pair.table.starts.tolist() == [32, 16, 0, 0]
    assert int(pair.table.num_free_pages) == 10 - 2


def test_a_row_is_shortened_to_what_it_still_holds_or_to_nothing():
    pair = Pair(num_pages=16)
    pair.append(25, 25, 25, 25)
    pair.drop_before(17, 17, 17, 17)
    pair.truncate(18, 16, 15, 0)
    assert pair.table.kv_lens.tolist() == [18, 16, 0, 0]
    assert pair.table.starts.tolist() == [16, 16, 0, 0]
    assert pair.append(1, 1, 1, 1) == "successful"
    pair.free(0, 1)
    assert pair.append(9, 9, 0, 0) == "successful"


def test_a_fork_has_dropped_what_its_source_has():
    pair = Pair()
    pair.append(20, 0, 0, 0)
    pair.fork(0, 1)
    pair.drop_before(9, 0, 0, 0)
    assert int(pair.table.num_free_pages) == 10 - 3  # row 1 still has the first
    pair.fork(0, 2)
    assert pair.append(1, 1, 1, 0) == "successful"
    pair.drop_before(0, 16, 0, 0)
    pair.free(0, 2)
    assert int(pair.table.num_free_pages) == 10 - 1


@ft.cache
def expected_logits(tokens):
    """After each token, where each layer sees the last `WINDOW` tokens."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights())
    # The last position stands for those after it, as an index past the end does in JAX.
    x = (
        w["embedding"][list(tokens)]
        + w["positions"][np.minimum(np.arange(len(tokens)), 2 * MAX_LEN - 1)]
    )
    for p in w["layers"]:
        h = normed(x, np)
        q, k, v = ((h @ p[n]).reshape(len(h), -1, HEAD_DIM) for n in "qkv")
        out, _, _ = oracle.attention(q, k, v, sliding_window=WINDOW)
        x = x + out.reshape(len(h), -1) @ p["o"]
        x = x + np.maximum(normed(x, np) @ p["up"], 0) @ p["down"]
    return normed(x, np) @ w["out"]


@pytest.mark.parametrize("num_tokens", (CHUNK, None))
def test_a_row_of_twenty_pools_fits_into_one(num_tokens):
    import eqx_paged

    attention = eqx_paged.PagedAttention(sliding_window=WINDOW)
    model = Model(jax.tree.map(jnp.asarray, weights()), attention)
    cache = eqx_paged.PagedKVCache.empty(
        num_layers=2,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        num_seqs=2,
        max_len=LENGTH,
    )
    length = LENGTH if num_tokens else LENGTH // 2
    step = num_tokens or 1
    text = prompt(5, length)

    @quick_jit
    def read(cache, tokens):
        def chunk(cache, tokens):
            q_lens = ints((0, step))
            cache, batch, result = cache.append(q_lens, num_tokens)
            padded = (
                tokens if num_tokens else jnp.stack([jnp.zeros_like(tokens[0]), tokens[0]])
            )
            hidden, cache = model(padded, cache, batch)
            cache = cache.drop_before(cache.kv_lens - WINDOW + 1)
            hidden = hidden if num_tokens else hidden[1:]
            used = NUM_PAGES - cache.table.num_free_pages
            return poison_free_pages(cache), (model.unembed(hidden), result, used)

        return jax.lax.scan(chunk, cache, tokens.reshape(-1, step))

    cache, (logits, results, used) = read(poison_free_pages(cache), ints(text))
    # In float32, of size 10, after two layers.
    np.testing.assert_allclose(
        logits.reshape(length, -1), expected_logits(text), rtol=0, atol=2e-4
    )
    assert jnp.all(results == eqx_paged.RESULTS.successful)
    assert cache.kv_lens.tolist() == [0, length]
    assert int(jnp.max(used)) <= -(-(WINDOW - 1) // PAGE_SIZE) + 1
    cache = cache.free(jnp.array([False, True]))
    assert int(cache.table.num_free_pages) == NUM_PAGES
    assert cache.table.starts.tolist() == [0, 0]
