"""What the library must compute, in plain Python and float64 NumPy.

Nothing here uses JAX or the library. Keys and values are given row by row in the order
of their tokens: the oracle knows nothing of pages.
"""

import dataclasses
import math

import numpy as np


# --- Attention


def attention(
    q,  # [q_len, num_heads, head_dim]: the last `q_len` positions of the row
    k,  # [kv_len, num_kv_heads, head_dim]
    v,  # [kv_len, num_kv_heads, head_dim]
    *,
    sm_scale=None,
    soft_cap=None,
    sliding_window=None,
    sinks=None,  # [num_heads]
    k_scale=None,  # [] or [num_kv_heads]
    v_scale=None,
    start=0,  # positions before it are not attended
    mask_value=-math.inf,
):
    """Causal attention of one row. Returns `(out, m, l)`, one `m` and `l` a query and
    head. Decode is the case `q_len == 1`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_len, num_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    k_scale = np.broadcast_to(1.0 if k_scale is None else k_scale, (num_kv_heads,))
    v_scale = np.broadcast_to(1.0 if v_scale is None else v_scale, (num_kv_heads,))

    out = np.zeros((q_len, num_heads, v.shape[-1]))
    m = np.full((q_len, num_heads), float(mask_value))
    l = np.zeros((q_len, num_heads))  # noqa: E741
    for j in range(q_len):
        position = kv_len - q_len + j
        first = start
        if sliding_window is not None:
            first = max(first, position - sliding_window + 1)
        if position < first:
            continue  # attends to nothing
        for h in range(num_heads):
            head = h // group
            keys = k[first : position + 1, head] * k_scale[head]
            values = v[first : position + 1, head] * v_scale[head]
            x = sm_scale * (keys @ q[j, h])
            if soft_cap is not None:
                x = soft_cap * np.tanh(x / soft_cap)
            m[j, h] = x.max()
            p = np.exp(x - m[j, h])
            l[j, h] = p.sum()
            if sinks is None:
                denominator = l[j, h]
                out[j, h] = p @ values / denominator
            else:
                # The sink may be larger than every logit.
                top = max(x.max(), float(sinks[h]))
                p = np.exp(x - top)
                denominator = p.sum() + np.exp(float(sinks[h]) - top)
                out[j, h] = p @ values / denominator
    return out, m, l


def attention_rows(qs, ks, vs, **options):
    """`attention` for each row; the results are joined along the tokens."""
    results = [attention(q, k, v, **options) for q, k, v in zip(qs, ks, vs)]
    return tuple(np.concatenate(x) for x in zip(*results))


# --- The page table


class Page:
    """One page, told apart by identity."""


@dataclasses.dataclass
class Row:
    length: int = 0
    pages: list = dataclasses.field(default_factory=list)  # None for a dropped one


class PageTable:
    """A page table of lists. Operations return the name of their `RESULTS` member and
    do nothing unless it is `"successful"`."""

    def __init__(self, *, num_pages, num_seqs, pages_per_seq, page_size):
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_len = pages_per_seq * page_size
        self.rows = [Row() for _ in range(num_seqs)]
        self.retained = []  # pages, once each time

    def holders(self, page):
        rows = sum(any(p is page for p in row.pages) for row in self.rows)
        return rows + sum(p is page for p in self.retained)

    @property
    def num_free_pages(self):
        held = {id(page) for row in self.rows for page in row.pages if page is not None}
        return self.num_pages - len(held | {id(page) for page in self.retained})

    @property
    def starts(self):
        return [self.page_size * row.pages.count(None) for row in self.rows]

    @property
    def lengths(self):
        return [row.length for row in self.rows]

    def _shared_tails(self, rows):
        """The rows that must copy their last page before they write into it, in order.
        When all holders of a page write, the last of them keeps it."""
        writers = {}
        for i in rows:
            row = self.rows[i]
            if row.length % self.page_size:
                writers.setdefault(id(row.pages[-1]), []).append(i)
        copying = []
        for members in writers.values():
            page = self.rows[members[0]].pages[-1]
            if len(members) == self.holders(page):
                members = members[:-1]
            copying += members
        return sorted(copying)

    def append(self, q_lens, *, num_tokens=None, max_q_len=None):
        if any(q < 0 for q in q_lens):
            return "invalid_argument"
        if num_tokens is not None and sum(q_lens) > num_tokens:
            return "too_many_tokens"
        if max_q_len is not None and any(q > max_q_len for q in q_lens):
            return "too_many_tokens"
        lengths = [row.length + q for row, q in zip(self.rows, q_lens)]
        if any(length > self.max_len for length in lengths):
            return "sequence_too_long"
        writers = [i for i, q in enumerate(q_lens) if q > 0]
        copying = self._shared_tails(writers)
        growth = [
            math.ceil(length / self.page_size) - len(row.pages)
            for row, length in zip(self.rows, lengths)
        ]
        if sum(growth) + len(copying) > self.num_free_pages:
            return "out_of_pages"
        for i in copying:
            self.rows[i].pages[-1] = Page()
        for row, length, new in zip(self.rows, lengths, growth):
            row.length = length
            row.pages += [Page() for _ in range(new)]
        return "successful"

    def fork(self, src, dst):
        rows = range(len(self.rows))
        if any(i not in rows for i in (*src, *dst)):
            return "invalid_argument"
        if len(set(dst)) < len(dst) or any(s == d for s, d in zip(src, dst)):
            return "row_in_use"
        if any(self.rows[d].length for d in dst):
            return "row_in_use"
        for row, d in zip(self.copies_of(src), dst):
            self.rows[d] = row
        return "successful"

    def copies_of(self, rows):
        """Rows as they are now: with the same pages, but of their own."""
        return [Row(self.rows[i].length, list(self.rows[i].pages)) for i in rows]

    def load(self, saved, rows):
        """Puts copies of rows, of this table or another, into empty ones."""
        pages = {id(page): Page() for row in saved for page in row.pages}
        if any(row.length > self.max_len for row in saved):
            return "sequence_too_long"
        if len(pages) > self.num_free_pages:
            return "out_of_pages"
        if any(self.rows[i].length for i in rows):
            return "row_in_use"
        for i, row in zip(rows, saved):
            self.rows[i] = Row(row.length, [pages[id(page)] for page in row.pages])
        return "successful"

    def truncate(self, kv_lens):
        for row, start, length in zip(self.rows, self.starts, kv_lens):
            length = min(row.length, max(length, 0))
            row.length = length if length >= start else 0
            row.pages = row.pages[: math.ceil(row.length / self.page_size)]

    def drop_before(self, starts):
        for row, start in zip(self.rows, starts):
            for i in range(min(max(start, 0), row.length) // self.page_size):
                row.pages[i] = None

    def retain(self, pages):
        if any(self.holders(page) == 0 for page in pages):
            return "invalid_argument"
        self.retained += pages
        return "successful"

    def release(self, pages):
        if any(all(p is not page for p in self.retained) for page in pages):
            return "invalid_argument"
        for page in pages:
            first = next(i for i, p in enumerate(self.retained) if p is page)
            del self.retained[first]
        return "successful"

    def attach(self, rows):
        """`rows`: a length and pages, a row each; of length 0 for one left alone."""
        if any(n > 0 and len(set(map(id, pages))) < len(pages) for n, pages in rows):
            return "invalid_argument"
        if any(self.holders(page) == 0 for n, pages in rows for page in pages[:n]):
            return "invalid_argument"
        if any(n > 0 and row.length > 0 for (n, _), row in zip(rows, self.rows)):
            return "row_in_use"
        for i, (n, pages) in enumerate(rows):
            if n > 0:
                self.rows[i] = Row(n, list(pages))
        return "successful"

    def free(self, rows):
        self.truncate([0 if gone else self.max_len for gone in rows])
