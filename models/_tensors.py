"""Where a decoder's parameters are in a published checkpoint."""

import dataclasses
from collections.abc import Mapping

from ._config import DecoderConfig
from ._families import family_of


# Norms by where they stand, as a family with norms before, after or around its blocks
# calls them.
_NORMS = {
    "pre": {
        "pre_attention_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
    },
    "post": {
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    "both": {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter's place in a checkpoint.

    - `name`: of the published tensor.
    - `rows`: which of its rows, first and past the last; None for the whole tensor. The
        parameters that share a tensor fill it, in the order of their rows.
    """

    name: str
    rows: tuple[int, int] | None = None


def tensor_sources(config: DecoderConfig) -> Mapping[str, Source]:
    """Says where each parameter is.

    **Arguments:**

    - `config`: of the decoder.

    **Returns:**

    A source for each parameter, by the fields on the way to it, as in
    `layers.0.self_attn.q_proj.weight`.
    """
    sources = {
        "embed_tokens.weight": Source("model.embed_tokens.weight"),
        "norm.weight": Source("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        sources["lm_head.weight"] = Source("lm_head.weight")
    for layer in range(config.num_hidden_layers):
        for path, source in _of_layer(config).items():
            name = f"model.layers.{layer}.{source.name}"
            sources[f"layers.{layer}.{path}"] = Source(name, source.rows)
    return sources


def _of_layer(config: DecoderConfig) -> dict[str, Source]:
    sources = {
        f"{path}.weight": Source(f"{name}.weight")
        for path, name in _NORMS[config.norms].items()
    }
    if config.qk_norm is not None:
        names = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        sources |= {name: Source(name) for name in names}
    if config.attention_sinks:
        sources["self_attn.sinks"] = Source("self_attn.sinks")
    is_fused = family_of(config.model_type).fused
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    gate_up = {name: config.intermediate_size for name in ("gate_proj", "up_proj")}
    parts = (
        ("self_attn", qkv, "qkv_proj" if is_fused else None, config.qkv_bias),
        ("self_attn", {"o_proj": config.hidden_size}, None, config.o_bias),
        ("mlp", gate_up, "gate_up_proj" if is_fused else None, config.mlp_bias),
        ("mlp", {"down_proj": config.hidden_size}, None, config.mlp_bias),
    )
    for block, sizes, fused, has_bias in parts:
        for kind in ("weight", "bias")[: 1 + has_bias]:
            sources |= _projections(block, sizes, fused, kind)
    return sources


def _projections(
    block: str, sizes: Mapping[str, int], fused: str | None, kind: str
) -> dict[str, Source]:
    sources, start = {}, 0
    for name, size in sizes.items():
        path = f"{block}.{name}.{kind}"
        if fused is None:
            sources[path] = Source(path)
        else:
            rows = (start, start + size)
            sources[path] = Source(f"{block}.{fused}.{kind}", rows)
        start += size
    return sources
