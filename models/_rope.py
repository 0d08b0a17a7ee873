"""Rotary positions: the angles by which channels are turned, and how they are scaled for
contexts longer than those of the training.

A scaling is a frozen record under its published names. Frequencies are computed in float64
and rounded once.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int32

from ._checks import check_bool, check_positive, check_size, is_number, refuse


Frequencies = Float64[np.ndarray, " num_frequencies"]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def scaled(self, frequencies: Frequencies, theta: float, max_len: int) -> Frequencies:
        del theta, max_len
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling of the base by the length so far, from
    `max_position_embeddings` on.

    Each token is turned by the frequencies of the length up to and with itself, so that
    how a sequence is cut into steps does not matter.
    """

    rope_type: ClassVar[str] = "dynamic"
    factor: float
    max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def scaled_at(
        self, frequencies: Frequencies, positions: Int32[Array, " num_tokens"]
    ) -> Float[Array, "num_tokens num_frequencies"]:
        """The frequencies for each position."""
        num = len(frequencies)
        lengths = jnp.maximum(positions + 1, self.max_position_embeddings)
        stretch = lengths.astype(jnp.float32) / self.max_position_embeddings
        growth = self.factor * stretch - (self.factor - 1)
        # The base grows by `growth ** (d / (d - 2))`, and frequency i is its power -2i/d.
        exponents = np.asarray(-np.arange(num) / (num - 1), np.float32)
        powers = growth[:, None] ** exponents[None, :]
        return jnp.asarray(frequencies, jnp.float32)[None, :] * powers


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between blended."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def scaled(self, frequencies: Frequencies, theta: float, max_len: int) -> Frequencies:
        del theta, max_len
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        return _blend(frequencies, self.factor, np.clip(kept, 0, 1))


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: as `llama3`, by a ramp over the channels, and all logits made sharper.

    - `beta_fast`, `beta_slow`: a channel that turns more often than the first within the
        original length is kept, one that turns less often than the second is divided.
    - `truncate`: whether the ramp's ends are whole channels.
    - `attention_factor`: on the cosines and sines.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scaled(self, frequencies: Frequencies, theta: float, max_len: int) -> Frequencies:
        del max_len
        num = len(frequencies)
        low, high = (self._channel(beta, num, theta) for beta in self._betas)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num - 1)
        # The published programs do the same where the ramp has no length.
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(num) - low) / width, 0, 1)
        return _blend(frequencies, self.factor, 1 - ramp)

    @property
    def _betas(self) -> tuple[float, float]:
        return self.beta_fast, self.beta_slow

    def _channel(self, turns: float, num: int, theta: float) -> float:
        """Which channel turns that often within the original length."""
        wavelength = self.original_max_position_embeddings / turns
        return num * math.log(wavelength / (2 * math.pi)) / math.log(theta)


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """LongRoPE: each frequency divided by a factor of its own, of one set for sequences
    up to the original length and another for longer ones.

    A stored key is not turned again: the room that sequences have decides once for all.
    """

    rope_type: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def scaled(self, frequencies: Frequencies, theta: float, max_len: int) -> Frequencies:
        del theta
        is_long = max_len > self.original_max_position_embeddings
        return frequencies / np.asarray(self.long_factor if is_long else self.short_factor)


StaticScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling
Scaling = StaticScaling | DynamicScaling


def angles(
    positions: Int32[Array, " num_tokens"],
    *,
    theta: float,
    rotary_dim: int,
    scaling: Scaling | None,
    max_len: int,
) -> Float[Array, "num_tokens num_frequencies"]:
    """The angle of each pair of channels at each position, in radians.

    **Arguments:**

    - `positions`: one a token.
    - `theta`: the base of the frequencies.
    - `rotary_dim`: how many channels of a head are turned.
    - `scaling`: for long contexts, if any.
    - `max_len`: the most tokens that a sequence has room for.

    **Returns:**

    The angles, `rotary_dim / 2` a token.
    """
    frequencies = theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    at = positions.astype(jnp.float32)[:, None]
    if isinstance(scaling, DynamicScaling):
        return at * scaling.scaled_at(frequencies, positions)
    if scaling is not None:
        frequencies = scaling.scaled(frequencies, theta, max_len)
    return at * np.asarray(frequencies, np.float32)[None, :]


def _blend(frequencies: Frequencies, factor: float, kept: Frequencies) -> Frequencies:
    return frequencies * kept + frequencies / factor * (1 - kept)


# --- As published

# Which keys each kind must have, and which it may.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        *("original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "truncate"),
    ),
    "longrope": ("original_max_position_embeddings", "attention_factor", "factor"),
}
_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_scaling(
    name: str, published: Mapping[str, Any], max_position_embeddings: int
) -> Scaling | None:
    """Reads the scaling of a published `rope_scaling` or `rope_parameters`.

    **Arguments:**

    - `name`: the key, for errors.
    - `published`: its value.
    - `max_position_embeddings`: of the whole configuration.

    **Returns:**

    The scaling, None for plain positions. A `ValueError` names what is missing, makes no
    sense or is not supported.
    """
    kind = published.get("rope_type", published.get("type", "default"))
    given = {key: x for key, x in published.items() if key not in _OF_ALL and x is not None}
    # Not by `in` the dictionary: what a file holds need not be hashable.
    if kind not in [*_REQUIRED] or set(given) - {*_REQUIRED[kind], *_OPTIONAL[kind]}:
        raise ValueError(f"{name} {dict(published)!r} is not supported")
    if kind == "default":
        return None
    missing = [key for key in _REQUIRED[kind] if key not in given]
    if missing:
        raise ValueError(f"{name} of type {kind!r}: missing {', '.join(missing)}")
    for key, value in given.items():
        _check(f"{name}.{key}", key, value)
    return _build(kind, given, max_position_embeddings)


def publish_scaling(scaling: Scaling | None) -> dict[str, Any]:
    """The keys under which other programs expect a scaling.

    **Arguments:**

    - `scaling`: which one, if any.

    **Returns:**

    What `read_scaling` reads.
    """
    if scaling is None:
        return {"rope_type": "default"}
    options = dataclasses.asdict(scaling)
    # This one is of the whole configuration.
    options.pop("max_position_embeddings", None)
    options = {k: list(x) if isinstance(x, tuple) else x for k, x in options.items()}
    return {"rope_type": scaling.rope_type, **options}


def _build(kind: str, given: dict[str, Any], max_position_embeddings: int) -> Scaling:
    given = {key: x if _is_bool_or_list(x) else float(x) for key, x in given.items()}
    original = int(given.pop("original_max_position_embeddings", max_position_embeddings))
    if kind == "linear":
        return LinearScaling(**given)
    if kind == "dynamic":
        return DynamicScaling(**given, max_position_embeddings=max_position_embeddings)
    if kind == "llama3":
        if given["low_freq_factor"] >= given["high_freq_factor"]:
            raise ValueError(
                f"low_freq_factor {given['low_freq_factor']} must be less than "
                f"high_freq_factor {given['high_freq_factor']}"
            )
        return Llama3Scaling(**given, original_max_position_embeddings=original)
    if kind == "yarn":
        sharper = 1 + 0.1 * math.log(max(given["factor"], 1.0))
        given.setdefault("attention_factor", sharper)
        return YarnScaling(**given, original_max_position_embeddings=original)
    if original == 1:
        # By its logarithm the logits' factor is divided.
        refuse("original_max_position_embeddings", original, "more than 1")
    longer = given.pop("factor", max_position_embeddings / original)
    given.setdefault("attention_factor", _long_attention_factor(longer, original))
    given |= {key: tuple(map(float, given[key])) for key in _REQUIRED[kind]}
    return LongScaling(**given, original_max_position_embeddings=original)


def _long_attention_factor(longer: float, original: int) -> float:
    return math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0


def _check(name: str, key: str, value: Any) -> None:
    if key == "truncate":
        check_bool(name, value)
    elif key == "original_max_position_embeddings":
        check_size(name, value)
    elif key in ("short_factor", "long_factor"):
        if not (isinstance(value, list) and all(map(is_number, value))):
            refuse(name, value, "a list of numbers")
        for factor in value:
            check_positive(name, factor)
    else:
        check_positive(name, value)


def _is_bool_or_list(value: Any) -> bool:
    return isinstance(value, (bool, list))
