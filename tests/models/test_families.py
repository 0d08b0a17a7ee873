"""The families against what transformers computed with the same checkpoints: those of
`tests/fixtures/`, which `python -m scripts.make_fixtures` makes.
"""

import functools
import json
import pathlib

import eqx_paged
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import safetensors.numpy
from scripts._fixture_cases import CASES, LOGITS_EVERY, NUM_NEW_TOKENS, ROPE_CASES

from ..helpers import quick_jit
from .cases import paged_cache, ragged_cache, stepwise_logits


FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
# Logits of size 10, through up to six layers in float32, and angles that are rounded
# otherwise: they differ by up to 2e-5.
TOLERANCE = 2e-4
CHUNK = 16
ROW_LEN = 112


def load(name, directory=FIXTURES, attention=None):
    return models.load_checkpoint(directory / name, jnp.float32, attention=attention)


@functools.cache
def expected(name):
    """Prompts, new tokens, the logits after each token of the prompts, and those of some
    steps; each a list of rows.
    """
    stored = safetensors.numpy.load_file(FIXTURES / name / "expected.safetensors")
    kinds = ("prompt", "tokens", "prompt_logits", "logits")
    return [[stored[f"{kind}_{row}"] for row in range(3)] for kind in kinds]


def whole_rows(name):
    """Each prompt with its new tokens, but the last, which nothing follows."""
    prompts, new, _, _ = expected(name)
    return [[*map(int, p), *map(int, t[:-1])] for p, t in zip(prompts, new)]


def assert_close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE)


@quick_jit
def dense_logits(decoder, tokens):
    return jax.vmap(decoder.unembed)(decoder.dense(tokens))


@pytest.mark.parametrize("name", CASES)
def test_dense_gives_the_logits_of_transformers(name):
    prompts, _, prompt_logits, logits = expected(name)
    rows = whole_rows(name)
    padded = np.zeros((len(rows), ROW_LEN), np.int32)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = tokens
    found = np.asarray(dense_logits(load(name), jnp.asarray(padded)))
    for row, prompt in enumerate(prompts):
        assert_close(found[row, : len(prompt)], prompt_logits[row])
        steps = found[row, len(prompt) - 1 : len(rows[row])]
        assert_close(steps[::LOGITS_EVERY], logits[row])


def chunks(lens):
    """Steps that read prompts of these lengths in chunks, in order."""
    left, steps = list(lens), []
    while any(left):
        room, q_lens = CHUNK, []
        for length in left:
            q_lens.append(min(length, room))
            room -= q_lens[-1]
        left = [length - q_len for length, q_len in zip(left, q_lens)]
        steps.append((tuple(q_lens), CHUNK))
    return steps


def assert_steps_agree(name, make, attention=None):
    """Reads the prompts in chunks, then the new tokens one by one."""
    prompts, new, prompt_logits, logits = expected(name)
    decoder = load(name, attention=attention)
    steps = chunks([len(prompt) for prompt in prompts])
    steps += [((1, 1, 1), None)] * (NUM_NEW_TOKENS - 1)
    cache = make(decoder, num_seqs=3, max_len=ROW_LEN)
    found = stepwise_logits(decoder, cache, whole_rows(name), steps)
    for row, prompt in enumerate(prompts):
        assert_close(found[row][: len(prompt)], prompt_logits[row])
        own = found[row][len(prompt) - 1 :]
        assert_close(own[::LOGITS_EVERY], logits[row])
        # Each is what transformers chose, having chosen the ones before.
        np.testing.assert_array_equal(own.argmax(axis=-1), new[row])


@pytest.mark.parametrize("name", CASES)
def test_pages_give_the_logits_and_tokens_of_transformers(name):
    assert_steps_agree(name, functools.partial(paged_cache, page_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_contiguous_caches_give_the_logits_and_tokens_of_transformers(name):
    assert_steps_agree(name, ragged_cache, eqx_paged.RaggedAttention())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_tokens_of_transformers(name):
    prompts, new, _, _ = expected(name)
    lens = np.asarray([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), max(lens)), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    decoder = load(name)
    made, _ = eqx_paged.generate(
        decoder,
        paged_cache(decoder, num_seqs=3, max_len=ROW_LEN),
        padded,
        lens,
        max_new_tokens=NUM_NEW_TOKENS,
        prefill_chunk=CHUNK,
    )
    np.testing.assert_array_equal(made.tokens, np.stack(new))
