import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import (
    assert_trees_identical,
    entry,
    fails_naming,
    ints,
    layer_pools,
    normal,
    poison_free_pages,
    quick_jit,
    rng_of,
    row_tokens,
    stacked,
    stored_as_on,
    told,
)


SIZES = dict(
    num_layers=2,
    num_pages=12,
    page_size=8,
    num_kv_heads=2,
    head_dim=16,
    num_seqs=4,
    max_len=32,
)


def empty(**changed):
    import eqx_paged

    return eqx_paged.PagedKVCache.empty(**(SIZES | changed))


@ft.partial(quick_jit, static_argnames="num_tokens")
def store(cache, q_lens, tokens, num_tokens):
    cache, batch, result = cache.append(q_lens, num_tokens)
    layers = tuple(
        layer.write(*(x.astype(layer.dtype) for x in kv), batch.slots)
        for layer, kv in zip(cache.layers, tokens, strict=True)
    )
    return dataclasses.replace(cache, layers=layers), result


def fill(cache, q_lens, rng):
    """Appends random tokens."""
    layer = cache.layers[0]
    shape = (48, layer.num_kv_heads, layer.head_dim)
    tokens = [[normal(rng, shape) for _ in range(2)] for _ in cache.layers]
    cache, result = store(cache, ints(q_lens), tokens, 48)
    assert told(result) == "successful"
    return cache


def contents(cache, row):
    """The keys and values of a row, layer by layer."""
    indices, length = np.asarray(cache.table.page_indices[row]), int(cache.kv_lens[row])
    return [row_tokens(p, indices, length) for ps in layer_pools(cache) for p in ps]


def assert_same_contents(cache, row, wanted):
    for x, y in zip(contents(cache, row), wanted, strict=True):
        np.testing.assert_array_equal(x, y)


# --- Making one


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize(
    "head_dim, page_size, rows, lanes",
    [
        *((64, 16, 8, 128), (16, 8, 1, 128), (128, 8, 8, 128), (256, 16, 16, 256)),
        *((80, 16, 16, 80), (96, 8, 8, 96), (8, 8, 8, 8), (8, 16, 1, 128)),
    ],
)
def test_pages_are_stored_in_rows_of_128_lanes_where_they_can(
    head_dim, page_size, rows, lanes, dtype
):
    cache = empty(head_dim=head_dim, page_size=page_size, dtype=jnp.dtype(dtype))
    stored = jnp.uint16 if dtype == "bfloat16" else jnp.dtype(dtype)
    for layer in cache.layers:
        for pages in (layer.k_pages, layer.v_pages):
            assert pages.shape == (12, 2, rows, lanes)
            assert pages.dtype == stored
        assert layer.head_dim == head_dim
        assert layer.page_size == page_size
        assert (layer.num_pages, layer.num_kv_heads) == (12, 2)
        assert layer.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "head_dim, page_size, rows, lanes",
    [
        *((80, 16, 16, 128), (96, 8, 8, 128), (160, 8, 8, 256), (320, 8, 8, 384)),
        *((64, 16, 8, 128), (128, 8, 8, 128), (256, 16, 16, 256), (8, 8, 8, 8)),
    ],
)
def test_on_a_tpu_pages_are_rounded_up_to_128_lanes(head_dim, page_size, rows, lanes):
    with stored_as_on("tpu"):
        cache = empty(head_dim=head_dim, page_size=page_size, dtype=jnp.bfloat16)
    for layer in cache.layers:
        for pages in (layer.k_pages, layer.v_pages):
            assert pages.shape == (12, 2, rows, lanes)
            assert pages.dtype == jnp.bfloat16
        assert (layer.head_dim, layer.page_size) == (head_dim, page_size)
    assert cache.num_bytes == 2 * 2 * 12 * 2 * rows * lanes * 2


def test_properties():
    cache = empty(max_len=33)
    assert len(cache.layers) == 2
    assert (cache.num_seqs, cache.page_size) == (4, 8)
    assert cache.max_len == 40  # whole pages
    assert cache.kv_lens.tolist() == [0] * 4
    assert cache.num_bytes == 2 * 2 * 12 * 2 * 8 * 16 * 4
    assert empty(dtype=jnp.bfloat16).num_bytes == empty().num_bytes // 2


def test_the_default_dtype_is_float32():
    assert empty().layers[0].dtype == jnp.float32


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, 0) for name in SIZES),
        *((name, -1) for name in SIZES),
        *(("page_size", n) for n in (1, 4, 12, 20, 512)),
    ],
)
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*{value})"):
        empty(**{name: value})


@pytest.mark.parametrize("dtype", ("int32", "uint16", "bool", "complex64"))
def test_the_dtype_is_floating_point(dtype):
    with pytest.raises(ValueError, match=dtype):
        empty(dtype=jnp.dtype(dtype))


# --- Sharing


def test_neither_row_sees_the_others_tokens_after_a_fork(getkey):
    rng = rng_of(getkey())
    cache = fill(empty(), (12, 3, 0, 0), rng)
    common = contents(cache, 0)
    cache, result = cache.fork(jnp.int32(0), jnp.int32(2))
    assert told(result) == "successful"
    assert_same_contents(cache, 2, common)
    cache = fill(cache, (2, 0, 5, 1), rng)
    for row in (0, 2):
        assert_same_contents(
            dataclasses.replace(cache, table=cache.table.truncate(ints([12] * 4))),
            row,
            common,
        )
    rows = contents(cache, 0)[0][12:], contents(cache, 2)[0][12:14]
    assert not np.any(rows[0] == rows[1])


def test_forks_and_frees_move_no_keys(getkey):
    cache = fill(empty(), (12, 3, 0, 0), rng_of(getkey()))
    forked, _ = cache.fork(ints((0, 1)), ints((2, 3)))
    freed = forked.free(jnp.array([True, False, False, True]))
    cut = freed.truncate(ints((0, 2, 9, 9)))
    for x in (forked, freed, cut):
        assert_trees_identical(x.layers, cache.layers)
    assert cut.kv_lens.tolist() == [0, 2, 9, 0]


def test_rows_may_be_plain_integers(getkey):
    cache = fill(empty(), (12, 3, 0, 0), rng_of(getkey()))
    a, _ = cache.fork(0, 2)
    b, _ = cache.fork(jnp.int32(0), jnp.int32(2))
    assert_trees_identical(a, b)


def test_fork_needs_as_many_sources_as_targets(no_type_hook):
    with pytest.raises(ValueError, match=r"(?s)(?=.*2)(?=.*1)"):
        empty().fork(ints((0, 1)), ints((2,)))


def test_the_callers_cache_is_never_changed(getkey):
    rng = rng_of(getkey())
    cache = fill(empty(), (12, 3, 0, 0), rng)
    before = jax.tree.map(np.array, cache)
    other, _ = cache.fork(0, 2)
    other = fill(other, (4, 0, 4, 9), rng).free(jnp.ones(4, bool))
    assert_trees_identical(cache, before)


@pytest.mark.parametrize(
    "name, argument, words",
    [
        ("append", jnp.zeros(3, jnp.int32), ("(4,)", "(3,)")),
        ("append", jnp.zeros(4), ("int32", "float32")),
        ("truncate", jnp.zeros((4, 1), jnp.int32), ("(4,)", "(4, 1)")),
        ("truncate", jnp.zeros(4, jnp.uint32), ("int32", "uint32")),
        ("free", jnp.zeros(5, bool), ("(4,)", "(5,)")),
        ("free", jnp.zeros(4, jnp.int32), ("bool", "int32")),
    ],
    ids=str,
)
def test_arguments_are_one_a_row(no_type_hook, name, argument, words):
    with fails_naming(words):
        getattr(empty(), name)(argument)


def test_a_batch_of_caches_does_what_each_does_alone(getkey):
    # One copies a page that rows share, one copies two, and one has no page left.
    rng = rng_of(getkey())
    shared = fill(empty(), (12, 5, 0, 0), rng)
    caches = [
        shared.fork(0, 2)[0],
        shared.fork(ints((0, 1)), ints((2, 3)))[0],
        fill(fill(empty(), (32, 16, 0, 0), rng), (0, 16, 32, 0), rng),
    ]
    caches = [poison_free_pages(cache) for cache in caches]

    def step(cache, q_lens, src, gone):
        cache, batch, result = cache.append(q_lens, 9)
        cut = cache.truncate(cache.kv_lens - q_lens).free(gone)
        forked, fork_result = cut.fork(src, jnp.int32(3))
        return cache, batch, result, forked, fork_result

    arguments = (
        ints([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]]),
        ints([0, 1, 2]),
        jnp.array([[False] * 3 + [True], [True] * 4, [False] * 4]),
    )
    mapped = quick_jit(jax.vmap(step))(stacked(caches), *arguments)
    alone = quick_jit(step)
    results = []
    for i, cache in enumerate(caches):
        one = alone(cache, *(x[i] for x in arguments))
        assert_trees_identical(entry(mapped, i), one)
        results.append((told(one[2]), told(one[4])))
    assert results == [("successful",) * 2] * 2 + [("out_of_pages", "successful")]


def test_64_bit_mode_changes_nothing(getkey, tmp_path):
    cache, _ = fill(empty(), (12, 5, 0, 0), rng_of(getkey())).fork(0, 2)
    cache.save(tmp_path / "rows", [0, 2])

    @quick_jit
    def change(cache):
        decode = cache.append(ints((1, 0, 1, 1)))
        mixed = decode[0].append(ints((1, 0, 3, 1)), 9)
        cut = mixed[0].truncate(ints((3, 9, 8, 0))).free(jnp.arange(4) == 0)
        return decode, mixed, cut, cut.fork(1, 0)

    wanted = change(cache), cache.load(tmp_path / "rows", [3, 1])
    with jax.enable_x64(True):
        actual = change(cache), cache.load(tmp_path / "rows", [3, 1])
    assert_trees_identical(actual, wanted)


@pytest.mark.parametrize("name", ("num_layers", "num_pages", "page_size", "max_len"))
@pytest.mark.parametrize("value", (16.0, True, "16"))
def test_sizes_are_integers(no_type_hook, name, value):
    with fails_naming((name, repr(value))):
        empty(**{name: value})
