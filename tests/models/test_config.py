import dataclasses
import json

import pytest
from models import DecoderConfig

from .cases import published


def test_the_published_keys_are_read():
    config = DecoderConfig.from_dict(published(tie_word_embeddings=True))
    assert config == DecoderConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=(2,),
    )


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
        ("model_type", "gpt2"),
        ("model_type", "gpt_oss"),
        ("model_type", ["llama"]),
        ("model_type", None),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("architectures", ["LlamaForCausalLM", "LlamaModel"]),
        ("architectures", 5),
        ("is_causal", False),
        ("rope_scaling", {"rope_type": "proportional", "factor": 8.0}),
        ("rope_scaling", {"type": "longrope", "short_factor": [1], "long_factor": [1]}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "extra": 1}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "mscale": 1.0}),
        ("rope_scaling", {"rope_type": "default", "factor": 2.0}),
        ("rope_scaling", {"rope_type": ["yarn"], "factor": 2.0}),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"rope_type": ["linear"], "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("an_unknown_option", 3),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("use_bidirectional_attention", True),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("query_pre_attn_scalar", 24),
        ("sliding_window", 128),
        ("sliding_window_size", 128),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("pretraining_tp", 2),
    ),
)
def test_an_option_that_is_not_supported_is_named(name, value):
    said = "partial_rotary_factor" if "partial" in str(value) else name
    with pytest.raises(ValueError, match=f"{said} .* is not supported"):
        DecoderConfig.from_dict(published(**{name: value}))


# As transformers 4 wrote them into every file, and as some files change them.
MAKING_TEXTS = (
    {
        **{"max_length": 20, "min_length": 0, "do_sample": False, "num_beams": 1},
        **{"early_stopping": False, "num_beam_groups": 1, "diversity_penalty": 0.0},
        **{"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
        **{"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
        **{"encoder_no_repeat_ngram_size": 0, "bad_words_ids": None},
        **{"num_return_sequences": 1, "output_scores": False, "suppress_tokens": None},
        **{"return_dict_in_generate": False, "remove_invalid_values": False},
        **{"forced_bos_token_id": None, "forced_eos_token_id": None},
        **{"begin_suppress_tokens": None, "exponential_decay_length_penalty": None},
        # What else those files say that has no effect.
        **{"add_cross_attention": False, "chunk_size_feed_forward": 0, "prefix": None},
        **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pruned_heads": {}},
        **{"is_decoder": False, "is_encoder_decoder": False, "torchscript": False},
        **{"tokenizer_class": "LlamaTokenizer", "use_bfloat16": False},
    },
    {
        **{"max_length": 4096, "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        **{"top_k": 20, "num_beams": 4, "repetition_penalty": 1.1, "min_length": 5},
    },
)


@pytest.mark.parametrize("said", MAKING_TEXTS, ids=("default", "changed"))
def test_how_to_make_texts_changes_nothing_of_the_model(said):
    assert DecoderConfig.from_dict(published(**said)) == DecoderConfig.from_dict(
        published()
    )


@pytest.mark.parametrize(
    "name, value",
    (
        ("vocab_size", 0),
        ("vocab_size", "97"),
        ("hidden_size", 48.0),
        ("hidden_size", 10**400),
        ("head_dim", 2**31),
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
        ("attention_bias", "no"),
        ("max_position_embeddings", 1.5),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "truncate": 1}),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5},
        ),
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
    scalings = ({"type": "linear", "factor": factor} for factor in (2.0, 3.0))
    old, new = scalings
    with pytest.raises(ValueError, match="2.0.* contradicts .*3.0"):
        DecoderConfig.from_dict(published(rope_scaling=old, rope_parameters=new))
    llama3 = {"type": "llama3", "factor": 8.0}
    llama3 |= {"low_freq_factor": 4.0, "high_freq_factor": 1.0}
    with pytest.raises(ValueError, match="4.0 must be less than .* 1.0"):
        DecoderConfig.from_dict(published(rope_scaling=llama3))
    windows = {"model_type": "gemma2", "architectures": None, "sliding_window": None}
    types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_attention.* contradicts .* None"):
        DecoderConfig.from_dict(published(**windows, layer_types=types))
    with pytest.raises(ValueError, match="sliding_window_size 64 is not supported"):
        DecoderConfig.from_dict(published(**windows, sliding_window_size=64))


def test_all_missing_keys_are_named_together():
    options = published(hidden_size=None)
    del options["vocab_size"]
    with pytest.raises(ValueError, match="missing vocab_size, hidden_size$"):
        DecoderConfig.from_dict(options)
    scaling = {"type": "llama3", "factor": 2.0}
    with pytest.raises(ValueError, match="missing low_freq_factor, high_freq_factor$"):
        DecoderConfig.from_dict(published(rope_scaling=scaling))


@pytest.mark.parametrize("ends", (2, [2, 5], None))
def test_what_is_written_is_read_back(ends):
    config = DecoderConfig.from_dict(published(eos_token_id=ends, rope_theta=1e6))
    written = json.loads(json.dumps(config.to_dict()))
    assert DecoderConfig.from_dict(written) == config
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["eos_token_id"] == ends
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6


# What sets the models apart, as their files say it.
SAID = {
    "Llama 3.2": {
        **{"model_type": "llama", "hidden_size": 2048, "head_dim": 64},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
        **{"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
    },
    "Vicuna 1.5": {
        **{"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32},
        **{"max_sequence_length": 16384, "max_position_embeddings": 4096},
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "SmolLM2": {
        **{"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "is_llama_config": True, "rope_interleaved": False},
        **{"transformers.js_config": {"dtype": "q4"}, "rope_theta": 100000},
    },
    "Mistral 7B v0.1": {
        **{"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "sliding_window": 4096},
    },
    "Mistral 7B v0.3": {
        **{"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1e6},
    },
    "Qwen2.5": {
        **{"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14},
        **{"num_key_value_heads": 2, "sliding_window": 32768, "use_mrope": False},
        **{"use_sliding_window": False, "max_window_layers": 21},
    },
    "Qwen3": {
        **{"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16},
        **{"num_key_value_heads": 8, "sliding_window": None, "head_dim": 128},
        **{"use_sliding_window": False, "max_window_layers": 28},
    },
    "Gemma 2": {
        **{"model_type": "gemma2", "hidden_size": 2304, "num_attention_heads": 8},
        **{"num_key_value_heads": 4, "sliding_window": 4096, "head_dim": 256},
        **{"sliding_window_size": 4096, "final_logit_softcapping": 30.0},
        **{"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
        **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    },
    "Gemma 3": {
        **{"model_type": "gemma3_text", "hidden_size": 1152, "num_attention_heads": 4},
        **{"num_key_value_heads": 1, "sliding_window": 512, "head_dim": 256},
        **{"sliding_window_pattern": 6, "rope_local_base_freq": 10000},
        **{"rope_theta": 1000000, "rope_scaling": None, "num_hidden_layers": 12},
    },
    "Phi 3.5": {
        **{"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32},
        **{"num_key_value_heads": 32, "sliding_window": 262144, "auto_map": {"A": "b"}},
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False},
        **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
        "rope_scaling": {
            **{"short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "type": "longrope"},
        },
    },
    "Phi 4 mini": {
        **{"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24},
        **{"num_key_value_heads": 8, "sliding_window": 262144, "mlp_bias": False},
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False},
        **{"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
        **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
        **{"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        "rope_scaling": {
            **{"short_factor": [1] * 48, "long_factor": [4.0] * 48, "type": "longrope"},
        },
    },
    "OLMo 2": {
        **{"model_type": "olmo2", "hidden_size": 2048, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "rope_theta": 500000, "rope_scaling": None},
        **{"attention_bias": False, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    },
}
SIZES = {
    **{"vocab_size": 100000, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02},
    **{"attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1},
}


def said(name):
    return DecoderConfig.from_dict({**SIZES, **SAID[name]})


@pytest.mark.parametrize("name", SAID)
def test_what_is_written_of_a_family_is_read_back(name):
    config = said(name)
    written = json.loads(json.dumps(config.to_dict()))
    assert DecoderConfig.from_dict(written) == config
    assert written["pad_token_id"] is None


def test_windows_are_where_each_family_has_them():
    def windows(name, **changes):
        config = DecoderConfig.from_dict({**SIZES, **SAID[name], **changes})
        return [config.window(layer) for layer in range(config.num_hidden_layers)]

    assert windows("Llama 3.2") == windows("Qwen3") == windows("OLMo 2") == [None] * 4
    assert windows("Mistral 7B v0.1") == [4096] * 4
    assert windows("Mistral 7B v0.3") == windows("Qwen2.5") == [None] * 4
    used = {"use_sliding_window": True, "max_window_layers": 3}
    assert windows("Qwen2.5", **used) == [None, None, None, 32768]
    assert windows("Gemma 2") == [4096, None] * 2
    assert windows("Gemma 3") == ([512] * 5 + [None]) * 2
    types = ["full_attention"] * 3 + ["sliding_attention"]
    assert windows("Gemma 2", layer_types=types) == [None, None, None, 4096]
    all_alike = ["sliding_attention"] * 4
    assert windows("Mistral 7B v0.1", layer_types=all_alike) == [4096] * 4


@pytest.mark.parametrize(
    "name, change",
    (
        # Others take a window for all layers of these, whatever the list says.
        ("Mistral 7B v0.1", {"layer_types": ["full_attention"] * 4}),
        (
            "Phi 3.5",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
        ),
        ("Gemma 2", {"sliding_window_size": 2048}),
        # Others have the key, and compute nothing with it.
        ("Gemma 3", {"attn_logit_softcapping": 50.0}),
        ("Phi 4 mini", {"full_attn_mod": 2}),
        ("Phi 4 mini", {"interpolate_factor": 2}),
        ("Phi 4 mini", {"lm_head_bias": True}),
    ),
)
def test_what_a_family_does_not_compute_is_named(name, change):
    (key,) = change
    with pytest.raises(ValueError, match=f"{key} .* is not supported"):
        DecoderConfig.from_dict({**SIZES, **SAID[name], **change})


def test_an_original_length_of_one_is_named():
    with pytest.raises(ValueError, match="original_max_position_embeddings must be"):
        changes = {"original_max_position_embeddings": 1}
        DecoderConfig.from_dict({**SIZES, **SAID["Phi 3.5"], **changes})


@pytest.mark.parametrize("value", ("21", -1, 1.5))
def test_max_window_layers_that_makes_no_sense_is_named(value):
    used = {"use_sliding_window": True, "max_window_layers": value}
    with pytest.raises(ValueError, match="max_window_layers must be"):
        DecoderConfig.from_dict({**SIZES, **SAID["Qwen2.5"], **used})


def test_layer_types_that_a_family_does_not_look_at_are_refused():
    """transformers takes the window for all layers of these, whatever the types say."""
    mistral = {**SIZES, **SAID["Mistral 7B v0.1"]}
    for types in (["full_attention"] * 4, ["full_attention", "sliding_attention"] * 2):
        with pytest.raises(ValueError, match="layer_types .* is not supported"):
            DecoderConfig.from_dict({**mistral, "layer_types": types})
    same = DecoderConfig.from_dict({**mistral, "layer_types": ["sliding_attention"] * 4})
    assert same == DecoderConfig.from_dict(mistral)


@pytest.mark.parametrize(
    "model, key, changes",
    (
        ("Qwen2.5", "max_window_layers", {"max_window_layers": "3"}),
        ("Qwen3", "max_window_layers", {"max_window_layers": -1}),
        (
            *("Phi 3.5", "original_max_position_embeddings"),
            {"original_max_position_embeddings": 1},
        ),
        (
            *("Mistral 7B v0.3", "rope_theta"),
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        ),
    ),
)
def test_a_value_that_makes_no_sense_in_a_family_is_named(model, key, changes):
    changed = {**SIZES, **SAID[model], **changes}
    if key == "max_window_layers":
        changed |= {"use_sliding_window": True, "sliding_window": 128}
    with pytest.raises(ValueError, match=f"^{key} must be"):
        DecoderConfig.from_dict(changed)


def test_each_family_computes_what_sets_it_apart():
    assert said("Qwen2.5").qkv_bias and not said("Qwen2.5").o_bias
    assert said("Qwen3").qk_norm == "head" and said("OLMo 2").qk_norm == "projection"
    assert said("OLMo 2").norms == "post" and said("Llama 3.2").norms == "pre"
    gemma2, gemma3 = said("Gemma 2"), said("Gemma 3")
    for gemma in (gemma2, gemma3):
        assert (gemma.norms, gemma.norm_offset) == ("both", 1.0)
        assert gemma.scale_embeddings and gemma.tie_word_embeddings
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50, 30)
    assert gemma3.attn_logit_softcapping is gemma3.final_logit_softcapping is None
    assert (gemma2.rope_local_base_freq, gemma3.rope_local_base_freq) == (None, 1e4)
    assert (gemma2.qk_norm, gemma3.qk_norm) == (None, "head")
    assert said("SmolLM2").head_dim == 64


def test_what_no_family_says_is_not_written():
    config = DecoderConfig.from_dict(published())
    sunk = dataclasses.replace(config, attention_sinks=True, norms="post")
    with pytest.raises(
        ValueError, match="'llama' has no way to say norms, attention_sinks"
    ):
        sunk.to_dict()


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
