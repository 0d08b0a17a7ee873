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


# --- Saving

DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (16, 80))
def test_saved_rows_come_back(getkey, tmp_path, dtype, head_dim):
    rng = rng_of(getkey())
    cache = empty(dtype=jnp.dtype(dtype), head_dim=head_dim)
    cache = poison_free_pages(fill(cache, (12, 16, 1, 0), rng))
    cache.save(tmp_path / "rows", [2, 0])

    # Another pool, another number of rows, and other rows in it.
    other = empty(
        dtype=jnp.dtype(dtype), head_dim=head_dim, num_pages=30, num_seqs=6, max_len=64
    )
    other = fill(other, (0, 9, 0, 0, 0, 0), rng)
    kept = contents(other, 1)
    loaded, result = other.load(tmp_path / "rows", [0, 5])
    assert told(result) == "successful"
    assert loaded.kv_lens.tolist() == [1, 9, 0, 0, 0, 12]
    assert_same_contents(loaded, 0, contents(cache, 2))
    assert_same_contents(loaded, 5, contents(cache, 0))
    assert_same_contents(loaded, 1, kept)
    assert int(loaded.table.num_free_pages) == 30 - 2 - 1 - 2
    # And goes on as any other.
    loaded = fill(loaded, (9, 1, 1, 0, 0, 20), rng)
    assert_same_contents(
        dataclasses.replace(loaded, table=loaded.table.truncate(ints([1] * 5 + [12]))),
        5,
        contents(cache, 0),
    )


@pytest.mark.parametrize(
    "source, target, head_dim", (("tpu", "cpu", 80), ("cpu", "tpu", 80), ("cpu", "tpu", 16))
)
def test_rows_saved_on_one_platform_load_on_another(
    getkey, tmp_path, source, target, head_dim
):
    sizes = dict(head_dim=head_dim, dtype=jnp.bfloat16)
    with stored_as_on(source):
        cache = empty(**sizes)
    cache = poison_free_pages(fill(cache, (12, 16, 1, 0), rng_of(getkey())))
    cache.save(tmp_path / "rows", [2, 0])
    with stored_as_on(target):
        other = empty(**sizes)
    assert other.layers[0].k_pages.dtype != cache.layers[0].k_pages.dtype
    loaded, result = other.load(tmp_path / "rows", [0, 3])
    assert told(result) == "successful"
    assert_same_contents(loaded, 0, contents(cache, 2))
    assert_same_contents(loaded, 3, contents(cache, 0))
    for x, y in zip(jax.tree.leaves(loaded.layers), jax.tree.leaves(other.layers)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    loaded.save(tmp_path / "again", [0, 3])
    again, wanted = (read_file(tmp_path / name)[0] for name in ("again", "rows"))
    assert_trees_identical(again, wanted)


def test_what_was_shared_is_shared_again(getkey, tmp_path):
    rng = rng_of(getkey())
    cache, _ = fill(empty(), (20, 0, 0, 0), rng).fork(ints((0, 0)), ints((1, 2)))
    cache = fill(cache, (0, 0, 1, 0), rng)
    cache.save(tmp_path / "rows", [0, 1, 2])
    loaded, result = empty().load(tmp_path / "rows", [3, 2, 1])
    assert told(result) == "successful"
    # Three pages of the first two rows, and the third's copy of the last.
    assert int(loaded.table.num_free_pages) == 12 - 4
    assert sorted(loaded.table.ref_counts.tolist()) == [0] * 8 + [1, 2, 3, 3]
    wanted = contents(cache, 0)
    loaded = fill(loaded, (0, 0, 4, 0), rng)
    assert_same_contents(loaded, 3, wanted)


def test_rows_without_tokens_can_be_saved(getkey, tmp_path):
    cache = fill(empty(), (12, 0, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [3, 0])
    loaded, result = empty().load(tmp_path / "rows", [0, 1])
    assert told(result) == "successful"
    assert loaded.kv_lens.tolist() == [0, 12, 0, 0]
    cache.save(tmp_path / "none", [1])
    loaded, result = empty().load(tmp_path / "none", [2])
    assert told(result) == "successful"
    assert_trees_identical(loaded.table, empty().table)


def test_a_file_holds_nothing_of_other_rows(getkey, tmp_path):
    # The page's tail still holds what a longer sequence left there.
    import safetensors.numpy

    cache = fill(empty(), (16, 3, 0, 0), rng_of(getkey())).truncate(ints((9, 3, 0, 0)))
    cache.save(tmp_path / "rows", [0])
    tensors = safetensors.numpy.load_file(tmp_path / "rows")
    stored = np.concatenate([x.ravel() for n, x in tensors.items() if "layer" in n])
    assert np.count_nonzero(stored) == 2 * 2 * 9 * 2 * 16  # layers, k and v, tokens


def test_loading_into_rows_in_use_changes_nothing(getkey, tmp_path):
    cache = fill(empty(), (12, 3, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [0])
    loaded, result = cache.load(tmp_path / "rows", [1])
    assert told(result) == "row_in_use"
    assert_trees_identical(loaded, cache)


@pytest.mark.parametrize(
    "changed, wanted",
    [(dict(num_pages=1), "out_of_pages"), (dict(max_len=8), "sequence_too_long")],
)
def test_loading_what_does_not_fit_changes_nothing(getkey, tmp_path, changed, wanted):
    fill(empty(), (12, 3, 0, 0), rng_of(getkey())).save(tmp_path / "rows", [0])
    target = empty(**changed)
    loaded, result = target.load(tmp_path / "rows", [1])
    assert told(result) == wanted
    assert_trees_identical(loaded, target)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(num_layers=3), ("2", "3")),
        (dict(num_kv_heads=4), ("2", "4")),
        (dict(head_dim=32), ("16", "32")),
        (dict(page_size=16), ("8", "16")),
        (dict(dtype=jnp.bfloat16), ("float32", "bfloat16")),
    ],
)
def test_another_geometry_is_refused_naming_both(getkey, tmp_path, changed, words):
    fill(empty(), (12, 3, 0, 0), rng_of(getkey())).save(tmp_path / "rows", [0])
    pattern = "".join(rf"(?=.*{word})" for word in words)
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        empty(**changed).load(tmp_path / "rows", [0])


@pytest.mark.parametrize("rows", ([0, 1], [4], [-1], [0, 0], []))
def test_the_rows_to_load_into_are_checked(getkey, tmp_path, rows):
    fill(empty(), (12, 3, 0, 0), rng_of(getkey())).save(tmp_path / "rows", [0])
    with pytest.raises(ValueError):
        empty().load(tmp_path / "rows", rows)


@pytest.mark.parametrize("rows", ([4], [-1], [0, 0]))
def test_the_rows_to_save_are_checked(tmp_path, rows):
    with pytest.raises(ValueError):
        empty().save(tmp_path / "rows", rows)
    assert not (tmp_path / "rows").exists()


def test_a_damaged_file_is_refused(getkey, tmp_path):
    cache = fill(empty(), (12, 3, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [0])
    whole = (tmp_path / "rows").read_bytes()
    # Cut within the header's length, the header, its end, and the tensors.
    end = 8 + int.from_bytes(whole[:8], "little")
    cuts = (1, 7, 8, 9, 40, end - 1, end, end + 1, (end + len(whole)) // 2, -7, -1)
    for damaged in (b"", b"nonsense", whole + b"x", *(whole[:n] for n in cuts)):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError):
            cache.load(tmp_path / "damaged", [2])
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "missing", [2])
    # The cache that met them is still good.
    loaded, result = cache.load(tmp_path / "rows", [2])
    assert told(result) == "successful"
    assert_same_contents(loaded, 2, contents(cache, 0))


def read_file(path):
    import safetensors

    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


# The first row has one page and the second two, so that the first's second entry is unused.
@pytest.mark.parametrize(
    "name, wrong",
    [
        ("kv_lens", np.array([9, 12], np.int32)),  # the first row would hold a page twice
        ("kv_lens", np.array([12, 3], np.int32)),
        ("kv_lens", np.array([3, 8], np.int32)),
        ("kv_lens", np.array([3, 17], np.int32)),
        ("kv_lens", np.array([3.0, 12.0], np.float32)),
        ("kv_lens", np.array([[3, 12]], np.int32)),
        ("kv_lens", np.array(3, np.int32)),
        ("page_indices", np.array([[0, 0], [1, 1]], np.int32)),
        ("page_indices", np.array([[0, 0], [1, 0]], np.int32)),  # page 0 as a second page
        ("page_indices", np.array([[0, 0], [1, 2]], np.float32)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.tolist()}, {x.dtype}",
)
def test_a_file_with_corrupted_rows_is_refused(getkey, tmp_path, name, wrong):
    import safetensors.numpy

    cache = fill(empty(), (3, 12, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [0, 1])
    tensors, metadata = read_file(tmp_path / "rows")
    assert tensors["page_indices"].tolist() == [[0, 0], [1, 2]]
    safetensors.numpy.save_file(tensors | {name: wrong}, tmp_path / "rows", metadata)
    with pytest.raises(ValueError, match="rows"):
        cache.load(tmp_path / "rows", [2, 3])


def test_a_file_with_a_wrong_table_is_refused(getkey, tmp_path):
    import safetensors.numpy

    cache = fill(empty(), (12, 3, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [0, 1])
    tensors, metadata = read_file(tmp_path / "rows")
    integers = [n for n, x in tensors.items() if x.dtype == np.int32]
    assert integers
    for name in integers:
        for value in (-1, 99, 2**31 - 1):
            changed = dict(tensors)
            changed[name] = tensors[name].copy()
            changed[name].flat[0] = value
            safetensors.numpy.save_file(changed, tmp_path / "wrong", metadata)
            with pytest.raises(ValueError):
                empty().load(tmp_path / "wrong", [0, 1])
    for name in tensors:
        changed = {n: x for n, x in tensors.items() if n != name}
        safetensors.numpy.save_file(changed, tmp_path / "wrong", metadata)
        with pytest.raises(ValueError):
            empty().load(tmp_path / "wrong", [0, 1])


def test_saving_replaces_an_older_file_and_leaves_no_other(getkey, tmp_path):
    rng = rng_of(getkey())
    cache = fill(empty(), (12, 3, 0, 0), rng)
    cache.save(tmp_path / "rows", [0])
    cache.save(tmp_path / "rows", [1])
    assert [x.name for x in tmp_path.iterdir()] == ["rows"]
    loaded, _ = empty().load(tmp_path / "rows", [0])
    assert loaded.kv_lens.tolist() == [3, 0, 0, 0]


@pytest.mark.parametrize(
    "rows", ([True, False, False, False], [0.7], "0", 0, [[0, 1]]), ids=str
)
def test_rows_to_save_are_integers(tmp_path, no_type_hook, rows):
    with pytest.raises(ValueError, match="integers"):
        empty().save(tmp_path / "rows", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ("num_layers", "num_pages", "page_size", "max_len"))
@pytest.mark.parametrize("value", (16.0, True, "16"))
def test_sizes_are_integers(no_type_hook, name, value):
    with fails_naming((name, repr(value))):
        empty(**{name: value})
