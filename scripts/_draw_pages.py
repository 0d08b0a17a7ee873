"""A drawing, in text, of which sequence holds which page."""

import eqx_paged
import numpy as np


PAGES_PER_LINE = 32
MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"


def held_pages(table: eqx_paged.PageTable) -> list[list[int]]:
    """The pages of each row, in the order of its tokens."""
    page_indices = np.asarray(table.page_indices)
    counts = -(-np.asarray(table.kv_lens) // table.page_size)
    return [
        [int(page) for page in row[:count]]
        for row, count in zip(page_indices, counts, strict=True)
    ]


def draw_pages(table: eqx_paged.PageTable, num_rows: int) -> str:
    """Draws the pool page by page, then each of the first `num_rows` rows.

    A page that one row holds shows that row's mark (a digit or letter as far as they go,
    and `#` beyond), a page that several rows share a star, and a free page a dot.
    """
    rows = held_pages(table)[:num_rows]
    kv_lens = np.asarray(table.kv_lens)[:num_rows].tolist()
    return "\n".join([*_draw_pool(table, rows), *_draw_rows(rows, kv_lens)])


def _draw_pool(table: eqx_paged.PageTable, rows: list[list[int]]) -> list[str]:
    marks = ["."] * table.num_pages
    for row, pages in enumerate(rows):
        for page in pages:
            marks[page] = _mark(row) if marks[page] == "." else "*"
    held = table.num_pages - marks.count(".")
    legend = "a row's mark: its page, *: shared, .: free"
    lines = [f"{held} of {table.num_pages} pages of {table.page_size} tokens ({legend})"]
    for first in range(0, table.num_pages, PAGES_PER_LINE):
        line = "".join(marks[first : first + PAGES_PER_LINE])
        eights = [line[i : i + 8] for i in range(0, len(line), 8)]
        lines.append(f"{first:>9} | {' '.join(eights)}")
    return lines


def _draw_rows(rows: list[list[int]], kv_lens: list[int]) -> list[str]:
    return [
        f"row {row:>3} {_mark(row)} | {kv_len:>5} tokens, pages {_spans(pages)}"
        for row, (pages, kv_len) in enumerate(zip(rows, kv_lens, strict=True))
    ]


def _mark(row: int) -> str:
    return MARKS[row] if row < len(MARKS) else "#"


def _spans(pages: list[int]) -> str:
    """`[3, 4, 5, 9]` as `3-5 9`."""
    spans: list[list[int]] = []
    for page in pages:
        if spans and page == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], page]
        else:
            spans.append([page])
    return " ".join("-".join(map(str, dict.fromkeys(span))) for span in spans) or "none"
