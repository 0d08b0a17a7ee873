"""The models that are timed: random weights, in the layout of published checkpoints."""

import functools
import json
import math
import pathlib

import models
import numpy as np
import safetensors.numpy

from .._whole_file import write_whole


SEED = 0
_COMMON = {
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    # None that ends a text: a side that stops early would do less work than the others.
    "eos_token_id": (),
}
# As checkpoints of these sizes are published.
CONFIGS: dict[str, models.DecoderConfig] = {
    "tiny": models.DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **_COMMON,
    ),
    # Of the model that lies in `models/tiny`.
    "embedded": models.DecoderConfig(
        vocab_size=1685,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        **_COMMON,
    ),
    "135m": models.DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        **_COMMON,
    ),
    "1b": models.DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        **_COMMON,
    ),
}


def weight_shapes(config: models.DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, by their published names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def num_weights(config: models.DecoderConfig) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(config).values())


def itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def checkpoint(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The directory of a checkpoint in float32 with random weights: written at the first
    call, always the same."""
    root = folder / f"checkpoint_{name}_seed{SEED}"
    if (root / "config.json").exists():
        return root
    config = CONFIGS[name]
    rng = np.random.default_rng(SEED)
    tensors = {
        tensor: _random(rng, tensor, shape)
        for tensor, shape in weight_shapes(config).items()
    }
    root.mkdir(parents=True, exist_ok=True)
    # Without this note other programs do not take the file for a model.
    write = functools.partial(
        safetensors.numpy.save_file, tensors, metadata={"format": "pt"}
    )
    write_whole(root / "model.safetensors", write)
    # Last, as the sign that the checkpoint is whole.
    text = _config_json(config)
    write_whole(root / "config.json", lambda path: path.write_text(text))
    return root


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    if "embed_tokens" in name:
        # So small that the layers' outputs, and not the token just read, decide which
        # token is next: with a tied embedding, a token is the most like itself.
        std = 0.02
    elif "q_proj" in name or "k_proj" in name:
        # Sharper than the mean over all tokens, so that every key counts for something.
        std = 1.5 / math.sqrt(shape[1])
    else:
        std = 1 / math.sqrt(shape[1])
    weight = rng.standard_normal(shape, np.float32)
    return np.multiply(weight, np.float32(std), out=weight)


def _config_json(config: models.DecoderConfig) -> str:
    return json.dumps({**config.to_dict(), "dtype": "float32"}, indent=1) + "\n"
