"""Reused prefixes, against a model of dictionaries and against reading each prompt anew."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import (
    assert_trees_identical,
    fails_naming,
    ints,
    layer_pools,
    poison_free_pages,
    row_tokens,
    told,
)
from .test_cache import store
from .test_generate import (
    answers,
    empty,
    expected,
    generate_padded,
    MAX_PROMPT_LEN,
    model,  # noqa: F401  a fixture
    padded,
    prompt,
)
from .test_prompts_in_turn import assert_all_free, poisoned


SIZE = 8
EVERYTHING = jnp.ones(4, bool)


def new_index():
    import eqx_paged

    return eqx_paged.PrefixIndex()


# --- With a model


def serve(model, index, cache, prompts):  # noqa: F811
    """Continues prompts through the index, and leaves no row in use."""
    arrays = [np.asarray(x) for x in padded(prompts)]
    index, cache, rest, lens = index.fork(cache, *arrays, max_new_tokens=12)
    made, cache = generate_padded(model, poison_free_pages(cache), rest, lens)
    index, cache = index.insert(cache, *arrays)
    return answers(made), lens.tolist(), index, cache.free(EVERYTHING)


@pytest.mark.slow
def test_prompts_are_continued_as_without_the_index(model):  # noqa: F811
    first, second = prompt(2, 20), prompt(61, 8)
    batches = (
        (first, second, ()),
        # Two pages, one, and none although it ends as the first begins; a whole prompt
        # that is there but for its last token.
        ((*first[:16], *prompt(62, 4)), (*first[:8], *second), first[4:], second),
        (first, (*second, 5), (*first[:16], *prompt(62, 4)), first[:16]),
    )
    lens_read = ((20, 8, 0), (4, 8, 16, 8), (4, 1, 4, 8))
    index, cache = new_index(), poisoned(empty(num_pages=21))
    for prompts, lens in zip(batches, lens_read):
        made, read, index, cache = serve(model, index, cache, prompts)
        assert made == expected(prompts)
        assert tuple(read) == lens
    # 20 tokens are two pages, `second` one, and its two places in other prompts are two.
    assert index.num_pages == 6
    asked = sum(len(p) for prompts in batches for p in prompts)
    assert index.num_tokens == asked
    assert index.num_hits == asked - sum(map(sum, lens_read))
    assert index.hit_rate == index.num_hits / asked
    assert int(cache.table.num_free_pages) == 21 - 6
    index, cache = index.clear(cache)
    assert index.num_pages == index.num_evicted == 0
    assert_all_free(cache)


def test_pages_are_given_up_for_new_tokens(model):  # noqa: F811
    index, cache = new_index(), poisoned(empty(num_pages=21))
    old, new = [prompt(seed, 20) for seed in (71, 72, 73)], prompt(2, 20)
    for text in (*old, old[0]):
        made, _, index, cache = serve(model, index, cache, (text,))
        assert made == expected((text,))
    assert (index.num_pages, index.num_evicted, index.num_hits) == (6, 0, 16)
    # Four times 20 and 11 tokens are 16 pages, of which 15 are free.
    made, read, index, cache = serve(model, index, cache, (new, new, new, new))
    assert made == expected((new,) * 4) and read == [20] * 4
    assert (index.num_pages, index.num_evicted) == (5 + 2, 1)
    # It was the last page of the one that had not been used for longest.
    _, read, index, cache = serve(model, index, cache, old)
    assert read == [4, 12, 4]
    assert int(cache.table.num_free_pages) == 21 - index.num_pages == 21 - 8


def test_pages_are_given_up_for_copies_of_shared_ones():
    from .test_cache import empty

    cache, _ = store(empty(num_pages=4), ints((16, 0, 0, 0)), kv_of(range(16)), 48)
    tokens = np.zeros((4, 20), np.int32)
    index, cache = new_index().insert(cache, tokens, ints((16, 0, 0, 0)))
    # A page that two rows share and write to, and one free page: one of the rows copies.
    cache, _ = store(cache.free(EVERYTHING), ints((3, 0, 0, 0)), kv_of(range(3)), 48)
    cache, _ = cache.fork(0, 1)
    for max_new_tokens, num_free in ((1, 1), (5, 1), (6, 3), (2**40, 3)):
        after, changed, _, _ = index.fork(
            cache, tokens, ints((1, 1, 0, 0)), max_new_tokens=max_new_tokens
        )
        assert int(changed.table.num_free_pages) == num_free
        assert after.num_pages == 3 - num_free
    # None are free.
    cache, _ = cache.fork(0, 2)
    full, _ = store(cache, ints((0, 0, 0, 8)), kv_of(range(8)), 48)
    after, changed, _, _ = index.fork(full, tokens, ints((1, 1, 1, 0)))
    assert (after.num_pages, int(changed.table.num_free_pages)) == (0, 2)


# --- Against a model of dictionaries


def kv_of(tokens, num_tokens=48):
    """What is stored for each token: itself."""
    values = np.full(num_tokens, np.nan, np.float32)
    values[: len(tokens)] = tokens
    kv = np.broadcast_to(values[:, None, None], (num_tokens, 2, 16))
    return [[kv, kv]] * 2


def stored_tokens(cache, row):
    (pool, _), *_ = layer_pools(cache)
    indices = np.asarray(cache.table.page_indices[row])
    return tuple(row_tokens(pool, indices, int(cache.kv_lens[row]))[:, 0, 0].astype(int))


class Dictionaries:
    """Paths, each the tokens up to the end of a page, with the time of their last use and
    the rows that hold their page."""

    def __init__(self):
        self.paths, self.clock = {}, 0

    def path(self, tokens, n):
        return tokens[: n * SIZE]

    def fork(self, row, tokens):
        n = 0
        while (n + 1) * SIZE < len(tokens) and self.path(tokens, n + 1) in self.paths:
            n += 1
            self.paths[self.path(tokens, n)][0] = self.clock
            self.paths[self.path(tokens, n)][1].add(row)
        self.clock += 1
        return n * SIZE

    def insert(self, row, tokens):
        for n in range(1, len(tokens) // SIZE + 1):
            entry = self.paths.setdefault(self.path(tokens, n), [self.clock, {row}])
            entry[0] = self.clock
        self.clock += 1

    def free(self, row):
        for _, rows in self.paths.values():
            rows.discard(row)

    def evict(self, missing):
        for _ in range(missing):
            parents = {path[:-SIZE] for path in self.paths}
            free = [
                p for p, (_, rows) in self.paths.items() if not rows and p not in parents
            ]
            if not free:
                break
            del self.paths[min(free, key=lambda p: self.paths[p][0])]


# Blocks of few kinds, so that prompts often begin alike.
blocks = st.lists(st.sampled_from((1, 2)), max_size=2)
texts = st.builds(
    lambda blocks, rest: tuple(b for b in blocks for _ in range(SIZE)) + (3,) * rest,
    blocks,
    st.integers(1, 4) | st.just(SIZE),
)
steps = st.one_of(
    st.tuples(st.just("serve"), texts, st.integers(0, 40)),
    st.tuples(st.just("serve"), texts, st.integers(0, 40)),
    st.tuples(st.just("free"), st.integers(0, 3), st.none()),
    st.tuples(st.just("evict"), st.integers(0, 10), st.none()),
)


def check(index, cache, known, rows):
    """The same paths, each page with the right tokens, and nobody's page is lost."""
    table = cache.table
    held = {
        p
        for i in rows
        for p in np.asarray(table.page_indices[i])[: -(-len(rows[i]) // SIZE)]
    }
    assert index.num_pages == len(known.paths)
    assert int(table.num_free_pages) == table.num_pages - len(held | set(index.entries))
    for row, tokens in rows.items():
        assert stored_tokens(cache, row) == tokens
    (pool, _), *_ = layer_pools(cache)
    paths = set()
    for page, entry in index.entries.items():
        path, at = (), page
        while at >= 0:
            path = tuple(pool[at, 0, :, 0].astype(int)) + path
            at = index.entries[at].key[0]
        paths.add(path)
        assert known.paths[path][0] == entry.last_use
    assert paths == set(known.paths)


@hypothesis.settings(
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(steps=st.lists(steps, min_size=8, max_size=25))
def test_random_arrivals_agree_with_dictionaries(steps):
    from .test_cache import empty

    cache = poison_free_pages(empty(num_pages=10))
    index, known, rows = new_index(), Dictionaries(), {}
    for name, what, more in steps:
        if name == "serve" and len(rows) < 4:
            row = min(set(range(4)) - set(rows))
            prompts = np.zeros((4, 24), np.int32)
            prompts[row, : len(what)] = what
            lens = np.array([len(what) if i == row else 0 for i in range(4)])
            free = int(cache.table.num_free_pages)
            found = known.fork(row, what)
            most = min(len(what) + max(more - 1, 0), cache.max_len)
            needed = -(-most // SIZE) - found // SIZE
            known.evict(needed - free)
            index, cache, rest, rest_lens = index.fork(
                cache, prompts, lens, max_new_tokens=more
            )
            left = what[found:]
            assert rest_lens.tolist() == [len(left) if i == row else 0 for i in range(4)]
            assert tuple(rest[row, : len(left)]) == left and not np.any(
                rest[row, len(left) :]
            )
            new, result = store(cache, ints(rest_lens), kv_of(left), 48)
            if told(result) != "successful":
                cache = cache.free(jnp.arange(4) == row)
                known.free(row)
                continue
            index, cache = index.insert(poison_free_pages(new), prompts, lens)
            known.insert(row, what)
            rows[row] = what
        elif name == "free" and what in rows:
            cache = poison_free_pages(cache.free(jnp.arange(4) == what))
            known.free(what)
            del rows[what]
        elif name == "evict":
            known.evict(what - int(cache.table.num_free_pages))
            index, cache = index.evict(cache, what)
        check(index, cache, known, rows)
    index, cache = index.clear(cache.free(EVERYTHING))
    assert_all_free(cache)


# --- What can go wrong


def test_an_index_and_a_cache_are_values():
    from .test_cache import empty

    tokens, lens = np.arange(16, dtype=np.int32)[None], np.array([16])
    cache, _ = store(empty(), ints((16, 0, 0, 0)), kv_of(range(16)), 48)
    before = jax.tree.map(np.array, cache)
    index = new_index()
    full, kept = index.insert(cache, tokens, lens)
    assert (index.num_pages, full.num_pages) == (0, 2)
    assert_trees_identical(cache, before)
    # The new index does not go with the old cache, once that has freed its pages.
    with pytest.raises(ValueError, match="returned with the index"):
        full.clear(cache.free(EVERYTHING))
    none, kept = full.clear(kept.free(EVERYTHING))
    assert (none.num_pages, full.num_pages) == (0, 2)
    assert_all_free(kept)


def test_what_does_not_fit_is_told(no_type_hook):
    from .test_cache import empty

    cache, _ = store(empty(), ints((16, 3, 0, 0)), kv_of(range(19)), 48)
    index, tokens = new_index(), np.zeros((4, 20), np.int32)
    wide = tokens + np.int64(2**32)
    for call, words in (
        (lambda: index.fork(cache, np.zeros((5, 20), int), np.zeros(5, int)), ("5", "4")),
        (lambda: index.fork(cache, tokens + 0.5, ints([2] * 4)), ("prompts", "float64")),
        (lambda: index.fork(cache, tokens, np.full(4, 1.9)), ("prompt_lens", "float64")),
        (lambda: index.fork(cache, wide, ints([2] * 4)), ("int32", str(2**32))),
        (lambda: index.insert(cache, tokens, np.full(4, 1.9)), ("lengths", "float64")),
        (lambda: index.insert(cache, [[1, 2]], ints((2,))), ("tokens", "[[1, 2]]")),
        (lambda: index.fork(cache, tokens, ints((0, 21, 0, 0))), ("Prompt 1", "21", "20")),
        (lambda: index.fork(cache, tokens, ints((0, 1))), ("(4, 20)", "(2,)")),
        (lambda: index.insert(cache, tokens, ints((16, 4, 0, 0))), ("row 1", "4", "3")),
        (
            lambda: index.insert(cache.drop_before(ints([9] * 4)), tokens, ints([9] * 4)),
            ("row 0", "8", "16"),
        ),
        (lambda: index.evict(cache, -1), ("num_free_pages", "-1")),
    ):
        with fails_naming(words):
            call()
    assert MAX_PROMPT_LEN == 20
