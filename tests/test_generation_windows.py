"""Rows that outgrow the pool, of models whose every layer has a window, against a full
recompute of each prompt by itself."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from . import test_generate
from .helpers import told
from .test_generate import answers, empty, generate, Model, prompt, weights
from .test_prompts_in_turn import assert_all_free, poisoned


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
    # And a next turn goes on from there.
    turn = (*answers(generation)[0][-1:], *prompt(3, 9))
    more, _ = run(model, cache, (turn,), max_new_tokens=20)
    whole = (*TEXTS[0], *answers(generation)[0][:-1], *turn)
    assert answers(more) == [continued(whole, 20)]


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
