"""The families of decoders: what each `model_type` has of what the decoder can compute."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes one `model_type`.

    - `architecture`: the name of the class in `architectures`.
    - `fixed`: fields of `DecoderConfig` that are the same in all of the family.
    - `defaults`: what a key that is absent stands for, where it is not the usual.
    - `options`: keys, besides those of all, that are fields of the same name.
    - `neutral`: options of the family that the decoder does not have, with the value that
        means "not used".
    - `biases`: the fields that `attention_bias` sets, if the family has it.
    - `activation`: the key that names the activation.
    - `windows`: which layers see a sliding window where `layer_types` is absent: none,
        all, those from `max_window_layers` on, or all but every n-th.
    - `fused`: whether `q`, `k` and `v` are stored as one matrix, and `gate` and `up`.
    - `partial_rotary`: whether it may turn a part of each head only.
    - `scalings`: the kinds of rotary scaling.
    """

    architecture: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: tuple[str, ...] = ()
    neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    activation: str = "hidden_act"
    windows: str | int = "none"
    fused: bool = False
    partial_rotary: bool = False
    scalings: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn")

    @property
    def lists_layers(self) -> bool:
        """Whether a file may say `layer_types`."""
        return self.windows == "upper" or isinstance(self.windows, int)

    @property
    def local_rope(self) -> bool:
        """Whether layers with a window have a base of their own."""
        return "rope_local_base_freq" in self.defaults


_ALL_BIASES = ("qkv_bias", "o_bias")


def _gemma(
    architecture: str,
    *,
    windows: int,
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any],
    options: tuple[str, ...] = (),
) -> Family:
    """What Gemma 2 and 3 have in common, and what not."""
    common = {
        **{"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1},
        **{"sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh"},
    }
    return Family(
        architecture,
        fixed={"norms": "both", "norm_offset": 1.0, "scale_embeddings": True, **fixed},
        defaults={**common, **defaults},
        options=("query_pre_attn_scalar", "final_logit_softcapping", *options),
        neutral={"use_bidirectional_attention": False},
        biases=_ALL_BIASES,
        activation="hidden_activation",
        windows=windows,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        defaults={"bos_token_id": 1, "eos_token_id": 2},
        options=("mlp_bias",),
        neutral={"pretraining_tp": 1},
        biases=_ALL_BIASES,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={
            **{"num_key_value_heads": 8, "max_position_embeddings": 131072},
            **{"sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
        },
        windows="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={
            **{"num_key_value_heads": 32, "max_position_embeddings": 32768},
            "sliding_window": 4096,
        },
        neutral={"attention_bias": True},
        windows="upper",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        defaults={
            **{"num_key_value_heads": 32, "max_position_embeddings": 32768},
            **{"sliding_window": 4096, "head_dim": 128},
        },
        biases=_ALL_BIASES,
        windows="upper",
    ),
    "gemma2": _gemma(
        "Gemma2ForCausalLM",
        windows=2,
        options=("attn_logit_softcapping",),
        fixed={},
        defaults={
            **{"max_position_embeddings": 8192},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
    ),
    "gemma3_text": _gemma(
        "Gemma3ForCausalLM",
        windows=6,
        fixed={"qk_norm": "head"},
        defaults={
            **{"max_position_embeddings": 131072},
            **{"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            **{"original_max_position_embeddings": 4096},
            **{"bos_token_id": 1, "eos_token_id": 32000},
        },
        neutral={
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0},
            **{"full_attn_mod": 1, "interpolate_factor": 1},
        },
        windows="all",
        fused=True,
        partial_rotary=True,
        scalings=("longrope",),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        fixed={"norms": "post", "qk_norm": "projection"},
        defaults={"eos_token_id": 50279, "rms_norm_eps": 1e-5},
        biases=_ALL_BIASES,
    ),
}
# Known, and why they are not here.
OUT_OF_REACH = {
    "gemma3": "only its text model, 'gemma3_text'",
    "gpt_oss": "it is a mixture of experts",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
}


def family_of(model_type: Any) -> Family:
    """The family of a published `model_type`; a `ValueError` names one that is not
    supported.
    """
    # What a file holds need not be hashable.
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        why = OUT_OF_REACH.get(str(model_type), f"only {', '.join(map(repr, FAMILIES))}")
        raise ValueError(f"model_type {model_type!r} is not supported ({why})")
    return family
