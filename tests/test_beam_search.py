"""Beam search, against one in plain Python over logits that are recomputed whole."""

import functools as ft
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import oracle
from .helpers import (
    append,
    assert_trees_identical,
    count_compilations,
    fails_naming,
    ints,
    quick_jit,
    told,
)
from .test_generate import (
    empty,
    generate,
    model,  # noqa: F401  a fixture
    NUM_SEQS,
    padded,
    PAGE_SIZE,
    prompt,
    recomputed_logits,
    TRACES,
)
from .test_prompts_in_turn import assert_all_free, poisoned


NUM_BEAMS = 3
PROMPTS = (prompt(1, 5), prompt(2, 20), (), prompt(8, 1))


@ft.cache
def log_probs_after(tokens):
    logits = recomputed_logits(tokens)
    logits = logits - logits.max()
    return logits - np.log(np.sum(np.exp(logits)))


def searched(tokens, stops=(), penalty=1.0, early=False, num_beams=NUM_BEAMS, most=8):
    """`(score, tokens)` of the hypotheses, the best first; and at each step the beams, each
    with the number of the beam before that it continues, and the hypotheses after it."""
    beams, found, steps, kept = [(0.0, ())], [], [], []
    while beams:
        candidates = sorted(
            (
                (total + log_prob, i, (*made, token))
                for i, (total, made) in enumerate(beams)
                for token, log_prob in enumerate(log_probs_after((*tokens, *made)))
            ),
            reverse=True,
        )[: max(2, 1 + len(stops)) * num_beams + 1]
        # Otherwise float32 might rightly choose others.
        assert min(a[0] - b[0] for a, b in zip(candidates, candidates[1:])) > 2e-5
        length = len(candidates[0][2])
        going = []
        for rank, (total, parent, made) in enumerate(candidates[:-1]):
            if made[-1] not in stops and length < most:
                going.append((total, parent, made))
            elif rank < num_beams:
                found.append((total / length**penalty, made))
        found = sorted(found, reverse=True)[:num_beams]
        going = going[:num_beams]
        if len(found) == num_beams and going:
            at = most if early == "never" and penalty > 0 else length
            if early is True or going[0][0] / at**penalty <= found[-1][0]:
                going = []
        steps.append([(parent, made) for _, parent, made in going])
        kept.append(tuple(found))
        beams = [(total, made) for total, _, made in going]
    return found, steps, kept


def search(model, cache, prompts=PROMPTS, num_beams=NUM_BEAMS, **options):  # noqa: F811
    import eqx_paged

    options = dict(max_new_tokens=8, prefill_chunk=16) | options
    return eqx_paged.beam_search(
        model, cache, *padded(prompts), num_beams=num_beams, **options
    )


def read(model, cache, texts):  # noqa: F811
    """The cache with texts in some of its rows."""
    rows = [texts.get(i, ()) for i in range(cache.num_seqs)]
    return quick_jit(
        lambda cache: generate(model, cache, rows, max_new_tokens=0, throw=False)[1]
    )(cache)


def hypotheses(found):
    """`(score, tokens)` of each prompt's. Past their ends is 0, and past the last none."""
    out = []
    for scores, lengths, tokens in zip(
        *map(np.asarray, (found.scores, found.lengths, found.tokens))
    ):
        np.testing.assert_array_equal(scores > -np.inf, lengths > 0)
        assert all(not np.any(row[n:]) for row, n in zip(tokens, lengths))
        out.append(
            [(s, tuple(t[:n].tolist())) for s, t, n in zip(scores, tokens, lengths) if n]
        )
    return out


def assert_found(found, wanted, result="successful"):
    assert told(found.result) == result
    for mine, theirs in zip(hypotheses(found), wanted, strict=True):
        assert [tokens for _, tokens in mine] == [tokens for _, tokens in theirs]
        # Sums of eight log-probabilities of size 10 in float32.
        np.testing.assert_allclose(
            [score for score, _ in mine], [score for score, _ in theirs], rtol=0, atol=1e-4
        )


# Two that often come up, so that hypotheses have all lengths.
STOPS = (43, 12)
EARLY = (False, True, "never")
PENALTIES = (1.0, 0.0, 2.0, -1.0)
# Rows for the beams of all prompts and four to spare, which may hold what they like.
SPARE = range(NUM_SEQS * NUM_BEAMS, NUM_SEQS * NUM_BEAMS + 4)
POOL = 52


def rows_for_all(**changed):
    return poisoned(empty(**dict(num_seqs=SPARE.stop, num_pages=POOL) | changed))


def wanted_of(prompts, **options):
    return [searched(p, STOPS, **options)[0] if p else [] for p in prompts]


def test_a_search_finds_what_plain_python_finds(model):  # noqa: F811
    lengths = set()
    for i, (early, penalty) in enumerate(itertools.product(EARLY, PENALTIES)):
        with count_compilations() as compilations:
            found, cache = search(
                model,
                rows_for_all(),
                stop_tokens=STOPS,
                early_stopping=early,
                length_penalty=penalty,
            )
        assert_found(found, wanted_of(PROMPTS, penalty=penalty, early=early))
        assert_all_free(cache)
        lengths |= {len(tokens) for of in hypotheses(found) for _, tokens in of}
        assert i == 0 or not compilations
    assert len(lengths) > 4
    # A bool of NumPy is one.
    found, _ = search(
        model, rows_for_all(), stop_tokens=STOPS, early_stopping=np.bool_(True)
    )
    assert_found(found, wanted_of(PROMPTS, early=True))


def test_when_to_stop_and_the_penalty_matter():
    kinds = itertools.product(EARLY, PENALTIES)
    results = [wanted_of(PROMPTS, early=early, penalty=p) for early, p in kinds]
    tokens = {repr([[made for _, made in of] for of in result]) for result in results}
    assert len(tokens) >= 6


def test_a_prompt_extends_what_its_row_holds(model):  # noqa: F811
    """The others' rows and the spare ones are left alone."""
    first, rest = PROMPTS[1][:9], PROMPTS[1][9:]
    cache = rows_for_all()
    cache = read(model, cache, {0: first, 3: prompt(5, 17), 6: prompt(6, 2)})
    cache, result = cache.fork(0, SPARE[0])
    assert told(result) == "successful"
    prompts = (rest, PROMPTS[0], (), ())
    found, after = search(model, cache, prompts, stop_tokens=STOPS)
    whole = (PROMPTS[1], (*prompt(5, 17), *PROMPTS[0]), (), ())
    assert_found(found, wanted_of(whole))
    held = cache.kv_lens.tolist()
    assert after.kv_lens.tolist() == [0] * 6 + held[6:]
    assert int(after.table.num_free_pages) == POOL - 2 - 1


# --- Pages


def pages_of_a_search(prompts):
    """The pages in use at each step, by the oracle's beams and page table."""
    table = oracle.PageTable(
        num_pages=1000, num_seqs=2 * SPARE[0], pages_per_seq=12, page_size=PAGE_SIZE
    )
    rows = range(0, SPARE[0], NUM_BEAMS)
    lens = {row: len(tokens) - 1 for row, tokens in zip(rows, prompts) if tokens}
    table.append([lens.get(i, 0) for i in range(2 * SPARE[0])])
    beams, used = {row: [row] for row in lens}, []
    runs = {row: searched(p, STOPS)[1] for row, p in zip(rows, prompts) if p}
    for step in range(8):
        reading = [i for of in beams.values() for i in of]
        table.append([int(i in reading) for i in range(2 * SPARE[0])])
        used.append(1000 - table.num_free_pages)
        for row, of in list(beams.items()):
            new = runs[row][step] if step < len(runs[row]) else []
            # To the other half of the rows and back.
            free = [i for i in range(len(table.rows)) if not table.lengths[i]]
            table.fork([of[parent] for parent, _ in new], free[: len(new)])
            table.free([i in of for i in range(len(table.rows))])
            beams[row] = free[: len(new)]
    assert table.num_free_pages == 1000
    return used


def with_free_pages(cache, num_pages):
    """The cache, with all pages but some in the spare rows."""
    left = int(cache.table.num_free_pages) - num_pages
    lens = np.zeros(cache.num_seqs, np.int32)
    for row in SPARE:
        lens[row] = PAGE_SIZE * min(left, 12)
        left -= min(left, 12)
    cache, _, result = append(cache, ints(lens), 512)
    assert told(result) == "successful" and int(cache.table.num_free_pages) == num_pages
    return cache


def test_beams_share_the_pages_of_what_they_have_in_common(model):  # noqa: F811
    used = pages_of_a_search(PROMPTS)
    most = max(used)
    apart = sum(NUM_BEAMS * math.ceil((len(p) + 7) / PAGE_SIZE) for p in PROMPTS if p)
    assert most <= 0.7 * apart
    cache = with_free_pages(rows_for_all(), most)
    found, after = search(model, cache, stop_tokens=STOPS)
    assert_found(found, wanted_of(PROMPTS))
    assert int(after.table.num_free_pages) == most

    cache = with_free_pages(rows_for_all(), most - 1)
    found, after = search(model, cache, stop_tokens=STOPS, throw=False)
    assert int(after.table.num_free_pages) == most - 1
    # What the steps had found that there were pages for.
    num_steps = used.index(most)
    runs = [searched(p, STOPS)[2] if p else [] for p in PROMPTS]
    kept = [run[min(num_steps, len(run)) - 1] if run else [] for run in runs]
    assert num_steps > 1 and any(kept)
    assert_found(found, kept, "out_of_pages")
    with pytest.raises(RuntimeError, match="not enough free pages. .* hypotheses"):
        search(model, cache, stop_tokens=STOPS)


# --- Few tokens


class Bigram(eqx.Module):
    """The next token depends on the last one alone; nothing is stored."""

    table: jax.Array

    def __call__(self, tokens, cache, batch):
        return self.table[tokens], cache

    def unembed(self, hidden):
        return hidden


@ft.partial(quick_jit, static_argnames=("num_beams", "max_new_tokens"))
def search_bigrams(table, token, stop_tokens, num_beams, max_new_tokens):
    """From one token on. It is too short to be read before the search."""
    import eqx_paged

    return eqx_paged.beam_search(
        Bigram(table),
        empty(num_layers=1, num_seqs=num_beams),
        token[None, None],
        ints([1]),
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        throw=False,
    )


def test_a_search_with_a_beam_for_all_there_is_finds_it_all():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2, 2)).astype(np.float32)
    log_probs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    wanted = []
    for made in itertools.product((0, 1), repeat=3):
        pairs = zip((1, *made), made)
        wanted.append((sum(log_probs[pair] for pair in pairs) / 3, made))
    wanted = sorted(wanted, reverse=True)
    # Beams that there are no tokens for at first, and one more than there are ever.
    found, cache = search_bigrams(jnp.asarray(table), ints(1), ints(()), 9, 3)
    assert_found(found, [wanted])
    assert_all_free(cache)


def test_one_beam_takes_the_most_probable_token():
    table = np.random.default_rng(1).standard_normal((30, 30)).astype(np.float32)
    made, last = [], 4
    while len(made) < 9:
        last = int(np.argmax(table[last]))
        made.append(last)
    (of,) = hypotheses(search_bigrams(jnp.asarray(table), ints(4), ints(()), 1, 9)[0])
    assert [tokens for _, tokens in of] == [tuple(made)]


def test_what_cannot_be_continued_ends_the_search():
    # Only token 1 can come, and it is a stop token: one hypothesis, and nothing after it.
    table = jnp.array([[-jnp.inf, 0.0]] * 2)
    found, _ = search_bigrams(table, ints(0), ints((1,)), 2, 5)
    assert told(found.result) == "successful"
    assert hypotheses(found) == [[(0.0, (1,))]]


# --- What can go wrong


def test_what_does_not_fit_is_told_before_any_work(model, no_type_hook):  # noqa: F811
    import eqx_paged

    cache = rows_for_all()
    before = jax.tree.map(np.array, cache)
    contiguous = eqx_paged.RaggedKVCache.empty(
        num_layers=1, num_seqs=16, max_len=32, num_kv_heads=1, head_dim=8
    )
    used, _, _ = append(cache, ints([0] * 4 + [5] + [0] * 11), 512)
    for changed, options, words in (
        (cache, dict(num_beams=5), ("20", "16")),
        (cache, dict(num_beams=0), ("num_beams", "0")),
        (cache, dict(max_new_tokens=0), ("max_new_tokens", "0")),
        (cache, dict(early_stopping="no"), ("early_stopping", "no")),
        (cache, dict(early_stopping=1), ("early_stopping", "1")),
        (cache, dict(length_penalty=np.nan), ("length_penalty", "nan")),
        (cache, dict(length_penalty="long"), ("length_penalty", "long")),
        (cache, dict(length_penalty=1e39), ("length_penalty", "1e+39")),
        (contiguous, {}, ("PagedKVCache", "RaggedKVCache")),
        (cache, dict(stop_tokens=[0.5]), ("stop_tokens", "0.5")),
        (used, {}, ("Row 4", "prompt 1", "5 tokens")),
        (with_free_pages(cache, 4), {}, ("5 pages", "4 are free")),
        (empty(num_seqs=12, max_len=16), {}, ("Prompt 1", "20 tokens", "16")),
    ):
        traces = len(TRACES)
        with fails_naming(words):
            search(model, changed, **options)
        assert len(TRACES) == traces
    with fails_naming(("Prompt 1", "21", "20")):
        prompts, lens = padded(PROMPTS)
        eqx_paged.beam_search(
            model, cache, prompts, lens.at[1].set(21), num_beams=2, max_new_tokens=2
        )
    for changed, reason in (
        (used, "row_in_use"),
        (with_free_pages(cache, 4), "out_of_pages"),
    ):
        found, after = search(model, changed, stop_tokens=STOPS, throw=False)
        assert told(found.result) == reason and hypotheses(found) == [[]] * 4
        assert_trees_identical(after.table, changed.table)
    assert_trees_identical(cache, before)


def test_a_search_cannot_throw_under_jit(model):  # noqa: F811
    with pytest.raises(ValueError, match="throw"):
        jax.jit(lambda cache: search(model, cache))(rows_for_all())
