"""Drafted tokens against generation without a draft, by oracles that know no draft."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from . import sampling
from .helpers import append, ints, quick_jit, told
from .test_generate import (
    answers,
    continued,
    empty,
    expected,
    generate,
    HEAD_DIM,
    held,
    MAX_LEN,
    model,  # noqa: F401  a fixture
    NUM_KV_HEADS,
    NUM_LAYERS,
    prompt,
    weights,
)
from .test_prompts_in_turn import assert_all_free, poisoned, PROMPTS


MAX_NEW_TOKENS = 12


def looked_up(text, num_tokens, max_ngram, min_ngram):
    """What is proposed after a text, place by place."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[len(text) - n :]:
                proposed = text[place:]
                while len(proposed) < num_tokens:
                    proposed = proposed + text[place:]
                return proposed[:num_tokens]
    return []


@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=3, max_size=3),
    sizes=st.sampled_from(((1, 1, 1), (4, 3, 1), (6, 2, 2))),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_looked_up(texts, sizes):
    import eqx_paged

    num_tokens, max_ngram, min_ngram = sizes
    draft = eqx_paged.PromptLookup(num_tokens, max_ngram=max_ngram, min_ngram=min_ngram)
    padded = np.full((3, 16), 1, np.int32)
    for row, text in zip(padded, texts):
        row[: len(text)] = text
    look_up = eqx.filter_jit(type(draft).look_up)
    proposed, counts = look_up(draft, jnp.asarray(padded), ints([len(x) for x in texts]))
    for text, tokens, count in zip(texts, proposed.tolist(), counts.tolist()):
        assert tokens[:count] == looked_up(text, *sizes)


def draft_of(model, cache, *, noise=0.0, num_tokens=3):  # noqa: F811
    """A model that is like another one, but for some noise."""
    import eqx_paged

    changed = jax.tree.map(jnp.asarray, weights())
    rng = np.random.default_rng(3)
    changed["out"] += noise * rng.standard_normal(changed["out"].shape).astype(np.float32)
    model = eqx.tree_at(lambda m: m.weights, model, changed)  # noqa: F811
    return eqx_paged.DraftModel(model, cache, num_tokens=num_tokens)


# Room for all, rows that wait for pages, and so few that rows are put back.
@pytest.mark.parametrize(
    "num_seqs, num_pages, noise",
    (
        (3, 5, 0.4),
        pytest.param(3, 5, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 4, 0.4, marks=pytest.mark.slow),
        pytest.param(4, 32, 0.0, marks=pytest.mark.slow),
    ),
)
def test_a_draft_changes_no_token(model, num_seqs, num_pages, noise):  # noqa: F811
    cache = poisoned(empty(num_seqs=num_seqs, num_pages=num_pages))
    stops = (continued(PROMPTS[0])[4], continued(PROMPTS[5])[0])
    draft = draft_of(model, cache, noise=noise)
    generation, after = generate(model, cache, PROMPTS, stop_tokens=stops, draft=draft)
    assert told(generation.result) == "successful"
    assert answers(generation) == expected(PROMPTS, stops)
    assert_all_free(after)
    assert_all_free(generation.drafted.cache)
    proposed, accepted = (
        np.asarray(getattr(generation.drafted, x)) for x in ("proposed", "accepted")
    )
    assert np.all(accepted <= proposed)
    assert np.all(accepted <= np.maximum(generation.lengths - 1, 0))
    if noise == 0:
        # Only a stop token makes what the same model proposes come to nothing.
        whole = np.asarray(generation.lengths) == MAX_NEW_TOKENS
        assert np.all(accepted[whole] == proposed[whole])
    else:
        assert 0 < accepted.sum() < proposed.sum()


def test_rows_go_on_where_a_draft_left_them(model):  # noqa: F811
    first = (PROMPTS[0], PROMPTS[3], (), PROMPTS[5])
    cache = poisoned(empty())
    draft = draft_of(model, cache, noise=0.4)
    made, cache = generate(model, cache, first, max_new_tokens=5, draft=draft)
    lens = [len(x) + 4 if x else 0 for x in first]
    assert cache.kv_lens.tolist() == lens
    assert made.drafted.cache.kv_lens.tolist() == lens
    second = tuple(
        (*answer[-1:], *prompt(i, 3)) if answer else ()
        for i, answer in enumerate(answers(made))
    )
    draft = dataclasses.replace(draft, cache=made.drafted.cache)
    generation, _ = generate(model, cache, second, max_new_tokens=5, draft=draft)
    whole = tuple(
        (*a, *b[:-1], *c) for a, b, c in zip(first, answers(made), second, strict=True)
    )
    assert answers(generation) == expected(whole, max_new_tokens=5)


class Chain(sampling.Table):
    """Its logits depend on a token alone, so that a greedy text soon repeats itself."""

    def __call__(self, tokens, cache, batch):
        return self.logits[tokens], cache


def test_a_text_that_repeats_itself_takes_few_steps():
    import eqx_paged

    chain = Chain(sampling.table().logits)
    follows = np.argmax(np.asarray(chain.logits), axis=1)
    prompts, padded, lengths = sampling.prompts_of((3, 9, 1))
    cache = sampling.empty(num_seqs=3, num_pages=24)
    options = dict(max_new_tokens=40, draft=eqx_paged.PromptLookup(7))
    generation, cache = eqx_paged.generate(chain, cache, padded, lengths, **options)
    for tokens, new in zip(prompts, generation.tokens.tolist()):
        for token in new:
            assert token == follows[tokens[-1]]
            tokens.append(token)
    assert cache.kv_lens.tolist() == [len(x) - 1 for x in prompts]
    # Eight a step, but where the text has not begun to repeat itself.
    assert np.all(np.asarray(generation.drafted.accepted) >= 24)


def test_a_drafted_stop_token_is_accepted():
    """It is what the model makes as well, though nothing comes after it."""
    import eqx_paged

    successor = np.roll(np.eye(sampling.VOCAB, dtype=np.float32), 1, axis=1)
    text = np.array([[*range(8), 0]])
    generation, _ = eqx_paged.generate(
        Chain(jnp.asarray(successor)),
        sampling.empty(num_seqs=1, num_pages=6),
        text,
        np.array([9]),
        max_new_tokens=20,
        stop_tokens=(3,),
        draft=eqx_paged.PromptLookup(7),
    )
    # 1 comes of the prompt, and what followed it there is proposed: 2, 3, 4 and so on.
    assert answers(generation) == [(1, 2, 3)]
    assert generation.drafted.proposed.tolist() == [7]
    assert generation.drafted.accepted.tolist() == [2]


PARAMETERS = dict(temperature=1.5, presence_penalty=0.7, top_p=0.9)


@pytest.mark.parametrize("in_turn", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_what_is_drawn_is_drawn_without_a_draft(in_turn):
    import eqx_paged

    table = sampling.table()
    lengths = (4, 7, 1, 5, 2, 6)
    prompts, padded, lengths = sampling.prompts_of(lengths)
    sizes = dict(num_seqs=2 if in_turn else 6, num_pages=12 if in_turn else 24)
    like = eqx.tree_at(lambda t: t.logits, table, table.logits * 0.8)
    draft = eqx_paged.DraftModel(like, sampling.empty(**sizes), num_tokens=3)
    key = jax.random.key(4)
    generation, _ = eqx_paged.generate(
        table,
        sampling.empty(**sizes),
        padded,
        lengths,
        max_new_tokens=16,
        sampler=sampling.chain_of(PARAMETERS),
        key=key,
        log_probs=1,
        draft=draft,
    )
    for i, text in enumerate(prompts):
        own = jax.random.fold_in(key, i)
        tokens, raws = sampling.drawn(table, text, own, 16, **PARAMETERS)
        assert generation.tokens[i].tolist() == tokens
        chances = [np.log(sampling.softmax(x)[t]) for x, t in zip(raws, tokens)]
        # Sums of 23 float32 numbers.
        np.testing.assert_allclose(generation.log_probs.chosen[i], chances, atol=1e-5)
    # Both draw by the same keys, so that they mostly agree.
    drafted = generation.drafted
    assert int(drafted.accepted.sum()) > 0.6 * int(drafted.proposed.sum())


@pytest.mark.slow
def test_a_stream_with_a_draft_gives_the_same_tokens(model):  # noqa: F811
    import eqx_paged

    cache = empty(num_seqs=2, num_pages=9)
    texts = PROMPTS[:6]
    padded = np.zeros((6, 20), np.int32)
    for row, text in zip(padded, texts):
        row[: len(text)] = text
    stream = eqx_paged.stream(
        model,
        cache,
        padded,
        np.array([len(x) for x in texts]),
        max_new_tokens=MAX_NEW_TOKENS,
        burst=2,
        draft=draft_of(model, cache, noise=0.4),
    )
    made = [[] for _ in texts]
    for burst in stream:
        for i, tokens in burst.items():
            made[i] += tokens
    generation, after = stream.finish()
    assert [tuple(x) for x in made] == answers(generation) == expected(texts)
    assert_all_free(after)


@pytest.mark.slow
def test_limits_and_the_ends_of_rows_bound_what_is_drafted(model):  # noqa: F811
    texts = (PROMPTS[3], PROMPTS[5])
    for changed in (dict(max_len=24), dict(num_pages=5)):
        cache = empty(num_seqs=2, **changed)
        limits = np.array([7, 12])
        options = dict(limits=limits, max_new_tokens=12, draft=draft_of(model, cache))
        generation, _ = generate(model, cache, texts, **options)
        assert told(generation.result) == "successful"
        for new, text, limit in zip(answers(generation), texts, limits):
            assert new == continued(text)[:limit]


@pytest.mark.slow
def test_drafts_over_a_contiguous_cache(model):  # noqa: F811
    import eqx_paged

    cache = eqx_paged.RaggedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_seqs=4,
        max_len=MAX_LEN,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
    )
    ragged = eqx.tree_at(lambda m: m.attention, model, eqx_paged.RaggedAttention())
    texts = (PROMPTS[0], PROMPTS[3], (), PROMPTS[1])
    for draft in (
        draft_of(ragged, cache, noise=0.4),
        draft_of(model, poisoned(empty(num_pages=4 * 12)), noise=0.4),
    ):
        generation, after = generate(ragged, cache, texts, draft=draft)
        assert answers(generation) == expected(texts)
        assert after.kv_lens.tolist() == held(texts, expected(texts))
        drafted = generation.drafted
        assert drafted.cache.kv_lens.tolist() == after.kv_lens.tolist()
        assert 0 < int(drafted.accepted.sum()) < int(drafted.proposed.sum())


def test_pages_of_a_draft_for_what_a_contiguous_cache_has_room_for():
    """Room for three pages' tokens a row, one of which is in use."""
    import eqx_paged

    table = sampling.table()
    contiguous = eqx_paged.RaggedKVCache.empty(
        num_layers=1, num_seqs=1, max_len=24, num_kv_heads=1, head_dim=8
    )
    cache, _, _ = append(contiguous, ints((4,)), 8)
    _, texts, lens = sampling.prompts_of((5,))

    def stream(num_pages):
        own, _, _ = append(sampling.empty(1, num_pages, max_len=24), ints((4,)), 8)
        draft = eqx_paged.DraftModel(table, own, num_tokens=3)
        return eqx_paged.stream(table, cache, texts, lens, max_new_tokens=30, draft=draft)

    with pytest.raises(ValueError, match="has 1 free pages, but may need 2"):
        stream(2)
    stream(3)


def test_what_a_draft_runs_out_of_leaves_both_caches_alike():
    """Where it cannot be known before, since the caches are traced."""
    import eqx_paged

    table = sampling.table()

    @eqx.filter_jit
    def run(cache, own, texts, lens):
        draft = eqx_paged.DraftModel(table, own, num_tokens=3)
        options = dict(max_new_tokens=30, prefill_chunk=8, draft=draft, throw=False)
        return eqx_paged.generate(table, cache, texts, lens, **options)

    texts, padded, lens = sampling.prompts_of((5, 20))
    for i, text in enumerate(texts):
        arguments = padded[i : i + 1], lens[i : i + 1]
        generation, cache = run(sampling.empty(1, 8), sampling.empty(1, 2), *arguments)
        assert told(generation.result) == "out_of_pages"
        made = answers(generation)[0]
        assert made == sampling.continued(text, 30)[: len(made)]
        # Two pages of a chunk each; or as many tokens as there is room for, but for those
        # of the last draft.
        stored = 16 if len(text) == 20 else len(text) + len(made) - 1
        assert 12 < stored <= 16
        assert cache.kv_lens.tolist() == [stored]
        assert generation.drafted.cache.kv_lens.tolist() == [stored]


def test_a_draft_may_have_to_copy_what_it_alone_shares():
    import eqx_paged

    table = sampling.table()
    _, texts, lens = sampling.prompts_of((3, 2))
    apart, _, _ = append(sampling.empty(2, 6), ints((5, 5)), 16)

    def sharing(num_pages):
        cache, _, _ = append(sampling.empty(2, num_pages), ints((5, 0)), 16)
        return quick_jit(lambda cache: cache.fork(0, 1)[0])(cache)

    def stream(cache, own):
        draft = eqx_paged.DraftModel(table, own)
        return eqx_paged.stream(table, cache, texts, lens, max_new_tokens=9, draft=draft)

    # Four pages are free on either side, of which the draft needs one for its copy.
    with pytest.raises(ValueError, match="has 4 free pages, but may need 5"):
        stream(apart, sharing(5))
    for cache, own in ((apart, sharing(6)), (sharing(6), sharing(6)), (apart, apart)):
        stream(cache, own)


@pytest.mark.parametrize("num_tokens, ngrams", ((0, {}), (2, dict(max_ngram=0))))
def test_a_look_up_of_nothing_is_refused(num_tokens, ngrams):
    import eqx_paged

    with pytest.raises(ValueError, match="must be at least 1, but is 0"):
        eqx_paged.PromptLookup(num_tokens, **ngrams)
    with pytest.raises(ValueError, match="min_ngram must be at most .* is 3 of 2"):
        eqx_paged.PromptLookup(2, max_ngram=2, min_ngram=3)


@pytest.mark.parametrize(
    "changed, said",
    (
        (dict(num_seqs=3), "num_seqs of the other one, but has 3 and the other 4"),
        (dict(page_size=16), "page_size of the other one, but has 16 and the other 8"),
        (dict(max_len=88), "room for 88 tokens a row, but the other one for 96"),
        (dict(num_pages=16), "16 free pages, but may need 17"),
    ),
)
def test_a_draft_whose_cache_is_too_small_is_refused(model, changed, said):  # noqa: F811
    draft = draft_of(model, empty(**changed))
    with pytest.raises(ValueError, match=said):
        generate(model, empty(), PROMPTS[:2], draft=draft)


def test_a_draft_that_has_read_something_else_is_refused(model):  # noqa: F811
    cache, _, _ = empty().append(ints((1, 0, 0, 0)))
    with pytest.raises(ValueError, match=r"rows hold \[1, 0, 0, 0\] tokens"):
        generate(model, empty(), PROMPTS[:2], draft=draft_of(model, cache))
    with pytest.raises(ValueError, match="its cache is None"):
        generate(model, empty(), PROMPTS[:2], draft=draft_of(model, None))
