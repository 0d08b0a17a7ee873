"""Rows that outgrow the pool, of models whose every layer has a window, against a full
recompute of each prompt by itself."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from . import sampling, test_generate
from .helpers import append, ints, quick_jit, told
from .test_generate import (
    answers,
    empty,
    generate,
    MAX_NEW_TOKENS as FEW_NEW_TOKENS,
    Model,
    prompt,
    weights,
)
from .test_prompts_in_turn import (
    arrivals,
    assert_all_free,
    assert_free,
    cut,
    poisoned,
    PROMPTS,
    thorough,
    with_free_pages,
)


WINDOW, MAX_LEN, MAX_NEW_TOKENS = 10, 192, 140
TEXTS = tuple(prompt(seed, n) for seed, n in ((1, 20), (2, 3), (5, 17), (9, 19)))


continued = functools.partial(test_generate.continued, sliding_window=WINDOW)


@pytest.fixture(scope="module")
def model():
    import eqx_paged

    attention = eqx_paged.PagedAttention(sliding_window=WINDOW)
    return Model(jax.tree.map(jnp.asarray, weights()), attention)


def run(model, cache, texts, **options):
    options = dict(window=WINDOW, prefill_chunk=8, max_new_tokens=30) | options
    return generate(model, cache, texts, **options)


def test_a_row_is_many_times_as_long_as_the_pool(model):
    # 32 slots, and a text of 160 tokens.
    cache = poisoned(empty(num_seqs=1, num_pages=4, max_len=MAX_LEN))
    options = dict(max_new_tokens=MAX_NEW_TOKENS)
    generation, cache = run(model, cache, TEXTS[:1], **options)
    assert answers(generation) == [continued(TEXTS[0], MAX_NEW_TOKENS)]
    assert cache.kv_lens.tolist() == [len(TEXTS[0]) + MAX_NEW_TOKENS - 1]
    assert int(cache.table.num_free_pages) >= 1
    # And a next turn goes on from there, of more pages than are free beside those that the
    # row has, and drops on the way.
    turn = (*answers(generation)[0][-1:], *prompt(3, 19))
    more, _ = run(model, cache, (turn,), max_new_tokens=12)
    whole = (*TEXTS[0], *answers(generation)[0][:-1], *turn)
    assert answers(more) == [continued(whole, 12)]


@pytest.mark.parametrize(
    "num_seqs, num_pages", ((3, 7), pytest.param(4, 16, marks=pytest.mark.slow))
)
def test_prompts_in_turn_and_side_by_side(model, num_seqs, num_pages):
    cache = poisoned(empty(num_seqs=num_seqs, num_pages=num_pages, max_len=MAX_LEN))
    generation, cache = run(model, cache, TEXTS)
    assert told(generation.result) == "successful"
    assert answers(generation) == [continued(text, 30) for text in TEXTS]
    if num_seqs < len(TEXTS):
        assert_all_free(cache)


@pytest.mark.slow
def test_drafted_tokens_that_are_taken_back_leave_what_is_still_seen(model):
    import eqx_paged

    cache = poisoned(empty(num_seqs=1, num_pages=5, max_len=MAX_LEN))
    noisy = eqx.tree_at(lambda m: m.weights["out"], model, replace_fn=lambda x: x * 0.9)
    room = empty(num_seqs=1, num_pages=23, max_len=MAX_LEN)
    for draft in (
        eqx_paged.PromptLookup(4, max_ngram=1),
        eqx_paged.DraftModel(noisy, room, num_tokens=3),
    ):
        generation, _ = run(model, cache, TEXTS[1:2], draft=draft)
        assert answers(generation) == [continued(TEXTS[1], 30)]


def test_a_pool_that_is_too_small_for_a_window_is_refused(model):
    cache = empty(num_seqs=1, num_pages=2, max_len=MAX_LEN)
    with pytest.raises(ValueError, match="need 3 pages of 8 tokens, but 2 are free"):
        run(model, cache, TEXTS[:1])
    generation, _ = run(model, cache, TEXTS[:1], throw=False)
    assert told(generation.result) == "out_of_pages"
    with pytest.raises(ValueError, match="window must be at least 1, but is 0"):
        run(model, cache, TEXTS[:1], window=0)


@pytest.mark.slow
@thorough
@given(data=st.data())
def test_whatever_arrives_is_continued_as_by_itself(model, data):
    whole = [continued(text, FEW_NEW_TOKENS) if text else () for text in PROMPTS]
    # A chunk of eight tokens and what they see are on three pages at most.
    order, limits, stops, free = data.draw(arrivals(whole, most_pages=3))
    cache = with_free_pages(poisoned(empty(num_seqs=3, num_pages=12)), free)
    options = dict(max_new_tokens=FEW_NEW_TOKENS, limits=np.array(limits))
    options |= dict(stop_tokens=[*stops, *[-1] * (3 - len(stops))])
    generation, cache = run(model, cache, [PROMPTS[i] for i in order], **options)
    assert answers(generation) == [cut(whole[i], n, stops) for i, n in zip(order, limits)]
    assert_free(cache, free)


# --- Which pages are needed, by a model that looks at none of them


def prompts_of(*lengths):
    """Prompts of some lengths, as arrays of one shape."""
    _, padded, lens = sampling.prompts_of((*lengths, 40))
    return padded[:-1], lens[:-1]


def of_table(call, cache, arguments, **options):
    return call(sampling.table(), cache, *arguments, **dict(window=WINDOW) | options)


def all_continued(arguments, max_new_tokens):
    texts = [row[:n].tolist() for row, n in zip(*arguments)]
    return [sampling.continued(text, max_new_tokens) for text in texts]


def test_prompts_that_could_not_be_read_again_are_refused():
    """Short enough to be read, they could grow to need more than there is when put back."""
    import eqx_paged

    cache, arguments = sampling.empty(2, 4), prompts_of(1, 20, 1)
    options = dict(max_new_tokens=30, prefill_chunk=32)
    for call in (eqx_paged.generate, eqx_paged.stream):
        with pytest.raises(ValueError, match="Prompt 1 needs 6 pages of 8 .* 4 are free"):
            of_table(call, cache, arguments, **options)
    generation, after = of_table(
        eqx_paged.generate, cache, arguments, throw=False, **options
    )
    assert told(generation.result) == "out_of_pages"
    assert answers(generation) == [()] * 3
    # In chunks that leave room they go through, put back or not.
    options = dict(max_new_tokens=30, prefill_chunk=8)
    generation, after = of_table(eqx_paged.generate, cache, arguments, **options)
    assert answers(generation) == all_continued(arguments, 30)
    assert_all_free(after)


@quick_jit
def without_unseen(cache):
    return cache.drop_before(cache.kv_lens + 1 - WINDOW)


@quick_jit
def forked(cache, src, dst):
    return cache.fork(src, dst)


def rows_of(*lens, fork=None):
    """Three rows on three pages; a long row has dropped what its window does not see."""
    cache = sampling.empty(3, 3)
    while any(lens):
        now = [min(n, 8) for n in lens]
        cache, _, result = append(cache, ints(now), 48)
        assert told(result) == "successful"
        cache = without_unseen(cache)
        lens = [n - m for n, m in zip(lens, now)]
    if fork is not None:
        cache, result = forked(cache, *fork)
        assert told(result) == "successful"
    return cache


def assert_fits(cache, lens, fits):
    """Whether prompts are read, or refused before any work, with `throw` and without."""
    import eqx_paged

    arguments = prompts_of(*lens)
    options = dict(max_new_tokens=0, prefill_chunk=4)
    generation, after = of_table(
        eqx_paged.generate, cache, arguments, throw=False, **options
    )
    held = cache.kv_lens.tolist()
    if fits:
        of_table(eqx_paged.generate, cache, arguments, **options)
        assert told(generation.result) == "successful"
        assert after.kv_lens.tolist() == [n + more for n, more in zip(held, lens)]
    else:
        with pytest.raises(ValueError, match="The prompts need . pages of 8 .* are free"):
            of_table(eqx_paged.generate, cache, arguments, **options)
        assert told(generation.result) == "out_of_pages"
        assert after.kv_lens.tolist() == held


def test_what_rows_hold_and_share_decides_what_fits():
    # The rest of a page, and the one that is free.
    assert_fits(rows_of(7, 8, 0), (9, 0, 0), True)
    assert_fits(rows_of(7, 8, 0), (10, 0, 0), False)
    # The rest of a page that must be copied first.
    shared, _, _ = append(rows_of(5, 0, 0, fork=(0, 1)), ints((0, 0, 8)), 48)
    assert int(shared.table.num_free_pages) == 1
    assert_fits(shared, (3, 0, 0), True)
    assert_fits(shared, (10, 0, 0), False)
    assert_fits(shared, (3, 3, 0), True)  # one of the two keeps it
    # On the pages that a long row drops on the way, unless others hold them.
    long = rows_of(40, 0, 0)
    assert (long.table.starts.tolist(), int(long.table.num_free_pages)) == ([24, 0, 0], 1)
    assert_fits(long, (20, 0, 0), True)
    assert_fits(rows_of(40, 0, 0, fork=(0, 1)), (20, 0, 0), False)


def test_what_is_said_to_fit_fits():
    rng, told_so = np.random.default_rng(6), []
    for _ in range(60):
        lens = rng.integers(0, (17, 9))
        cache = rows_of(*lens.tolist(), 0, fork=(0, 2) if rng.random() < 0.5 else None)
        prompts = rng.integers(0, 24, 3) * (rng.random(3) < 0.6)
        try:
            assert_fits(cache, prompts.tolist(), True)
        except ValueError:
            assert_fits(cache, prompts.tolist(), False)
            told_so.append(False)
        else:
            told_so.append(True)
    assert 10 < sum(told_so) < 50


def test_an_idle_row_keeps_all_its_pages():
    import eqx_paged

    cache, _, _ = append(sampling.empty(2, 8), ints((20, 20)), 48)
    options = dict(max_new_tokens=8, prefill_chunk=8)
    _, after = of_table(eqx_paged.generate, cache, prompts_of(3, 0), **options)
    assert after.kv_lens.tolist() == [30, 20]
    assert after.table.starts.tolist() == [16, 0]
    np.testing.assert_array_equal(after.table.page_indices[1], cache.table.page_indices[1])


def test_a_row_that_only_decodes_keeps_no_pages_for_a_chunk():
    import eqx_paged

    arguments = prompts_of(40, 40, 1)
    stream = of_table(
        eqx_paged.stream,
        sampling.empty(2, 8),
        arguments,
        max_new_tokens=20,
        prefill_chunk=32,
        burst=1,
    )
    # On the six pages that the first one does not hold, the second one is read beside it.
    assert any({0, 1} <= item.keys() for item in list(stream))
    generation, cache = stream.finish()
    assert answers(generation) == all_continued(arguments, 20)
    assert_all_free(cache)


def test_the_cache_of_a_draft_needs_pages_for_the_whole_length():
    import eqx_paged

    def stream(num_pages):
        draft = eqx_paged.DraftModel(sampling.table(), sampling.empty(1, num_pages))
        return of_table(
            eqx_paged.stream,
            sampling.empty(1, 4),
            prompts_of(3),
            max_new_tokens=50,
            prefill_chunk=8,
            draft=draft,
        )

    for num_pages in (4, 6):
        with pytest.raises(ValueError, match=f"{num_pages} free pages, but may need 7"):
            stream(num_pages)
    bursts = stream(7)
    for _ in bursts:
        pass
    generation, _ = bursts.finish()
    assert answers(generation) == all_continued(prompts_of(3), 50)
