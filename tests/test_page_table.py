import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from . import oracle
from .helpers import (
    assert_trees_identical,
    check_table,
    entry,
    fails_naming,
    ints,
    quick_jit,
    told,
)


def empty(num_pages=10, num_seqs=4, pages_per_seq=4, page_size=8):
    """A table and its model."""
    import eqx_paged

    sizes = dict(
        num_pages=num_pages,
        num_seqs=num_seqs,
        pages_per_seq=pages_per_seq,
        page_size=page_size,
    )
    return eqx_paged.PageTable.empty(**sizes), oracle.PageTable(**sizes)


# One program an operation and shape, which is much quicker than op by op.
append, fork, truncate, free, drop_before = (
    quick_jit(lambda table, *args, name=name: getattr(table, name)(*args))
    for name in ("append", "fork", "truncate", "free", "drop_before")
)


@quick_jit
def fork_where(table, src, dst, where):
    return table.fork(src, dst, where=where)


class Pair:
    """A table and its model, driven together and compared after every step."""

    def __init__(self, **sizes):
        self.table, self.model = empty(**sizes)
        check_table(self.table, self.model)

    def append(self, *q_lens):
        before = self.table
        self.table, result = append(self.table, ints(q_lens))
        return self._compare(before, result, self.model.append(q_lens))

    def fork(self, src, dst):
        before = self.table
        self.table, result = fork(self.table, ints(src), ints(dst))
        src, dst = np.atleast_1d(src).tolist(), np.atleast_1d(dst).tolist()
        return self._compare(before, result, self.model.fork(src, dst))

    def fork_where(self, src, dst, where):
        before = self.table
        where = jnp.array(where, bool)
        self.table, result = fork_where(self.table, ints(src), ints(dst), where)
        chosen = [(s, d) for s, d, x in zip(src, dst, where) if x]
        wanted = self.model.fork(*([pair[i] for pair in chosen] for i in (0, 1)))
        return self._compare(before, result, wanted)

    def truncate(self, *kv_lens):
        self.table = truncate(self.table, ints(kv_lens))
        self.model.truncate(kv_lens)
        check_table(self.table, self.model)

    def drop_before(self, *starts):
        self.table = drop_before(self.table, ints(starts))
        self.model.drop_before(starts)
        check_table(self.table, self.model)

    def free(self, *rows):
        gone = [i in rows for i in range(self.table.num_seqs)]
        self.table = free(self.table, jnp.array(gone))
        self.model.free(gone)
        check_table(self.table, self.model)

    def _compare(self, before, result, wanted):
        assert told(result) == wanted
        check_table(self.table, self.model)
        if wanted != "successful":
            assert_trees_identical(self.table, before)
        return wanted


def test_an_empty_table():
    table, _ = empty()
    assert (table.num_pages, table.num_seqs, table.pages_per_seq) == (10, 4, 4)
    assert (table.page_size, table.max_len) == (8, 32)
    assert int(table.num_free_pages) == 10
    np.testing.assert_array_equal(table.page_indices, np.zeros((4, 4)))
    np.testing.assert_array_equal(table.kv_lens, np.zeros(4))
    np.testing.assert_array_equal(table.ref_counts, np.zeros(10))
    assert sorted(table.free_pages.tolist()) == list(range(10))
    for x in jax.tree.leaves(table):
        assert x.dtype == jnp.int32


@pytest.mark.parametrize(
    "name, value",
    [
        *(("num_pages", 0), ("num_pages", -1), ("num_seqs", 0), ("pages_per_seq", 0)),
        *(("page_size", 0), ("page_size", 4), ("page_size", 12), ("page_size", 512)),
    ],
)
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*{value})"):
        empty(**{name: value})


@pytest.mark.parametrize(
    "counts, words",
    [
        (jnp.zeros(3, jnp.int32), ("(4,)", "(3,)")),
        (jnp.zeros(5, jnp.int32), ("(4,)", "(5,)")),
        (jnp.zeros((4, 1), jnp.int32), ("(4,)", "(4, 1)")),
        (jnp.zeros((), jnp.int32), ("(4,)", "()")),
        (jnp.zeros(4, jnp.int16), ("int32", "int16")),
        (jnp.zeros(4, jnp.uint32), ("int32", "uint32")),
        (jnp.zeros(4), ("int32", "float32")),
        (jnp.zeros(4, bool), ("int32", "bool")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ("append", "reserve", "truncate", "drop_before"))
def test_counts_are_int32_and_one_a_row(no_type_hook, name, counts, words):
    table, _ = empty()
    with fails_naming(words):
        getattr(table, name)(counts)


@pytest.mark.parametrize(
    "rows, words",
    [
        (jnp.zeros(3, bool), ("(4,)", "(3,)")),
        (jnp.zeros((), bool), ("(4,)", "()")),
        (jnp.zeros(4, jnp.int32), ("bool", "int32")),
        (jnp.zeros(4), ("bool", "float32")),
    ],
    ids=str,
)
def test_rows_to_free_are_a_mask(no_type_hook, rows, words):
    table, _ = empty()
    with fails_naming(words):
        table.free(rows)


@pytest.mark.parametrize(
    "src, dst, words",
    [
        (ints((0,)), ints((1, 2)), ("(1,)", "(2,)")),
        (ints(0), ints((1,)), ("()", "(1,)")),
        (0, ints((1, 2)), ("()", "(2,)")),
        (ints([[0, 1]]), ints([[2, 3]]), ("(1, 2)",)),
        (jnp.zeros(1), ints((1,)), ("src", "float32")),
        (ints((0,)), jnp.ones(1), ("dst", "float32")),
        (ints(0), True, ("dst", "bool")),
    ],
    ids=str,
)
def test_forks_are_pairs_of_integers(no_type_hook, src, dst, words):
    table, _ = empty()
    with fails_naming(words):
        table.fork(src, dst)


def test_append_takes_a_page_when_the_last_is_full():
    pair = Pair()
    for q_lens in ((1, 7, 8, 9), (7, 1, 1, 0), (0, 0, 0, 0), (1, 1, 0, 0)):
        assert pair.append(*q_lens) == "successful"


def test_append_fills_the_pool_to_the_last_page():
    pair = Pair(num_pages=7)
    assert pair.append(32, 16, 8, 0) == "successful"
    assert int(pair.table.num_free_pages) == 0
    assert pair.append(0, 0, 0, 1) == "out_of_pages"
    assert pair.append(0, 1, 0, 0) == "out_of_pages"


def test_append_is_all_or_nothing():
    pair = Pair(num_pages=4)
    assert pair.append(8, 8, 0, 0) == "successful"
    # Two pages are left: either row alone could be served.
    assert pair.append(16, 8, 0, 0) == "out_of_pages"
    assert pair.append(16, 0, 0, 0) == "successful"


def test_append_within_a_page_needs_no_free_page():
    pair = Pair(num_pages=1)
    assert pair.append(1, 0, 0, 0) == "successful"
    assert pair.append(7, 0, 0, 0) == "successful"
    assert pair.append(1, 0, 0, 0) == "out_of_pages"


def test_the_first_reason_is_told():
    pair = Pair(num_pages=2)
    assert pair.append(33, -1, 0, 0) == "invalid_argument"
    assert pair.append(33, 32, 0, 0) == "sequence_too_long"
    assert pair.append(17, 0, 0, 0) == "out_of_pages"
    assert pair.append(16, 0, 0, 0) == "successful"
    assert pair.append(17, 1, 0, 0) == "sequence_too_long"
    assert pair.append(0, 1, 0, 0) == "out_of_pages"


@pytest.mark.parametrize("huge", (2**31 - 1, 2**31 - 8, 2**30, 2**29))
def test_lengths_that_overflow_int32_are_too_long(huge):
    pair = Pair()
    assert pair.append(5, 0, 0, 0) == "successful"
    for q_lens in ((huge, 0, 0, 0), (0, huge, 0, 0), (huge, huge, huge, huge)):
        assert pair.append(*q_lens) == "sequence_too_long"


def test_the_lowest_int32_is_a_negative_count():
    pair = Pair()
    assert pair.append(-(2**31), 0, 0, 0) == "invalid_argument"


def test_freed_pages_are_used_again():
    pair = Pair(num_pages=4)
    for _ in range(5):
        assert pair.append(32, 0, 0, 0) == "successful"
        pair.free(0)
        assert pair.append(0, 16, 16, 0) == "successful"
        pair.free(1, 2)


def test_free_of_nothing_and_of_empty_rows():
    pair = Pair()
    pair.append(9, 0, 0, 0)
    pair.free()
    pair.free(1, 2, 3)
    pair.free(0, 1, 2, 3)
    assert int(pair.table.num_free_pages) == 10


@pytest.mark.parametrize("length", (0, 1, 7, 8, 9, 15, 16, 17, 24, 25, 26, 32, 2**31 - 1))
def test_truncate_releases_whole_pages(length):
    pair = Pair()
    pair.append(25, 8, 0, 0)
    pair.truncate(length, length, length, length)


def test_a_negative_length_truncates_to_nothing():
    pair = Pair()
    pair.append(25, 8, 1, 0)
    pair.truncate(-1, 5, -(2**31), -3)


def test_truncate_then_append_again():
    pair = Pair()
    pair.append(25, 8, 0, 0)
    pair.truncate(9, 8, 0, 0)
    assert pair.append(8, 1, 0, 0) == "successful"
    pair.truncate(16, 0, 0, 0)
    assert pair.append(1, 1, 0, 0) == "successful"


def test_fork_shares_every_page():
    pair = Pair()
    pair.append(20, 3, 0, 0)
    free = int(pair.table.num_free_pages)
    assert pair.fork(0, 2) == "successful"
    assert int(pair.table.num_free_pages) == free
    np.testing.assert_array_equal(pair.table.page_indices[0], pair.table.page_indices[2])


def test_fork_refuses_what_it_cannot_do():
    pair = Pair()
    pair.append(20, 3, 0, 0)
    assert pair.fork(0, 1) == "row_in_use"
    assert pair.fork(0, 0) == "row_in_use"
    assert pair.fork(2, 2) == "row_in_use"
    for src, dst in ((0, 4), (4, 2), (-1, 2), (0, -1), (2**31 - 1, 2)):
        assert pair.fork(src, dst) == "invalid_argument"
    assert pair.fork([0, 0], [2, 2]) == "row_in_use"
    assert pair.fork([0, 0], [2, 1]) == "row_in_use"
    assert pair.fork([0, 0], [1, 7]) == "invalid_argument"
    assert pair.fork([0, 1], [2, 3]) == "successful"


def test_fork_of_an_empty_row_is_empty():
    pair = Pair()
    assert pair.fork(1, 2) == "successful"
    assert pair.append(0, 0, 5, 0) == "successful"


def test_array_forks_from_one_and_from_several_rows():
    pair = Pair(num_seqs=8, num_pages=20)
    pair.append(20, 3, 0, 0, 0, 0, 0, 0)
    assert pair.fork([0, 0, 1], [2, 4, 6]) == "successful"
    assert pair.fork([2], [3]) == "successful"
    pair.free(0, 2)
    pair.append(0, 1, 0, 1, 1, 0, 1, 0)


def test_forks_of_one_call_are_all_from_the_table_before_it():
    # A chain: row 1 is the target of the first and the source of the second.
    pair = Pair()
    pair.append(20, 0, 0, 0)
    for src, dst in (([0, 1], [1, 2]), ([3, 2], [2, 3]), ([2, 0], [3, 2])):
        assert pair.fork(src, dst) == "successful"
        assert pair.append(1, 1, 1, 1) == "successful"
        pair.free(1, 2, 3)
    assert pair.fork([0, 1], [1, 1]) == "row_in_use"
    assert pair.fork([0, 1, 2], [1, 2, 0]) == "row_in_use"


def test_forks_that_are_not_to_be_carried_out_may_name_anything():
    pair = Pair()
    pair.append(20, 3, 0, 0)
    # A row in use, a row that does not exist, a row twice, and its own source.
    for src, dst in (((0, 1, 0), (2, 0, 9)), ((-1, 1, 3), (2, 2, 3)), ((0,) * 3, (2,) * 3)):
        for chosen in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1)):
            wanted = pair.fork_where(src, dst, chosen)
            assert wanted == "successful" or any(chosen)
            pair.free(2, 3)
    assert pair.fork_where((0, 1, 0), (2, 0, 3), (1, 0, 1)) == "successful"
    table, result = pair.table.free(jnp.arange(4) > 1).fork(0, 2, where=jnp.array(False))
    assert told(result) == "successful" and table.kv_lens.tolist() == [20, 3, 0, 0]


def test_which_forks_to_carry_out_is_a_mask_of_them(no_type_hook):
    table, _ = empty()
    for where in (jnp.ones(1, bool), jnp.array(True), ints((1, 1))):
        with fails_naming(("where", "(2,)")):
            table.fork(ints((0, 1)), ints((2, 3)), where=where)


def test_no_fork_at_all_changes_nothing():
    pair = Pair()
    pair.append(20, 3, 0, 0)
    before = pair.table
    assert pair.fork([], []) == "successful"
    assert_trees_identical(pair.table, before)


def test_the_last_page_is_copied_before_it_is_written():
    pair = Pair()
    pair.append(12, 0, 0, 0)
    pair.fork(0, 1)
    shared = int(pair.table.page_indices[0, 1])
    assert pair.append(0, 1, 0, 0) == "successful"
    assert int(pair.table.page_indices[0, 1]) == shared
    assert int(pair.table.page_indices[1, 1]) != shared
    # Row 0 holds it alone now.
    assert pair.append(1, 0, 0, 0) == "successful"
    assert int(pair.table.page_indices[0, 1]) == shared


def test_a_full_last_page_is_not_copied():
    pair = Pair()
    pair.append(16, 0, 0, 0)
    pair.fork(0, 1)
    free = int(pair.table.num_free_pages)
    assert pair.append(1, 1, 0, 0) == "successful"
    assert int(pair.table.num_free_pages) == free - 2
    np.testing.assert_array_equal(
        pair.table.page_indices[0, :2], pair.table.page_indices[1, :2]
    )


def test_the_last_holder_keeps_the_page():
    pair = Pair()
    pair.append(12, 0, 0, 0)
    pair.fork([0, 0, 0], [1, 2, 3])
    shared = int(pair.table.page_indices[0, 1])
    free = int(pair.table.num_free_pages)
    assert pair.append(1, 1, 1, 1) == "successful"
    assert int(pair.table.num_free_pages) == free - 3
    assert pair.table.page_indices[:, 1].tolist().count(shared) == 1


def test_a_holder_that_does_not_append_keeps_the_page():
    pair = Pair()
    pair.append(12, 0, 0, 0)
    pair.fork([0, 0, 0], [1, 2, 3])
    shared = int(pair.table.page_indices[0, 1])
    assert pair.append(1, 0, 1, 1) == "successful"
    assert int(pair.table.page_indices[1, 1]) == shared


def test_holders_of_different_lengths():
    # Row 0 holds all of a page that rows 1 and 2 hold in part.
    pair = Pair()
    pair.append(16, 0, 0, 0)
    pair.fork([0, 0], [1, 2])
    pair.truncate(16, 11, 13, 0)
    assert pair.append(0, 1, 1, 0) == "successful"  # both copy
    pair.truncate(16, 5, 3, 0)  # the first page is still everybody's
    assert pair.append(1, 1, 1, 0) == "successful"  # and again both copy
    pair.free(0)
    assert pair.append(0, 1, 1, 0) == "successful"


def test_copies_count_against_the_pool():
    pair = Pair(num_pages=3)
    pair.append(12, 0, 0, 0)
    pair.fork([0, 0], [1, 2])
    assert pair.append(1, 1, 0, 0) == "out_of_pages"  # row 2 keeps it; two copies
    assert pair.append(1, 1, 1, 0) == "out_of_pages"
    assert pair.append(0, 1, 0, 0) == "successful"
    assert pair.append(1, 0, 0, 0) == "out_of_pages"
    pair.free(2)
    assert pair.append(1, 0, 0, 0) == "successful"


def test_an_append_that_copies_and_grows():
    pair = Pair()
    pair.append(12, 0, 0, 0)
    pair.fork(0, 1)
    assert pair.append(13, 5, 0, 0) == "successful"


def test_free_and_truncate_keep_shared_pages():
    pair = Pair()
    pair.append(20, 0, 0, 0)
    pair.fork([0, 0], [1, 2])
    free = int(pair.table.num_free_pages)
    pair.free(0)
    pair.truncate(0, 3, 20, 0)
    assert int(pair.table.num_free_pages) == free
    pair.free(1, 2)
    assert int(pair.table.num_free_pages) == 10


def test_reserve_tells_what_to_copy():
    table, _ = empty()
    table, _ = table.append(ints((12, 0, 5, 0)))
    table, _ = table.fork(jnp.int32(0), jnp.int32(1))
    before = table
    table, copies, result = table.reserve(ints((1, 1, 1, 0)))
    assert told(result) == "successful"
    # One of the two holders copies; row 2 is the only holder of its page.
    assert int(copies.num_copies) == 1
    src, dst = int(copies.src[0]), int(copies.dst[0])
    assert src == int(before.page_indices[0, 1])
    assert {src, dst} == set(table.page_indices[:2, 1].tolist())


def test_reserve_limits_the_tokens_of_a_row():
    table, _ = empty()
    for q_lens, wanted in (
        ((1, 1, 0, 1), "successful"),
        ((2, 0, 0, 0), "too_many_tokens"),
        ((33, 0, 0, 0), "too_many_tokens"),
        ((2, -1, 0, 0), "invalid_argument"),
    ):
        new, copies, result = table.reserve(ints(q_lens), max_q_len=1)
        assert told(result) == wanted
        if wanted != "successful":
            assert_trees_identical(new, table)
        assert int(copies.num_copies) == 0


def test_one_row_and_one_page():
    pair = Pair(num_pages=1, num_seqs=1, pages_per_seq=1)
    assert pair.append(8) == "successful"
    assert pair.append(1) == "sequence_too_long"
    pair.free(0)
    assert pair.append(9) == "sequence_too_long"
    assert pair.append(1) == "successful"


def test_all_operations_may_be_jitted_scanned_and_mapped():
    table, _ = empty(num_pages=8)

    def step(table, q_lens):
        table, result = table.append(q_lens)
        table = table.free(table.kv_lens > 24)
        table = table.truncate(jnp.full(4, 20, jnp.int32))
        forked, fork_result = table.fork(jnp.int32(0), jnp.int32(3))
        return forked, (result, fork_result, forked.kv_lens)

    q_lens = ints([[9, 3, 1, 0], [9, 0, 0, 2], [9, 9, 30, 0], [1, 1, 1, 1]])
    jitted = quick_jit(step)
    looped, outs = table, []
    for x in q_lens:
        looped, out = jitted(looped, x)
        outs.append(out)
    scanned, stacked = quick_jit(lambda *args: jax.lax.scan(step, *args))(table, q_lens)
    assert_trees_identical(scanned, looped)
    for i, out in enumerate(outs):
        assert_trees_identical(entry(stacked, i), out)

    tables = jax.tree.map(lambda x: jnp.stack([x] * 4), table)
    mapped, _ = quick_jit(jax.vmap(step))(tables, q_lens)
    for i, x in enumerate(q_lens):
        one, _ = jitted(table, x)
        assert_trees_identical(entry(mapped, i), one)


def test_a_step_is_made_of_table_sized_work_without_loops():
    # A million tokens of pool: nothing may loop over pages or be of their number's square.
    table, _ = empty(num_pages=65_536, num_seqs=8, pages_per_seq=16, page_size=16)

    def is_jaxpr(x):
        return isinstance(x, (ClosedJaxpr, Jaxpr))

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            # A binary search is a loop of logarithmic length; there may be no other.
            assert eqn.primitive.name != "while", eqn
            assert eqn.primitive.name != "scan" or eqn.params["length"] <= 16, eqn
            yield from (v.aval.size for v in eqn.outvars)
            for sub in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
                if is_jaxpr(sub):
                    yield from sizes(sub.jaxpr if isinstance(sub, ClosedJaxpr) else sub)

    for call in (
        lambda t: t.append(ints(range(8))),
        lambda t: t.fork(jnp.int32(0), jnp.int32(1)),
        lambda t: t.truncate(ints(range(8))),
        lambda t: t.free(jnp.ones(8, bool)),
    ):
        assert max(sizes(jax.make_jaxpr(call)(table).jaxpr)) <= 65_536


def test_rows_of_64_bits_do_not_wrap_round():
    with jax.enable_x64(True):
        table, _ = empty()[0].append(ints((5, 0, 0, 0)))
        for src, dst in ((2**32, 1), (0, 2**32 + 2)):
            _, result = table.fork(src, dst)
            assert told(result) == "invalid_argument"


def test_lists_are_not_arrays(no_type_hook):
    with fails_naming(("q_lens", "array")):
        empty()[0].append([1, 0, 0, 0])
    with fails_naming(("rows", "array")):
        empty()[0].free([True, False, False, False])
