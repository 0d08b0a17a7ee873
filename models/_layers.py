"""The parts of a decoder layer. Each works on a flat list of tokens."""

import math
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from ._config import DecoderConfig


State = TypeVar("State")

# So many tokens are multiplied by a matrix in the time it takes to read it.
FEW_TOKENS = 16


def multiply(
    x: Float[Array, "num_tokens in_size"], weight: Float[Array, "out_size in_size"]
) -> Float[Array, "num_tokens out_size"]:
    """Multiplies each token's vector by a matrix with one row an output.

    **Arguments:**

    - `x`: one vector a token.
    - `weight`: the matrix.

    **Returns:**

    One vector a token.
    """
    if x.shape[0] <= FEW_TOKENS and weight.dtype == jnp.float32:
        # The matrix first: XLA on CPU then reads it at the speed of the memory, and two to
        # three times slower otherwise. Without the barrier it would swap them back.
        return jax.lax.optimization_barrier(weight @ x.T).T
    return x @ weight.T


class Linear(eqx.Module):
    """A matrix, stored as checkpoints have it: one row an output.

    Takes all tokens at once: the gradient of the matrix is then one product that
    contracts one axis, which is several times faster on CPU than contracting two.
    """

    weight: Float[Array, "out_size in_size"]

    def __init__(
        self, in_size: int, out_size: int, *, scale: float = 1.0, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `in_size`, `out_size`: widths of the input and the output.
        - `scale`: standard deviation of the output for inputs of standard deviation 1.
        - `key`: where the random weights come from.
        """
        std = scale / math.sqrt(in_size)
        self.weight = std * jax.random.normal(key, (out_size, in_size), jnp.float32)

    def __call__(
        self, x: Float[Array, "num_tokens in_size"]
    ) -> Float[Array, "num_tokens out_size"]:
        """Multiplies each token's vector by the matrix.

        **Arguments:**

        - `x`: one vector a token.

        **Returns:**

        One vector a token.
        """
        return multiply(x, self.weight)


class Embedding(eqx.Module):
    """One vector for each token of the vocabulary."""

    weight: Float[Array, "vocab_size hidden_size"]

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `vocab_size`: number of vectors.
        - `hidden_size`: their width.
        - `scale`: their standard deviation.
        - `key`: where the random vectors come from.
        """
        shape = (vocab_size, hidden_size)
        self.weight = scale * jax.random.normal(key, shape, jnp.float32)

    def __call__(
        self, tokens: Int32[Array, " num_tokens"]
    ) -> Float[Array, "num_tokens hidden_size"]:
        """Looks tokens up.

        **Arguments:**

        - `tokens`: which vectors.

        **Returns:**

        One vector a token.
        """
        return self.weight[tokens]


class RMSNorm(eqx.Module):
    """Scales each vector to a root mean square of 1, then each channel by its weight."""

    weight: Float[Array, " hidden_size"]
    eps: float = eqx.field(static=True)

    def __init__(self, hidden_size: int, *, eps: float):
        """**Arguments:**

        - `hidden_size`: width of the vectors.
        - `eps`: added to the mean square.
        """
        self.weight = jnp.ones(hidden_size, jnp.float32)
        self.eps = eps

    def __call__(
        self, x: Float[Array, "num_tokens hidden_size"]
    ) -> Float[Array, "num_tokens hidden_size"]:
        """Normalises in float32.

        **Arguments:**

        - `x`: one vector a token.

        **Returns:**

        One vector a token, in the dtype of `x`.
        """
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact**2, axis=-1, keepdims=True)
        normed = exact * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * self.weight.astype(jnp.float32)[None, :]).astype(x.dtype)


class Rotary(eqx.Module):
    """The angles by which the queries and keys of some positions are turned."""

    cos: Float[Array, "num_tokens half_head_dim"]
    sin: Float[Array, "num_tokens half_head_dim"]

    @classmethod
    def at(cls, positions: Int32[Array, " num_tokens"], config: DecoderConfig) -> "Rotary":
        """Computes the angles, once for all layers.

        **Arguments:**

        - `positions`: one a token.
        - `config`: gives the frequencies.

        **Returns:**

        The cosines and sines of the angles.
        """
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        frequencies = np.asarray(config.rope_theta**-exponents, np.float32)
        angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
        return cls(cos=jnp.cos(angles), sin=jnp.sin(angles))

    def __call__(
        self, x: Float[Array, "num_tokens heads head_dim"]
    ) -> Float[Array, "num_tokens heads head_dim"]:
        """Turns channel `i` with channel `i + head_dim / 2`, in float32.

        **Arguments:**

        - `x`: the queries or the keys.

        **Returns:**

        The turned ones, in the dtype of `x`.
        """
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class SelfAttention(eqx.Module):
    """The projections around attention. What is attended to is the caller's matter."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    head_dim: int = eqx.field(static=True)

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: the sizes.
        - `key`: where the random weights come from.
        """
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, key=q_key)
        self.k_proj = Linear(config.hidden_size, kv_size, key=k_key)
        self.v_proj = Linear(config.hidden_size, kv_size, key=v_key)
        self.o_proj = Linear(
            q_size, config.hidden_size, scale=_into_residual(config), key=o_key
        )
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "num_tokens hidden_size"],
        rotary: Rotary,
        attend: Callable[[Array, Array, Array], tuple[Array, State]],
    ) -> tuple[Float[Array, "num_tokens hidden_size"], State]:
        """Projects, attends, projects back.

        **Arguments:**

        - `x`: one vector a token.
        - `rotary`: the angles of the tokens' positions.
        - `attend`: `(q, k, v) -> (out, state)` with `[num_tokens, heads, head_dim]`
            arrays.

        **Returns:**

        One vector a token, and what `attend` gave besides.
        """
        num_tokens = x.shape[0]
        q, k, v = (
            project(x).reshape(num_tokens, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, state = attend(rotary(q), rotary(k), v)
        return self.o_proj(out.reshape(num_tokens, -1)), state


class SwiGLU(eqx.Module):
    """The feed-forward block: `down(silu(gate(x)) * up(x))`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: the sizes.
        - `key`: where the random weights come from.
        """
        gate_key, up_key, down_key = jax.random.split(key, 3)
        outer, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(outer, inner, key=gate_key)
        self.up_proj = Linear(outer, inner, key=up_key)
        self.down_proj = Linear(inner, outer, scale=_into_residual(config), key=down_key)

    def __call__(
        self, x: Float[Array, "num_tokens hidden_size"]
    ) -> Float[Array, "num_tokens hidden_size"]:
        """Maps each token by itself.

        **Arguments:**

        - `x`: one vector a token.

        **Returns:**

        One vector a token.
        """
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def _into_residual(config: DecoderConfig) -> float:
    """Two blocks a layer add to the residual stream; this keeps its size near 1."""
    return 1 / math.sqrt(2 * config.num_hidden_layers)
