"""The keys of a published `config.json`, read and written.

Every key of a file is read, passed over because it changes nothing that is computed, or
refused.
"""

from collections.abc import Mapping
from typing import Any

from ._checks import check_bool, check_choice, check_positive, check_size, is_int, refuse
from ._families import FAMILIES, Family, family_of
from ._rope import publish_scaling, read_scaling, Scaling


FULL, WINDOW = "full_attention", "sliding_attention"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What an absent key stands for in most families. A null is the same, but in `_NULLABLE`.
_USUAL = {
    **{"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False},
    **{"bos_token_id": None, "eos_token_id": None, "sliding_window": None},
    **{"hidden_act": "silu", "mlp_bias": False, "layer_types": None},
    **{"rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
}
_NULLABLE = {name for name, value in _USUAL.items() if value is None}
_AS_THEY_ARE = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
# The options that are off at another value than false or 0.
_NEUTRAL = {"is_causal": True, "pretraining_tp": 1, "pruned_heads": {}}
_HARMLESS = {
    *("model_type", "transformers_version", "_name_or_path", "auto_map"),
    *("torch_dtype", "dtype", "use_cache", "initializer_range", "pad_token_id"),
    *("cache_implementation", "output_attentions", "output_hidden_states"),
    *("return_dict", "is_llama_config", "transformers.js_config"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("unsloth_fixed", "unsloth_version", "max_sequence_length", "_commit_hash"),
    *("id2label", "label2id", "tokenizer_class"),
}
# How to make a text, which older files say here too. Like what `generation_config.json`
# says of it, it is not used.
_GENERATION = {
    *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "early_stopping"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "num_beams", "num_beam_groups", "length_penalty"),
    *("diversity_penalty", "repetition_penalty", "encoder_repetition_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "low_memory"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    *("penalty_alpha", "guidance_scale"),
}
# Read here or by `_check_supported`, in any family.
_READ = {
    *REQUIRED,
    *("num_key_value_heads", "head_dim", "hidden_act", "architectures", "layer_types"),
    *("bos_token_id", "eos_token_id", *_AS_THEY_ARE),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
}


def read(published: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a published configuration.

    **Arguments:**

    - `published`: the parsed file.

    **Returns:**

    The arguments of `DecoderConfig`. A `ValueError` names a missing key, a value that
    makes no sense, or an option that the decoder does not have.
    """
    family = family_of(published.get("model_type"))
    _check_supported(published, family)
    missing = [key for key in REQUIRED if published.get(key) is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    given = {k: x for k, x in published.items() if x is not None or k in _NULLABLE}
    said = {**_USUAL, **family.defaults, **given}
    for name in (*REQUIRED, "max_position_embeddings"):
        check_size(name, said[name])
    check_bool("attention_bias", said["attention_bias"])
    heads = said["num_attention_heads"]
    kv_heads, head_dim = said["num_key_value_heads"], said["head_dim"]
    return {
        "model_type": said["model_type"],
        **{name: said[name] for name in (*REQUIRED, *_AS_THEY_ARE)},
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": said["hidden_size"] // heads if head_dim is None else head_dim,
        "bos_token_id": said["bos_token_id"],
        "eos_token_id": _token_ids(said["eos_token_id"]),
        "hidden_act": said[family.activation],
        **{field: said["attention_bias"] for field in family.biases},
        **{name: said[name] for name in family.options},
        **_read_windows(said, family),
        **_read_rope(said, published, family),
        **family.fixed,
    }


def publish(options: Mapping[str, Any], scaling: Scaling | None) -> dict[str, Any]:
    """Gives the keys under which other programs expect a configuration.

    **Arguments:**

    - `options`: the fields of a `DecoderConfig`, by name.
    - `scaling`: of the rotary positions.

    **Returns:**

    What `read` reads.
    """
    family = FAMILIES[options["model_type"]]
    eos = list(options["eos_token_id"])
    same = (*REQUIRED, *_AS_THEY_ARE, "num_key_value_heads", "head_dim", "bos_token_id")
    biases = {options[field] for field in family.biases} or {False}
    neutral = {"attention_dropout": 0.0, "attention_bias": biases == {True}}
    return {
        "architectures": [family.architecture],
        "model_type": options["model_type"],
        **{name: options[name] for name in same},
        # Programs that predate lists of ends expect a lone number.
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        # Other programs would take one of the family's, that may be no token here.
        "pad_token_id": None,
        family.activation: options["hidden_act"],
        **neutral,
        **family.neutral,
        **{name: options[name] for name in family.options},
        **_publish_windows(options, family),
        **_publish_rope(options, scaling, family),
    }


# --- What is supported


def _check_supported(published: Mapping[str, Any], family: Family) -> None:
    _check_architectures(published, family)
    own = set(family.options)
    if family.biases:
        own.add("attention_bias")
    if family.windows != "none":
        own.add("sliding_window")
    neutral = {**_NEUTRAL, **family.neutral, **_neutral_of_others(published, family)}
    passed = _READ | own | _keys_of(family) | _HARMLESS | _GENERATION
    for name, value in published.items():
        if name in passed or value is None:
            continue
        # What is not known here and said to be off is not used either.
        if value != neutral.get(name, False):
            raise ValueError(f"{name} {value!r} is not supported")


def _check_architectures(published: Mapping[str, Any], family: Family) -> None:
    found = published.get("architectures")
    if found is None:
        return
    # Early files say "LLaMAForCausalLM".
    names = [str(name).lower() for name in found] if isinstance(found, list) else None
    if names != [family.architecture.lower()]:
        raise ValueError(
            f"architectures {found!r} is not supported (only {family.architecture!r} "
            f"of {published['model_type']!r})"
        )


def _keys_of(family: Family) -> set[str]:
    keys = {family.activation}
    if family.windows == "upper":
        keys |= {"use_sliding_window", "max_window_layers"}
    if family.local_rope:
        keys |= {"rope_local_base_freq", *_PATTERN}
    if "longrope" in family.scalings:
        keys |= {"original_max_position_embeddings"}
    return keys


def _neutral_of_others(published: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Keys that say again what the family says anyway."""
    again: dict[str, Any] = {}
    if family.activation != "hidden_act":
        usual = family.defaults[family.activation]
        again["hidden_act"] = published.get(family.activation) or usual
    if isinstance(family.windows, int):
        again |= {name: family.windows for name in _PATTERN}
        window = published.get("sliding_window") or family.defaults["sliding_window"]
        again["sliding_window_size"] = window
    return again


# --- Tokens


def _token_ids(published: Any) -> tuple[Any, ...]:
    if published is None:
        return ()
    return tuple(published) if isinstance(published, list) else (published,)


# --- Windows

_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")


def _read_windows(said: Mapping[str, Any], family: Family) -> dict[str, Any]:
    num_layers, window = said["num_hidden_layers"], said["sliding_window"]
    if family.windows == "upper":
        check_bool("use_sliding_window", said.get("use_sliding_window", False))
        window = window if said.get("use_sliding_window", False) else None
    usual = _usual_types(said, family) if window is not None else []
    types = said["layer_types"]
    if types is None:
        types = usual
    elif not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"layer_types {types!r} must be a list of {num_layers}")
    elif not family.lists_layers and types != (usual or [FULL] * num_layers):
        raise ValueError(f"layer_types {types!r} is not supported")
    for kind in types:
        check_choice("layer_types", kind, (FULL, WINDOW))
    if WINDOW not in types:
        return {}
    if window is None:
        raise ValueError(f"layer_types {types!r} contradicts sliding_window None")
    check_size("sliding_window", window)
    return {"layer_types": tuple(types), "sliding_window": window}


def _usual_types(said: Mapping[str, Any], family: Family) -> list[str]:
    num_layers = said["num_hidden_layers"]
    if family.windows == "all":
        return [WINDOW] * num_layers
    if family.windows == "upper":
        first = said.get("max_window_layers", 28)
        if not (is_int(first) and first >= 0):
            refuse("max_window_layers", first, "a whole number from 0 on")
        return [WINDOW if i >= first else FULL for i in range(num_layers)]
    if isinstance(family.windows, int):
        every = next((said[key] for key in _PATTERN if key in said), family.windows)
        check_size("sliding_window_pattern", every)
        return [FULL if (i + 1) % every == 0 else WINDOW for i in range(num_layers)]
    return [FULL] * num_layers


def _publish_windows(options: Mapping[str, Any], family: Family) -> dict[str, Any]:
    window, types = options["sliding_window"], list(options["layer_types"])
    if family.windows == "none":
        return {}
    out: dict[str, Any] = {"sliding_window": window}
    if family.lists_layers:
        out["layer_types"] = types or [FULL] * options["num_hidden_layers"]
    if family.windows == "upper":
        out["use_sliding_window"] = window is not None
        # Older programs know no other way.
        out["max_window_layers"] = (
            types.index(WINDOW) if types else options["num_hidden_layers"]
        )
    return out


# --- Rotary positions


def _read_rope(
    said: Mapping[str, Any], published: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    # The newer key first, which also holds the base.
    new, old = (
        _mapping(name, published.get(name)) for name in ("rope_parameters", "rope_scaling")
    )
    options: dict[str, Any] = {}
    if family.local_rope:
        new, local = _by_kind_of_layer(new)
        freq = local.get("rope_theta", said["rope_local_base_freq"])
        check_positive("rope_local_base_freq", freq)
        options["rope_local_base_freq"] = float(freq)
    found = [
        _read_scaling(name, value, said, family)
        for name, value in (("rope_parameters", new), ("rope_scaling", old))
        if value
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"rope_scaling {old!r} contradicts rope_parameters {new!r}")
    theta = _rope_theta(published, new, said["rope_theta"])
    partial = new.get("partial_rotary_factor", old.get("partial_rotary_factor"))
    partial = said["partial_rotary_factor"] if partial is None else partial
    check_positive("partial_rotary_factor", partial)
    if partial != 1 and not family.partial_rotary:
        raise ValueError(f"partial_rotary_factor {partial!r} is not supported")
    return options | {
        "rope_theta": theta,
        "rope_scaling": found[0] if found else None,
        "partial_rotary_factor": float(partial),
    }


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} {value!r} is not supported")
    return dict(value or {})


def _by_kind_of_layer(parameters: dict[str, Any]) -> tuple[dict, dict]:
    name = "rope_parameters"
    if set(parameters) - {FULL, WINDOW}:
        raise ValueError(f"{name} {parameters!r} is not supported")
    full, local = (_mapping(name, parameters.get(kind)) for kind in (FULL, WINDOW))
    if set(local) - {"rope_theta", "rope_type"} or local.get("rope_type") not in (
        *(None, "default"),
    ):
        raise ValueError(f"{name}.{WINDOW} {local!r} is not supported")
    return full, local


def _read_scaling(
    name: str, value: dict[str, Any], said: Mapping[str, Any], family: Family
) -> Scaling | None:
    if "longrope" in family.scalings:
        # Early files have other names for it, and the original length is at the top.
        kind = value.get("rope_type", value.get("type", "default"))
        value = {**value, "rope_type": "longrope" if kind in ("su", "yarn") else kind}
        if value["rope_type"] == "longrope":
            original = "original_max_position_embeddings"
            value[original] = said[original]
    scaling = read_scaling(name, value, said["max_position_embeddings"])
    if scaling is not None and scaling.rope_type not in family.scalings:
        raise ValueError(f"{name} of type {scaling.rope_type!r} is not supported")
    return scaling


def _rope_theta(
    published: Mapping[str, Any], parameters: Mapping[str, Any], usual: Any
) -> float:
    """The base, which newer files keep in `rope_parameters` and older ones at the top."""
    old, new = published.get("rope_theta"), parameters.get("rope_theta")
    for theta in (old, new):
        if theta is not None:
            check_positive("rope_theta", theta)
    if old is not None and new is not None and old != new:
        raise ValueError(f"rope_theta {old} contradicts rope_parameters.rope_theta {new}")
    found = [theta for theta in (new, old) if theta is not None]
    return float(found[0] if found else usual)


def _publish_rope(
    options: Mapping[str, Any], scaling: Scaling | None, family: Family
) -> dict[str, Any]:
    theta, partial = options["rope_theta"], options["partial_rotary_factor"]
    parameters: dict[str, Any] = {"rope_theta": theta, **publish_scaling(scaling)}
    # The same under its older names too.
    out: dict[str, Any] = {"rope_theta": theta}
    if scaling is not None:
        out["rope_scaling"] = publish_scaling(scaling)
    if family.partial_rotary:
        out["partial_rotary_factor"] = parameters["partial_rotary_factor"] = partial
    original = getattr(scaling, "original_max_position_embeddings", None)
    if "longrope" in family.scalings and original is not None:
        out["original_max_position_embeddings"] = original
    if family.local_rope:
        local = options["rope_local_base_freq"]
        out["rope_local_base_freq"] = local
        parameters = {
            FULL: parameters,
            WINDOW: {"rope_theta": local, "rope_type": "default"},
        }
    return {**out, "rope_parameters": parameters}
