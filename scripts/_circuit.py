"""The start of a training run: random weights with a circuit for look-ups in them.

To answer `tomin?` a decoder must find the place where `tomin` stood before. From random
weights alone a small decoder takes very long to come upon how. So two heads of the first
layer start out as "what was n tokens ago", and two of the second start by comparing
that between the question and the context. What is done with the place found, and all
the rest, is learnt. The result is an ordinary checkpoint.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from models import Decoder


# How far two of layer 0's heads look back. At `?` the token before is the key; at the
# first digit of a value the key is two tokens back.
_LOOK_BACK = (1, 2)
_NUM_FAST = 10  # pairs of channels that turn fast enough to tell neighbours apart
_CONSTANT = 6.0  # what the embedding's channel 0 holds for every token
_SHARPNESS = 6.0
_MATCH = 1.5


def with_lookup_circuit(decoder: Decoder, *, seed: int) -> Decoder:
    """Writes the circuit into the first two layers.

    **Arguments:**

    - `decoder`: random, with at least two layers, two query heads to its first key head,
        and `head_dim <= hidden_size`.
    - `seed`: chooses the random directions that the circuit uses.

    **Returns:**

    The decoder to train.
    """
    config = decoder.config
    hidden_size, half = config.hidden_size, config.head_dim // 2
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.standard_normal((hidden_size, hidden_size)))[0]
    mix[0] *= 0.1  # hardly any of the constant channel
    slots = [mix[:, half * i : half * (i + 1)] for i in range(2)]
    embedding = np.array(decoder.embed_tokens.weight)
    embedding[:, 0] = _CONSTANT
    first = _look_back(_Heads(decoder, 0), slots, config)
    second = _compare(_Heads(decoder, 1), slots, half)
    return eqx.tree_at(
        lambda d: [
            d.embed_tokens.weight,
            *_weights(d, 0),
            *_weights(d, 1),
        ],
        decoder,
        [jnp.asarray(x, jnp.float32) for x in (embedding, *first, *second)],
    )


class _Heads:
    """One layer's projections as `[in, heads, head_dim]`, and o as its transpose."""

    def __init__(self, decoder: Decoder, layer: int):
        head_dim = decoder.config.head_dim
        q, k, v, o = (np.array(weight) for weight in _weights(decoder, layer))
        self.q, self.k, self.v = (w.T.reshape(w.shape[1], -1, head_dim) for w in (q, k, v))
        self.o = o.T.reshape(-1, head_dim, o.shape[0])

    def flat(self) -> tuple[np.ndarray, ...]:
        q, k, v = (x.reshape(x.shape[0], -1).T for x in (self.q, self.k, self.v))
        return q, k, v, self.o.reshape(-1, self.o.shape[-1]).T


def _weights(decoder: Decoder, layer: int) -> list[Any]:
    # Arrays, or what stands for them inside `tree_at`.
    attn = decoder.layers[layer].self_attn
    projections = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    return [projection.weight for projection in projections]


def _look_back(heads: _Heads, slots, config) -> tuple[np.ndarray, ...]:
    """Layer 0: two heads read the token a fixed distance back, whatever it is, and write
    it to channels of their own."""
    half, hidden_size = config.head_dim // 2, config.hidden_size
    angles = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    # What the normalised stream holds in the constant channel.
    constant = _CONSTANT / np.sqrt((_CONSTANT**2 + hidden_size - 1) / hidden_size)
    fast = slice(0, _NUM_FAST)
    heads.q *= 0.2
    heads.k *= 0.2
    heads.o *= 0.3
    heads.v[0] = 0
    heads.k[0, 0] = 0
    heads.k[0, 0, fast] = _SHARPNESS / constant
    for head, back in enumerate(_LOOK_BACK):
        turned = _SHARPNESS / constant * np.exp(-1j * back * angles[fast])
        heads.q[0, head] = 0
        heads.q[0, head, fast] = turned.real
        heads.q[0, head, half : half + _NUM_FAST] = turned.imag
        heads.o[head, :half] = slots[head].T
    return heads.flat()


def _compare(heads: _Heads, slots, half: int) -> tuple[np.ndarray, ...]:
    """Layer 1: what came before the question's last token against what came two before
    each token. Only the slower half of the channel pairs is used: those turn little over
    a long context."""
    pairs = np.arange(half // 2, half)
    slow = np.concatenate([pairs, pairs + half])
    heads.q *= 0.2
    heads.k *= 0.2
    heads.q[:, :2, slow] += _MATCH * slots[0][:, None, :]
    heads.k[:, 0, slow] += _MATCH * slots[1]
    return heads.flat()
