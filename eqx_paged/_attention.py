"""Attention layers that read and extend a cache."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._batch import RaggedBatch
from ._kv_pages import KVPages
from ._ragged_cache import RaggedKV
from ._types import Implementation
from .kernels._arguments import check_equal, check_rank
from .kernels.paged_attention import paged_attention
from .kernels.ragged_attention import ragged_gqa
from .kernels.ragged_attention.api import ragged_chunk_attention
from .kernels.ragged_paged_attention import ragged_paged_attention


class PagedAttention(eqx.Module):
    """Causal attention over a paged cache. It has no weights but the sinks, if any.

    Used inside a model's own attention block, which applies its own projections and its own
    positional encoding, by `batch.positions`.
    """

    sinks: Float[Array, " num_heads"] | None = None
    sm_scale: float | None = eqx.field(static=True, default=None, kw_only=True)
    soft_cap: float | None = eqx.field(static=True, default=None, kw_only=True)
    sliding_window: int | None = eqx.field(static=True, default=None, kw_only=True)
    implementation: Implementation | None = eqx.field(
        static=True, default=None, kw_only=True
    )

    def __call__(
        self,
        q: Float[Array, "num_tokens num_heads head_dim"],
        k: Float[Array, "num_tokens num_kv_heads head_dim"],
        v: Float[Array, "num_tokens num_kv_heads head_dim"],
        pages: KVPages,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "num_tokens num_heads head_dim"], KVPages]:
        """Stores a step's keys and values, and attends to all up to each token's own.

        **Arguments:**

        - `q`, `k`, `v`: the step's queries, keys and values, one a token.
        - `pages`: this layer's part of the cache.
        - `batch`: where the tokens are, from [`eqx_paged.PagedKVCache.append`][].

        **Returns:**

        The output, which is 0 for padding and idle rows, and the new pages.
        """
        _check_kind(pages, KVPages, "PagedAttention")
        _check_step(q, pages.head_dim, pages.page_size, pages.num_pages, batch)
        pages = pages.write(k, v, batch.slots, implementation=self.implementation)
        options = _options_of(self)
        where = (pages.k_pages, pages.v_pages, batch.kv_lens, batch.page_indices)
        if batch.kind == "decode":
            out = paged_attention(q, *where, **options)
        else:
            rows = (batch.cu_q_lens, batch.num_seqs)
            out = ragged_paged_attention(q, *where, *rows, **options)
        assert isinstance(out, jax.Array)  # and not residuals
        return out, pages


PagedAttention.__init__.__doc__ = """**Arguments:**

- `sinks`: if given, a logit a head that joins the softmax denominator only.
- `sm_scale`: the factor on `q . k`; `head_dim ** -0.5` if None.
- `soft_cap`: if given, logits become `soft_cap * tanh(logits / soft_cap)`.
- `sliding_window`: if given, how many tokens are seen, the query's own included.
- `implementation`: as in [`eqx_paged.paged_attention`][].
"""


class RaggedAttention(eqx.Module):
    """Causal attention over a contiguous cache: [`eqx_paged.PagedAttention`][] for a layer
    of [`eqx_paged.RaggedKVCache`][].
    """

    sinks: Float[Array, " num_heads"] | None = None
    sm_scale: float | None = eqx.field(static=True, default=None, kw_only=True)
    soft_cap: float | None = eqx.field(static=True, default=None, kw_only=True)
    sliding_window: int | None = eqx.field(static=True, default=None, kw_only=True)
    implementation: Implementation | None = eqx.field(
        static=True, default=None, kw_only=True
    )

    def __call__(
        self,
        q: Float[Array, "num_tokens num_heads head_dim"],
        k: Float[Array, "num_tokens num_kv_heads head_dim"],
        v: Float[Array, "num_tokens num_kv_heads head_dim"],
        kv: RaggedKV,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "num_tokens num_heads head_dim"], RaggedKV]:
        """As [`eqx_paged.PagedAttention`][], with `kv` this layer's part of the cache and
        `batch` from [`eqx_paged.RaggedKVCache.append`][].
        """
        _check_kind(kv, RaggedKV, "RaggedAttention")
        num_seqs, max_len, _, head_dim = kv.k.shape
        _check_step(q, head_dim, max_len, num_seqs, batch)
        kv = kv.write(k, v, batch.slots)
        options = _options_of(self)
        where = (kv.k, kv.v, batch.kv_lens, batch.starts)
        if batch.kind == "decode":
            return ragged_gqa(q, *where, **options)[0], kv
        out = ragged_chunk_attention(q, *where, batch.cu_q_lens, batch.num_seqs, **options)
        return out, kv


RaggedAttention.__init__.__doc__ = PagedAttention.__init__.__doc__


class PagedMultiheadAttention(eqx.Module):
    """`eqx.nn.MultiheadAttention` as causal self-attention with a paged cache.

    The same weights, the same numbers. Made by `from_equinox`.
    """

    query_proj: eqx.nn.Linear
    key_proj: eqx.nn.Linear
    value_proj: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    attention: PagedAttention
    num_heads: int = eqx.field(static=True)
    qk_size: int = eqx.field(static=True)
    vo_size: int = eqx.field(static=True)

    @classmethod
    def from_equinox(
        cls,
        attention: eqx.nn.MultiheadAttention,
        *,
        implementation: Implementation | None = None,
    ) -> "PagedMultiheadAttention":
        """Takes over the weights of an Equinox layer.

        **Arguments:**

        - `attention`: a layer whose queries, keys and values are made from the same input.
            Any number of heads, head sizes, output size and biases.
        - `implementation`: as in [`eqx_paged.paged_attention`][].

        **Raises:**

        `ValueError` for a layer that cannot be self-attention, its `key_size` or
        `value_size` not being its `query_size`; and for one that would apply dropout, which
        a cache of keys and values knows nothing of: use `eqx.nn.inference_mode` first.
        """
        for name in ("key_size", "value_size"):
            if getattr(attention, name) != attention.query_size:
                raise ValueError(
                    f"Self-attention needs {name} to be query_size, but they are "
                    f"{getattr(attention, name)} and {attention.query_size}."
                )
        dropout = attention.dropout
        if dropout.p > 0 and not dropout.inference:
            raise ValueError(
                f"This layer applies dropout, with p={dropout.p}. Generation needs "
                "`eqx.nn.inference_mode(attention)`."
            )
        return cls(
            query_proj=attention.query_proj,
            key_proj=attention.key_proj,
            value_proj=attention.value_proj,
            output_proj=attention.output_proj,
            attention=PagedAttention(
                sm_scale=attention.qk_size**-0.5, implementation=implementation
            ),
            num_heads=attention.num_heads,
            qk_size=attention.qk_size,
            vo_size=attention.vo_size,
        )

    @property
    def head_dim(self) -> int:
        """The `head_dim` of the cache that this layer needs, with `num_heads` kv heads."""
        return max(self.qk_size, self.vo_size)

    def __call__(
        self,
        x: Float[Array, "num_tokens query_size"],
        pages: KVPages,
        batch: RaggedBatch,
        *,
        process_heads: Callable[..., tuple[Array, Array, Array]] | None = None,
    ) -> tuple[Float[Array, "num_tokens output_size"], KVPages]:
        """Attends from a step's tokens to all tokens up to each one's own.

        **Arguments:**

        - `x`: the step's tokens.
        - `pages`: this layer's part of the cache.
        - `batch`: where the tokens are, from [`eqx_paged.PagedKVCache.append`][].
        - `process_heads`: as in Equinox: takes queries, keys and values, each `[num_tokens,
            num_heads, size]`, and returns new ones of the same shapes. For a rotary
            embedding, use `batch.positions` in it.

        **Returns:**

        The output and the new pages.
        """
        heads = tuple(
            jax.vmap(proj)(x).reshape(x.shape[0], self.num_heads, -1)
            for proj in (self.query_proj, self.key_proj, self.value_proj)
        )
        if process_heads is not None:
            shapes = [h.shape for h in heads]
            heads = process_heads(*heads)
            if [h.shape for h in heads] != shapes:
                raise ValueError(
                    f"process_heads must not change the shapes {shapes}, but returned "
                    f"{[h.shape for h in heads]}."
                )
        # Zeros at the end of a query and key change no logit, and those of a value are cut.
        heads = (self._padded(h) for h in heads)
        out, pages = self.attention(*heads, pages, batch)
        out = out[..., : self.vo_size].reshape(x.shape[0], -1)
        return jax.vmap(self.output_proj)(out), pages

    def _padded(self, heads):
        return jnp.pad(heads, ((0, 0), (0, 0), (0, self.head_dim - heads.shape[2])))


def _check_kind(layer: Any, kind: type, attention: str) -> None:
    if not isinstance(layer, kind):
        raise ValueError(
            f"{attention} reads a layer of type {kind.__name__}, but was given a "
            f"{type(layer).__name__}."
        )


def _check_step(
    q: Array, head_dim: int, page_size: int, num_pages: int, batch: RaggedBatch
) -> None:
    check_rank("q", q, 3)
    num_tokens = batch.positions.shape[0]
    check_equal("num_tokens of q", q.shape[0], "of the batch", num_tokens)
    check_equal("head_dim of q", q.shape[2], "of the cache", head_dim)
    check_equal("page_size of the batch", batch.page_size, "of the cache", page_size)
    check_equal("num_pages of the batch", batch.num_pages, "of the cache", num_pages)


def _options_of(attention: PagedAttention | RaggedAttention) -> dict[str, Any]:
    return dict(
        sm_scale=attention.sm_scale,
        soft_cap=attention.soft_cap,
        sliding_window=attention.sliding_window,
        sinks=attention.sinks,
        implementation=attention.implementation,
    )
