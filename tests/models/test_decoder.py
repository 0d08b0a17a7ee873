import equinox as eqx
import eqx_paged
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models import _decoder, Decoder, DecoderConfig, save_checkpoint

from ..helpers import count_compilations, quick_jit
from .cases import (
    paged_cache,
    published,
    ragged_cache,
    random_decoder,
    random_tokens,
    stepwise_logits,
)
from .llama import llama_logits


# float32 sums of up to some hundred products, through a few layers: logits of size 1 to
# 5 differ from the exact ones by about 2e-6.
TOLERANCE = 3e-5


@quick_jit
def dense_logits(decoder, tokens):
    hidden = decoder.dense(tokens)
    return jax.vmap(decoder.unembed)(hidden)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 1e6},
        {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8},
        {
            **{"num_attention_heads": 8, "head_dim": 2},
            **{"num_hidden_layers": 1, "rms_norm_eps": 0.1},
        },
    ),
)
def test_dense_matches_an_independent_llama(getkey, tmp_path, changes):
    decoder = random_decoder(getkey, **changes)
    tokens = random_tokens(getkey, 2, 21)
    save_checkpoint(decoder, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    options = published(**changes)
    expected = [llama_logits(tensors, options, row) for row in np.asarray(tokens)]
    assert_close(dense_logits(decoder, tokens), np.stack(expected))


# A block of queries is 256.
@pytest.mark.parametrize("length", (1, 255, 256, 257, 512))
def test_blocks_of_queries_do_not_show(getkey, length, tmp_path):
    decoder = random_decoder(getkey, num_hidden_layers=1)
    tokens = random_tokens(getkey, 1, length)
    save_checkpoint(decoder, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    options = published(num_hidden_layers=1)
    expected = llama_logits(tensors, options, np.asarray(tokens)[0])
    assert_close(dense_logits(decoder, tokens)[0], expected)


def test_no_position_sees_a_later_one(getkey):
    decoder = random_decoder(getkey)
    tokens = random_tokens(getkey, 1, 40)
    other = tokens.at[0, 25:].set((tokens[0, 25:] + 1) % 97)
    before, after = dense_logits(decoder, tokens), dense_logits(decoder, other)
    np.testing.assert_array_equal(before[:, :25], after[:, :25])
    assert not np.allclose(before[:, 25:], after[:, 25:])


# Rows of 1, 16, 17 and 40 tokens. Chunks that end within a page, on its edge and past
# it; mixed steps with and without padding; decode steps with idle rows.
LENGTHS = (1, 16, 17, 40)
STEPS = (
    ((1, 15, 16, 7), 39),
    ((0, 1, 0, 9), 39),
    ((0, 0, 1, 1), None),
    ((0, 0, 0, 16), 39),
    ((0, 0, 0, 1), None),
    ((0, 0, 0, 6), 39),
)


@pytest.mark.parametrize("kind", ("paged", "ragged"))
def test_a_cache_gives_what_dense_gives(getkey, kind):
    attention = eqx_paged.RaggedAttention() if kind == "ragged" else None
    decoder = random_decoder(getkey, attention=attention)
    tokens = random_tokens(getkey, len(LENGTHS), max(LENGTHS))
    make = ragged_cache if kind == "ragged" else paged_cache
    cache = make(decoder, num_seqs=len(LENGTHS), max_len=48)
    rows = [list(row[:n]) for row, n in zip(np.asarray(tokens), LENGTHS, strict=True)]
    expected = dense_logits(decoder, tokens)
    for row, logits in enumerate(stepwise_logits(decoder, cache, rows, STEPS)):
        assert_close(logits, expected[row, : LENGTHS[row]])


def test_layer_by_layer_is_the_same_with_a_program_for_all_layers(getkey):
    def read(num_layers):
        decoder = random_decoder(getkey, num_hidden_layers=num_layers)
        q_lens = jnp.asarray((9, 0, 1), jnp.int32)
        cache = paged_cache(decoder, num_seqs=3, max_len=32)
        cache, batch, _ = cache.append(q_lens, 12)
        tokens = random_tokens(getkey, 1, 12)[0]
        expected, stored = quick_jit(lambda *args: decoder(*args))(tokens, cache, batch)
        with count_compilations() as compiled:
            hidden, new = decoder.by_layers(tokens, cache, batch)
        assert_close(hidden[:10], np.asarray(expected)[:10])
        for pages, other in zip(new.layers, stored.layers, strict=True):
            assert_close(pages.k_pages, np.asarray(other.k_pages))
            assert_close(pages.v_pages, np.asarray(other.v_pages))
        return len(compiled)

    # A layer, and what comes before and after all of them. For more layers, there is a new
    # one for what comes before, which depends on the configuration.
    assert (read(2), read(4)) == (3, 1)


def test_bfloat16_weights_give_nearly_the_same_logits(getkey):
    decoder = random_decoder(getkey)
    # The exact decoder has the rounded weights too: what is left is the arithmetic's
    # rounding, 2**-8 a step, through two layers.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    tokens = random_tokens(getkey, 1, 20)
    expected = np.asarray(dense_logits(exact, tokens)[0])
    cache = paged_cache(rounded, num_seqs=1, max_len=32)
    rows = [list(np.asarray(tokens)[0])]
    (logits,) = stepwise_logits(rounded, cache, rows, [((19,), 24), ((1,), None)])
    assert logits.dtype == jnp.bfloat16
    for actual in (logits, dense_logits(rounded, tokens)[0]):
        error = np.asarray(actual, np.float32) - expected
        assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(expected**2))


def test_generation_equals_recomputing_everything(getkey):
    decoder = random_decoder(getkey)
    prompt_lens = (3, 30, 16)
    prompts = random_tokens(getkey, 3, 30)
    cache = paged_cache(decoder, num_seqs=3, max_len=48)
    generation, _ = eqx_paged.generate(
        decoder,
        cache,
        prompts,
        np.asarray(prompt_lens, np.int32),
        max_new_tokens=12,
        prefill_chunk=20,
    )
    for row, length in enumerate(prompt_lens):
        tokens = jnp.zeros((1, 48), jnp.int32)
        tokens = tokens.at[0, :length].set(prompts[row, :length])
        for end in range(length, length + 12):
            best = jnp.argmax(dense_logits(decoder, tokens)[0, end - 1])
            tokens = tokens.at[0, end].set(best.astype(jnp.int32))
        expected = tokens[0, length : length + 12]
        np.testing.assert_array_equal(generation.tokens[row], expected)


def test_a_cache_for_another_decoder_is_refused(getkey):
    decoder = random_decoder(getkey)
    shallow = random_decoder(getkey, num_hidden_layers=1)
    cache = paged_cache(shallow, num_seqs=1, max_len=16)
    with pytest.raises(ValueError, match="cache has 1 layers, the decoder 2"):
        stepwise_logits(decoder, cache, [[3]], [((1,), None)])


def test_the_start_is_unsure_of_everything(getkey):
    for tied in (True, False):
        options = published(tie_word_embeddings=tied, hidden_size=256)
        decoder = Decoder(DecoderConfig.from_dict(options), key=getkey())
        assert (decoder.lm_head is None) == tied
        logits = dense_logits(decoder, random_tokens(getkey, 1, 64))
        assert float(jnp.std(logits)) < 1.5


def test_one_layer_is_traced_for_all(monkeypatch):
    traced = []
    init = _decoder.GatedMLP.__init__

    def count(self, config, *, key):
        traced.append(self)
        init(self, config, key=key)

    monkeypatch.setattr(_decoder.GatedMLP, "__init__", count)
    # Of sizes that no other test has traced.
    options = published(num_hidden_layers=40, intermediate_size=52)
    config = DecoderConfig.from_dict(options)
    shapes = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    assert len(shapes.layers) == 40 and len(traced) == 1


def test_angles_are_computed_once_for_all_layers_and_heads(getkey):
    decoder = random_decoder(getkey, num_hidden_layers=2)
    cache = paged_cache(decoder, num_seqs=2, max_len=32)

    @eqx.filter_jit
    def step(decoder, cache, tokens):
        q_lens = jnp.full(2, 9, jnp.int32)
        cache, batch, _ = cache.append(q_lens, num_tokens=24)
        return decoder(tokens, cache, batch)

    tokens = jnp.zeros(24, jnp.int32)
    program = step.lower(decoder, cache, tokens).compile().compiled.as_text()
    assert (program.count(" cosine("), program.count(" sine(")) == (1, 1)


def test_gradients_reach_every_weight(getkey):
    decoder = random_decoder(getkey)
    tokens = random_tokens(getkey, 1, 30)

    @quick_jit
    @jax.grad
    def gradient(decoder):
        return jnp.sum(decoder.unembed(decoder.dense(tokens)[0]) ** 2)

    for path, grad in jax.tree_util.tree_leaves_with_path(gradient(decoder)):
        assert float(jnp.abs(grad).max()) > 0, path


# Each is multiplied in another way: one token and many outputs, few tokens, many tokens.
@pytest.mark.parametrize("num_tokens", (1, 2, 128, 129))
@pytest.mark.parametrize("out_size", (8191, 8192))
def test_tokens_times_a_matrix_are_the_same_however_many_there_are(num_tokens, out_size):
    from models._layers import multiply

    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((n, 24)) for n in (num_tokens, out_size))
    out = jax.jit(multiply)(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    # Sums of 24 products of about 1, each rounded to 24 bits.
    np.testing.assert_allclose(out, x @ weight.T, rtol=0, atol=2e-5)
