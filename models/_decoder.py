"""A Llama decoder over a paged cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_paged import (
    PagedAttention,
    PagedKVCache,
    RaggedAttention,
    RaggedBatch,
    RaggedKVCache,
)
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from ._config import DecoderConfig
from ._dense import causal_attention
from ._layers import (
    Embedding,
    Linear,
    multiply,
    RMSNorm,
    Rotary,
    SelfAttention,
    State,
    SwiGLU,
)


class DecoderLayer(eqx.Module):
    """Attention and a feed-forward block, each added to what it read."""

    input_layernorm: RMSNorm
    self_attn: SelfAttention
    post_attention_layernorm: RMSNorm
    mlp: SwiGLU

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: the sizes.
        - `key`: where the random weights come from.
        """
        attention_key, mlp_key = jax.random.split(key)
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, key=attention_key)
        self.post_attention_layernorm = norm()
        self.mlp = SwiGLU(config, key=mlp_key)

    def __call__(
        self,
        x: Float[Array, "num_tokens hidden_size"],
        rotary: Rotary,
        attend: Callable[[Array, Array, Array], tuple[Array, State]],
    ) -> tuple[Float[Array, "num_tokens hidden_size"], State]:
        """Applies the layer.

        **Arguments:**

        - `x`: one vector a token.
        - `rotary`: the angles of the tokens' positions.
        - `attend`: `(q, k, v) -> (out, state)`.

        **Returns:**

        One vector a token, and what `attend` gave besides.
        """
        out, state = self.self_attn(self.input_layernorm(x), rotary, attend)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), state


class Decoder(eqx.Module):
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention
    and SwiGLU.

    The fields carry the names that tensors have in a published checkpoint.
    """

    embed_tokens: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Linear | None
    attention: PagedAttention | RaggedAttention
    config: DecoderConfig = eqx.field(static=True)

    def __init__(
        self,
        config: DecoderConfig,
        *,
        attention: PagedAttention | RaggedAttention | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `config`: the sizes.
        - `attention`: how the layers attend over a cache; `PagedAttention()` if None.
            `RaggedAttention()` makes the decoder read a `RaggedKVCache`.
        - `key`: where the random float32 weights come from.
        """
        embed_key, head_key, *layer_keys = jax.random.split(
            key, 2 + config.num_hidden_layers
        )
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        # A matrix that is also the output must not make huge logits of its own vectors.
        scale = hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        self.embed_tokens = Embedding(vocab_size, hidden_size, scale=scale, key=embed_key)
        self.layers = tuple(DecoderLayer(config, key=key) for key in layer_keys)
        self.norm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            # Small, so that an untrained decoder is unsure of everything.
            self.lm_head = Linear(hidden_size, vocab_size, scale=0.3, key=head_key)
        self.attention = PagedAttention() if attention is None else attention
        self.config = config

    def __call__(
        self,
        tokens: Int32[Array, " num_tokens"],
        cache: PagedKVCache | RaggedKVCache,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "num_tokens hidden_size"], PagedKVCache | RaggedKVCache]:
        """Reads one step's tokens, and stores their keys and values.

        **Arguments:**

        - `tokens`: the step's tokens, in the order that `batch` tells.
        - `cache`, `batch`: what `cache.append` gave for this step.

        **Returns:**

        One vector a token, for `unembed`, and the cache with this step's entries.
        """
        if len(cache.layers) != len(self.layers):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, the decoder {len(self.layers)}"
            )
        x = self.embed_tokens(tokens)
        rotary = Rotary.at(batch.positions, self.config)
        stored = []
        for layer, pages in zip(self.layers, cache.layers, strict=True):

            def attend(q: Array, k: Array, v: Array, pages: Any = pages):
                return self.attention(q, k, v, pages, batch)

            x, pages = layer(x, rotary, attend)
            stored.append(pages)
        return self.norm(x), dataclasses.replace(cache, layers=tuple(stored))

    def dense(
        self, tokens: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden_size"]:
        """Reads whole sequences without a cache, each from position 0: the form to
        train, and to check `__call__` against.

        **Arguments:**

        - `tokens`: sequences of one length. One that ends earlier may be filled up with
            any token: no position sees a later one.

        **Returns:**

        One vector a token, for `unembed`.
        """
        batch, length = tokens.shape

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
            out = causal_attention(q, k, v)
            return out.reshape(batch * length, *out.shape[2:]), None

        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        rotary = Rotary.at(positions, self.config)
        x = self.embed_tokens(tokens.reshape(-1))
        for layer in self.layers:
            x, _ = layer(x, rotary, attend)
        return self.norm(x).reshape(batch, length, -1)

    def unembed(
        self, hidden: Float[Array, "num_tokens hidden_size"]
    ) -> Float[Array, "num_tokens vocab_size"]:
        """Scores every token of the vocabulary as the next one.

        **Arguments:**

        - `hidden`: vectors that the decoder gave.

        **Returns:**

        The logits, in the decoder's dtype.
        """
        if self.lm_head is None:
            return multiply(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)
