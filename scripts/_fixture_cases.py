"""Which small random checkpoints the tests of the model families read.

Sizes on which every option shows: windows shorter than the prompts, more than one layer of
each kind, fewer heads of keys than of queries.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


VOCAB_SIZE = 97
PROMPT_LENS = (5, 20, 41)
NUM_NEW_TOKENS = 64
# Whose logits are stored.
LOGITS_EVERY = 8
ROPE_LENGTH = 60

SIZES = {
    **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1},
    "eos_token_id": 2,
}
_GEMMA = {
    **{"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24},
    "hidden_activation": "gelu_pytorch_tanh",
}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint.

    - `config`: the name of the configuration's class in transformers.
    - `options`: its arguments, besides the sizes.
    - `embed_scale`: standard deviation of the embeddings. Where they are the output
        matrix too, large ones only repeat the last token.
    - `seed`: the first whose choices of tokens are far from ties and from short cycles.
    """

    config: str
    options: Mapping[str, Any]
    embed_scale: float = 1.0
    seed: int = 0


CASES: Mapping[str, Case] = {
    "llama": Case("LlamaConfig", {"rope_parameters": _LLAMA3}, seed=7),
    "llama_biases": Case(
        "LlamaConfig",
        {
            **{"attention_bias": True, "mlp_bias": True, "num_attention_heads": 3},
            **{"num_key_value_heads": 3, "head_dim": 6, "hidden_size": 24},
        },
    ),
    "smollm": Case(
        "LlamaConfig",
        {
            **{"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
            **{"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        },
        embed_scale=0.3,
        seed=6,
    ),
    "mistral": Case("MistralConfig", {"sliding_window": 12, "head_dim": 16}, seed=3),
    "qwen2": Case(
        "Qwen2Config",
        {
            **{"use_sliding_window": True, "sliding_window": 12},
            **{"max_window_layers": 1, "num_hidden_layers": 3},
        },
        seed=4,
    ),
    "qwen3": Case("Qwen3Config", {"head_dim": 16}),
    "gemma2": Case(
        "Gemma2Config",
        {**_GEMMA, "num_hidden_layers": 4},
        embed_scale=0.1,
        seed=26,
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        # Sharper attention: averages over many tokens would change little from step to
        # step.
        {**_GEMMA, "num_hidden_layers": 6, "query_pre_attn_scalar": 1},
        embed_scale=0.07,
        seed=4,
    ),
    "phi3": Case("Phi3Config", {"sliding_window": 30}, seed=3),
    "olmo2": Case("Olmo2Config", {}, seed=2),
    # All but its mixture of experts, which is made to give 0.
    "gpt_oss": Case(
        "GptOssConfig",
        {
            **{"head_dim": 8, "sliding_window": 12, "num_local_experts": 2},
            "num_experts_per_tok": 1,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 4.0},
                **{"original_max_position_embeddings": 32, "truncate": False},
            },
        },
        seed=6,
    ),
}
# Changes to the `config.json` of a checkpoint, for the kinds of rotary positions.
ROPE_CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "default": ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 3.0}},
    ),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 24,
        },
    ),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0},
                **{"original_max_position_embeddings": 32, "beta_fast": 4.0},
            },
        },
    ),
    "yarn_given": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0},
                **{"original_max_position_embeddings": 32, "attention_factor": 1.3},
                **{"beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
            },
        },
    ),
    "gemma3_linear": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {
                    **{"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                },
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    ),
    **{
        f"longrope_{name}": (
            "phi3",
            {
                "original_max_position_embeddings": original,
                "rope_parameters": {
                    **{"rope_theta": 1e4, "rope_type": "longrope"},
                    "short_factor": [1.0, 1.1, 1.5, 2.0],
                    "long_factor": [1.0, 1.4, 3.0, 6.0],
                },
            },
        )
        for name, original in (("short", 64), ("long", 32))
    },
    "partial": (
        "phi3",
        {
            "rope_parameters": {
                **{"rope_theta": 1e4, "rope_type": "default"},
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}
