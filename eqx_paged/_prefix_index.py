"""Pages of earlier prompts, found again by their tokens. Runs on the host."""

import dataclasses
import heapq
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ._cache import PagedKVCache
from ._checks import check_int
from ._generation_checks import check_prompts
from ._page_needs import pages_to_read
from ._page_table import PageTable
from ._results import RESULTS


ROOT = -1  # the page before the first of a sequence
Key = tuple[int, bytes]  # the page before, and the tokens of this one
Rows = Int[np.ndarray | jax.Array, "num_prompts max_prompt_len"]
Lengths = Int[np.ndarray | jax.Array, " num_prompts"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A page of the index: what it holds, when it was last of use, and how many of the
    index's pages come right after it."""

    key: Key
    last_use: int
    num_children: int


def _nothing():
    return MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class PrefixIndex:
    """Pages of earlier prompts, kept so that later ones need not read them again.

    A page is found by its own tokens and all those before it, which are compared and not
    only hashed. The index retains its pages in the cache's table, so that they outlive the
    rows that they were read in. It is a value as the cache is, and goes with it: methods
    take a cache and return the index and the cache after them, and the old two still go
    together. Not for `jax.jit`.

    A prompt never takes all of its tokens from the index: the last one is to be read, for
    the token after it.

    Prompt `i` is of row `i`, so give `fork` and `generate` at most as many prompts at a
    time as there are rows: more would go through the rows in turn, for which `generate`
    wants them empty.

    !!! example

        ```python
        index, cache, rest, rest_lens = index.fork(
            cache, prompts, prompt_lens, max_new_tokens=64
        )
        made, cache = generate(model, cache, rest, rest_lens, max_new_tokens=64)
        index, cache = index.insert(cache, prompts, prompt_lens)
        cache = cache.free(jnp.ones(cache.num_seqs, bool))
        ```

    - `entries`: what is known of each page of the index.
    - `pages`: the page of each key.
    - `clock`: how many calls of `fork` and `insert` there were.
    - `num_tokens`, `num_hits`: how many tokens `fork` was asked for, and how many of them
        were found.
    - `num_evicted`: how many pages were given up for others.
    """

    entries: Mapping[int, Entry] = dataclasses.field(default_factory=_nothing)
    pages: Mapping[Key, int] = dataclasses.field(default_factory=_nothing)
    clock: int = 0
    num_tokens: int = 0
    num_hits: int = 0
    num_evicted: int = 0

    @property
    def num_pages(self) -> int:
        """Pages in the index."""
        return len(self.entries)

    @property
    def hit_rate(self) -> float:
        """Which part of the tokens that `fork` was asked for was found; 0 before any."""
        return self.num_hits / max(1, self.num_tokens)

    def fork(
        self,
        cache: PagedKVCache,
        prompts: Rows,
        prompt_lens: Lengths,
        *,
        max_new_tokens: int = 0,
    ) -> tuple["PrefixIndex", PagedKVCache, Rows, Lengths]:
        """Gives rows the pages that their prompts begin with, and makes room for the rest.

        **Arguments:**

        - `cache`: what the index goes with.
        - `prompts`, `prompt_lens`: as in [`eqx_paged.generate`][]; prompt `i` is for row
            `i`. Nothing is looked up for a row that is in use.
        - `max_new_tokens`: of each prompt. Until there are free pages for them and for the
            rest of the prompts, or nothing more to give up, the pages of the index that are
            in no row are given up, the least recently used first.

        **Returns:**

        The index; the cache, whose rows hold the beginnings that were found; and the rest
        of the prompts with their lengths, to be given to `generate`.

        **Raises:**

        `ValueError` for more prompts than rows, lengths that the prompts do not have, and
        what is no int32.
        """
        check_int(max_new_tokens=max_new_tokens, least=0)
        names = "prompts", "prompt_lens"
        prompts, prompt_lens = _checked(cache, prompts, prompt_lens, names)
        held, size = np.asarray(cache.kv_lens), cache.page_size
        table_rows = np.zeros(cache.table.page_indices.shape, np.int32)
        num_found = np.zeros(cache.num_seqs, np.int32)
        used = {}
        for i, (tokens, length) in enumerate(zip(prompts, prompt_lens, strict=True)):
            if held[i] > 0:
                continue
            # A row can hold no more than its columns; `generate` tells of longer prompts.
            most = min((int(length) - 1) // size, table_rows.shape[1])
            found = self._find(tokens, most, size)
            table_rows[i, : len(found)] = found
            num_found[i] = len(found) * size
            used |= {page: self._used(page) for page in found}
        if used:
            table, result = _attach(
                cache.table, jnp.asarray(table_rows), jnp.asarray(num_found)
            )
            _check_goes_with(result)
            cache = dataclasses.replace(cache, table=table)
        num_found = num_found[: len(prompts)]
        rest_lens = prompt_lens - num_found
        index = dataclasses.replace(
            self,
            entries=MappingProxyType({**self.entries, **used}),
            clock=self.clock + 1,
            num_tokens=self.num_tokens + int(prompt_lens[held[: len(prompts)] == 0].sum()),
            num_hits=self.num_hits + int(num_found.sum()),
        )
        needed = _pages_needed(cache.table, rest_lens, max_new_tokens)
        index, cache = index.evict(cache, needed)
        rest = np.zeros_like(prompts)
        for row, tokens, first, n in zip(rest, prompts, num_found, rest_lens, strict=True):
            row[:n] = tokens[first : first + n]
        return index, cache, rest, rest_lens

    def insert(
        self, cache: PagedKVCache, tokens: Rows, lengths: Lengths
    ) -> tuple["PrefixIndex", PagedKVCache]:
        """Keeps the whole pages of what rows hold.

        **Arguments:**

        - `cache`: what the index goes with.
        - `tokens`, `lengths`: which tokens row `i` holds, from its first: a prompt, and if
            you like what was made of it, but for its last token. Fewer than the row holds
            will do, and 0 leaves it out.

        **Returns:**

        The index and the cache. What the index has already is not kept twice.

        **Raises:**

        `ValueError` for a row that holds fewer tokens than are given, or has dropped some,
        and as `fork` raises it.
        """
        tokens, lengths = _checked(cache, tokens, lengths, ("tokens", "lengths"))
        table, size = cache.table, cache.page_size
        kv_lens, starts = np.asarray(table.kv_lens), np.asarray(table.starts)
        for i, length in enumerate(lengths):
            if length > 0 and (length > kv_lens[i] or starts[i] > 0):
                raise ValueError(
                    f"{length} tokens are given for row {i}, which holds those from "
                    f"{starts[i]} to {kv_lens[i]}."
                )
        rows = np.asarray(table.page_indices)
        entries, pages = dict(self.entries), dict(self.pages)
        new = np.zeros(table.num_pages, bool)
        for row, row_tokens, length in zip(rows, tokens, lengths, strict=False):
            before = ROOT
            for column in range(int(length) // size):
                key = (before, _content(row_tokens, column, size))
                page = pages.get(key)
                if page is None:
                    page = int(row[column])
                    if page in entries:  # it is there with other tokens before it
                        break
                    pages[key], entries[page] = page, Entry(key, self.clock, 0)
                    new[page] = True
                    if before != ROOT:
                        entries[before] = _with_children(entries[before], 1)
                entries[page] = dataclasses.replace(entries[page], last_use=self.clock)
                before = page
        table, result = _retain(table, jnp.asarray(new))
        _check_goes_with(result)
        index = dataclasses.replace(
            self,
            entries=MappingProxyType(entries),
            pages=MappingProxyType(pages),
            clock=self.clock + 1,
        )
        return index, dataclasses.replace(cache, table=table)

    def evict(
        self, cache: PagedKVCache, num_free_pages: int
    ) -> tuple["PrefixIndex", PagedKVCache]:
        """Gives up pages until so many are free, the least recently used first.

        **Arguments:**

        - `cache`: what the index goes with.
        - `num_free_pages`: how many are to be free. Pages that a row holds are kept, since
            they would not become free, so that in the end there may be fewer.

        **Returns:**

        The index and the cache.
        """
        check_int(num_free_pages=num_free_pages, least=0)
        missing = num_free_pages - int(cache.table.num_free_pages)
        if missing <= 0 or not self.entries:
            return self, cache
        counts = np.asarray(cache.table.ref_counts)
        entries = dict(self.entries)
        # A page without those before it could not be found again: from the last ones on.
        last = [
            (entry.last_use, page)
            for page, entry in entries.items()
            if entry.num_children == 0 and counts[page] == 1
        ]
        heapq.heapify(last)
        gone = []
        while last and len(gone) < missing:
            _, page = heapq.heappop(last)
            gone.append(page)
            before = entries.pop(page).key[0]
            if before != ROOT:
                entries[before] = _with_children(entries[before], -1)
                if entries[before].num_children == 0 and counts[before] == 1:
                    heapq.heappush(last, (entries[before].last_use, before))
        return self._without(cache, gone, entries, len(gone))

    def clear(self, cache: PagedKVCache) -> tuple["PrefixIndex", PagedKVCache]:
        """Gives up all pages. What rows hold stays theirs.

        **Arguments:**

        - `cache`: what the index goes with.

        **Returns:**

        The index, which is empty but for its statistics, and the cache.
        """
        return self._without(cache, list(self.entries), {}, 0)

    def _find(self, tokens, most, page_size):
        """The pages that tokens begin with."""
        found, before = [], ROOT
        for column in range(most):
            page = self.pages.get((before, _content(tokens, column, page_size)))
            if page is None:
                break
            found.append(page)
            before = page
        return found

    def _used(self, page):
        return dataclasses.replace(self.entries[page], last_use=self.clock)

    def _without(self, cache, gone, entries, num_evicted):
        released = np.zeros(cache.table.num_pages, bool)
        released[gone] = True
        table, result = _release(cache.table, jnp.asarray(released))
        _check_goes_with(result)
        index = dataclasses.replace(
            self,
            entries=MappingProxyType(entries),
            pages=MappingProxyType({entry.key: page for page, entry in entries.items()}),
            num_evicted=self.num_evicted + num_evicted,
        )
        return index, dataclasses.replace(cache, table=table)


_attach, _retain, _release = map(
    jax.jit, (PageTable.attach, PageTable.retain, PageTable.release)
)


def _pages_needed(table, prompt_lens, max_new_tokens):
    """The free pages that the first rows take for prompts and what is made of them."""
    table = jax.device_get(table)
    # The last new token is not stored, and no row holds more than it has room for.
    most_new = min(max(max_new_tokens - 1, 0), table.max_len)
    lens = np.where(prompt_lens > 0, prompt_lens + most_new, 0)
    lens = np.pad(lens, (0, table.num_seqs - len(lens)))
    lens = np.minimum(lens, table.max_len - table.kv_lens)
    return int(pages_to_read(table, lens).sum())


def _with_children(entry, more):
    return dataclasses.replace(entry, num_children=entry.num_children + more)


def _content(tokens, column, page_size):
    return tokens[column * page_size : (column + 1) * page_size].tobytes()


def _check_goes_with(result):
    if result != RESULTS.successful:
        raise ValueError(
            "The index has pages that this cache does not keep for it: use the cache that "
            "was returned with the index."
        )


def _checked(cache, tokens, lengths, names):
    check_prompts(tokens, lengths, names)
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    if len(tokens) > cache.num_seqs:
        raise ValueError(f"{len(tokens)} prompts do not fit {cache.num_seqs} rows.")
    for i, length in enumerate(lengths):
        if not 0 <= length <= tokens.shape[1]:
            raise ValueError(
                f"Prompt {i} has length {length}, but there is room for 0 to "
                f"{tokens.shape[1]} tokens each."
            )
    return tokens.astype(np.int32), lengths.astype(np.int32)
