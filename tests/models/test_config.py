import dataclasses
import json

import pytest
from models import DecoderConfig

from .cases import published


def test_the_published_keys_are_read():
    config = DecoderConfig.from_dict(published(tie_word_embeddings=True))
    assert dataclasses.asdict(config) == {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": (2,),
    }


def test_absent_keys_have_the_published_defaults():
    minimal = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = DecoderConfig.from_dict(minimal)
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10_000.0)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "keys",
    (
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 500_000, "rope_scaling": {"type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
        {
            "rope_theta": 5e5,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        },
    ),
)
def test_the_base_is_read_from_either_place(keys):
    assert DecoderConfig.from_dict(published(**keys)).rope_theta == 5e5


@pytest.mark.parametrize(
    "published_ids, ids",
    ((2, (2,)), ([2, 5, 7], (2, 5, 7)), (None, ())),
)
def test_one_end_several_or_none(published_ids, ids):
    config = DecoderConfig.from_dict(published(eos_token_id=published_ids))
    assert config.eos_token_id == ids


@pytest.mark.parametrize(
    "name, value",
    (
        ("model_type", "mistral"),
        ("model_type", None),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "default", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("sliding_window", 128),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("pretraining_tp", 2),
    ),
)
def test_an_option_that_is_not_supported_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} .* is not supported"):
        DecoderConfig.from_dict(published(**{name: value}))


@pytest.mark.parametrize(
    "name, value",
    (
        ("vocab_size", 0),
        ("vocab_size", "97"),
        ("hidden_size", 48.0),
        ("num_hidden_layers", -1),
        ("num_attention_heads", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("head_dim", 15),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 10**400),
        ("rope_theta", "1e4"),
        ("tie_word_embeddings", "no"),
        ("bos_token_id", -1),
        ("eos_token_id", [2, "</s>"]),
    ),
)
def test_a_value_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.* must be"):
        DecoderConfig.from_dict(published(**{name: value}))


def test_contradictions_name_both_values():
    with pytest.raises(ValueError, match="4 is no multiple of .* 3"):
        DecoderConfig.from_dict(published(num_key_value_heads=3))
    parameters = {"rope_theta": 5e5, "rope_type": "default"}
    with pytest.raises(ValueError, match="10000.0 contradicts .* 500000.0"):
        DecoderConfig.from_dict(published(rope_parameters=parameters))


def test_all_missing_keys_are_named_together():
    options = published(hidden_size=None)
    del options["vocab_size"]
    with pytest.raises(ValueError, match="missing vocab_size, hidden_size$"):
        DecoderConfig.from_dict(options)


@pytest.mark.parametrize("ends", (2, [2, 5], None))
def test_what_is_written_is_read_back(ends):
    config = DecoderConfig.from_dict(published(eos_token_id=ends, rope_theta=1e6))
    written = json.loads(json.dumps(config.to_dict()))
    assert DecoderConfig.from_dict(written) == config
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["eos_token_id"] == ends
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "content",
    (b"{", b"[1, 2]", b"", b"{}", b"\xff", b"[" * 200_000, b"1" * 5000),
    ids=("cut", "list", "empty", "keyless", "not UTF-8", "deep", "long"),
)
def test_a_broken_file_is_named_once(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        DecoderConfig.from_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.count("config") == 1
    assert "\n" not in message
