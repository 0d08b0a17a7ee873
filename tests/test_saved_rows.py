"""Rows of a cache in a file: what comes back, where, and what is refused."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import (
    assert_trees_identical,
    ints,
    poison_free_pages,
    rng_of,
    stored_as_on,
    told,
)
from .test_cache import assert_same_contents, contents, empty, fill


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


def seal(path, tensors, metadata):
    """Writes a file whose checksum is right, whatever else is wrong about it."""
    import safetensors.numpy

    crc = 0
    for name, x in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes(), crc)
    safetensors.numpy.save_file(tensors, path, metadata | {"crc32": f"{crc:08x}"})


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
        ("starts", np.array([0, 16], np.int32)),
        ("starts", np.array([0, 4], np.int32)),
        ("starts", np.array([0], np.int32)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.tolist()}, {x.dtype}",
)
def test_a_file_with_corrupted_rows_is_refused(getkey, tmp_path, name, wrong):
    cache = fill(empty(), (3, 12, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [0, 1])
    tensors, metadata = read_file(tmp_path / "rows")
    assert tensors["page_indices"].tolist() == [[0, 0], [1, 2]]
    seal(tmp_path / "rows", tensors | {name: wrong}, metadata)
    with pytest.raises(ValueError, match=r"(?s)^(?!.*damaged).*rows"):
        cache.load(tmp_path / "rows", [2, 3])


def test_a_file_with_a_wrong_table_is_refused(getkey, tmp_path):
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
            seal(tmp_path / "wrong", changed, metadata)
            with pytest.raises(ValueError):
                empty().load(tmp_path / "wrong", [0, 1])
    for name in tensors:
        changed = {n: x for n, x in tensors.items() if n != name}
        seal(tmp_path / "wrong", changed, metadata)
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


def test_a_changed_byte_is_told(getkey, tmp_path):
    cache = fill(empty(), (12, 3, 0, 0), rng_of(getkey()))
    cache.save(tmp_path / "rows", [0, 1])
    whole = (tmp_path / "rows").read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in (begin, (begin + len(whole)) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged: the checksum .* is .{8}, but was"):
            empty().load(tmp_path / "damaged", [0, 1])


@pytest.mark.parametrize("changed", (dict(page_size="12"), dict(page_size="x"), {}))
def test_another_format_or_page_size_is_told(getkey, tmp_path, changed):
    fill(empty(), (12, 0, 0, 0), rng_of(getkey())).save(tmp_path / "rows", [0])
    tensors, metadata = read_file(tmp_path / "rows")
    changed = changed or dict(format="eqx_paged rows 1")
    seal(tmp_path / "rows", tensors, metadata | changed)
    with pytest.raises(ValueError, match="|".join(changed.values())):
        empty().load(tmp_path / "rows", [0])


# --- Pages of another size


@pytest.mark.parametrize(
    "old, new, head_dim, dtype",
    [
        *((8, 32, 16, "float32"), (32, 8, 64, "bfloat16"), (16, 8, 80, "float32")),
        (16, 32, 64, "bfloat16"),
    ],
)
def test_rows_load_into_pages_of_another_size(getkey, tmp_path, old, new, head_dim, dtype):
    rng = rng_of(getkey())
    sizes = dict(head_dim=head_dim, dtype=jnp.dtype(dtype), max_len=64)
    # Rows 0 and 2 have a page and a half in common at page size 16; row 3 is row 0 again.
    cache = fill(empty(page_size=old, **sizes), (24, 7, 0, 0), rng)
    cache, _ = cache.fork(0, 2)
    cache, _ = poison_free_pages(fill(cache, (10, 0, 3, 0), rng)).fork(0, 3)
    cache.save(tmp_path / "rows", [3, 1, 2, 0])
    target = poison_free_pages(empty(page_size=new, **sizes, num_pages=40))
    loaded, result = target.load(tmp_path / "rows", [0, 1, 2, 3])
    assert told(result) == "successful"
    assert loaded.kv_lens.tolist() == [34, 7, 27, 34]
    for row, source in enumerate((3, 1, 2, 0)):
        assert_same_contents(loaded, row, contents(cache, source))
    # Two equal rows are one. The third has in common with them what is whole in both: of
    # 24 tokens, or of as many as the old pages shared, the pages that those fill.
    in_common = 24 // old * old // new
    ends = [-(-34 // new), -(-7 // new), -(-27 // new)]
    assert int(loaded.table.num_free_pages) == 40 - sum(ends) + in_common
    # Saved again it is the same, and each row goes on by itself.
    loaded.save(tmp_path / "again", [0, 1, 2, 3])
    again, result = empty(page_size=old, **sizes).load(tmp_path / "again", [3, 1, 2, 0])
    for row in range(4):
        assert_same_contents(again, row, contents(cache, row))
    before = contents(loaded, 3)
    loaded = fill(loaded, (3, 9, 1, 0), rng)
    assert_same_contents(loaded, 3, before)


@pytest.mark.parametrize("new", (8, 16, 64))
def test_rows_that_dropped_pages_load_again(getkey, tmp_path, new):
    rng = rng_of(getkey())
    sizes = dict(max_len=64, num_pages=20)
    cache = fill(empty(page_size=16, **sizes), (24, 16, 5, 0), rng)
    cache = fill(cache, (16, 16, 0, 0), rng)
    whole = [contents(cache, row) for row in range(3)]
    cache = poison_free_pages(cache.drop_before(ints((25, 32, 4, 0))))
    assert cache.table.starts.tolist() == [16, 32, 0, 0]
    cache.save(tmp_path / "rows", [0, 1, 2])
    loaded, result = empty(page_size=new, **sizes).load(tmp_path / "rows", [3, 0, 2])
    assert told(result) == "successful"
    starts = [16 // new * new, 32 // new * new]
    assert loaded.table.starts.tolist() == [starts[1], 0, 0, starts[0]]
    assert loaded.kv_lens.tolist() == [32, 0, 5, 40]
    pages = [-(-n // new) - s // new for n, s in zip((40, 32, 5), (*starts, 0))]
    assert int(loaded.table.num_free_pages) == 20 - sum(pages)
    loaded = fill(loaded, (9, 0, 0, 1), rng)
    for row, source, first, end in ((3, 0, 16, 40), (2, 2, 0, 5)):
        for x, y in zip(contents(loaded, row), whole[source], strict=True):
            np.testing.assert_array_equal(x[first:end], y[first:end])
