"""What fixes a decoder, as it is published in a checkpoint's `config.json`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ._checks import (
    check_bool,
    check_choice,
    check_positive,
    check_size,
    check_token,
    refuse,
)
from ._families import family_of
from ._published import FULL, publish, read, REQUIRED, WINDOW
from ._rope import DynamicScaling, LongScaling, Scaling, YarnScaling


_SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_POSITIVE = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_POSITIVE_OR_NONE = (
    *("rope_local_base_freq", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_FLAGS = (
    *("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "scale_embeddings"),
    "attention_sinks",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a decoder computes, under the published names where there are such.

    **Arguments:**

    - `vocab_size`: number of distinct tokens.
    - `hidden_size`: width of the residual stream.
    - `intermediate_size`: width of the feed-forward block.
    - `num_hidden_layers`: number of decoder layers.
    - `num_attention_heads`, `num_key_value_heads`: query heads, and the heads of keys
        and values that they share; the first is a multiple of the second.
    - `head_dim`: width of one head, an even number.
    - `rms_norm_eps`: added to the mean square before its root is taken.
    - `rope_theta`: the base of the rotary frequencies.
    - `max_position_embeddings`: the longest sequence that the weights were made for.
    - `tie_word_embeddings`: whether the embedding is also the output matrix.
    - `bos_token_id`: the token that begins a text, if there is one. Whether one is put
        before a prompt is for the tokenizer to say.
    - `eos_token_id`: the tokens that end a text, possibly none.
    - `model_type`: the family, which decides how a checkpoint is laid out.
    - `rope_scaling`: how rotary positions are scaled for long contexts, if they are.
    - `rope_local_base_freq`: the base for layers with a window, which are not scaled
        then; `rope_theta`, scaled, if None.
    - `partial_rotary_factor`: the part of each head that is turned.
    - `layer_types`: `"full_attention"` or `"sliding_attention"` for each layer; empty if
        all are full.
    - `sliding_window`: how many tokens a `"sliding_attention"` layer sees, the query's
        own included.
    - `hidden_act`: the activation, `"silu"` or `"gelu_pytorch_tanh"`.
    - `qkv_bias`, `o_bias`, `mlp_bias`: which projections have a bias.
    - `norms`: whether a block's input is normalised (`"pre"`), its output (`"post"`) or
        both (`"both"`).
    - `norm_offset`: added to the stored weights of the norms.
    - `qk_norm`: whether queries and keys are normalised, each head by itself (`"head"`)
        or all heads together (`"projection"`).
    - `scale_embeddings`: whether embeddings are multiplied by the root of `hidden_size`.
    - `query_pre_attn_scalar`: attention logits are divided by its root; `head_dim` if
        None.
    - `attn_logit_softcapping`, `final_logit_softcapping`: `c * tanh(x / c)` on the logits
        of attention, and on those of the tokens.
    - `attention_sinks`: whether each head has a logit that joins the softmax denominator
        only. No family that can be loaded has it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    model_type: str = "llama"
    rope_scaling: Scaling | None = None
    rope_local_base_freq: float | None = None
    partial_rotary_factor: float = 1.0
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norms: str = "pre"
    norm_offset: float = 0.0
    qk_norm: str | None = None
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_sinks: bool = False

    def __post_init__(self):
        _check({field.name: getattr(self, field.name) for field in _fields(self)})

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def short_len(self) -> int | None:
        """The most tokens of room in a cache for which positions are turned by the short
        factors of `longrope`; None without such a scaling.
        """
        scaling = self.rope_scaling
        if not isinstance(scaling, LongScaling):
            return None
        return scaling.original_max_position_embeddings

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees, None for all."""
        is_full = not self.layer_types or self.layer_types[layer] == FULL
        return None if is_full else self.sliding_window

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the keys of a published `config.json`.

        **Arguments:**

        - `published`: the parsed file. Keys that do not change what is computed, such
            as `transformers_version`, are passed over.

        **Returns:**

        The configuration. A `ValueError` names a missing key, a value that makes no
        sense, or an option that the decoder does not have.
        """
        options = read(published)
        _check({**_DEFAULTS, **options})
        numbers = ("rms_norm_eps", *_POSITIVE_OR_NONE)
        exact = {name: float(options[name]) for name in numbers if options.get(name)}
        return cls(**{**options, **exact})

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "DecoderConfig":
        """Reads a `config.json`.

        **Arguments:**

        - `path`: the file.

        **Returns:**

        The configuration; errors as in `from_dict`, and naming the file.
        """
        content = pathlib.Path(path).read_bytes()
        try:
            published = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(published, dict):
            raise ValueError(f"{path}: not a JSON object")
        try:
            return cls.from_dict(published)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Gives the keys under which other programs expect this configuration.

        **Returns:**

        What `from_dict` reads, and what names the architecture. A `ValueError` if the
        family has no way to say it.
        """
        options = {field.name: getattr(self, field.name) for field in _fields(self)}
        published = publish(options, self.rope_scaling)
        told = DecoderConfig.from_dict(published)
        lost = [name for name in options if getattr(told, name) != options[name]]
        if lost:
            raise ValueError(f"{self.model_type!r} has no way to say {', '.join(lost)}")
        return published


def _fields(config: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(config)


_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(DecoderConfig)
    if field.default is not dataclasses.MISSING
}


def _check(options: Mapping[str, Any]) -> None:
    family_of(options["model_type"])
    for name in _SIZES:
        check_size(name, options[name])
    for name in _POSITIVE:
        check_positive(name, options[name])
    for name in _POSITIVE_OR_NONE:
        if options[name] is not None:
            check_positive(name, options[name])
    for name in _FLAGS:
        check_bool(name, options[name])
    check_choice("hidden_act", options["hidden_act"], ("silu", "gelu_pytorch_tanh"))
    check_choice("norms", options["norms"], ("pre", "post", "both"))
    check_choice("norm_offset", options["norm_offset"], (0.0, 1.0))
    check_choice("qk_norm", options["qk_norm"], (None, "head", "projection"))
    heads, kv_heads = options["num_attention_heads"], options["num_key_value_heads"]
    if heads % kv_heads != 0:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    bos, eos = options["bos_token_id"], options["eos_token_id"]
    if bos is not None:
        check_token("bos_token_id", bos, options["vocab_size"])
    for token in eos:
        check_token("eos_token_id", token, options["vocab_size"])
    _check_layer_types(options)
    _check_rope(options)


def _check_layer_types(options: Mapping[str, Any]) -> None:
    types, num_layers = options["layer_types"], options["num_hidden_layers"]
    if types and len(types) != num_layers:
        refuse("layer_types", types, f"of length num_hidden_layers {num_layers}")
    for kind in types:
        check_choice("layer_types", kind, (FULL, WINDOW))
    window = options["sliding_window"]
    if window is not None:
        check_size("sliding_window", window)
    if (WINDOW in types) != (window is not None):
        raise ValueError(f"sliding_window {window} contradicts layer_types {types}")


def _check_rope(options: Mapping[str, Any]) -> None:
    head_dim, part = options["head_dim"], options["partial_rotary_factor"]
    if head_dim % 2 != 0:
        refuse("head_dim", head_dim, "an even number")
    rotary_dim = int(head_dim * part)
    if part > 1 or rotary_dim % 2 != 0 or rotary_dim == 0:
        refuse("partial_rotary_factor", part, f"an even number of channels of {head_dim}")
    scaling = options["rope_scaling"]
    if isinstance(scaling, YarnScaling) and options["rope_theta"] <= 1:
        refuse("rope_theta", options["rope_theta"], "more than 1 for 'yarn'")
    if isinstance(scaling, DynamicScaling) and rotary_dim == 2:
        raise ValueError("rope_scaling of type 'dynamic' needs more than 2 channels")
    if isinstance(scaling, LongScaling):
        for name in ("short_factor", "long_factor"):
            found = len(getattr(scaling, name))
            if found != rotary_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name} must have {rotary_dim // 2} values, not {found}"
                )
