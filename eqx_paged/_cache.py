"""The paged cache: a value itself, to be kept, forked and thrown away."""

import dataclasses
import os
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32

from . import _saved_rows as saved_rows
from ._batch import RaggedBatch
from ._checks import check_page_size, check_positive
from ._kv_pages import KVPages
from ._page_table import PageCopies, PageTable
from ._results import RESULTS


class PagedKVCache(eqx.Module):
    """The keys and values of all layers in pages, with one page table for all.

    An immutable value: every operation returns a new cache, and the old one is still good.
    Operations that can fail return a [`eqx_paged.RESULTS`][] as well, and if they fail, a
    cache equal to the old one.

    !!! info

        Under `jax.jit` an update is in place only if the cache is donated
        (`donate_argnums`, or `donate="all"` of `eqx.filter_jit`); the old one is gone then.

    - `layers`: the pools of pages, one [`eqx_paged.KVPages`][] a layer.
    - `table`: the [`eqx_paged.PageTable`][] that serves them all.
    """

    layers: tuple[KVPages, ...]
    table: PageTable

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        num_seqs: int,
        max_len: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "PagedKVCache":
        """A cache without sequences.

        **Arguments:**

        - `num_layers`, `num_kv_heads`, `head_dim`: of the model.
        - `num_pages`: pages in the pool, which all sequences share.
        - `page_size`: tokens a page, a power of two from 8 to 256. Small pages waste less
            memory at the end of a sequence, large ones are faster.
        - `num_seqs`: rows, the most sequences at a time.
        - `max_len`: the most tokens of one sequence, rounded up to whole pages.
        - `dtype`: of the keys and values, floating-point.

        **Raises:**

        `ValueError` for a size below 1, another page size or another dtype.
        """
        check_page_size(page_size)
        check_positive(num_layers=num_layers, max_len=max_len)
        table = PageTable.empty(
            num_pages=num_pages,
            num_seqs=num_seqs,
            pages_per_seq=-(-max_len // page_size),
            page_size=page_size,
        )
        layers = tuple(
            KVPages.empty(
                num_pages=num_pages,
                page_size=page_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        return cls(layers=layers, table=table)

    @property
    def num_seqs(self) -> int:
        """Rows."""
        return self.table.num_seqs

    @property
    def max_len(self) -> int:
        """The most tokens of one row."""
        return self.table.max_len

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.table.page_size

    @property
    def kv_lens(self) -> Int32[Array, " num_seqs"]:
        """Tokens each row holds."""
        return self.table.kv_lens

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, as stored on the device."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    def append(
        self, q_lens: Int32[Array, " num_seqs"], num_tokens: int | None = None
    ) -> tuple["PagedKVCache", RaggedBatch, RESULTS]:
        """Makes room for a step's tokens, and tells the layers where everything is.

        Pages that a row is about to write to, but shares with another, are copied first.

        **Arguments:**

        - `q_lens`: the step's tokens a row; 0 leaves a row idle.
        - `num_tokens`: the padded number of tokens of a mixed step. None means a decode
            step, of at most one token a row.

        **Returns:**

        The new cache, the step's addresses and `successful`. Or this cache, addresses that
        write nothing and attend to nothing, and `invalid_argument`, `too_many_tokens`,
        `sequence_too_long` or `out_of_pages`.

        !!! info

            The copies are a loop of as many turns as there are, which has no reverse-mode
            gradient under `jit`. Differentiate the array functions, or a single step.
        """
        table, copies, result = self.table.reserve(
            q_lens,
            max_q_len=1 if num_tokens is None else num_tokens,
            num_tokens=num_tokens,
        )
        batch = RaggedBatch.of_step(
            table.page_indices,
            table.kv_lens,
            jnp.where(result == RESULTS.successful, q_lens, 0),
            jnp.zeros_like(table.kv_lens),
            page_size=table.page_size,
            num_pages=table.num_pages,
            num_tokens=num_tokens,
        )
        layers = _copy_pages(self.layers, copies)
        return PagedKVCache(layers=layers, table=table), batch, result

    def fork(
        self,
        src: int | Int32[Array, ""] | Int32[Array, " num_forks"],
        dst: int | Int32[Array, ""] | Int32[Array, " num_forks"],
        *,
        where: Bool[Array, ""] | Bool[Array, " num_forks"] | None = None,
    ) -> tuple["PagedKVCache", RESULTS]:
        """As [`eqx_paged.PageTable.fork`][]: no key or value is copied."""
        table, result = self.table.fork(src, dst, where=where)
        return dataclasses.replace(self, table=table), result

    def truncate(self, kv_lens: Int32[Array, " num_seqs"]) -> "PagedKVCache":
        """As [`eqx_paged.PageTable.truncate`][]."""
        return dataclasses.replace(self, table=self.table.truncate(kv_lens))

    def drop_before(self, starts: Int32[Array, " num_seqs"]) -> "PagedKVCache":
        """As [`eqx_paged.PageTable.drop_before`][]."""
        return dataclasses.replace(self, table=self.table.drop_before(starts))

    def free(self, rows: Bool[Array, " num_seqs"]) -> "PagedKVCache":
        """As [`eqx_paged.PageTable.free`][]."""
        return dataclasses.replace(self, table=self.table.free(rows))

    def save(self, path: str | os.PathLike, rows: Sequence[int]) -> None:
        """Writes rows to a safetensors file: their live pages, shared ones once.

        **Arguments:**

        - `path`: the file. An existing one is replaced when the new one is complete.
        - `rows`: which rows, each once.

        **Raises:**

        `ValueError` for a row that does not exist or is named twice.
        """
        saved_rows.write(path, self.layers, self.table, rows)

    def load(
        self, path: str | os.PathLike, rows: Sequence[int]
    ) -> tuple["PagedKVCache", RESULTS]:
        """Reads saved rows into empty ones.

        What was shared is shared again; with larger pages than those of the file, where the
        whole of a page was.

        **Arguments:**

        - `path`: a file written by `save`, of a cache with the same layers, heads,
            head_dim and dtype, which is not converted. The pools may differ in size, and in
            the size of their pages.
        - `rows`: an empty row for each saved one.

        **Returns:**

        The new cache and `successful`; or this cache and `sequence_too_long`,
        `out_of_pages` or `row_in_use`.

        **Raises:**

        `ValueError` for a row that does not exist or is named twice, a file that is not a
        saved cache or was damaged since, or one of another geometry. `FileNotFoundError` if
        there is none.
        """
        saved = saved_rows.read(path, self.layers, self.table, rows)
        table, pages, result = saved_rows.place(self.table, saved, rows)
        if result != RESULTS.successful:
            return self, result
        layers = jax.tree.map(
            lambda stored, new: stored.at[pages].set(new), self.layers, saved.layers
        )
        return PagedKVCache(layers=layers, table=table), result


def _copy_pages(layers: tuple[KVPages, ...], copies: PageCopies) -> tuple[KVPages, ...]:
    # As many turns as there are copies, which is none in nearly every step: a vectorised
    # copy would move a page a row and layer each time.
    def copy_page(i, layers):
        def copy(pages):
            page = jax.lax.dynamic_index_in_dim(pages, copies.src[i])
            return jax.lax.dynamic_update_index_in_dim(pages, page, copies.dst[i], 0)

        return jax.tree.map(copy, layers)

    return jax.lax.fori_loop(0, copies.num_copies, copy_page, layers)
