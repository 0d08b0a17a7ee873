"""The usual steps from logits to logits."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from ._processor import Processor


Parameter = float | int | np.integer | np.floating | Real[Array | np.ndarray, "..."]
"""One number for all prompts, or an array of one a prompt."""

# Below it, logits of a usual size might overflow.
LEAST_TEMPERATURE = 1e-6
INT32_MAX = np.iinfo(np.int32).max


def temperature(temperature: Parameter) -> Processor:
    """Divides the logits: below 1 the likely tokens become likelier.

    **Arguments:**

    - `temperature`: 0 leaves the most probable token alone, as `greedy` does; otherwise
        finite and at least 1e-6.

    **Raises:**

    `ValueError` for another number.
    """
    allowed = lambda t: (t == 0) | (t >= LEAST_TEMPERATURE) & np.isfinite(t)  # noqa: E731
    text = "0, or finite and at least 1e-06"
    value = _parameter("temperature", temperature, allowed, text)
    return Processor("temperature", _divide, (value,))


def top_k(k: Parameter) -> Processor:
    """Leaves the `k` most probable tokens; of equally probable ones, the first.

    **Arguments:**

    - `k`: at least 1. One above the size of the vocabulary leaves all.

    **Raises:**

    `ValueError` for another number, or one that is no integer.
    """
    value = _parameter("k", k, lambda k: k >= 1, "at least 1", integer=True)
    return Processor("top_k", _keep_top_k, (value,))


def top_p(p: Parameter) -> Processor:
    """Leaves the fewest of the most probable tokens that have probability `p` together.

    Of equally probable ones the first are left.

    **Arguments:**

    - `p`: from 0, which leaves the most probable token, to 1, which leaves all.

    **Raises:**

    `ValueError` for another number.
    """
    value = _parameter("p", p, lambda p: (0 <= p) & (p <= 1), "from 0 to 1")
    return Processor("top_p", _keep_top_p, (value,))


def min_p(p: Parameter) -> Processor:
    """Leaves the tokens that are at least `p` times as probable as the most probable one.

    **Arguments:**

    - `p`: from 0, which leaves all, to 1.

    **Raises:**

    `ValueError` for another number.
    """
    value = _parameter("p", p, lambda p: (0 <= p) & (p <= 1), "from 0 to 1")
    return Processor("min_p", _keep_min_p, (value,))


def repetition_penalty(penalty: Parameter) -> Processor:
    """Makes the tokens of the prompt, and those made of it, less probable.

    Their logits are divided by `penalty` if positive and multiplied by it if negative, so
    that it belongs before what shifts logits. As in Hugging Face's `transformers`.

    **Arguments:**

    - `penalty`: above 0; 1 changes nothing, and less makes repetition more probable.

    **Raises:**

    `ValueError` for another number.
    """
    allowed = lambda p: (p > 0) & np.isfinite(p)  # noqa: E731
    value = _parameter("penalty", penalty, allowed, "a finite number above 0")
    return Processor("repetition_penalty", _penalise_seen, (value,), uses_history=True)


def presence_penalty(penalty: Parameter) -> Processor:
    """Takes `penalty` off the logits of tokens that were made of the prompt.

    Those of the prompt itself do not count, as in OpenAI's interface.

    **Arguments:**

    - `penalty`: 0 changes nothing, and less makes repetition more probable.

    **Raises:**

    `ValueError` if it is not finite.
    """
    value = _parameter("penalty", penalty, np.isfinite, "a finite number")
    return Processor("presence_penalty", _penalise_presence, (value,), uses_history=True)


def frequency_penalty(penalty: Parameter) -> Processor:
    """Takes `penalty` off a token's logit for each time that it was made of the prompt.

    Those of the prompt itself do not count, as in OpenAI's interface.

    **Arguments:**

    - `penalty`: 0 changes nothing, and less makes repetition more probable.

    **Raises:**

    `ValueError` if it is not finite.
    """
    value = _parameter("penalty", penalty, np.isfinite, "a finite number")
    return Processor("frequency_penalty", _penalise_counts, (value,), uses_history=True)


def logit_bias(biases: Mapping[int, float] | Sequence[Mapping[int, float]]) -> Processor:
    """Adds to the logits of some tokens.

    **Arguments:**

    - `biases`: what to add to each token's logit; or a list of such, one a prompt. One of
        `-inf` forbids the token. A token that the model does not have is ignored. A program
        is compiled for each number of tokens, the most that a prompt has.

    **Raises:**

    `ValueError` for a token that is no integer, below 0 or above an int32, and for a bias
    that is NaN or `inf`.
    """
    each = [biases] if isinstance(biases, Mapping) else biases
    is_list = isinstance(each, Sequence) and all(isinstance(x, Mapping) for x in each)
    if not is_list:
        raise ValueError(
            "logit_bias needs a mapping from tokens to numbers, or a list of such, but is "
            f"given {biases!r}."
        )
    if not each:
        raise ValueError(
            "logit_bias needs one mapping, or one a prompt, but there is none."
        )
    for one in each:
        for token, bias in one.items():
            is_int = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
            if not is_int or not 0 <= token < INT32_MAX:
                raise ValueError(f"logit_bias has no token {token!r}: no int32 from 0.")
            if not _is_real(bias) or not _float32(bias) < np.inf:
                raise ValueError(
                    f"The bias of token {token} must be a number below inf in float32, "
                    f"not {bias!r}."
                )
    width = max(map(len, each))
    # No vocabulary is as large as that.
    tokens = np.full((len(each), width), INT32_MAX, np.int32)
    values = np.zeros((len(each), width), np.float32)
    for row, one in enumerate(each):
        tokens[row, : len(one)] = list(one.keys())
        values[row, : len(one)] = list(one.values())
    return Processor("logit_bias", _add, (jnp.asarray(tokens), jnp.asarray(values)))


def _parameter(
    name: str,
    value: Parameter,
    is_allowed: Callable[..., np.ndarray],
    allowed: str,
    integer: bool = False,
):
    """A parameter with an axis of prompts; its values are checked unless it is traced."""
    is_traced = isinstance(value, jax.core.Tracer)
    array = value if is_traced else np.asarray(value)
    kinds, words = (np.integer, np.floating), "a real number"
    if integer:
        kinds, words = (np.integer,), "an integer"
    if array.ndim > 1 or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise ValueError(
            f"{name} must be {words} or an array of one a prompt, but is {array.dtype} of "
            f"shape {array.shape}."
        )
    if not is_traced:
        kept = np.minimum(array, INT32_MAX) if integer else _float32(array)
        # What is finite, or above 0, may not be so any more in float32.
        if not np.all(is_allowed(array) & is_allowed(kept)):
            raise ValueError(f"{name} must be {allowed}, but is {value}.")
    dtype = jnp.int32 if integer else jnp.float32
    if is_traced:
        return jnp.atleast_1d(array.astype(dtype))
    # By NumPy, which compiles nothing.
    return jnp.asarray(np.atleast_1d(kept).astype(dtype))


def _is_real(value):
    array = np.asarray(value)
    kinds = np.integer, np.floating
    return array.shape == () and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)


def _float32(numbers):
    with np.errstate(over="ignore"):
        return np.asarray(numbers).astype(np.float32)


# --- What they do, a row each: logits [num_seqs, vocab_size], parameters [num_seqs] or [1]


def _divide(logits, temperature):
    temperature = temperature[:, None]
    tokens = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    best = tokens == jnp.argmax(logits, axis=1).astype(jnp.int32)[:, None]
    divided = logits / jnp.where(temperature > 0, temperature, 1)
    return jnp.where((temperature > 0) | best, divided, -jnp.inf)


def _keep_top_k(logits, k):
    order, k = _order(logits), k[:, None]
    threshold = _largest(lambda t: _sum(order >= t) >= k, logits.shape[0])
    above, tied = order > threshold, order == threshold
    first = jnp.cumsum(tied, axis=1, dtype=jnp.int32) <= k - _sum(above)
    return jnp.where(above | (tied & first), logits, -jnp.inf)


def _keep_top_p(logits, p):
    # At p = 0 still one.
    order, p = _order(logits), jnp.maximum(p, jnp.finfo(jnp.float32).tiny)[:, None]
    probs = jax.nn.softmax(logits, axis=1)

    def total(tokens):
        return jnp.sum(jnp.where(tokens, probs, 0), axis=1, keepdims=True)

    threshold = _largest(lambda t: total(order >= t) >= p, logits.shape[0])
    above, tied = order > threshold, order == threshold
    num_before = jnp.cumsum(tied, axis=1, dtype=jnp.int32) - tied.astype(jnp.int32)
    before = total(above) + num_before.astype(probs.dtype) * probs
    kept = above | (tied & ((num_before == 0) | (before < p)))
    # Rounded probabilities may be less than 1 together.
    return jnp.where(kept | (p >= 1), logits, -jnp.inf)


def _keep_min_p(logits, p):
    best = jnp.max(logits, axis=1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(p)[:, None], logits, -jnp.inf)


def _penalise_seen(logits, history, penalty):
    penalty = penalty[:, None]
    less = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(history.seen(logits.shape[1]), less, logits)


def _penalise_presence(logits, history, penalty):
    made = history.counts(logits.shape[1]) > 0
    return logits - penalty[:, None] * made.astype(logits.dtype)


def _penalise_counts(logits, history, penalty):
    counts = history.counts(logits.shape[1])
    return logits - penalty[:, None] * counts.astype(logits.dtype)


def _add(logits, tokens, biases):
    num_seqs = logits.shape[0]
    shape = (num_seqs, tokens.shape[1])
    rows = jnp.arange(num_seqs, dtype=jnp.int32)[:, None]
    tokens, biases = jnp.broadcast_to(tokens, shape), jnp.broadcast_to(biases, shape)
    return logits.at[rows, tokens].add(biases, mode="drop")


# --- Thresholds: a search over the bits of a float, some times as fast as sorting


def _order(x):
    """Unsigned integers in the order of the floats, -0 and 0 the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(is_low_enough, num_seqs):
    """The largest unsigned integer of each row that is low enough; 0 if none is."""

    def with_bit(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(is_low_enough(higher), higher, threshold)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((num_seqs, 1), jnp.uint32))


def _sum(tokens):
    return jnp.sum(tokens, axis=1, keepdims=True, dtype=jnp.int32)
