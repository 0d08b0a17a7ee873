"""The families against what transformers computed with the same checkpoints: those of
`tests/fixtures/`, which `python -m scripts.make_fixtures` makes.
"""

import functools
import json
import pathlib
import shutil

import eqx_paged
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import safetensors.numpy
from models._rope import YarnScaling
from models._tensors import tensor_sources
from scripts._fixture_cases import CASES, LOGITS_EVERY, NUM_NEW_TOKENS, ROPE_CASES

from ..helpers import quick_jit
from .cases import paged_cache, ragged_cache, stepwise_logits


FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
# Logits of size 10, through up to six layers in float32, and angles that are rounded
# otherwise: they differ by up to 2e-5.
TOLERANCE = 2e-4
CHUNK = 16
ROW_LEN = 112


def load(name, attention=None):
    if name == "gpt_oss":
        return with_sinks(attention)
    return models.load_checkpoint(FIXTURES / name, jnp.float32, attention=attention)


def with_sinks(attention):
    """The decoder that computes what a gpt-oss computes whose experts give 0."""
    said = json.loads((FIXTURES / "gpt_oss" / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    config = models.DecoderConfig(
        **{name: said[name] for name in (*names, "sliding_window")},
        layer_types=tuple(said["layer_types"]),
        rope_theta=150_000.0,
        rope_scaling=YarnScaling(
            factor=4.0,
            original_max_position_embeddings=32,
            attention_factor=1 + 0.1 * np.log(4.0),
            truncate=False,
        ),
        qkv_bias=True,
        o_bias=True,
        attention_sinks=True,
    )
    decoder = jax.eval_shape(
        lambda key: models.Decoder(config, attention=attention, key=key), jax.random.key(0)
    )
    stored = safetensors.numpy.load_file(FIXTURES / "gpt_oss" / "model.safetensors")
    sources = tensor_sources(config)

    def taken(path, weight):
        name = sources[jax.tree_util.keystr(path, simple=True, separator=".")].name
        if ".mlp." in name:
            return jnp.zeros(weight.shape, weight.dtype)
        return jnp.asarray(stored[name], jnp.float32)

    return jax.tree_util.tree_map_with_path(taken, decoder)


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


def slow_if(is_slow):
    """All checkpoints, some of them only where slow tests run."""
    marks = {name: pytest.mark.slow if is_slow(name) else () for name in CASES}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


# What sets these apart is in no part that pages have to do with.
ALIKE = ("llama_biases", "smollm", "qwen2", "phi3", "olmo2")
# What sets these apart is in attention, of which dense has its own.
APART = ("gemma2", "gpt_oss")


@pytest.mark.parametrize("name", slow_if(lambda name: name not in (*ALIKE, *APART)))
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


@pytest.mark.parametrize("name", slow_if(lambda name: name in ALIKE))
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


# --- Kinds of rotary positions


def changed(kind, directory):
    """A checkpoint with what the kind changes in its `config.json`."""
    name, changes = ROPE_CASES[kind]
    shutil.copytree(FIXTURES / name, directory / name)
    path = directory / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return models.load_checkpoint(directory / name, jnp.float32)


@functools.cache
def rope_expected():
    return safetensors.numpy.load_file(FIXTURES / "rope.safetensors")


@pytest.mark.parametrize("kind", ROPE_CASES)
def test_rotary_positions_are_those_of_transformers(kind, tmp_path):
    decoder = changed(kind, tmp_path)
    tokens = jnp.asarray(rope_expected()["tokens"])
    assert_close(dense_logits(decoder, tokens[None])[0], rope_expected()[kind])


# Those whose angles depend on more than the position.
@pytest.mark.parametrize("kind", ("dynamic", "longrope_short", "longrope_long"))
def test_rotary_positions_in_pages_are_those_of_transformers(kind, tmp_path):
    decoder = changed(kind, tmp_path)
    tokens = rope_expected()["tokens"].tolist()
    cache = paged_cache(decoder, num_seqs=1, max_len=64, page_size=8)
    (found,) = stepwise_logits(decoder, cache, [tokens], chunks([len(tokens)]))
    assert_close(found, rope_expected()[kind])


def test_the_kinds_of_rotary_positions_differ():
    kinds = ("default", "linear", "dynamic", "yarn", "yarn_given")
    last = [rope_expected()[kind][-1] for kind in kinds]
    for i, one in enumerate(last):
        for other in last[:i]:
            assert np.abs(one - other).max() > 100 * TOLERANCE


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match="'gpt_oss' is not supported .*experts"):
        models.load_checkpoint(FIXTURES / "gpt_oss")


# --- The files


def test_the_fixtures_are_small_and_all_there():
    sizes = [path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()]
    assert sum(sizes) < 2 * 2**20
    assert {path.name for path in FIXTURES.iterdir() if path.is_dir()} == set(CASES)
    assert set(rope_expected()) == {"tokens", *ROPE_CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_fixtures_tell_one_token_from_another(name):
    prompts, new, _, logits = expected(name)
    # Longer than the windows, and than one chunk.
    assert max(len(prompt) for prompt in prompts) > max(CHUNK, 30)
    for row, chosen in enumerate(new):
        assert len(set(chosen[NUM_NEW_TOKENS // 2 :].tolist())) > NUM_NEW_TOKENS // 6
        second, best = np.sort(logits[row], axis=-1)[:, -2:].T
        assert (best - second).min() > 10 * TOLERANCE
