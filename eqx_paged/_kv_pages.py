"""The stored keys and values of one layer."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Real

from ._checks import check_cache, check_page_size, check_positive
from ._types import Implementation
from .kernels._arguments import check_equal
from .kernels._pages import page_size_of, storage_dtype, storage_shape, value_dtype
from .kernels.write_kv import write_kv


class KVPages(eqx.Module):
    """The stored keys and values of one layer, cut into fixed-size pages.

    Which sequence a page serves is recorded in [`eqx_paged.PageTable`][], not here.

    The arrays are `[num_pages, num_kv_heads, page_size, head_dim]`; or, where `head_dim`
    divides 128, the same numbers in rows of 128 lanes. On a TPU any other `head_dim` is
    rounded up to a multiple of 128; on a CPU bfloat16 is stored as its bits, in uint16.
    """

    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"]
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"]
    head_dim: int = eqx.field(static=True)

    @classmethod
    def empty(
        cls,
        *,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "KVPages":
        """Pages full of zeros.

        **Arguments:**

        - `num_pages`, `num_kv_heads`, `head_dim`: sizes.
        - `page_size`: tokens a page, a power of two from 8 to 256.
        - `dtype`: of the keys and values, floating-point.

        **Raises:**

        `ValueError` for a size below 1, another page size or another dtype.
        """
        check_page_size(page_size)
        check_cache(num_kv_heads, head_dim, dtype)
        check_positive(num_pages=num_pages)
        shape = storage_shape(num_pages, num_kv_heads, page_size, head_dim)
        stored = storage_dtype(dtype)
        return cls(jnp.zeros(shape, stored), jnp.zeros(shape, stored), head_dim)

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.k_pages.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.k_pages.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return page_size_of(self.k_pages, self.head_dim)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the keys, however they are stored."""
        return value_dtype(self.k_pages.dtype)

    def write(
        self,
        k: Float[Array, "num_tokens num_kv_heads head_dim"],
        v: Float[Array, "num_tokens num_kv_heads head_dim"],
        slots: Int32[Array, " num_tokens"],
        *,
        implementation: Implementation | None = None,
    ) -> "KVPages":
        """Stores one key and one value per token.

        **Arguments:**

        - `k`, `v`: the new entries, in token order.
        - `slots`: where each one goes, as `page * page_size + offset`. A slot past the
            last page is padding and is dropped; negative slots are not allowed.
        - `implementation`: as in [`eqx_paged.write_kv`][].

        **Returns:**

        A new `KVPages`. `self` is unchanged.

        **Raises:**

        `ValueError` for keys and values that do not fit these pages.
        """
        check_equal("head_dim of k", k.shape[-1], "of the cache", self.head_dim)
        k_pages, v_pages = write_kv(
            self.k_pages, self.v_pages, k, v, slots, implementation=implementation
        )
        return dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)
