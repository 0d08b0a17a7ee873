"""The decoder of all families, over a paged cache."""

import dataclasses
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
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from ._config import DecoderConfig
from ._dense import causal_attention
from ._layers import (
    Embedding,
    GatedMLP,
    Linear,
    multiply,
    norm_of,
    RMSNorm,
    Rotary,
    SelfAttention,
    State,
)


class DecoderLayer(eqx.Module):
    """Attention and a feed-forward block, each added to what it read, and each with a
    norm of its input, of its output or of both.
    """

    pre_attention_norm: RMSNorm | None
    self_attn: SelfAttention
    post_attention_norm: RMSNorm | None
    pre_mlp_norm: RMSNorm | None
    mlp: GatedMLP
    post_mlp_norm: RMSNorm | None

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: the sizes, and which norms there are.
        - `key`: where the random weights come from.
        """
        attention_key, mlp_key = jax.random.split(key)

        def norm(*where: str) -> RMSNorm | None:
            return norm_of(config, config.hidden_size) if config.norms in where else None

        self.pre_attention_norm = norm("pre", "both")
        self.self_attn = SelfAttention(config, key=attention_key)
        self.post_attention_norm = norm("post", "both")
        self.pre_mlp_norm = norm("pre", "both")
        self.mlp = GatedMLP(config, key=mlp_key)
        self.post_mlp_norm = norm("post", "both")

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
        out, state = self.self_attn(_normed(self.pre_attention_norm, x), rotary, attend)
        x = x + _normed(self.post_attention_norm, out)
        out = self.mlp(_normed(self.pre_mlp_norm, x))
        return x + _normed(self.post_mlp_norm, out), state


# Traced once for all layers: for the hundred of a large model, even their shapes alone
# would take seconds.
_layer = eqx.filter_jit(DecoderLayer)


class Decoder(eqx.Module):
    """A decoder: RMSNorm, rotary positions, grouped-query attention and a gated
    feed-forward block, in the variants that its configuration names.
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

        - `config`: the sizes, and what is computed.
        - `attention`: how the layers attend over a cache; `PagedAttention()` if None.
            `RaggedAttention()` makes the decoder read a `RaggedKVCache`. Only its
            `implementation` may be chosen: the rest is the configuration's.
        - `key`: where the random float32 weights come from.
        """
        attention = PagedAttention() if attention is None else attention
        _check_plain(attention)
        embed_key, head_key, *layer_keys = jax.random.split(
            key, 2 + config.num_hidden_layers
        )
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        # A matrix that is also the output must not make huge logits of its own vectors.
        scale = hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        self.embed_tokens = Embedding(vocab_size, hidden_size, scale=scale, key=embed_key)
        self.layers = tuple(_layer(config, key=key) for key in layer_keys)
        self.norm = norm_of(config, hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            # Small, so that an untrained decoder is unsure of everything.
            self.lm_head = Linear(hidden_size, vocab_size, scale=0.3, key=head_key)
        self.attention = attention
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
        return self._read(tokens, cache, batch, _read_layer)

    def by_layers(
        self,
        tokens: Int32[Array, " num_tokens"],
        cache: PagedKVCache | RaggedKVCache,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "num_tokens hidden_size"], PagedKVCache | RaggedKVCache]:
        """Does what a call does, outside of `jit` and layer by layer: a program for each
        kind of layer is compiled in a small part of the time that one for all would take.

        **Arguments:**

        - `tokens`, `batch`: as for a call.
        - `cache`: as for a call; its pages are used up.

        **Returns:**

        As a call, and the same within rounding.
        """
        return self._read(tokens, cache, batch, _read_layer_alone)

    def _read(
        self,
        tokens: Int32[Array, " num_tokens"],
        cache: PagedKVCache | RaggedKVCache,
        batch: RaggedBatch,
        read_layer: Callable[..., Any],
    ) -> tuple[Float[Array, "num_tokens hidden_size"], PagedKVCache | RaggedKVCache]:
        if len(cache.layers) != len(self.layers):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, the decoder {len(self.layers)}"
            )
        x, rotaries = _enter(self._without_layers, tokens, batch.positions, cache.max_len)
        stored = []
        for i, (layer, pages) in enumerate(zip(self.layers, cache.layers, strict=True)):
            attention = dataclasses.replace(self.attention, **self._options(i))
            rotary = rotaries[self._is_local(i)]
            x, pages = read_layer((layer, x, rotary, attention, batch), pages)
            stored.append(pages)
        return _leave(self.norm, x), dataclasses.replace(cache, layers=tuple(stored))

    @property
    def _without_layers(self) -> "Decoder":
        return eqx.tree_at(lambda decoder: decoder.layers, self, ())

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
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        x, rotaries = _enter(self._without_layers, tokens.reshape(-1), positions, length)
        for i, layer in enumerate(self.layers):
            options = self._options(i)

            def attend(q: Array, k: Array, v: Array, options: dict[str, Any] = options):
                q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
                out = causal_attention(q, k, v, **options)
                return out.reshape(batch * length, *out.shape[2:]), None

            x, _ = layer(x, rotaries[self._is_local(i)], attend)
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
            logits = multiply(hidden, self.embed_tokens.weight)
        else:
            logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embed(
        self, tokens: Int32[Array, " num_tokens"]
    ) -> Float[Array, "num_tokens hidden_size"]:
        x = self.embed_tokens(tokens)
        if not self.config.scale_embeddings:
            return x
        # Rounded as the weights are: the models were trained so.
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def _rotaries(
        self, positions: Int32[Array, " num_tokens"], max_len: int
    ) -> dict[bool, Rotary]:
        """The angles for layers that are local, and for those that are not."""
        kinds = {self._is_local(layer) for layer in range(self.config.num_hidden_layers)}
        return {
            kind: Rotary.at(positions, self.config, max_len=max_len, local=kind)
            for kind in kinds
        }

    def _is_local(self, layer: int) -> bool:
        """Whether a layer has angles of layers with a window."""
        has_own = self.config.rope_local_base_freq is not None
        return has_own and self.config.window(layer) is not None

    def _options(self, layer: int) -> dict[str, Any]:
        """How a layer attends, as `eqx_paged.PagedAttention` takes it."""
        config = self.config
        scalar = config.query_pre_attn_scalar
        return {
            "sinks": self.layers[layer].self_attn.sinks,
            "sm_scale": None if scalar is None else scalar**-0.5,
            "soft_cap": config.attn_logit_softcapping,
            "sliding_window": config.window(layer),
        }


def _enter(decoder, tokens, positions, max_len):
    # XLA on CPU would compute cosines and sines again in each layer, for each of its heads,
    # but does not look into a call.
    with set_xla_metadata(inlineable="false"):
        return _entered(decoder, tokens, positions, max_len)


@eqx.filter_jit
def _entered(decoder, tokens, positions, max_len):
    return decoder._embed(tokens), decoder._rotaries(positions, max_len)


def _read_layer(operands, pages):
    layer, x, rotary, attention, batch = operands
    return layer(x, rotary, lambda q, k, v: attention(q, k, v, pages, batch))


_read_layer_alone = eqx.filter_jit(_read_layer, donate="all-except-first")


@eqx.filter_jit
def _leave(norm, x):
    return norm(x)


def _normed(
    norm: RMSNorm | None, x: Float[Array, "num_tokens hidden_size"]
) -> Float[Array, "num_tokens hidden_size"]:
    return x if norm is None else norm(x)


def _check_plain(attention: PagedAttention | RaggedAttention) -> None:
    for name in ("sinks", "sm_scale", "soft_cap", "sliding_window"):
        value = getattr(attention, name)
        if value is not None:
            raise ValueError(
                f"the attention's {name} is the configuration's to say, but is {value}"
            )
