"""Which page holds which tokens of which sequence."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from ._checks import (
    check_mask,
    check_page_size,
    check_per_row,
    check_positive,
    faults_of_step,
    first_of,
)
from ._results import RESULTS


class PageCopies(eqx.Module):
    """Pages to be copied before the next write: the first `num_copies` of `src` to `dst`.

    Past those, `dst` is past the last page.
    """

    src: Int32[Array, " num_seqs"]
    dst: Int32[Array, " num_seqs"]
    num_copies: Int32[Array, ""]


class PageTable(eqx.Module):
    """Which page holds which tokens of which sequence.

    A row is a sequence: token `t` of row `i` lies in page `page_indices[i, t // page_size]`
    at offset `t % page_size`. Pages are taken from a stack of free ones and given back to
    it; a page that several rows hold is counted once a row, and one that is to outlive its
    rows can be retained. The keys and values themselves are elsewhere, in
    [`eqx_paged.KVPages`][], and the same table serves every layer.

    All operations are pure: they return a new table, under `jit`, `vmap` or `scan` as well.
    Those that can fail return a [`eqx_paged.RESULTS`][] beside it, and if they fail, the
    table is as it was. Lengths never exceed `max_len`; each page is either free or counted
    by exactly the rows that hold it and once each time that it was retained.

    - `page_indices`: the pages of each row, in order; 0 past its end and before its start.
    - `kv_lens`: how many tokens each row has.
    - `starts`: the first of them that is still stored, at the beginning of a page; 0 unless
        those before it were dropped.
    - `ref_counts`: how many rows hold each page, and how often it is retained.
    - `free_pages`: a stack, whose first `num_free_pages` entries are the pages that nobody
        holds.
    - `page_size`: tokens a page.
    """

    page_indices: Int32[Array, "num_seqs pages_per_seq"]
    kv_lens: Int32[Array, " num_seqs"]
    starts: Int32[Array, " num_seqs"]
    ref_counts: Int32[Array, " num_pages"]
    free_pages: Int32[Array, " num_pages"]
    num_free_pages: Int32[Array, ""]
    page_size: int = eqx.field(static=True)

    @classmethod
    def empty(
        cls, *, num_pages: int, num_seqs: int, pages_per_seq: int, page_size: int
    ) -> "PageTable":
        """A table without sequences.

        **Arguments:**

        - `num_pages`: pages in the pool.
        - `num_seqs`: rows, the most sequences at a time.
        - `pages_per_seq`: the most pages of one sequence.
        - `page_size`: tokens a page, a power of two from 8 to 256.

        **Raises:**

        `ValueError` for a count below 1, another page size, or a pool of more slots than
        an int32 can tell apart.
        """
        check_page_size(page_size)
        check_positive(num_pages=num_pages, num_seqs=num_seqs, pages_per_seq=pages_per_seq)
        # One value is kept for "past the end".
        if max(num_pages, pages_per_seq) * page_size >= 2**31 - 1:
            raise ValueError(
                f"{max(num_pages, pages_per_seq)} pages of {page_size} tokens are more "
                f"slots than an int32 can index, which is {2**31 - 1}."
            )
        return cls(
            page_indices=jnp.zeros((num_seqs, pages_per_seq), jnp.int32),
            kv_lens=jnp.zeros(num_seqs, jnp.int32),
            starts=jnp.zeros(num_seqs, jnp.int32),
            ref_counts=jnp.zeros(num_pages, jnp.int32),
            free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
            num_free_pages=jnp.array(num_pages, jnp.int32),
            page_size=page_size,
        )

    @property
    def num_seqs(self) -> int:
        """Rows."""
        return self.page_indices.shape[0]

    @property
    def pages_per_seq(self) -> int:
        """The most pages of one row."""
        return self.page_indices.shape[1]

    @property
    def num_pages(self) -> int:
        """Pages in the pool, free or not."""
        return self.ref_counts.shape[0]

    @property
    def max_len(self) -> int:
        """The most tokens of one row."""
        return self.pages_per_seq * self.page_size

    def append(self, q_lens: Int32[Array, " num_seqs"]) -> tuple["PageTable", RESULTS]:
        """Makes room for more tokens. All rows are served, or none.

        A row that is about to write into a page that it shares gets a page of its own in
        its place; whoever stores the tokens must copy the old one's contents first, which
        [`eqx_paged.PagedKVCache`][] does. [`eqx_paged.PageTable.reserve`][] tells which.

        **Arguments:**

        - `q_lens`: how many tokens to make room for in each row; 0 leaves it alone.

        **Returns:**

        The new table and `successful`; or this table and `invalid_argument`,
        `sequence_too_long` or `out_of_pages`.
        """
        table, _, result = self.reserve(q_lens)
        return table, result

    def reserve(
        self,
        q_lens: Int32[Array, " num_seqs"],
        *,
        max_q_len: int | None = None,
        num_tokens: int | None = None,
    ) -> tuple["PageTable", PageCopies, RESULTS]:
        """As `append`, and tells which pages must be copied before tokens are stored.

        **Arguments:**

        - `q_lens`: as in `append`.
        - `max_q_len`: the most tokens of one row, if known; the work is
            `num_seqs * max_q_len / page_size` then, and not `num_seqs * pages_per_seq`.
        - `num_tokens`: the most tokens of all rows together, if there is a limit.

        **Returns:**

        The new table; the copies to make, at most one a row; and the result, which may
        also be `too_many_tokens`.
        """
        check_per_row("q_lens", q_lens, self.num_seqs)
        if num_tokens is not None:
            check_positive(num_tokens=num_tokens)
        if max_q_len is not None:
            check_positive(max_q_len=max_q_len)
        old_pages = _ceil_div(self.kv_lens, self.page_size)
        copying, tail = self._rows_to_copy(q_lens)
        kv_lens = self.kv_lens + q_lens
        # Of a row that copies, the first new page takes the tail's column.
        num_new = _ceil_div(kv_lens, self.page_size) - old_pages
        num_new += copying.astype(jnp.int32)
        result = self._check_room(q_lens, num_new, max_q_len, num_tokens)

        ok = result == RESULTS.successful
        num_new, copying = jnp.where(ok, num_new, 0), copying & ok
        ranks = jnp.cumsum(num_new, dtype=jnp.int32) - num_new
        width = self._most_new_pages(max_q_len)
        nth = jnp.arange(width, dtype=jnp.int32)[None]
        taken = nth < num_new[:, None]
        from_top = self.num_free_pages - 1 - ranks[:, None] - nth
        pages = self.free_pages.at[from_top].get(mode="clip")
        columns = (old_pages - copying.astype(jnp.int32))[:, None] + nth
        columns = jnp.where(taken, columns, self.pages_per_seq)
        rows = jnp.arange(self.num_seqs, dtype=jnp.int32)

        ref_counts = self.ref_counts.at[jnp.where(taken, pages, self.num_pages)].set(
            1, mode="drop"
        )
        table = dataclasses.replace(
            self,
            page_indices=self.page_indices.at[rows[:, None], columns].set(
                pages, mode="drop"
            ),
            kv_lens=jnp.where(ok, kv_lens, self.kv_lens),
            ref_counts=ref_counts.at[jnp.where(copying, tail, self.num_pages)].add(
                -1, mode="drop"
            ),
            num_free_pages=self.num_free_pages - jnp.sum(num_new, dtype=jnp.int32),
        )
        copies = _pack_copies(copying, tail, pages[:, 0], self.num_pages)
        return table, copies, result

    def fork(
        self,
        src: int | Int32[Array, ""] | Int32[Array, " num_forks"],
        dst: int | Int32[Array, ""] | Int32[Array, " num_forks"],
        *,
        where: Bool[Array, ""] | Bool[Array, " num_forks"] | None = None,
    ) -> tuple["PageTable", RESULTS]:
        """Makes rows `dst` the same sequences as rows `src`, without copying a token.

        They share every page until one of them appends to a page that is not full, which
        then gets its own copy of it.

        **Arguments:**

        - `src`, `dst`: rows; several forks at once if they are arrays, all from the table
            as it is before them. Rows `dst` must be empty, each named once, and none of
            them its own `src`.
        - `where`: if given, which of the forks to carry out, so that their number is data;
            what the others name does not matter.

        **Returns:**

        The new table and `successful`; or this table and `invalid_argument` or
        `row_in_use`.
        """
        src, dst = jnp.asarray(src), jnp.asarray(dst)
        if src.shape != dst.shape or src.ndim > 1:
            raise ValueError(
                "src and dst must be rows, or lists of rows of one length, but have shapes "
                f"{src.shape} and {dst.shape}."
            )
        for name, rows in (("src", src), ("dst", dst)):
            if not jnp.issubdtype(rows.dtype, jnp.integer):
                raise ValueError(f"{name} must be integers, but is {rows.dtype}.")
        if where is None:
            where = jnp.ones(src.shape, bool)
        check_mask("where", where, src.shape)
        src, dst, where = (jnp.atleast_1d(x) for x in (src, dst, where))
        # Before the cast, which takes a row of 64 bits for another one.
        unknown = (src < 0) | (src >= self.num_seqs) | (dst < 0) | (dst >= self.num_seqs)
        src, dst = src.astype(jnp.int32), dst.astype(jnp.int32)
        in_use = (self.kv_lens.at[dst].get(mode="clip") > 0) | (src == dst)
        # What is not carried out names rows of its own, past the last.
        past = self.num_seqs + jnp.arange(dst.size, dtype=jnp.int32)
        dst = jnp.where(where, dst, past)
        result = first_of(
            (jnp.any(unknown & where), RESULTS.invalid_argument),
            (jnp.any(in_use & where) | _has_duplicates(dst), RESULTS.row_in_use),
        )
        ok = where & (result == RESULTS.successful)
        src, dst = jnp.where(ok, src, 0), jnp.where(ok, dst, self.num_seqs)
        pages, kv_lens, starts = (
            x[src] for x in (self.page_indices, self.kv_lens, self.starts)
        )
        counted = self._held(starts, kv_lens) & ok[:, None]
        counted = jnp.where(counted, pages, self.num_pages)
        table = dataclasses.replace(
            self,
            page_indices=self.page_indices.at[dst].set(pages, mode="drop"),
            kv_lens=self.kv_lens.at[dst].set(kv_lens, mode="drop"),
            starts=self.starts.at[dst].set(starts, mode="drop"),
            ref_counts=self.ref_counts.at[counted].add(1, mode="drop"),
        )
        return table, result

    def truncate(self, kv_lens: Int32[Array, " num_seqs"]) -> "PageTable":
        """Shortens rows, and releases the pages that they no longer need.

        **Arguments:**

        - `kv_lens`: the new length of each row. A length above the present one leaves the
            row as it is; one below 0, or below the row's start, is 0.

        **Returns:**

        The new table.
        """
        check_per_row("kv_lens", kv_lens, self.num_seqs)
        kv_lens = jnp.clip(kv_lens, 0, self.kv_lens)
        kv_lens = jnp.where(kv_lens < self.starts, 0, kv_lens)
        return self._cut(jnp.where(kv_lens > 0, self.starts, 0), kv_lens)

    def drop_before(self, starts: Int32[Array, " num_seqs"]) -> "PageTable":
        """Releases the whole pages before a position of each row, whose length stays.

        For models that look back a limited number of tokens, so that what a row holds is
        bounded however long it becomes. Where each layer sees the last `w` tokens, the
        query's own included, none sees what is before `kv_lens - w + 1` any more.

        **Arguments:**

        - `starts`: the first position of each row that may still be attended to. One below
            the present start leaves the row as it is; one above its length is its length.

        **Returns:**

        The new table.

        !!! warning

            What attends to an earlier position after that reads what is not the row's, so
            leave a margin if `truncate` is to follow.
        """
        check_per_row("starts", starts, self.num_seqs)
        starts = jnp.clip(starts, 0, self.kv_lens) // self.page_size * self.page_size
        return self._cut(jnp.maximum(starts, self.starts), self.kv_lens)

    def free(self, rows: Bool[Array, " num_seqs"]) -> "PageTable":
        """Empties rows, and releases their pages.

        **Arguments:**

        - `rows`: True for each row to empty.

        **Returns:**

        The new table.
        """
        check_mask("rows", rows, (self.num_seqs,))
        return self.truncate(jnp.where(rows, 0, self.kv_lens))

    def retain(self, pages: Bool[Array, " num_pages"]) -> tuple["PageTable", RESULTS]:
        """Counts pages once more, so that they are kept when no row holds them any more.

        **Arguments:**

        - `pages`: True for each page to keep; none of them free.

        **Returns:**

        The new table and `successful`; or this table and `invalid_argument`.
        """
        check_mask("pages", pages, (self.num_pages,))
        is_free = jnp.any(pages & (self.ref_counts == 0))
        result = first_of((is_free, RESULTS.invalid_argument))
        more = (pages & ~is_free).astype(jnp.int32)
        return dataclasses.replace(self, ref_counts=self.ref_counts + more), result

    def release(self, pages: Bool[Array, " num_pages"]) -> tuple["PageTable", RESULTS]:
        """Undoes `retain`. A page that nobody holds any more is free.

        **Arguments:**

        - `pages`: True for each page, all of them retained.

        **Returns:**

        The new table and `successful`; or this table and `invalid_argument`.
        """
        check_mask("pages", pages, (self.num_pages,))
        held = self._held(self.starts, self.kv_lens)
        held = jnp.where(held, self.page_indices, self.num_pages)
        by_rows = jnp.zeros_like(self.ref_counts).at[held].add(1, mode="drop")
        is_not = jnp.any(pages & (self.ref_counts <= by_rows))
        result = first_of((is_not, RESULTS.invalid_argument))
        less = (pages & ~is_not).astype(jnp.int32)
        return self._with_counts(self.ref_counts - less), result

    def attach(
        self,
        page_indices: Int32[Array, "num_seqs pages_per_seq"],
        kv_lens: Int32[Array, " num_seqs"],
    ) -> tuple["PageTable", RESULTS]:
        """Makes empty rows sequences of pages that are not free, which they then share.

        **Arguments:**

        - `page_indices`: the pages of each row, in order, as many as its length needs and
            each once; what is past them does not matter.
        - `kv_lens`: the tokens that are stored in them; 0 leaves a row as it is.

        **Returns:**

        The new table and `successful`; or this table and `invalid_argument`,
        `sequence_too_long` or `row_in_use`.
        """
        check_per_row("kv_lens", kv_lens, self.num_seqs)
        if page_indices.shape != self.page_indices.shape:
            raise ValueError(
                f"page_indices must have the shape {self.page_indices.shape} of the "
                f"table's, but has {page_indices.shape}."
            )
        taken = self._held(jnp.zeros_like(kv_lens), kv_lens)
        known = (page_indices >= 0) & (page_indices < self.num_pages)
        pages = jnp.where(taken & known, page_indices, self.num_pages)
        is_live = self.ref_counts.at[pages].get(mode="fill", fill_value=0) > 0
        # Numbers of their own for what is not taken, which is then no duplicate.
        numbers = jnp.where(taken, page_indices, self.num_pages + self._columns())
        wrong = (kv_lens < 0) | jnp.any(taken & ~is_live, axis=1)
        wrong |= jax.vmap(_has_duplicates)(numbers)
        result = first_of(
            (jnp.any(wrong), RESULTS.invalid_argument),
            (jnp.any(kv_lens > self.max_len), RESULTS.sequence_too_long),
            (jnp.any((kv_lens > 0) & (self.kv_lens > 0)), RESULTS.row_in_use),
        )
        taken &= result == RESULTS.successful
        pages = jnp.where(taken, pages, self.num_pages)
        table = dataclasses.replace(
            self,
            page_indices=jnp.where(taken, page_indices, self.page_indices),
            kv_lens=jnp.where(taken[:, 0], kv_lens, self.kv_lens),
            ref_counts=self.ref_counts.at[pages].add(1, mode="drop"),
        )
        return table, result

    def _columns(self) -> Int32[Array, "1 pages_per_seq"]:
        return jnp.arange(self.pages_per_seq, dtype=jnp.int32)[None]

    def _held(self, starts, kv_lens):
        """Which entries are pages of sequences with these starts and lengths."""
        first_slots = self._columns() * self.page_size
        return (first_slots >= starts[:, None]) & (first_slots < kv_lens[:, None])

    def _cut(self, starts, kv_lens):
        """The same rows, but from later starts or with smaller lengths."""
        kept = self._held(starts, kv_lens)
        released = self._held(self.starts, self.kv_lens) & ~kept
        pages = jnp.where(released, self.page_indices, self.num_pages)
        table = dataclasses.replace(
            self,
            page_indices=jnp.where(kept, self.page_indices, 0),
            kv_lens=kv_lens,
            starts=starts,
        )
        return table._with_counts(self.ref_counts.at[pages].add(-1, mode="drop"))

    def _with_counts(self, ref_counts):
        """Smaller counts. Pages that nobody holds any more are free."""
        # Page by page and not entry by entry: several rows may release one page at once.
        freed = (self.ref_counts > 0) & (ref_counts == 0)
        top = self.num_free_pages + jnp.cumsum(freed, dtype=jnp.int32)
        return dataclasses.replace(
            self,
            ref_counts=ref_counts,
            free_pages=self.free_pages.at[jnp.where(freed, top - 1, self.num_pages)].set(
                jnp.arange(self.num_pages, dtype=jnp.int32), mode="drop"
            ),
            num_free_pages=top[-1],
        )

    def _most_new_pages(self, max_q_len: int | None) -> int:
        # The first token may need a page, and then each `page_size` more.
        if max_q_len is None:
            return self.pages_per_seq
        return min(self.pages_per_seq, 1 + _ceil_div(max_q_len - 1, self.page_size))

    def _rows_to_copy(self, q_lens):
        """The rows that write into a page not theirs alone, and each row's last page."""
        column = jnp.maximum(_ceil_div(self.kv_lens, self.page_size) - 1, 0)
        tail = jnp.take_along_axis(self.page_indices, column[:, None], axis=1)[:, 0]
        holders = self.ref_counts[tail]
        writes = (q_lens > 0) & (self.kv_lens % self.page_size != 0) & (holders > 1)
        # Rows in the order of the shared page they write to. Where all holders of a page
        # write, the last of them keeps it.
        rows = jnp.arange(self.num_seqs, dtype=jnp.int32)
        page = jnp.where(writes, tail, self.num_pages + rows)
        order = jnp.argsort(page, stable=True)
        page = page[order]
        changes = page[1:] != page[:-1]
        begins, ends = (
            jnp.pad(changes, pad, constant_values=True) for pad in ((1, 0), (0, 1))
        )
        group = jnp.cumsum(begins, dtype=jnp.int32) - 1
        num_writers = jnp.zeros_like(rows).at[group].add(1)[group]
        keeps = ends & (num_writers == holders[order])
        keeps = jnp.zeros_like(writes).at[order].set(keeps)
        return writes & ~keeps, tail

    def _check_room(self, q_lens, num_new, max_q_len, num_tokens):
        out_of_pages = jnp.sum(num_new, dtype=jnp.int32) > self.num_free_pages
        return first_of(
            *faults_of_step(q_lens, self.kv_lens, self.max_len, max_q_len, num_tokens),
            (out_of_pages, RESULTS.out_of_pages),
        )


def _ceil_div(a, b):
    return -(-a // b)


def _has_duplicates(x):
    x = jnp.sort(x)
    return jnp.any(x[1:] == x[:-1])


def _pack_copies(copying, src, dst, past_the_end):
    """Moves the rows that copy to the front."""
    num_seqs = copying.shape[0]
    count = jnp.cumsum(copying, dtype=jnp.int32)
    place = jnp.where(copying, count - 1, num_seqs)
    return PageCopies(
        src=jnp.zeros(num_seqs, jnp.int32).at[place].set(src, mode="drop"),
        dst=jnp.full(num_seqs, past_the_end, jnp.int32).at[place].set(dst, mode="drop"),
        num_copies=count[-1],
    )
