"""The contiguous cache: a buffer a row. The simple counterpart of the paged one."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Real

from ._batch import RaggedBatch
from ._checks import (
    check_cache,
    check_mask,
    check_per_row,
    check_positive,
    faults_of_step,
    first_of,
)
from ._results import RESULTS
from .kernels._arguments import check_floating, check_indices, check_rank
from .kernels._pages import pack, storage_dtype, value_dtype


class RaggedKV(eqx.Module):
    """The stored keys and values of one layer, a contiguous buffer a row.

    On a CPU bfloat16 is stored as its bits, in uint16.
    """

    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"]
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the keys, however they are stored."""
        return value_dtype(self.k.dtype)

    def write(
        self,
        k: Float[Array, "num_tokens num_kv_heads head_dim"],
        v: Float[Array, "num_tokens num_kv_heads head_dim"],
        slots: Int32[Array, " num_tokens"],
    ) -> "RaggedKV":
        """Stores one key and one value per token.

        **Arguments:**

        - `k`, `v`: the new entries, in token order.
        - `slots`: where each one goes, as `row * max_len + position`. A slot past the last
            row is padding and is dropped; negative slots are not allowed.

        **Returns:**

        A new `RaggedKV`. `self` is unchanged.

        **Raises:**

        `ValueError` for keys, values and slots that do not fit these buffers.
        """
        check_rank("slots", slots, 1)
        check_indices(slots=slots)
        check_floating(k=k, v=v)
        shape = (slots.shape[0], *self.k.shape[2:])
        for name, new in (("k", k), ("v", v)):
            if new.shape != shape:
                raise ValueError(
                    f"{name} must be of shape {shape}, one entry a slot, but is of shape "
                    f"{new.shape}."
                )
        row, position = jnp.divmod(slots, self.k.shape[1])
        return RaggedKV(
            self.k.at[row, position].set(pack(k, self.k.dtype), mode="drop"),
            self.v.at[row, position].set(pack(v, self.v.dtype), mode="drop"),
        )


class RaggedKVCache(eqx.Module):
    """The keys and values of all layers, contiguous, with room for `max_len` tokens a row.

    An immutable value, as [`eqx_paged.PagedKVCache`][] is. Prefer it where all sequences
    have about the same, known length: it has no table to follow, and cannot share.

    Row `i` holds the tokens at positions below `lengths[i]`, and attends to those from
    `starts[i]` on: 0, unless it is set (`dataclasses.replace`) to hide padding on the left.
    """

    layers: tuple[RaggedKV, ...]
    starts: Int32[Array, " num_seqs"]
    lengths: Int32[Array, " num_seqs"]

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        num_seqs: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "RaggedKVCache":
        """A cache without sequences.

        **Arguments:**

        - `num_layers`, `num_kv_heads`, `head_dim`: of the model.
        - `num_seqs`: rows.
        - `max_len`: the most tokens of one row.
        - `dtype`: of the keys and values, floating-point.

        **Raises:**

        `ValueError` for a size below 1, another dtype, or more slots than an int32 can
        tell apart.
        """
        check_positive(num_layers=num_layers, num_seqs=num_seqs, max_len=max_len)
        check_cache(num_kv_heads, head_dim, dtype)
        if num_seqs * max_len >= 2**31 - 1:
            raise ValueError(
                f"{num_seqs} rows of {max_len} tokens are more slots than an int32 can "
                f"index, which is {2**31 - 1}."
            )
        shape = (num_seqs, max_len, num_kv_heads, head_dim)
        stored = storage_dtype(dtype)
        return cls(
            layers=tuple(
                RaggedKV(jnp.zeros(shape, stored), jnp.zeros(shape, stored))
                for _ in range(num_layers)
            ),
            starts=jnp.zeros(num_seqs, jnp.int32),
            lengths=jnp.zeros(num_seqs, jnp.int32),
        )

    @property
    def num_seqs(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def max_len(self) -> int:
        """The most tokens of one row."""
        return self.layers[0].k.shape[1]

    @property
    def kv_lens(self) -> Int32[Array, " num_seqs"]:
        """Tokens each row holds."""
        return self.lengths

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, as stored on the device."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    def append(
        self, q_lens: Int32[Array, " num_seqs"], num_tokens: int | None = None
    ) -> tuple["RaggedKVCache", RaggedBatch, RESULTS]:
        """As [`eqx_paged.PagedKVCache.append`][]; the buffer of row `i` is page `i`."""
        check_per_row("q_lens", q_lens, self.num_seqs)
        if num_tokens is not None:
            check_positive(num_tokens=num_tokens)
        max_q_len = 1 if num_tokens is None else num_tokens
        result = first_of(
            *faults_of_step(q_lens, self.lengths, self.max_len, max_q_len, num_tokens)
        )
        q_lens = jnp.where(result == RESULTS.successful, q_lens, 0)
        lengths = self.lengths + q_lens
        batch = RaggedBatch.of_step(
            jnp.arange(self.num_seqs, dtype=jnp.int32)[:, None],
            lengths,
            q_lens,
            self.starts,
            page_size=self.max_len,
            num_pages=self.num_seqs,
            num_tokens=num_tokens,
        )
        return dataclasses.replace(self, lengths=lengths), batch, result

    def truncate(self, kv_lens: Int32[Array, " num_seqs"]) -> "RaggedKVCache":
        """Shortens rows. A length above the present one leaves the row as it is; one below
        0 is 0."""
        check_per_row("kv_lens", kv_lens, self.num_seqs)
        return dataclasses.replace(self, lengths=jnp.clip(kv_lens, 0, self.lengths))

    def free(self, rows: Bool[Array, " num_seqs"]) -> "RaggedKVCache":
        """Empties the rows for which `rows` is True; they attend from position 0 again."""
        check_mask("rows", rows, (self.num_seqs,))
        starts = jnp.where(rows, 0, self.starts)
        lengths = jnp.where(rows, 0, self.lengths)
        return dataclasses.replace(self, starts=starts, lengths=lengths)
