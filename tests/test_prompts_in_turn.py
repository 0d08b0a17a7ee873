"""More prompts than rows, against a full recompute of each prompt by itself."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

from . import sampling
from .helpers import assert_trees_identical, ints, told
from .test_generate import (
    answers,
    continued,
    empty,
    expected,
    generate,
    HEAD_DIM,
    MAX_LEN,
    MAX_NEW_TOKENS,
    model,  # noqa: F401  a fixture
    NUM_KV_HEADS,
    NUM_LAYERS,
    padded,
    PAGE_SIZE,
    prompt,
    TRACES,
)


# No near ties. Lengths 0, 1, a page and around it, and the longest.
LENGTHS = (5, 20, 0, 9, 1, 8, 7, 17, 12, 3)
PROMPTS = tuple(prompt(seed, n) for seed, n in zip((1, 2, 0, 8, 4, 6, 7, 9, 5, 3), LENGTHS))


def poisoned(cache):
    """The cache, with NaN in every slot: what is read before it is written shows."""
    layers = tuple(
        dataclasses.replace(
            pages,
            k_pages=jnp.full_like(pages.k_pages, jnp.nan),
            v_pages=jnp.full_like(pages.v_pages, jnp.nan),
        )
        for pages in cache.layers
    )
    return dataclasses.replace(cache, layers=layers)


def with_free_pages(cache, free):
    """An empty cache of which only some pages are free, the last of them first."""
    held = np.setdiff1d(np.arange(cache.table.num_pages), free)
    table = dataclasses.replace(
        cache.table,
        free_pages=ints([*free, *held]),
        ref_counts=cache.table.ref_counts.at[held].set(1),
        num_free_pages=jnp.array(len(free), jnp.int32),
    )
    return dataclasses.replace(cache, table=table)


def assert_free(cache, free):
    """Whether no row holds anything, and just these pages are free."""
    table = cache.table
    assert table.kv_lens.tolist() == [0] * cache.num_seqs
    assert sorted(table.free_pages[: int(table.num_free_pages)].tolist()) == sorted(free)
    held = np.setdiff1d(np.arange(table.num_pages), free)
    np.testing.assert_array_equal(np.flatnonzero(table.ref_counts), held)


def assert_all_free(cache):
    assert_free(cache, range(cache.table.num_pages))


# Room for all; rows that wait for pages; and so few that rows are put back.
@pytest.mark.parametrize(
    "num_seqs, num_pages",
    (
        (4, 32),
        pytest.param(4, 9, marks=pytest.mark.slow),
        pytest.param(3, 5, marks=pytest.mark.slow),
        (2, 4),
        pytest.param(1, 4, marks=pytest.mark.slow),
    ),
)
def test_each_prompt_is_continued_as_by_itself(model, num_seqs, num_pages):  # noqa: F811
    cache = poisoned(empty(num_seqs=num_seqs, num_pages=num_pages))
    generation, cache = generate(model, cache, PROMPTS)
    assert told(generation.result) == "successful"
    assert answers(generation) == expected(PROMPTS)
    assert_all_free(cache)


def test_a_stop_token_frees_a_row_for_the_next(model):  # noqa: F811
    stops = (continued(PROMPTS[0])[2], continued(PROMPTS[3])[7], continued(PROMPTS[5])[0])
    new = expected(PROMPTS, stops)
    assert len({len(tokens) for tokens in new}) > 3
    cache = with_free_pages(empty(num_seqs=2, num_pages=12), range(6))
    # The program of the test of arrivals.
    options = dict(limits=np.full(len(PROMPTS), MAX_NEW_TOKENS), stop_tokens=stops)
    generation, cache = generate(model, cache, PROMPTS, **options)
    assert answers(generation) == new
    assert_free(cache, range(6))


@pytest.mark.parametrize("max_new_tokens", (0, 1))
def test_few_new_tokens(model, max_new_tokens):  # noqa: F811
    cache = empty(num_seqs=3)
    generation, cache = generate(model, cache, PROMPTS, max_new_tokens=max_new_tokens)
    assert answers(generation) == expected(PROMPTS, max_new_tokens=max_new_tokens)
    assert_all_free(cache)


def test_through_a_contiguous_cache(model):  # noqa: F811
    import eqx_paged

    cache = eqx_paged.RaggedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_seqs=3,
        max_len=MAX_LEN,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
    )
    ragged = eqx.tree_at(lambda m: m.attention, model, eqx_paged.RaggedAttention())
    generation, cache = generate(ragged, cache, PROMPTS)
    assert answers(generation) == expected(PROMPTS)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_the_model_is_traced_once_a_kind_of_step(model):  # noqa: F811
    traces = len(TRACES)
    generate(model, empty(num_seqs=3, num_pages=23), PROMPTS)
    assert sorted({kind for kind, _ in TRACES[traces:]}) == ["decode", "mixed"]
    assert len(TRACES) - traces <= 4  # a loop within a loop is traced twice


def test_what_can_never_be_read_is_told_before_any_work(model):  # noqa: F811
    cache = empty(num_seqs=2, num_pages=2)
    before = jax.tree.map(np.array, cache)
    with pytest.raises(ValueError, match="Prompt 1 needs 3 pages of 8 .* but 2 are free"):
        generate(model, cache, PROMPTS)
    with pytest.raises(ValueError, match="Prompt 1 has 20 tokens, .* room for 16"):
        generate(model, empty(num_seqs=2, max_len=16), PROMPTS)
    used, _, _ = empty(num_seqs=2).append(ints((0, 1)))
    with pytest.raises(ValueError, match="10 prompts go through 2 rows .* hold 1 tokens"):
        generate(model, used, PROMPTS)
    for changed, reason in (
        (cache, "out_of_pages"),
        (empty(num_seqs=2, max_len=16), "sequence_too_long"),
        (used, "row_in_use"),
    ):
        options = dict(max_new_tokens=0, throw=False)
        generation, _ = generate(model, changed, PROMPTS, **options)
        assert told(generation.result) == reason
        assert answers(generation) == [()] * len(PROMPTS)
    assert_trees_identical(cache, before)


def test_a_row_that_alone_has_too_few_pages_ends_the_run(model):  # noqa: F811
    # Read on three pages, the longest prompt needs a fourth in the end.
    cache = empty(num_seqs=2, num_pages=3)
    generation, cache = generate(model, cache, PROMPTS, throw=False)
    assert told(generation.result) == "out_of_pages"
    for made, whole in zip(answers(generation), expected(PROMPTS)):
        assert made == whole[: len(made)]
    assert_all_free(cache)


def test_a_prompt_that_can_never_be_read_ends_the_run(monkeypatch, fresh_traces):
    """Even if nobody has checked that it can."""
    import eqx_paged
    from eqx_paged import _generate

    fine = eqx_paged.RESULTS.successful
    monkeypatch.setattr(_generate, "result_of_prompts", lambda cache, plan: fine)
    prompts, arrays = PROMPTS[:2], padded(PROMPTS[:2])
    generation, cache = eqx_paged.generate(
        sampling.table(), sampling.empty(1, 2), *arrays, max_new_tokens=2, throw=False
    )
    assert told(generation.result) == "out_of_pages"
    assert answers(generation) == [sampling.continued(prompts[0], 2), ()]
    assert_all_free(cache)


@st.composite
def arrivals(draw, answers, most_pages=MAX_LEN):
    """Prompts in some order, some of them again; limits; stop tokens; free pages.

    - `answers`: what may be made of each.
    - `most_pages`: what a row has of them at a time.
    """
    n = len(PROMPTS)
    order = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    limits = draw(st.lists(st.integers(0, MAX_NEW_TOKENS), min_size=n, max_size=n))
    made = sorted({token for tokens in answers for token in tokens})
    stops = draw(st.lists(st.sampled_from(made), max_size=3))
    # As many pages as the longest prompt needs by itself, at least.
    lens = [len(PROMPTS[i]) + max(0, limit - 1) for i, limit in zip(order, limits)]
    least = min(most_pages, max(1, -(-max(lens) // PAGE_SIZE)))
    free = draw(st.permutations(range(12)))[: draw(st.integers(least, 12))]
    return order, limits, stops, free


def cut(tokens, limit, stops):
    """What is made of a prompt that ends at a limit or a stop token."""
    ends = [i + 1 for i, token in enumerate(tokens) if token in stops]
    return tokens[: min([limit, *ends])]


thorough = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@thorough
@given(data=st.data())
def test_whatever_arrives_is_continued_as_by_itself(model, data):  # noqa: F811
    order, limits, stops, free = data.draw(arrivals(expected(PROMPTS)))
    prompts = [PROMPTS[i] for i in order]
    cache = with_free_pages(poisoned(empty(num_seqs=2, num_pages=12)), free)
    # Of one shape, so that one program serves all.
    options = dict(limits=np.array(limits), stop_tokens=[*stops, *[-1] * (3 - len(stops))])
    generation, cache = generate(model, cache, prompts, **options)
    whole = expected(prompts)
    assert answers(generation) == [cut(made, n, stops) for made, n in zip(whole, limits)]
    assert_free(cache, free)
    held = np.setdiff1d(np.arange(12), free)
    for pool in jax.tree.leaves(cache.layers):
        assert np.all(np.isnan(pool[held])), "a page that was not free was written"


KEY = jax.random.key(3)
CHAIN = dict(temperature=1.2, top_p=0.9)


@functools.cache
def drawn():
    """What is drawn of each prompt by its own key, by itself."""
    table, keys = sampling.table(), [jax.random.fold_in(KEY, i) for i in range(10)]
    return [
        tuple(sampling.drawn(table, text, key, MAX_NEW_TOKENS, **CHAIN)[0])
        for text, key in zip(PROMPTS, keys)
    ]


def draft_of(kind, num_seqs):
    import eqx_paged

    if kind != "model":
        return None if kind is None else eqx_paged.PromptLookup(3, max_ngram=1)
    table = sampling.table()
    like = eqx.tree_at(lambda t: t.logits, table, table.logits * 0.8)
    return eqx_paged.DraftModel(like, sampling.empty(num_seqs, 12), num_tokens=3)


# A chunk of 32 tokens and a window of 10 are up to six pages, and a prompt with its answer
# up to four: of which there are all, or as few as that.
@pytest.mark.parametrize(
    "num_seqs, window, draft",
    (
        (3, 10, None),
        pytest.param(1, None, "look-up", marks=pytest.mark.slow),
        pytest.param(3, None, "model", marks=pytest.mark.slow),
        pytest.param(3, 10, "model", marks=pytest.mark.slow),
    ),
)
@thorough
@given(data=st.data())
def test_whatever_arrives_is_drawn_as_by_itself(num_seqs, window, draft, data):
    import eqx_paged

    order, limits, stops, free = data.draw(arrivals(drawn()))
    generation, cache = eqx_paged.generate(
        sampling.table(),
        with_free_pages(sampling.empty(num_seqs, 12), free),
        *padded([PROMPTS[i] for i in order]),
        max_new_tokens=MAX_NEW_TOKENS,
        limits=np.array(limits),
        stop_tokens=[*stops, *[-1] * (3 - len(stops))],
        sampler=sampling.chain_of(CHAIN),
        key=jax.vmap(jax.random.fold_in, (None, 0))(KEY, ints(order)),
        draft=draft_of(draft, num_seqs),
        window=window,
        prefill_chunk=32,
    )
    assert answers(generation) == [cut(drawn()[i], n, stops) for i, n in zip(order, limits)]
    assert_free(cache, free)
