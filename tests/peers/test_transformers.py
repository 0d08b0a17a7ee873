"""The fixtures made anew, and other checkpoints than those, by the transformers that is
installed.
"""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import safetensors.numpy
from scripts._fixture_cases import Case, CASES, ROPE_CASES
from scripts.make_fixtures import EXPECTED, in_steps, load, make, make_rope, ROOT, save

from ..helpers import quick_jit


pytestmark = [
    pytest.mark.peers,
    # What other programs warn of is theirs.
    pytest.mark.filterwarnings("default"),
]
# Logits of size 10 in float32, summed in another order by another release.
TOLERANCE = 1e-4


def assert_same_files(made, kept):
    made, kept = (safetensors.numpy.load_file(path) for path in (made, kept))
    assert made.keys() == kept.keys()
    for name, x in kept.items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(made[name], x, rtol=0, atol=TOLERANCE)
        else:
            np.testing.assert_array_equal(made[name], x)


@pytest.mark.parametrize("name", CASES)
def test_a_fixture_made_anew_is_the_same(name, tmp_path):
    make(name, tmp_path)
    for file in ("model.safetensors", EXPECTED):
        assert_same_files(tmp_path / name / file, ROOT / name / file)


def test_the_rotary_positions_made_anew_are_the_same(tmp_path):
    for name in {name for name, _ in ROPE_CASES.values()}:
        (tmp_path / name).symlink_to(ROOT / name)
    make_rope(tmp_path)
    assert_same_files(tmp_path / "rope.safetensors", ROOT / "rope.safetensors")


# Variants that no fixture has.
VARIANTS = {
    "gemma2 without caps": Case(
        "Gemma2Config",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3 with caps": Case("Gemma3TextConfig", {"attn_logit_softcapping": None}),
    "mistral without a window": Case("MistralConfig", {"sliding_window": None}),
    "qwen3 with biases": Case("Qwen3Config", {"attention_bias": True, "head_dim": 16}),
    "olmo2 with few heads": Case("Olmo2Config", {"num_key_value_heads": 1}),
}


@quick_jit
def dense_logits(decoder, tokens):
    return decoder.unembed(decoder.dense(tokens)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_the_logits_of_transformers(name, tmp_path):
    rng = np.random.default_rng(1)
    save(VARIANTS[name], rng, tmp_path / "saved")
    tokens = rng.integers(3, 97, 40)
    wanted = in_steps(load(tmp_path / "saved"), tokens, len(tokens))
    decoder = models.load_checkpoint(tmp_path / "saved", jnp.float32)
    found = dense_logits(decoder, jnp.asarray(tokens[None], jnp.int32))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_what_is_saved_is_loaded_by_transformers(tmp_path):
    decoder = models.load_checkpoint(ROOT / "phi3")
    models.save_checkpoint(decoder, tmp_path)
    tokens = np.arange(3, 43)
    wanted = in_steps(load(ROOT / "phi3"), tokens, len(tokens))
    np.testing.assert_array_equal(in_steps(load(tmp_path), tokens, len(tokens)), wanted)
    assert jax.tree.structure(models.load_checkpoint(tmp_path)) == jax.tree.structure(
        decoder
    )
