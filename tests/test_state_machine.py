"""Random operations on a page table and a cache, compared with a model after each step.

Shapes are fixed, so that every operation compiles once.
"""

import dataclasses
import pathlib
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    RuleBasedStateMachine,
    run_state_machine_as_test,
)

from . import oracle
from .helpers import (
    assert_close,
    assert_trees_identical,
    check_batch,
    check_table,
    ints,
    layer_pools,
    normal,
    poison_free_pages,
    row_tokens,
    told,
)


NUM_SEQS = 5
PAGE_SIZE = 8
PAGES_PER_SEQ = 4
MAX_LEN = PAGES_PER_SEQ * PAGE_SIZE
NUM_PAGES = 12  # of the 20 that full rows would need
SIZES = dict(
    num_pages=NUM_PAGES,
    num_seqs=NUM_SEQS,
    pages_per_seq=PAGES_PER_SEQ,
    page_size=PAGE_SIZE,
)

# Mostly small, so that rows stop within a page as well as at its edge; sometimes wrong.
counts = st.one_of(
    st.integers(0, 4),
    st.sampled_from((0, 0, 1, 7, 8, 9, 16)),
    st.sampled_from((-1, 31, 33, 2**31 - 1)),
)
good_counts = st.one_of(st.integers(0, 4), st.sampled_from((0, 0, 1, 7, 8, 9)))
q_lens_of_a_step = st.one_of(
    st.lists(good_counts, min_size=NUM_SEQS, max_size=NUM_SEQS),
    st.lists(counts, min_size=NUM_SEQS, max_size=NUM_SEQS),
)
lengths = st.lists(
    st.one_of(st.integers(0, MAX_LEN), st.sampled_from((-1, 8, 16, 2**31 - 1))),
    min_size=NUM_SEQS,
    max_size=NUM_SEQS,
)
rows = st.integers(0, NUM_SEQS - 1)
maybe_rows = st.one_of(rows, rows, rows, st.sampled_from((-1, NUM_SEQS, 2**31 - 1)))
row_sets = st.lists(st.booleans(), min_size=NUM_SEQS, max_size=NUM_SEQS)
some_rows = st.one_of(
    st.lists(rows, min_size=1, max_size=3, unique=True), st.just(list(range(NUM_SEQS)))
)
entries = st.tuples(rows, st.integers(0, PAGES_PER_SEQ - 1))
row_orders = st.permutations(range(NUM_SEQS))


# --- The page table


@jax.jit
def table_append(table, q_lens):
    return table.append(q_lens)


@jax.jit
def table_fork(table, src, dst):
    return table.fork(src, dst)


@jax.jit
def table_fork_where(table, src, dst, where):
    return table.fork(src, dst, where=where)


@jax.jit
def table_truncate(table, kv_lens):
    return table.truncate(kv_lens)


@jax.jit
def table_free(table, gone):
    return table.free(gone)


@jax.jit
def table_drop_before(table, starts):
    return table.drop_before(starts)


@jax.jit
def table_retain(table, pages):
    return table.retain(pages)


@jax.jit
def table_release(table, pages):
    return table.release(pages)


@jax.jit
def table_attach(table, page_indices, kv_lens):
    return table.attach(page_indices, kv_lens)


class PageTableMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        import eqx_paged

        self.table = eqx_paged.PageTable.empty(**SIZES)
        self.model = oracle.PageTable(**SIZES)
        self.numbers = []  # number and page of each retained one, once each time

    def take(self, table, result, wanted):
        assert told(result) == wanted
        if wanted != "successful":
            assert_trees_identical(table, self.table)
        self.table = table

    @rule(q_lens=q_lens_of_a_step)
    def append(self, q_lens):
        table, result = table_append(self.table, ints(q_lens))
        self.take(table, result, self.model.append(q_lens))

    @rule(src=maybe_rows, dst=maybe_rows)
    def fork(self, src, dst):
        table, result = table_fork(self.table, ints(src), ints(dst))
        self.take(table, result, self.model.fork([src], [dst]))

    @rule(src=st.tuples(maybe_rows, maybe_rows), dst=st.tuples(maybe_rows, maybe_rows))
    def fork_two(self, src, dst):
        table, result = table_fork(self.table, ints(src), ints(dst))
        self.take(table, result, self.model.fork(src, dst))

    @rule(
        src=st.tuples(maybe_rows, maybe_rows),
        dst=st.tuples(maybe_rows, maybe_rows),
        where=st.tuples(st.booleans(), st.booleans()),
    )
    def fork_some(self, src, dst, where):
        table, result = table_fork_where(self.table, ints(src), ints(dst), jnp.array(where))
        src, dst = ([x for x, chosen in zip(xs, where) if chosen] for xs in (src, dst))
        self.take(table, result, self.model.fork(src, dst))

    @rule(kv_lens=lengths)
    def truncate(self, kv_lens):
        self.table = table_truncate(self.table, ints(kv_lens))
        self.model.truncate(kv_lens)

    @rule(gone=row_sets)
    def free(self, gone):
        self.table = table_free(self.table, jnp.array(gone))
        self.model.free(gone)

    @rule(starts=lengths)
    def drop_before(self, starts):
        self.table = table_drop_before(self.table, ints(starts))
        self.model.drop_before(starts)

    def page(self, row, column):
        """A page that a row holds, as the table and as the model have it; or a free one."""
        pages = self.model.rows[row].pages
        if column < len(pages) and pages[column] is not None:
            return int(self.table.page_indices[row, column]), pages[column]
        free = np.flatnonzero(np.asarray(self.table.ref_counts) == 0)
        return int(free[0]) if len(free) else NUM_PAGES, oracle.Page()

    def mask(self, numbers):
        return jnp.array([i in numbers for i in range(NUM_PAGES)])

    @rule(entries=st.lists(entries, max_size=3))
    def retain(self, entries):
        pages = dict(self.page(*entry) for entry in entries)
        pages.pop(NUM_PAGES, None)
        table, result = table_retain(self.table, self.mask(pages))
        self.take(table, result, self.model.retain(list(pages.values())))
        if told(result) == "successful":
            self.numbers += pages.items()

    @rule(
        which=st.sets(st.integers(0, 20), max_size=3), others=st.lists(entries, max_size=1)
    )
    def release(self, which, others):
        chosen = [self.numbers[i] for i in which if i < len(self.numbers)]
        pages = dict([*chosen, *(self.page(*entry) for entry in others)])
        pages.pop(NUM_PAGES, None)
        table, result = table_release(self.table, self.mask(pages))
        self.take(table, result, self.model.release(list(pages.values())))
        if told(result) == "successful":
            for pair in pages.items():
                self.numbers.remove(pair)

    @rule(
        row=rows,
        source=rows,
        which=st.lists(st.integers(0, 20), max_size=2),
        short=st.integers(0, PAGE_SIZE - 1),
    )
    def attach(self, row, source, which, short):
        """Pages of a row, and retained ones after them."""
        numbers = [self.page(source, i) for i in range(PAGES_PER_SEQ)]
        numbers = [x for x, p in zip(numbers, self.model.rows[source].pages) if p]
        numbers += [self.numbers[i] for i in which if i < len(self.numbers)]
        numbers = numbers[:PAGES_PER_SEQ]
        length = max(0, len(numbers) * PAGE_SIZE - short)
        indices = np.full((NUM_SEQS, PAGES_PER_SEQ), 2**30, np.int32)
        indices[row, : len(numbers)] = [number for number, _ in numbers]
        lens = [length if i == row else 0 for i in range(NUM_SEQS)]
        table, result = table_attach(self.table, ints(indices), ints(lens))
        pages = [page for _, page in numbers]
        attached = [(n, pages if n else []) for n in lens]
        self.take(table, result, self.model.attach(attached))

    @invariant()
    def agrees(self):
        check_table(self.table, self.model)


# --- The cache, with what is stored in it

NUM_LAYERS = 2
NUM_KV_HEADS = 2
HEAD_DIM = 16
NUM_TOKENS = 20
NUM_HEADS = 4
SCALE = 1 / 64  # of what is stored, which is up to 64
# Caches to load into: of fewer pages, of more, and of shorter rows.
OTHER_CACHES = (dict(num_pages=2), dict(num_pages=40), dict(num_pages=20, max_len=8))


def stored(values, layer):
    """What the token with a given number stores as its key in a layer; its value is the
    negative. Small integers and quarters, which bfloat16 holds exactly."""
    head = np.arange(NUM_KV_HEADS, dtype=np.float32)[:, None] * 0.25
    lane = np.arange(HEAD_DIM, dtype=np.float32) % 2 * 0.5
    xp = jnp if isinstance(values, jax.Array) else np
    pattern = (head + lane + layer)[None]
    return xp.asarray(values)[:, None, None] + pattern


def write(cache, batch, values):
    layers = []
    for i, layer in enumerate(cache.layers):
        k = stored(values, i).astype(layer.dtype)
        layers.append(layer.write(k, -k, batch.slots))
    return dataclasses.replace(cache, layers=tuple(layers))


@jax.jit
def mixed_step(cache, q_lens, values):
    cache, batch, result = cache.append(q_lens, NUM_TOKENS)
    return write(cache, batch, values), batch, result


@jax.jit
def decode_step(cache, q_lens, values):
    cache, batch, result = cache.append(q_lens)
    return write(cache, batch, values), batch, result


@jax.jit
def cache_fork(cache, src, dst):
    return cache.fork(src, dst)


@jax.jit
def cache_truncate(cache, kv_lens):
    return cache.truncate(kv_lens)


@jax.jit
def cache_free(cache, gone):
    return cache.free(gone)


poison = jax.jit(poison_free_pages)


@jax.jit
def attend(cache, q):
    import eqx_paged

    layer, table = cache.layers[-1], cache.table
    return eqx_paged.paged_attention(
        q,
        layer.k_pages,
        layer.v_pages,
        table.kv_lens,
        table.page_indices,
        k_scale=SCALE,
        v_scale=SCALE,
    )


def empty(dtype, num_pages=NUM_PAGES, max_len=MAX_LEN):
    import eqx_paged

    return eqx_paged.PagedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_seqs=NUM_SEQS,
        max_len=max_len,
        dtype=jnp.dtype(dtype),
    )


def check_contents(cache, contents):
    """Each row stores its own tokens, in both layers."""
    indices = np.asarray(cache.table.page_indices)
    for i, (k_pool, v_pool) in enumerate(layer_pools(cache)):
        for row, numbers in zip(indices, contents):
            wanted = stored(np.array(numbers, np.float32), i)
            k = row_tokens(k_pool, row, len(numbers))
            v = row_tokens(v_pool, row, len(numbers))
            np.testing.assert_array_equal(k, wanted)
            np.testing.assert_array_equal(v, -wanted)


class CacheMachine(RuleBasedStateMachine):
    dtype = "float32"

    @initialize()
    def start(self):
        self.cache = poison(empty(self.dtype))
        self.model = oracle.PageTable(**SIZES)
        self.contents = [[] for _ in range(NUM_SEQS)]  # a number for each token
        self.next_number = 0
        self.folder = tempfile.TemporaryDirectory()
        self.saved = None  # rows of the model and of the contents, as in the file

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @property
    def file(self):
        return pathlib.Path(self.folder.name) / "rows"

    def new_numbers(self, num):
        # In -60 .. 60, where bfloat16 holds quarters; more than a row can hold.
        numbers = [(self.next_number + i) * 7 % 121 - 60 for i in range(num)]
        self.next_number += num
        return numbers

    def take(self, cache, result, wanted):
        assert told(result) == wanted
        if wanted != "successful":
            assert_trees_identical(cache, self.cache)
        self.cache = poison(cache)

    @rule(q_lens=q_lens_of_a_step)
    def append_mixed(self, q_lens):
        wanted = self.model.append(q_lens, num_tokens=NUM_TOKENS)
        ok = wanted == "successful"
        values = np.full(NUM_TOKENS, np.nan, np.float32)  # padding must be dropped
        if ok:
            numbers = self.new_numbers(sum(q_lens))
            values[: len(numbers)] = numbers
            for row, n in zip(self.contents, q_lens):
                row += numbers[:n]
                numbers = numbers[n:]
        cache, batch, result = mixed_step(self.cache, ints(q_lens), jnp.asarray(values))
        check_batch(batch, cache.table, q_lens, kind="mixed", ok=ok, num_tokens=NUM_TOKENS)
        self.take(cache, result, wanted)

    @rule(
        q_lens=st.lists(
            st.sampled_from((0, 1, 1, 1)), min_size=NUM_SEQS, max_size=NUM_SEQS
        ),
        wrong=st.sampled_from((None, None, None, None, 2, -1)),
    )
    def append_decode(self, q_lens, wrong):
        if wrong is not None:
            q_lens = [*q_lens[:-1], wrong]
        wanted = self.model.append(q_lens, max_q_len=1)
        ok = wanted == "successful"
        values = np.full(NUM_SEQS, np.nan, np.float32)
        if ok:
            for i in np.flatnonzero(q_lens):
                (values[i],) = numbers = self.new_numbers(1)
                self.contents[i] += numbers
        cache, batch, result = decode_step(self.cache, ints(q_lens), jnp.asarray(values))
        check_batch(batch, cache.table, q_lens, kind="decode", ok=ok)
        self.take(cache, result, wanted)

    @rule(src=maybe_rows, dst=maybe_rows)
    def fork(self, src, dst):
        self.fork_all([src], [dst], ints(src), ints(dst))

    @rule(src=st.tuples(maybe_rows, maybe_rows), dst=st.tuples(maybe_rows, maybe_rows))
    def fork_two(self, src, dst):
        self.fork_all(src, dst, ints(src), ints(dst))

    def fork_all(self, src, dst, src_array, dst_array):
        wanted = self.model.fork(src, dst)
        cache, result = cache_fork(self.cache, src_array, dst_array)
        self.take(cache, result, wanted)
        if wanted == "successful":
            for s, d in zip(src, dst):
                self.contents[d] = list(self.contents[s])

    @rule(kv_lens=lengths)
    def truncate(self, kv_lens):
        self.cache = poison(cache_truncate(self.cache, ints(kv_lens)))
        self.model.truncate(kv_lens)
        self.contents = [
            row[: max(n, 0)] for row, n in zip(self.contents, kv_lens, strict=True)
        ]

    @rule(gone=row_sets)
    def free(self, gone):
        self.cache = poison(cache_free(self.cache, jnp.array(gone)))
        self.model.free(gone)
        self.contents = [[] if x else row for row, x in zip(self.contents, gone)]

    @rule(chosen=some_rows, and_free=st.booleans())
    def save(self, chosen, and_free):
        # Mostly rows that hold something; saving nothing at all is tried as well.
        held = [i for i, n in enumerate(self.model.lengths) if n > 0] or range(NUM_SEQS)
        chosen = list(dict.fromkeys(held[i % len(held)] for i in chosen))
        self.cache.save(self.file, chosen)
        self.saved = (
            self.model.copies_of(chosen),
            [list(self.contents[i]) for i in chosen],
        )
        if and_free:
            self.free([i in chosen for i in range(NUM_SEQS)])

    @precondition(lambda self: self.saved is not None)
    @rule(order=row_orders)
    def load(self, order):
        rows, contents = self.saved
        into = order[: len(rows)]
        wanted = self.model.load(rows, into)
        cache, result = self.cache.load(self.file, into)
        self.take(cache, result, wanted)
        if wanted == "successful":
            for i, numbers in zip(into, contents):
                self.contents[i] = list(numbers)

    @precondition(lambda self: self.saved is not None)
    @rule(order=row_orders, sizes=st.sampled_from(OTHER_CACHES))
    def load_into_another_cache(self, order, sizes):
        rows, contents = self.saved
        into = order[: len(rows)]
        other = poison(empty(self.dtype, **sizes))
        model = oracle.PageTable(
            num_pages=other.table.num_pages,
            num_seqs=NUM_SEQS,
            pages_per_seq=other.table.pages_per_seq,
            page_size=PAGE_SIZE,
        )
        wanted = model.load(rows, into)
        cache, result = other.load(self.file, into)
        assert told(result) == wanted
        check_table(cache.table, model)
        if wanted == "successful":
            found = dict(zip(into, contents))
            check_contents(cache, [found.get(i, []) for i in range(NUM_SEQS)])
        else:
            assert_trees_identical(cache, other)

    @rule(seed=st.integers(0, 2**16))
    def attend(self, seed):
        rng = np.random.default_rng(seed)
        q = normal(rng, (NUM_SEQS, NUM_HEADS, HEAD_DIM), self.dtype)
        out = attend(self.cache, jnp.asarray(q))
        keys = [stored(np.array(x, np.float32), NUM_LAYERS - 1) for x in self.contents]
        wanted, _, _ = oracle.attention_rows(
            q[:, None], keys, [-k for k in keys], k_scale=SCALE, v_scale=SCALE
        )
        assert_close(out, wanted, self.dtype)

    @invariant()
    def agrees(self):
        check_table(self.cache.table, self.model)

    @invariant()
    def every_stored_token_is_where_it_belongs(self):
        check_contents(self.cache, self.contents)


class BFloat16CacheMachine(CacheMachine):
    dtype = "bfloat16"


def settings(num_examples, num_steps, **options):
    return hypothesis.settings(
        max_examples=num_examples,
        stateful_step_count=num_steps,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **options,
    )


MACHINES = (PageTableMachine, CacheMachine, BFloat16CacheMachine)
every_machine = pytest.mark.parametrize("machine", MACHINES)


@pytest.mark.parametrize(
    "machine",
    (
        PageTableMachine,
        CacheMachine,
        pytest.param(BFloat16CacheMachine, marks=pytest.mark.slow),
    ),
)
def test_random_operations_agree_with_the_model(machine):
    run_state_machine_as_test(machine, settings=settings(12, 40, derandomize=True))


@pytest.mark.slow
@every_machine
def test_many_random_operations_agree_with_the_model(machine):
    run_state_machine_as_test(machine, settings=settings(300, 60, print_blob=True))
