"""Generation by a small random model, against a full recompute in float64 NumPy."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import oracle
from .helpers import (
    assert_trees_identical,
    count_compilations,
    entry,
    ints,
    layer_pools,
    quick_jit,
    row_tokens,
    told,
)


VOCAB, WIDTH, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 60, 32, 2, 4, 2, 16
NUM_SEQS, MAX_LEN, PAGE_SIZE, MAX_PROMPT_LEN, MAX_NEW_TOKENS = 4, 96, 8, 20, 12
NUM_PAGES = 17

TRACES = []  # one entry each time that the model is traced


def weights():
    """Large enough that the next token depends on all tokens before it."""
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return rng.standard_normal((rows, columns)).astype(np.float32) * 2 / rows**0.5

    layers = [
        dict(
            q=matrix(WIDTH, NUM_HEADS * HEAD_DIM),
            k=matrix(WIDTH, NUM_KV_HEADS * HEAD_DIM),
            v=matrix(WIDTH, NUM_KV_HEADS * HEAD_DIM),
            o=matrix(NUM_HEADS * HEAD_DIM, WIDTH),
            up=matrix(WIDTH, 2 * WIDTH),
            down=matrix(2 * WIDTH, WIDTH),
        )
        for _ in range(NUM_LAYERS)
    ]
    embedding = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    positions = 0.5 * rng.standard_normal((2 * MAX_LEN, WIDTH)).astype(np.float32)
    return dict(
        layers=layers,
        embedding=embedding,
        positions=positions,
        out=matrix(WIDTH, VOCAB),
    )


def normed(x, xp):
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


class Model(eqx.Module):
    weights: dict
    attention: eqx.Module

    def __call__(self, tokens, cache, batch):
        TRACES.append((batch.kind, tokens.shape))
        w = self.weights
        x = w["embedding"][tokens] + w["positions"][batch.positions]
        layers = []
        for p, pages in zip(w["layers"], cache.layers, strict=True):
            h = normed(x, jnp)
            q, k, v = ((h @ p[n]).reshape(len(h), -1, HEAD_DIM) for n in "qkv")
            out, pages = self.attention(q, k, v, pages, batch)
            x = x + out.reshape(len(h), -1) @ p["o"]
            x = x + jax.nn.relu(normed(x, jnp) @ p["up"]) @ p["down"]
            layers.append(pages)
        return x, eqx.tree_at(lambda c: c.layers, cache, tuple(layers))

    def unembed(self, hidden):
        return normed(hidden, jnp) @ self.weights["out"]


def recomputed_logits(tokens, sliding_window=None):
    """The logits after the last of some tokens, from nothing but the tokens."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights())
    x = w["embedding"][list(tokens)] + w["positions"][: len(tokens)]
    for p in w["layers"]:
        h = normed(x, np)
        q, k, v = ((h @ p[n]).reshape(len(h), -1, HEAD_DIM) for n in "qkv")
        out, _, _ = oracle.attention(q, k, v, sliding_window=sliding_window)
        x = x + out.reshape(len(h), -1) @ p["o"]
        x = x + np.maximum(normed(x, np) @ p["up"], 0) @ p["down"]
    return normed(x[-1], np) @ w["out"]


@ft.cache
def continued(tokens, max_new_tokens=MAX_NEW_TOKENS, sliding_window=None):
    """The greedy continuation of a tuple of tokens."""
    tokens, new = list(tokens), []
    for _ in range(max_new_tokens):
        logits = recomputed_logits(tokens, sliding_window)
        best, second = np.sort(logits)[[-1, -2]]
        # Otherwise float32 might rightly choose another token.
        assert best - second > 1e-4
        new.append(int(np.argmax(logits)))
        tokens.append(new[-1])
    return tuple(new)


@pytest.fixture(scope="module")
def model():
    import eqx_paged

    return Model(jax.tree.map(jnp.asarray, weights()), eqx_paged.PagedAttention())


def empty(**changed):
    import eqx_paged

    sizes = dict(
        num_layers=NUM_LAYERS,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_seqs=NUM_SEQS,
        max_len=MAX_LEN,
    )
    return eqx_paged.PagedKVCache.empty(**(sizes | changed))


def prompt(seed, length):
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


PROMPTS = (prompt(1, 5), prompt(2, 20), (), prompt(8, 9))


def padded(prompts, num_rows=None):
    """Prompts as arrays; the padding is not a token, and must not be looked up."""
    rows = np.full((num_rows or len(prompts), MAX_PROMPT_LEN), 2**30, np.int32)
    lens = np.zeros(len(rows), np.int32)
    for i, tokens in enumerate(prompts):
        rows[i, : len(tokens)] = tokens
        lens[i] = len(tokens)
    return jnp.asarray(rows), jnp.asarray(lens)


def generate(model, cache, prompts, **options):
    return generate_padded(model, cache, *padded(prompts), **options)


def generate_padded(model, cache, prompts, prompt_lens, **options):
    import eqx_paged

    options = dict(max_new_tokens=MAX_NEW_TOKENS, prefill_chunk=16) | options
    return eqx_paged.generate(model, cache, prompts, prompt_lens, **options)


def answers(generation):
    """The tokens of each prompt, whose padding must be 0."""
    assert generation.tokens.dtype == generation.lengths.dtype == jnp.int32
    tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
    for row, n in zip(tokens, lengths):
        np.testing.assert_array_equal(row[n:], 0)
    return [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths)]


def expected(prompts, stop_tokens=(), max_new_tokens=MAX_NEW_TOKENS):
    out = []
    for tokens in prompts:
        new = continued(tokens)[:max_new_tokens] if tokens else ()
        stops = [i for i, token in enumerate(new) if token in stop_tokens]
        out.append(new[: stops[0] + 1] if stops else new)
    return out


def held(prompts, new):
    """Each row holds its prompt and all new tokens but the last."""
    return [len(p) + max(0, len(n) - 1) for p, n in zip(prompts, new)]


def test_the_models_answers_depend_on_their_context():
    new = [continued(tokens) for tokens in PROMPTS if tokens]
    assert min(len(set(tokens)) for tokens in new) >= 6
    changed = (PROMPTS[1][0] ^ 1, *PROMPTS[1][1:])  # the first of twenty tokens
    assert continued(changed) != continued(PROMPTS[1])


# One token, a page, several rows in a chunk, and more than there are tokens.
@pytest.mark.parametrize(
    "prefill_chunk",
    (pytest.param(1, marks=pytest.mark.slow), 8, pytest.param(16, marks=pytest.mark.slow))
    + (500,),
)
def test_generation_equals_full_recompute(model, prefill_chunk):
    generation, cache = generate(model, empty(), PROMPTS, prefill_chunk=prefill_chunk)
    assert told(generation.result) == "successful"
    assert generation.tokens.shape == (4, MAX_NEW_TOKENS)
    assert answers(generation) == expected(PROMPTS)
    assert cache.kv_lens.tolist() == held(PROMPTS, expected(PROMPTS))


def test_many_random_prompts(model):
    for seed in (4, 6, 7):  # no near ties
        lens = np.random.default_rng(seed).integers(0, 21, 4)
        prompts = [prompt(100 * seed + i, n) for i, n in enumerate(lens)]
        generation, _ = generate(model, empty(), prompts)
        assert answers(generation) == expected(prompts)


def test_the_contiguous_cache_gives_the_same_answers(model):
    import eqx_paged

    cache = eqx_paged.RaggedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_seqs=NUM_SEQS,
        max_len=MAX_LEN,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
    )
    ragged = eqx.tree_at(lambda m: m.attention, model, eqx_paged.RaggedAttention())
    generation, cache = generate(ragged, cache, PROMPTS)
    assert answers(generation) == expected(PROMPTS)
    assert cache.lengths.tolist() == held(PROMPTS, expected(PROMPTS))


def test_a_stop_token_ends_its_row_and_is_kept(model):
    # The third token of one answer and the eighth of another.
    stops = (continued(PROMPTS[0])[2], continued(PROMPTS[3])[7])
    new = expected(PROMPTS, stops)
    assert len({len(x) for x in new}) > 2
    generation, cache = generate(model, empty(), PROMPTS, stop_tokens=stops)
    assert told(generation.result) == "successful"
    assert answers(generation) == new
    assert cache.kv_lens.tolist() == held(PROMPTS, new)


def test_a_stop_token_may_be_the_first(model):
    stops = (continued(PROMPTS[0])[0], continued(PROMPTS[0])[0])
    new = expected(PROMPTS, stops)
    assert len(new[0]) == 1
    generation, cache = generate(model, empty(), PROMPTS, stop_tokens=stops)
    assert answers(generation) == new
    assert cache.kv_lens.tolist() == held(PROMPTS, new)


@pytest.mark.parametrize("max_new_tokens", (0, 1))
def test_few_new_tokens(model, max_new_tokens):
    generation, cache = generate(model, empty(), PROMPTS, max_new_tokens=max_new_tokens)
    assert told(generation.result) == "successful"
    assert generation.tokens.shape == (4, max_new_tokens)
    assert answers(generation) == expected(PROMPTS, max_new_tokens=max_new_tokens)
    assert cache.kv_lens.tolist() == [5, 20, 0, 9]


def test_a_prompt_may_be_read_before_its_last_token(model):
    heads = tuple(tokens[:-1] for tokens in PROMPTS)
    _, cache = generate(model, empty(), heads, max_new_tokens=0)
    tails = tuple(tokens[-1:] for tokens in PROMPTS)
    generation, _ = generate(model, cache, tails)
    assert answers(generation) == expected(PROMPTS)
    # With no room for more than that token, no prompt is read at all.
    narrow, lens = padded(tails)
    generation, cache = generate_padded(model, cache, narrow[:, :1], lens)
    assert answers(generation) == expected(PROMPTS)
    assert cache.kv_lens.tolist() == held(PROMPTS, expected(PROMPTS))


def test_a_second_turn_reads_its_own_text_only(model):
    first, cache = generate(model, empty(), PROMPTS)
    said = answers(first)
    # One goes on, one is silent, one begins, one is asked about its last token alone.
    texts = (prompt(11, 7), None, prompt(12, 13), ())
    second = tuple(
        () if text is None else (*tokens[-1:], *text) for tokens, text in zip(said, texts)
    )
    generation, after = generate(model, cache, second)
    assert told(generation.result) == "successful"
    whole = [
        () if not more else (*p, *n[:-1], *more)
        for p, n, more in zip(PROMPTS, said, second)
    ]
    new = expected(whole)
    assert answers(generation) == new
    assert after.kv_lens.tolist() == [
        len(w) + 11 if w else n for w, n in zip(whole, cache.kv_lens.tolist())
    ]
    # The silent row is as it was.
    for a, b in zip(layer_pools(cache), layer_pools(after)):
        for x, y in zip(a, b):
            rows = (np.asarray(c.table.page_indices[1]) for c in (cache, after))
            x, y = (row_tokens(p, r, 31) for p, r in zip((x, y), rows))
            np.testing.assert_array_equal(x, y)


def test_rows_forked_from_one_prompt_go_their_own_ways(model):
    _, cache = generate(model, empty(), (PROMPTS[1],), max_new_tokens=0)
    cache, result = cache.fork(ints((0, 0)), ints((1, 3)))
    assert told(result) == "successful"
    texts = (prompt(21, 4), prompt(22, 1), (), prompt(23, 6))
    generation, cache = generate(model, cache, texts)
    whole = [(*PROMPTS[1], *text) if text else () for text in texts]
    assert answers(generation) == expected(whole)


def test_fewer_prompts_than_rows(model):
    generation, cache = generate(model, empty(), PROMPTS[:2])
    assert generation.tokens.shape == (2, MAX_NEW_TOKENS)
    assert answers(generation) == expected(PROMPTS[:2])
    assert cache.kv_lens.tolist() == [16, 31, 0, 0]


def test_no_prompt_at_all(model):
    generation, cache = generate(model, empty(), ((), (), (), ()))
    assert told(generation.result) == "successful"
    assert answers(generation) == [()] * 4
    assert cache.kv_lens.tolist() == [0] * 4


def test_prompts_may_be_numpy_arrays(model):
    import eqx_paged

    prompts, lens = (np.asarray(x) for x in padded(PROMPTS))
    generation, _ = eqx_paged.generate(
        model, empty(), prompts, lens, max_new_tokens=MAX_NEW_TOKENS, prefill_chunk=16
    )
    assert answers(generation) == expected(PROMPTS)


# --- Samplers


def categorical(logits, key):
    return jax.random.categorical(key, logits).astype(jnp.int32)


def test_a_sampler_draws_by_its_key(model):
    runs = [
        answers(
            generate(model, empty(), PROMPTS, sampler=categorical, key=jax.random.key(k))[0]
        )
        for k in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0][0]) == MAX_NEW_TOKENS


def test_greedy_takes_the_first_of_the_largest():
    import eqx_paged

    logits = jnp.array([[0.0, 2.0, 2.0], [-1.0, -3.0, -2.0]])
    tokens = eqx_paged.greedy(logits, None)
    assert tokens.tolist() == [1, 0] and tokens.dtype == jnp.int32


# --- What can go wrong


def before_work(call, error=ValueError):
    """Raises, without a single trace of the model."""
    traces = len(TRACES)
    with pytest.raises(error) as info:
        call()
    assert len(TRACES) == traces
    return str(info.value)


def test_misuse_is_told_before_any_work(model, no_type_hook):
    import eqx_paged

    cache = empty()
    before = jax.tree.map(np.array, cache)
    options = dict(max_new_tokens=3)
    prompts, lens = padded(PROMPTS)
    call = ft.partial(eqx_paged.generate, model)

    none = jnp.zeros((0, 3), jnp.int32), ints([])
    assert "0" in before_work(lambda: call(cache, *none, **options))
    # More tokens than a row has room for.
    long = jnp.zeros((1, MAX_LEN + 1), jnp.int32), ints([MAX_LEN + 1])
    message = before_work(lambda: call(cache, *long, **options))
    assert str(MAX_LEN + 1) in message and str(MAX_LEN) in message
    # Lengths that the array does not have, below zero, or of another number of prompts.
    for wrong in ((21, 1, 1, 1), (-1, 1, 1, 1), (1, 1, 1)):
        before_work(lambda w=wrong: call(cache, prompts, ints(w), **options))
    before_work(lambda: call(cache, prompts, lens, max_new_tokens=-1))
    before_work(lambda: call(cache, prompts, lens, prefill_chunk=0, **options))
    before_work(lambda: call(cache, prompts, lens, max_new_tokens=2.5))
    before_work(lambda: call(cache, prompts, lens, prefill_chunk=8.0, **options))
    before_work(lambda: call(cache, prompts.tolist(), lens, **options))
    wide = np.asarray(prompts, np.int64) + 2**32
    assert "int32" in before_work(lambda: call(cache, wide, lens, **options))
    wide = np.asarray(lens, np.int64) + 2**32
    for throw in (True, False):
        assert "int32" in before_work(
            lambda t=throw: call(cache, prompts, wide, throw=t, **options)
        )
    for stops in ([1.7], {5}, "ab", [2**40], [[1, 2]]):
        message = before_work(
            lambda s=stops: call(cache, prompts, lens, stop_tokens=s, **options)
        )
        assert "stop_tokens" in message
    # A page shortage of the prompts: 34 tokens on 4 pages.
    message = before_work(lambda: call(empty(num_pages=4), prompts, lens, **options))
    assert "4" in message
    assert_trees_identical(cache, before)


def test_numbers_may_be_of_numpy(model, no_type_hook):
    ours = generate(model, empty(), PROMPTS, max_new_tokens=2)[0]
    numpys = generate(
        model, empty(), PROMPTS, max_new_tokens=np.int64(2), prefill_chunk=np.int32(16)
    )[0]
    assert answers(numpys) == answers(ours)


@pytest.mark.parametrize(
    "sampler", (lambda logits, key: logits[:, 0], lambda logits, key: ints((1,)))
)
def test_a_sampler_returns_a_token_a_row(model, no_type_hook, sampler):
    with pytest.raises(ValueError, match="sampler"):
        generate(model, empty(), PROMPTS, max_new_tokens=2, sampler=sampler)


def test_a_row_that_is_nearly_full_limits_its_prompt(model):
    cache, past = nearly_failing_cache(model, "sequence_too_long")  # 68 of 96 tokens
    _, cache = generate(model, cache, ((), prompt(45, 20)), max_new_tokens=0)
    assert str(MAX_LEN) in before_work(lambda: generate(model, cache, ((), prompt(4, 9))))
    generation, _ = generate(model, cache, ((), prompt(4, 8)), max_new_tokens=1)
    context = (*past[1], *prompt(45, 20), *prompt(4, 8))
    assert answers(generation) == [(), continued(context)[:1]]


def test_copies_of_shared_pages_count_in_the_shortage(model):
    # Rows 0 and 1 share a page with room in it, and row 2 holds the last free pages. A
    # token for both rows needs a copy, for which there is no page.
    _, cache = generate(model, empty(), (PROMPTS[0],), max_new_tokens=0)
    cache, _ = cache.fork(0, 1)
    table, result = cache.table.append(ints((0, 0, 96, 32)))
    assert told(result) == "successful"
    cache = eqx.tree_at(lambda c: c.table, cache, table)
    assert int(cache.table.num_free_pages) == 0
    before_work(lambda: generate(model, cache, ((1,), (2,)), max_new_tokens=1))


def nearly_failing_cache(model, reason):
    """A cache and what its rows hold; rows 0, 1 and 3 are to be used."""
    if reason == "out_of_pages":
        # Row 2 sits on ten of seventeen pages. The prompts need six, the answers nine.
        cache, result = empty().table.append(ints((0, 0, 80, 0)))
        assert told(result) == "successful"
        return eqx.tree_at(lambda c: c.table, empty(), cache), ((), (), (0,) * 80, ())
    # Row 1 has room for one page more than its prompt.
    past = (prompt(41, 20), prompt(42, 20), prompt(43, 20), prompt(44, 8))
    cache = empty()
    for text in past:
        _, cache = generate(model, cache, ((), text), max_new_tokens=0)
    return cache, ((), sum(past, ()), (), ())


@pytest.mark.parametrize("reason", ("sequence_too_long", "out_of_pages"))
def test_a_run_that_fails_midway_returns_what_was_made(model, reason):
    import eqx_paged

    cache, past = nearly_failing_cache(model, reason)
    before = jax.tree.map(np.array, cache)
    generation, after = generate(model, cache, PROMPTS, throw=False)
    assert told(generation.result) == reason
    assert_trees_identical(cache, before)

    made = answers(generation)
    whole = [(*old, *new) for old, new in zip(past, PROMPTS)]
    for tokens, context, text in zip(made, whole, PROMPTS):
        assert not text or tokens == continued(context)[: len(tokens)]
    assert 0 < len(made[1]) < MAX_NEW_TOKENS
    assert after.kv_lens.tolist() == held(whole, made)
    if reason == "sequence_too_long":
        assert len(made[1]) == MAX_LEN - len(whole[1]) + 1
    pages = sum(math.ceil(n / PAGE_SIZE) for n in after.kv_lens.tolist())
    assert int(after.table.num_free_pages) == after.table.num_pages - pages

    # The cache is good: with rows freed, another goes on where it stopped.
    after = after.free(jnp.array([False, True, True, True]))
    more, _ = generate(model, after, (made[0][-1:],))
    assert answers(more) == [continued((*PROMPTS[0], *made[0]))]

    with pytest.raises(RuntimeError) as info:
        generate(model, cache, PROMPTS)
    assert eqx_paged.RESULTS[getattr(eqx_paged.RESULTS, reason)] in str(info.value)
    assert_trees_identical(cache, before)


def test_prompts_that_do_not_fit_are_a_result_without_throw(model):
    cache = empty(num_pages=4)
    generation, after = generate(model, cache, PROMPTS, throw=False)
    assert told(generation.result) == "out_of_pages"
    assert answers(generation) == [()] * 4
    # In the consistent state of that point: a row holds a beginning of its prompt.
    assert all(n <= len(p) for n, p in zip(after.kv_lens.tolist(), PROMPTS))


def test_generation_may_be_jitted(model):
    run = eqx.filter_jit(ft.partial(generate, throw=False))
    generation, cache = run(model, empty(), PROMPTS)
    assert answers(generation) == expected(PROMPTS)
    assert cache.kv_lens.tolist() == held(PROMPTS, expected(PROMPTS))


def test_a_jitted_batch_of_sampler_keys_gives_a_generation_each(model):
    # The model is closed over, and there are rows to spare, which are cut off while traced.
    # One layer will do, and compiles sooner.
    model = eqx.tree_at(lambda m: m.weights["layers"], model, model.weights["layers"][:1])

    def run(key):
        options = dict(sampler=categorical, key=key, throw=False)
        return generate(model, empty(num_layers=1), PROMPTS[:2], **options)

    keys = jax.random.split(jax.random.key(3), 3)
    many, caches = quick_jit(jax.vmap(run))(keys)
    assert many.tokens.shape == (3, 2, MAX_NEW_TOKENS)
    alone, drawn = quick_jit(run), []
    for i, key in enumerate(keys):
        one, cache = alone(key)
        assert told(entry(many.result, i)) == told(one.result) == "successful"
        drawn.append(answers(one))
        assert answers(entry(many, i)) == drawn[-1]
        assert_trees_identical(entry(caches, i).table, cache.table)
    assert drawn[0] != drawn[1] != drawn[2]


def test_64_bit_mode_changes_nothing(model):
    @quick_jit
    def run(cache, prompts, prompt_lens):
        return generate_padded(model, cache, prompts, prompt_lens, throw=False)

    with jax.enable_x64(True):
        # As NumPy makes them: int64.
        prompts = (np.asarray(x, np.int64) for x in padded(PROMPTS[:2]))
        generation, cache = run(empty(), *prompts)
    assert told(generation.result) == "successful"
    assert answers(generation) == expected(PROMPTS[:2])
    assert cache.kv_lens.tolist() == [16, 31, 0, 0]
    for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(empty()), strict=True):
        assert x.dtype == y.dtype


def test_throw_cannot_be_jitted(model):
    run = eqx.filter_jit(generate)
    with pytest.raises(ValueError, match="throw"):
        run(model, empty(), PROMPTS)


# --- Compilations


def test_the_model_is_traced_once_a_kind_of_step(model):
    traces = len(TRACES)
    generate(model, empty(num_pages=18), PROMPTS)
    kinds = [kind for kind, _ in TRACES[traces:]]
    assert sorted(kinds) == ["decode", "mixed"]


@pytest.mark.parametrize(
    "max_prompt_len, max_new_tokens, kind",
    (
        (MAX_PROMPT_LEN, 1, "mixed"),
        (1, 5, "decode"),
        pytest.param(MAX_PROMPT_LEN, 0, "mixed", marks=pytest.mark.slow),
        pytest.param(1, 0, "mixed", marks=pytest.mark.slow),
        pytest.param(1, 1, "decode", marks=pytest.mark.slow),
    ),
)
def test_a_loop_that_never_turns_is_not_compiled(
    model, max_prompt_len, max_new_tokens, kind
):
    traces = len(TRACES)
    prompts = jnp.zeros((NUM_SEQS, max_prompt_len), jnp.int32)
    lens = jnp.ones(NUM_SEQS, jnp.int32)
    cache = empty(num_pages=19)
    generate_padded(model, cache, prompts, lens, max_new_tokens=max_new_tokens)
    assert [kind for kind, _ in TRACES[traces:]] == [kind]


def test_what_is_data_compiles_nothing(model):
    stops = (1, 2)
    generate(model, empty(), PROMPTS, stop_tokens=stops)
    _, used = generate(model, empty(), PROMPTS[::-1], stop_tokens=stops)
    caches = empty(), used.free(jnp.array([True, True, False, True]))
    traces = len(TRACES)
    with count_compilations() as compilations:
        for prompts in (
            (prompt(31, 1), prompt(32, 20), prompt(33, 8), prompt(34, 2)),
            ((), (), prompt(35, 3), ()),
            ((), (), (), ()),
        ):
            for other in ((3, 4), (5, 5)):
                for cache in caches:
                    generate(model, cache, prompts, stop_tokens=other)
    assert len(TRACES) == traces
    assert not compilations


def test_the_number_of_prompts_compiles_nothing(model):
    cache = empty()
    generate(model, cache, PROMPTS)
    calls = [padded(PROMPTS[:n]) for n in (1, 2, 3)]
    traces = len(TRACES)
    with count_compilations() as compilations:
        for call in calls:
            generate_padded(model, cache, *call)
    assert len(TRACES) == traces
    assert not compilations


def test_weights_are_data(model):
    generate(model, empty(), PROMPTS)
    traces = len(TRACES)
    other = jax.tree.map(lambda x: x * 0.5, model)
    generate(other, empty(), PROMPTS)
    assert len(TRACES) == traces
