"""The parts of a decoder layer. Each works on a flat list of tokens."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from ._config import DecoderConfig
from ._rope import angles


State = TypeVar("State")

# Up to here, a matrix times tokens is faster than tokens times a matrix.
FEW_TOKENS = 128
# But a token times a matrix of so many outputs is faster than the matrix times the token.
MANY_OUTPUTS = 8192


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
    wide = x.shape[0] == 1 and weight.shape[0] >= MANY_OUTPUTS
    if x.shape[0] <= FEW_TOKENS and weight.dtype == jnp.float32 and not wide:
        # XLA on CPU then reads it at the speed of the memory, and otherwise two to three
        # times slower. Without the barrier it would swap them back.
        return jax.lax.optimization_barrier(weight @ x.T).T
    return x @ weight.T


class Linear(eqx.Module):
    """A matrix, stored as checkpoints have it: one row an output; and a bias, if any.

    Takes all tokens at once: the gradient of the matrix is then one product that
    contracts one axis, which is several times faster on CPU than contracting two.
    """

    weight: Float[Array, "out_size in_size"]
    bias: Float[Array, " out_size"] | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool = False,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_size`, `out_size`: widths of the input and the output.
        - `bias`: whether there is one, 0 at first.
        - `scale`: standard deviation of the output for inputs of standard deviation 1.
        - `key`: where the random weights come from.
        """
        std = scale / math.sqrt(in_size)
        self.weight = std * jax.random.normal(key, (out_size, in_size), jnp.float32)
        self.bias = jnp.zeros(out_size, jnp.float32) if bias else None

    def __call__(
        self, x: Float[Array, "num_tokens in_size"]
    ) -> Float[Array, "num_tokens out_size"]:
        """Multiplies each token's vector by the matrix.

        **Arguments:**

        - `x`: one vector a token.

        **Returns:**

        One vector a token.
        """
        out = multiply(x, self.weight)
        return out if self.bias is None else out + self.bias[None, :]


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

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)

    def __init__(self, size: int, *, eps: float, offset: float = 0.0):
        """**Arguments:**

        - `size`: width of the vectors.
        - `eps`: added to the mean square.
        - `offset`: added to the weight, which is stored less by as much.
        """
        self.weight = jnp.full(size, 1 - offset, jnp.float32)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*vectors size"]) -> Float[Array, "*vectors size"]:
        """Normalises in float32.

        **Arguments:**

        - `x`: any number of vectors.

        **Returns:**

        As many, in the dtype of `x`.
        """
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact**2, axis=-1, keepdims=True)
        normed = exact * jax.lax.rsqrt(mean_square + self.eps)
        weight = self.weight.astype(jnp.float32) + self.offset
        return (normed * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)


class Rotary(eqx.Module):
    """The angles by which the queries and keys of some positions are turned."""

    cos: Float[Array, "num_tokens num_frequencies"]
    sin: Float[Array, "num_tokens num_frequencies"]

    @classmethod
    def at(
        cls,
        positions: Int32[Array, " num_tokens"],
        config: DecoderConfig,
        *,
        max_len: int,
        local: bool = False,
    ) -> "Rotary":
        """Computes the angles, once for all layers of a kind.

        **Arguments:**

        - `positions`: one a token.
        - `config`: gives the frequencies.
        - `max_len`: the most tokens that a sequence has room for.
        - `local`: whether for layers with a base of their own.

        **Returns:**

        The cosines and sines of the angles.
        """
        theta, scaling = config.rope_theta, config.rope_scaling
        if local:
            assert config.rope_local_base_freq is not None
            theta, scaling = config.rope_local_base_freq, None
        turned = angles(
            positions,
            theta=theta,
            rotary_dim=config.rotary_dim,
            scaling=scaling,
            max_len=max_len,
        )
        cos, sin = jnp.cos(turned), jnp.sin(turned)
        if scaling is not None:
            cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
        return cls(cos=cos, sin=sin)

    def __call__(
        self, x: Float[Array, "num_tokens heads head_dim"]
    ) -> Float[Array, "num_tokens heads head_dim"]:
        """Turns channel `i` with channel `i + num_frequencies`, in float32. Channels past
        those stay as they are.

        **Arguments:**

        - `x`: the queries or the keys.

        **Returns:**

        The turned ones, in the dtype of `x`.
        """
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        num = self.cos.shape[-1]
        first, second, rest = jnp.split(x.astype(jnp.float32), (num, 2 * num), axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class SelfAttention(eqx.Module):
    """The projections around attention. What is attended to is the caller's matter."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Float[Array, " num_heads"] | None
    head_dim: int = eqx.field(static=True)
    norms_heads: bool = eqx.field(static=True)

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: the sizes, and what there is.
        - `key`: where the random weights come from.
        """
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        project = functools.partial(Linear, config.hidden_size, bias=config.qkv_bias)
        self.q_proj = project(q_size, key=q_key)
        self.k_proj = project(kv_size, key=k_key)
        self.v_proj = project(kv_size, key=v_key)
        self.o_proj = Linear(
            q_size,
            config.hidden_size,
            bias=config.o_bias,
            scale=_into_residual(config),
            key=o_key,
        )
        self.head_dim = config.head_dim
        self.norms_heads = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            sizes = (self.head_dim,) * 2 if self.norms_heads else (q_size, kv_size)
            self.q_norm, self.k_norm = (norm_of(config, size) for size in sizes)
        self.sinks = None
        if config.attention_sinks:
            self.sinks = jnp.zeros(config.num_attention_heads, jnp.float32)

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
            arrays. The sinks are for it to use.

        **Returns:**

        One vector a token, and what `attend` gave besides.
        """
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x), None)
        out, state = attend(rotary(q), rotary(k), v)
        return self.o_proj(out.reshape(x.shape[0], -1)), state

    def _heads(
        self, x: Float[Array, "num_tokens size"], norm: RMSNorm | None
    ) -> Float[Array, "num_tokens heads head_dim"]:
        if norm is not None and not self.norms_heads:
            x = norm(x)
        x = x.reshape(x.shape[0], -1, self.head_dim)
        return norm(x) if norm is not None and self.norms_heads else x


class GatedMLP(eqx.Module):
    """The feed-forward block: `down(activation(gate(x)) * up(x))`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    hidden_act: str = eqx.field(static=True)

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: the sizes.
        - `key`: where the random weights come from.
        """
        gate_key, up_key, down_key = jax.random.split(key, 3)
        outer, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(Linear, bias=config.mlp_bias)
        self.gate_proj = linear(outer, inner, key=gate_key)
        self.up_proj = linear(outer, inner, key=up_key)
        self.down_proj = linear(inner, outer, scale=_into_residual(config), key=down_key)
        self.hidden_act = config.hidden_act

    def __call__(
        self, x: Float[Array, "num_tokens hidden_size"]
    ) -> Float[Array, "num_tokens hidden_size"]:
        """Maps each token by itself.

        **Arguments:**

        - `x`: one vector a token.

        **Returns:**

        One vector a token.
        """
        activation = jax.nn.silu if self.hidden_act == "silu" else jax.nn.gelu
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))


def norm_of(config: DecoderConfig, size: int) -> RMSNorm:
    """A norm of vectors of some width, as a decoder has them."""
    return RMSNorm(size, eps=config.rms_norm_eps, offset=config.norm_offset)


def _into_residual(config: DecoderConfig) -> float:
    """Two blocks a layer add to the residual stream; this keeps its size near 1."""
    return 1 / math.sqrt(2 * config.num_hidden_layers)
