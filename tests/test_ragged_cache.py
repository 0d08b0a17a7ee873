import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import (
    append,
    assert_trees_identical,
    check_batch,
    fails_naming,
    ints,
    normal,
    rng_of,
    told,
)


SIZES = dict(num_layers=2, num_seqs=3, max_len=20, num_kv_heads=2, head_dim=16)


def empty(**changed):
    import eqx_paged

    return eqx_paged.RaggedKVCache.empty(**(SIZES | changed))


def as_table(cache):
    """The cache seen as a table of one page a row."""
    return types.SimpleNamespace(
        num_seqs=cache.num_seqs,
        num_pages=cache.num_seqs,
        page_size=cache.max_len,
        kv_lens=cache.lengths,
        page_indices=np.arange(cache.num_seqs)[:, None],
    )


def test_an_empty_cache():
    import eqx_paged

    cache = empty()
    assert len(cache.layers) == 2
    for layer in cache.layers:
        assert isinstance(layer, eqx_paged.RaggedKV)
        assert layer.k.shape == layer.v.shape == (3, 20, 2, 16)
        assert layer.k.dtype == jnp.float32
    assert cache.starts.tolist() == cache.lengths.tolist() == [0, 0, 0]
    assert cache.starts.dtype == cache.lengths.dtype == jnp.int32


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", (0, -1))
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*{value})"):
        empty(**{name: value})


def test_the_dtype_is_floating_point():
    with pytest.raises(ValueError, match="int32"):
        empty(dtype=jnp.int32)


def test_append_packs_tokens_and_grows():
    cache = empty()
    for q_lens, num_tokens in (
        ((5, 0, 12), 17),
        ((0, 3, 1), 9),
        ((1, 1, 1), None),
        ((0, 1, 0), None),
        ((14, 0, 6), 20),
    ):
        cache, batch, result = append(cache, ints(q_lens), num_tokens)
        assert told(result) == "successful"
        kind = "decode" if num_tokens is None else "mixed"
        check_batch(batch, as_table(cache), q_lens, kind=kind, num_tokens=num_tokens)
    assert cache.lengths.tolist() == [20, 5, 20]


@pytest.mark.parametrize(
    "q_lens, num_tokens, wanted",
    [
        ((0, -1, 0), 8, "invalid_argument"),
        ((30, -1, 0), 8, "invalid_argument"),
        ((4, 4, 1), 8, "too_many_tokens"),
        ((2**30, 2**30, 2**30), 8, "too_many_tokens"),
        ((16, 0, 0), 16, "sequence_too_long"),
        ((2**31 - 1, 0, 0), 16, "too_many_tokens"),
        ((2, 0, 0), None, "too_many_tokens"),
        ((0, 1, 0), None, "sequence_too_long"),
    ],
)
def test_a_failed_append_changes_nothing(q_lens, num_tokens, wanted):
    cache, _, _ = append(empty(), ints((5, 20, 0)), 25)
    new, batch, result = append(cache, ints(q_lens), num_tokens)
    assert told(result) == wanted
    assert_trees_identical(new, cache)
    kind = "decode" if num_tokens is None else "mixed"
    check_batch(batch, as_table(cache), q_lens, kind=kind, ok=False, num_tokens=num_tokens)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_written_tokens_are_where_they_belong(getkey, dtype):
    import eqx_paged

    rng = rng_of(getkey())
    cache = empty(dtype=jnp.dtype(dtype))
    cache, batch, _ = append(cache, ints((5, 0, 12)), 20)
    k = normal(rng, (20, 2, 16), dtype)
    k[17:] = np.nan  # padding is dropped
    q = jnp.asarray(k)
    _, layer = eqx_paged.RaggedAttention()(q, q, -q, cache.layers[0], batch)
    wanted = np.zeros((3, 20, 2, 16), np.float32)
    wanted[0, :5], wanted[2, :12] = k[:5], k[5:17]
    for stored, sign in ((layer.k, 1), (layer.v, -1)):
        values = np.asarray(stored)
        if values.dtype == np.uint16:
            values = values.view(jnp.dtype("bfloat16"))
        np.testing.assert_array_equal(values.astype(np.float32), sign * wanted)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(k=(5, 2, 8)), ("k", "(5, 2, 16)", "(5, 2, 8)")),
        (dict(v=(5, 2, 32)), ("v", "(5, 2, 16)", "(5, 2, 32)")),
        (dict(k=(5, 1, 16)), ("k", "(5, 2, 16)", "(5, 1, 16)")),
        (dict(v=(4, 2, 16)), ("v", "(5, 2, 16)", "(4, 2, 16)")),
        (dict(slots=(4,)), ("k", "(4, 2, 16)", "(5, 2, 16)")),
        (dict(k=(5, 32)), ("k", "(5, 2, 16)", "(5, 32)")),
    ],
    ids=str,
)
def test_written_tokens_fit_the_cache(no_type_hook, changed, words):
    shapes = dict(k=(5, 2, 16), v=(5, 2, 16), slots=(5,)) | changed
    k, v = jnp.zeros(shapes["k"]), jnp.zeros(shapes["v"])
    with fails_naming(words):
        empty().layers[0].write(k, v, jnp.zeros(shapes["slots"], jnp.int32))


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(slots=((5,), "float32")), ("slots", "int32", "float32")),
        (dict(slots=((5, 1), "int32")), ("slots", "(5, 1)")),
        (dict(slots=((), "int32")), ("slots", "()")),
        (dict(k=((5, 2, 16), "int32")), ("k", "int32")),
    ],
    ids=str,
)
def test_what_is_written_is_floating_point_with_an_int32_slot_each(
    no_type_hook, changed, words
):
    entries = (5, 2, 16), "float32"
    arguments = dict(k=entries, v=entries, slots=((5,), "int32")) | changed
    with fails_naming(words):
        empty().layers[0].write(**{n: jnp.zeros(*x) for n, x in arguments.items()})


@pytest.mark.parametrize(
    "name, argument, words",
    [
        ("append", jnp.zeros(4, jnp.int32), ("(3,)", "(4,)")),
        ("append", jnp.zeros(3, jnp.int16), ("int32", "int16")),
        ("truncate", jnp.zeros(3), ("int32", "float32")),
        ("truncate", jnp.zeros((3, 1), jnp.int32), ("(3,)", "(3, 1)")),
        ("free", jnp.zeros(2, bool), ("(3,)", "(2,)")),
        ("free", jnp.zeros(3, jnp.int32), ("bool", "int32")),
    ],
    ids=str,
)
def test_arguments_are_one_a_row(no_type_hook, name, argument, words):
    with fails_naming(words):
        getattr(empty(), name)(argument)


def test_starts_reach_the_batch():
    cache = dataclasses.replace(empty(), starts=ints((0, 2, 4)))
    _, batch, _ = append(cache, ints((1, 1, 1)))
    assert batch.starts.tolist() == [0, 2, 4]


def test_a_freed_row_begins_at_its_beginning_again():
    cache = dataclasses.replace(empty(), starts=ints((2, 3, 0)), lengths=ints((5, 6, 7)))
    freed = cache.free(jnp.array([True, False, True]))
    assert freed.starts.tolist() == [0, 3, 0] and freed.lengths.tolist() == [0, 6, 0]
    assert cache.truncate(ints((0, 0, 0))).starts.tolist() == [2, 3, 0]
