"""What fixes a decoder, as it is published in a checkpoint's `config.json`."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any


# Options that would change what is computed and that the decoder does not have, each
# with the one value that means "not used".
_UNSUPPORTED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "quantization_config": None,
    "rope_scaling": None,
    "sliding_window": None,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OTHER_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a Llama decoder, under their published names.

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
    - `bos_token_id`: the token that every text begins with, if there is one.
    - `eos_token_id`: the tokens that end a text, possibly none.
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

    def __post_init__(self):
        _check(dataclasses.asdict(self))

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
        _check_supported(published)
        missing = [key for key in _REQUIRED if published.get(key) is None]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        }
        options = defaults | {
            field.name: published[field.name]
            for field in dataclasses.fields(cls)
            if published.get(field.name) is not None
        }
        for name in _REQUIRED:
            _check_size(name, options[name])
        heads = options["num_attention_heads"]
        options.setdefault("num_key_value_heads", heads)
        options.setdefault("head_dim", options["hidden_size"] // heads)
        options["rope_theta"] = _rope_theta(published)
        # Here null says that there is none, not that the default is meant.
        options["bos_token_id"] = published.get("bos_token_id", 1)
        options["eos_token_id"] = _token_ids(published.get("eos_token_id", 2))
        _check(options)
        return cls(**{**options, "rms_norm_eps": float(options["rms_norm_eps"])})

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

        What `from_dict` reads, and what names the architecture.
        """
        options = dataclasses.asdict(self)
        eos = list(self.eos_token_id)
        # Programs that predate lists of ends expect a lone number.
        options["eos_token_id"] = eos[0] if len(eos) == 1 else (eos or None)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **options,
            # The same base under its older name, `rope_theta`, is among the options.
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "mlp_bias": False,
        }


def _check(options: Mapping[str, Any]) -> None:
    for name in (*_REQUIRED, *_OTHER_SIZES):
        _check_size(name, options[name])
    for name in ("rms_norm_eps", "rope_theta"):
        _check_positive(name, options[name])
    if not isinstance(options["tie_word_embeddings"], bool):
        _refuse("tie_word_embeddings", options["tie_word_embeddings"], "true or false")
    if options["head_dim"] % 2 != 0:
        _refuse("head_dim", options["head_dim"], "an even number")
    heads, kv_heads = options["num_attention_heads"], options["num_key_value_heads"]
    if heads % kv_heads != 0:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    bos, eos = options["bos_token_id"], options["eos_token_id"]
    if bos is not None:
        _check_token("bos_token_id", bos, options["vocab_size"])
    for token in eos:
        _check_token("eos_token_id", token, options["vocab_size"])


def _check_supported(published: Mapping[str, Any]) -> None:
    model_type = published.get("model_type")
    if model_type != "llama":
        raise ValueError(f"model_type {model_type!r} is not supported (only 'llama')")
    for name, neutral in _UNSUPPORTED.items():
        value = published.get(name, neutral)
        if value is not None and value != neutral and not _is_default_rope(value):
            raise ValueError(f"{name} {value!r} is not supported")


def _is_default_rope(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    kind = value.get("rope_type", value.get("type", "default"))
    return kind == "default" and set(value) <= {"rope_type", "type", "rope_theta"}


def _rope_theta(published: Mapping[str, Any]) -> float:
    """The base, which newer files keep in `rope_parameters` and older ones at the top."""
    parameters = published.get("rope_parameters") or {}
    if not _is_default_rope(parameters):
        raise ValueError(f"rope_parameters {parameters!r} is not supported")
    old, new = published.get("rope_theta"), parameters.get("rope_theta")
    for theta in (old, new):
        if theta is not None:
            _check_positive("rope_theta", theta)
    if old is not None and new is not None and old != new:
        raise ValueError(f"rope_theta {old} contradicts rope_parameters.rope_theta {new}")
    found = [theta for theta in (new, old) if theta is not None]
    return float(found[0]) if found else DecoderConfig.rope_theta


def _token_ids(published: Any) -> tuple[Any, ...]:
    if published is None:
        return ()
    return tuple(published) if isinstance(published, list) else (published,)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_token(name: str, value: Any, vocab_size: int) -> None:
    if not (_is_int(value) and 0 <= value < vocab_size):
        _refuse(name, value, f"a token, 0 to {vocab_size - 1}")


def _check_size(name: str, value: Any) -> None:
    if not (_is_int(value) and value > 0):
        _refuse(name, value, "a positive whole number")


def _check_positive(name: str, value: Any) -> None:
    is_number = _is_int(value) or isinstance(value, float)
    # Whole numbers may be too large to become a float.
    if not (is_number and 0 < value <= sys.float_info.max):
        _refuse(name, value, "a positive number in a float's range")


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise ValueError(f"{name} must be {wanted}, not {value!r}")
