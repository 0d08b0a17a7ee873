"""The training step, and the state that a run is taken up again from."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32
from models import Decoder

from ._corpus import Rows


_WARM_UP = 100
_DIGEST_SIZE = 32  # of SHA-256, at the end of a saved state
_DECAY_SHARE = 0.4  # what is learnt is only settled while the rate falls


class Targets(eqx.Module):
    """`Rows`, on the device."""

    tokens: Int32[Array, "num_rows length"]
    positions: Int32[Array, " num_targets"]
    targets: Int32[Array, " num_targets"]
    weights: Float[Array, " num_targets"]

    @classmethod
    def of(cls, rows: Rows) -> "Targets":
        return cls(
            jnp.asarray(rows.tokens),
            jnp.asarray(rows.positions),
            jnp.asarray(rows.targets),
            jnp.asarray(rows.weights),
        )


class TrainState(eqx.Module):
    """All that a step changes."""

    decoder: Decoder
    optimiser: Any
    step: Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How fast to learn, and for how long.

    **Arguments:**

    - `num_steps`: the length of the whole run.
    - `peak`: the highest rate: reached after a warm-up, left for a linear fall to 0.
    """

    num_steps: int
    peak: float

    def __call__(self, step: ArrayLike) -> Array:
        step = jnp.asarray(step, jnp.float32)
        warm_up = min(_WARM_UP, max(self.num_steps // 10, 1))
        decay = max(_DECAY_SHARE * self.num_steps, 1.0)
        rising = (step + 1.0) / warm_up
        falling = (self.num_steps - step) / decay
        return self.peak * jnp.minimum(1.0, jnp.minimum(rising, falling))

    @functools.cached_property
    def optimiser(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9),
            optax.add_decayed_weights(0.05, mask=_is_matrix),
            optax.scale_by_learning_rate(self),
        )

    def start(self, decoder: Decoder) -> TrainState:
        """The state before the first step."""
        weights = eqx.filter(decoder, eqx.is_inexact_array)
        return TrainState(decoder, self.optimiser.init(weights), jnp.zeros((), jnp.int32))


@eqx.filter_jit(donate="all-except-first")
def train_step(
    batch: tuple[Targets, ...], state: TrainState, schedule: Schedule
) -> tuple[TrainState, Float[Array, ""]]:
    """Learns from one batch. The old state is used up.

    **Returns:**

    The new state, and the mean loss a unit of weight.
    """
    loss, grads = eqx.filter_value_and_grad(_loss)(state.decoder, batch)
    weights = eqx.filter(state.decoder, eqx.is_inexact_array)
    # Optax relies on implicit conversions, also where the caller has forbidden them.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimiser = schedule.optimiser.update(grads, state.optimiser, weights)
    decoder = eqx.apply_updates(state.decoder, updates)
    return TrainState(decoder, optimiser, state.step + 1), loss


@eqx.filter_jit
def mean_loss(decoder: Decoder, rows: Targets) -> Float[Array, ""]:
    """The mean loss a unit of weight, without learning."""
    return _loss(decoder, (rows,))


def _loss(decoder: Decoder, batch: tuple[Targets, ...]) -> Float[Array, ""]:
    losses = jnp.stack([_summed_loss(decoder, rows) for rows in batch])
    weights = jnp.stack([jnp.sum(rows.weights) for rows in batch])
    return jnp.sum(losses) / jnp.sum(weights)


def _summed_loss(decoder: Decoder, rows: Targets) -> Float[Array, ""]:
    hidden = decoder.dense(rows.tokens)
    hidden = hidden.reshape(-1, hidden.shape[-1])[rows.positions]
    logits = decoder.unembed(hidden)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    return jnp.sum(losses * rows.weights)


def _is_matrix(weights: Any) -> Any:
    return jax.tree.map(lambda weight: weight.ndim > 1, weights)


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()


def save_state(path: pathlib.Path, state: TrainState, notes: dict[str, Any]) -> None:
    """Writes a state, so that the file is whole whenever the program ends.

    **Arguments:**

    - `path`: the file.
    - `state`: what to write.
    - `notes`: anything that JSON can hold, to be written in front.
    """
    whole = io.BytesIO(json.dumps(notes).encode() + b"\n")
    whole.seek(0, os.SEEK_END)
    eqx.tree_serialise_leaves(whole, state)
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        file.write(whole.getbuffer())
        file.write(_digest(whole.getbuffer()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_notes(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `save_state` wrote in front.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    The notes. A file that is not just as it was written is a `ValueError`.
    """
    content = path.read_bytes()
    whole, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if _digest(whole) != digest:
        raise ValueError(f"{path}: not what was written")
    return json.loads(whole.partition(b"\n")[0])


def load_state(path: pathlib.Path, like: TrainState) -> TrainState:
    """Reads a state.

    **Arguments:**

    - `path`: the file that `save_state` wrote, which `load_notes` checks.
    - `like`: a state of the same shapes.

    **Returns:**

    The state.
    """
    with open(path, "rb") as file:
        file.readline()
        return eqx.tree_deserialise_leaves(file, like)
