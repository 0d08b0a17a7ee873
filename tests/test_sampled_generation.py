"""Drawn tokens, what ends them and their log-probabilities, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import count_compilations, told
from .sampling import chain_of, drawn, empty, prompts_of, table, VOCAB
from .test_generate import answers


LENGTHS = (5, 20, 0, 9, 1, 8, 7, 17)
PROMPTS, PADDED, LENS = prompts_of(LENGTHS)
MAX_NEW_TOKENS = 10
KEY = jax.random.key(7)
# One value a prompt; each is what `processed` knows by the same name.
PARAMETERS = dict(
    repetition_penalty=np.linspace(0.8, 1.5, 8),
    frequency_penalty=np.linspace(-0.5, 0.5, 8),
    temperature=np.array([0.7, 1.0, 1.0, 2.0, 0.0, 0.5, 1.5, 1.0]),
    top_k=np.array([3, 99, 1, 5, 9, 1, 20, 10]),
    top_p=np.linspace(0.6, 1.0, 8),
)


def generate(cache, sampler, **options):
    import eqx_paged

    arguments = dict(prompts=PADDED, prompt_lens=LENS, key=KEY)
    arguments |= dict(max_new_tokens=MAX_NEW_TOKENS) | options
    return eqx_paged.generate(
        table(),
        cache,
        arguments.pop("prompts"),
        arguments.pop("prompt_lens"),
        prefill_chunk=16,
        sampler=sampler,
        **arguments,
    )


def of_prompt(i, parameters):
    return {name: value[i] for name, value in parameters.items()}


def expected(keys, parameters=PARAMETERS, **options):
    """The new tokens of each prompt, by itself."""
    model = table()
    each = [
        drawn(model, prompt, key, MAX_NEW_TOKENS, **options, **of_prompt(i, parameters))
        for i, (prompt, key) in enumerate(zip(PROMPTS, keys))
    ]
    return [tuple(new) for new, _ in each], [raws for _, raws in each]


@pytest.fixture(scope="module")
def by_index():
    """What the one key draws."""
    new, _ = expected([jax.random.fold_in(KEY, i) for i in range(len(PROMPTS))])
    assert [len(x) for x in new] == [10 * (n > 0) for n in LENGTHS]
    return new


# All in rows; and in turn, with so few pages that rows are put back.
@pytest.mark.parametrize("num_seqs, num_pages", ((8, 24), (3, 5)))
def test_what_is_drawn_of_a_prompt_depends_on_it_alone(by_index, num_seqs, num_pages):
    cache = empty(num_seqs, num_pages)
    generation, _ = generate(cache, chain_of(PARAMETERS))
    assert told(generation.result) == "successful"
    assert answers(generation) == by_index
    assert generation.log_probs is None


def test_each_prompt_may_have_a_key_of_its_own(by_index):
    # Here the prompts' keys are those of the one key, in another order of the prompts.
    order = np.array([6, 0, 4, 3, 7])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.asarray(order))
    options = dict(prompts=PADDED[order], prompt_lens=LENS[order])
    chosen = chain_of({name: value[order] for name, value in PARAMETERS.items()})
    for key in (keys, jax.random.key_data(keys)):
        generation, _ = generate(empty(8, 24), chosen, key=key, **options)
        assert answers(generation) == [by_index[i] for i in order]


def test_a_sampler_of_your_own_draws_by_the_prompt_as_well():
    # Called for a row at a time, whatever the number of rows.
    def categorical(logits, key):
        return jax.random.categorical(key, logits).astype(jnp.int32)

    keys = [jax.random.fold_in(KEY, i) for i in range(len(PROMPTS))]
    new, _ = expected(keys, {})
    assert answers(generate(empty(3, 5), categorical)[0]) == new


def test_parameters_are_data():
    generate(empty(3, 5), chain_of(PARAMETERS))
    chains = [
        chain_of({name: value[::-1] for name, value in PARAMETERS.items()}),
        # One number for all prompts is the same program.
        chain_of(dict(of_prompt(0, PARAMETERS), top_k=4)),
    ]
    caches, keys = (empty(3, 5), empty(3, 5)), (KEY, jax.random.key(99))
    with count_compilations() as compilations:
        for chain, cache, key in zip(chains, caches, keys):
            generate(cache, chain, key=key)
    assert not compilations


def test_what_ends_a_prompt_and_how_likely_its_tokens_were(by_index):
    # The end of one prompt's tokens, two of another's beginning, and what none has.
    sequences = (by_index[1][6:9], by_index[3][:2], by_index[7][9:] + by_index[0][:1])
    limits = np.array([3, 10, 10, 10, 0, 1, 10, 40], np.int32)
    keys = [jax.random.fold_in(KEY, i) for i in range(len(PROMPTS))]
    new, raws = expected(keys, stops=sequences)
    new = [tokens[:limit] for tokens, limit in zip(new, limits)]
    assert len(new[1]) == 9 and len(new[3]) == 2 and len(new[7]) == 10
    options = dict(stop_sequences=sequences, limits=limits, log_probs=3)
    generation, cache = generate(empty(3, 24), chain_of(PARAMETERS), **options)
    assert answers(generation) == new
    assert int(cache.table.num_free_pages) == 24

    told_of = generation.log_probs
    assert told_of.top.shape == told_of.top_tokens.shape == (8, MAX_NEW_TOKENS, 3)
    for i, tokens in enumerate(new):
        logits = np.array(raws[i][: len(tokens)], np.float64).reshape(-1, VOCAB)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        order = np.argsort(-log_probs, axis=1, kind="stable")[:, :3]
        n = len(tokens)
        np.testing.assert_array_equal(told_of.top_tokens[i, :n], order)
        top = np.take_along_axis(log_probs, order, axis=1)
        chosen = log_probs[np.arange(n), list(tokens)]
        # Sums of 23 numbers in float32, of logarithms up to 10.
        np.testing.assert_allclose(told_of.top[i, :n], top, atol=1e-5)
        np.testing.assert_allclose(told_of.chosen[i, :n], chosen, atol=1e-5)
        for array in (told_of.top, told_of.top_tokens, told_of.chosen):
            assert not np.any(array[i, n:])


def test_no_more_log_probabilities_are_told_than_asked_for():
    from eqx_paged import greedy

    options = dict(prompts=PADDED[:3], prompt_lens=LENS[:3])
    told_of = generate(empty(8, 24), greedy, log_probs=0, **options)[0].log_probs
    assert told_of.chosen.shape == (3, MAX_NEW_TOKENS)
    assert told_of.top.shape == (3, MAX_NEW_TOKENS, 0)
    with pytest.raises(ValueError, match="24 most probable tokens, but there are 23"):
        generate(empty(8, 24), greedy, log_probs=24, **options)


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(key=jax.random.split(KEY, 3)), "one for each of 8 prompts.*3"),
        (dict(limits=np.ones(3, np.int32)), r"limits .* \(8,\).* \(3,\)"),
        (dict(limits=np.ones(8)), "limits must be integers"),
        (dict(limits=np.full(8, 2**40)), "limits must be int32"),
        (dict(limits=np.array([3, -1, *[2] * 6])), "limits must be at least 0.* is -1"),
        (dict(key=0), "key must be one that jax.random makes, but is 0"),
        (dict(key=np.zeros(2)), "key must be one that jax.random makes"),
        (dict(stop_sequences=[[1], []]), "at least one long"),
        (dict(stop_sequences=[[1.5]]), "lists of tokens"),
        (dict(stop_sequences=[[-1]]), "lists of tokens"),
        (dict(stop_sequences=np.ones(3, np.int32)), "stop_sequences"),
        (dict(stop_sequences=[[2**40]]), "stop_sequences must be int32"),
        (dict(stop_sequences=np.zeros((2, 0), int)), r"room for a token.*\(2, 0\)"),
        (dict(stop_sequences=np.array([[-1, 2], [2, -1]])), r"only before.*\[2, -1\]"),
        (dict(log_probs=-1), "log_probs must be at least 0"),
        (dict(stop_sequences=5), "stop_sequences must be lists of tokens, but is 5"),
        (dict(stop_sequences=None), "stop_sequences must be lists of tokens, but is None"),
        (dict(max_new_tokens=2**31), f"max_new_tokens must be at most {2**31 - 1}"),
        (dict(window=2**31), f"window must be at most {2**31 - 1}"),
    ),
)
def test_misuse_is_told(no_type_hook, options, message):
    with pytest.raises(ValueError, match=message):
        generate(empty(3, 24), chain_of({}), **options)


def test_what_is_no_sampler_or_no_cache_is_refused(no_type_hook):
    from eqx_paged import samplers

    for wrong, message in (
        (None, "sampler must be a function .* is None"),
        ("greedy", "sampler must be a function .* is 'greedy'"),
        (samplers.temperature(0.5), "sampler must choose tokens, but temperature is"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(empty(3, 24), wrong)
    for wrong in (None, empty(3, 24).table):
        with pytest.raises(ValueError, match="cache must be a PagedKVCache or a Ragged"):
            generate(wrong, chain_of({}))


def test_parameters_of_other_prompts_are_refused():
    with pytest.raises(ValueError, match="top_k was given for 3 prompts, .* are 8"):
        generate(empty(3, 24), chain_of(dict(top_k=np.arange(1, 4))))
    with pytest.raises(ValueError, match="needs a key"):
        generate(empty(3, 24), chain_of({}), key=None)
