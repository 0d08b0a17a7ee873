import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import append, check_batch, ints, told


def cache_of(*kv_lens, num_pages=12):
    import eqx_paged

    cache = eqx_paged.PagedKVCache.empty(
        num_layers=1,
        num_pages=num_pages,
        page_size=8,
        num_kv_heads=2,
        head_dim=16,
        num_seqs=len(kv_lens),
        max_len=32,
    )
    cache, _, result = append(cache, ints(kv_lens), max(1, sum(kv_lens)))
    assert told(result) == "successful"
    return cache


@pytest.mark.parametrize("q_lens", ((1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)))
def test_decode_has_one_token_a_row(q_lens):
    cache, batch, result = append(cache_of(0, 7, 8, 9), ints(q_lens))
    assert told(result) == "successful"
    check_batch(batch, cache.table, q_lens, kind="decode")
    assert batch.cu_q_lens.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "q_lens",
    ((5, 1, 8, 2), (16, 0, 0, 0), (0, 0, 0, 16), (0, 9, 0, 7), (1, 1, 1, 1), (0, 0, 0, 0)),
)
def test_mixed_packs_tokens_row_after_row(q_lens):
    cache, batch, result = append(cache_of(0, 7, 8, 9), ints(q_lens), 16)
    assert told(result) == "successful"
    check_batch(batch, cache.table, q_lens, kind="mixed", num_tokens=16)


def test_a_step_may_be_full_to_the_last_token():
    cache, batch, result = append(cache_of(0, 7), ints((3, 2)), 5)
    assert told(result) == "successful"
    check_batch(batch, cache.table, (3, 2), kind="mixed", num_tokens=5)
    assert int(batch.slots.max()) < 12 * 8


def test_fields_have_the_contracts_shapes():
    cache = cache_of(0, 7, 8)
    _, decode, _ = append(cache, ints((1, 1, 0)))
    _, mixed, _ = append(cache, ints((1, 1, 0)), 11)
    for batch, num_tokens in ((decode, 3), (mixed, 11)):
        assert batch.page_indices.shape == (3, 4)
        assert batch.kv_lens.shape == batch.last_tokens.shape == batch.starts.shape == (3,)
        assert batch.cu_q_lens.shape == (4,)
        assert batch.num_seqs.shape == ()
        assert batch.positions.shape == batch.slots.shape == (num_tokens,)


FAILURES = [
    ((1, 1, 2, 0), None, "too_many_tokens"),
    ((-1, 0, 0, 0), None, "invalid_argument"),
    ((2, 0, -1, 0), None, "invalid_argument"),
    ((0, 0, 0, 1), None, "sequence_too_long"),
    ((4, 4, 4, 0), 11, "too_many_tokens"),
    ((2**30, 2**30, 2**30, 2**30), 16, "too_many_tokens"),  # a sum that overflows to 0
    ((2**31 - 1, 1, 0, 0), 16, "too_many_tokens"),
    ((0, 0, 0, 1), 16, "sequence_too_long"),
    ((16, 16, 16, 0), 64, "out_of_pages"),
    ((40, 0, 0, 0), 16, "too_many_tokens"),
    ((40, 0, 0, 0), 64, "sequence_too_long"),
]


@pytest.mark.parametrize("q_lens, num_tokens, wanted", FAILURES)
def test_a_failed_append_writes_nothing_and_attends_to_nothing(q_lens, num_tokens, wanted):
    import eqx_paged

    before = cache_of(1, 7, 8, 32, num_pages=8)
    cache, batch, result = append(before, ints(q_lens), num_tokens)
    assert told(result) == wanted
    assert cache.table.kv_lens.tolist() == before.table.kv_lens.tolist()
    kind = "decode" if num_tokens is None else "mixed"
    check_batch(batch, before.table, q_lens, kind=kind, ok=False, num_tokens=num_tokens)

    shape = (batch.positions.shape[0], 2, 16)
    q = jnp.ones(shape)
    attention = eqx_paged.PagedAttention()
    out, pages = attention(q, q, q, cache.layers[0], batch)
    np.testing.assert_array_equal(out, np.zeros(shape))
    np.testing.assert_array_equal(pages.k_pages, before.layers[0].k_pages)
    np.testing.assert_array_equal(pages.v_pages, before.layers[0].v_pages)


@pytest.mark.parametrize("num_tokens", (0, -3))
def test_num_tokens_is_checked(num_tokens):
    with pytest.raises(ValueError, match=str(num_tokens)):
        cache_of(0, 1).append(ints((0, 0)), num_tokens)
