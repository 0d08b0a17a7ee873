"""Reports as tables: in the terminal, and in Markdown."""

import sys
from collections.abc import Iterator

import rich.box
import rich.console
import rich.table

from .measure import quartiles
from .record import Ratio, Report, Row


# Figures as they are shown, in the order of the columns.
COLUMNS: dict[str, tuple[str, str]] = {
    "gb_per_s": ("GB/s", ".1f"),
    "of_roofline": ("of roofline", ".0%"),
    "prefill_tok_s": ("prefill tok/s", ",.0f"),
    "decode_tok_s": ("decode tok/s", ",.1f"),
    "tok_s": ("new tok/s in all", ",.1f"),
    "weight_gb_s": ("weights GB/s", ".1f"),
    "peak_gib": ("peak GiB", ".2f"),
    "of_needed": ("of weights + cache", ".2f"),
    "first_token_s": ("s to first token", ".2f"),
    "of_smallest": ("of the smallest cache's", ".2f"),
}
NAMES = {name: heading for name, (heading, _) in COLUMNS.items()}


def table_of(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings, and the cells of a line for each row. Times are medians, with half the
    distance between the quartiles."""
    whats = list(dict.fromkeys(what for row in rows for what in row.seconds))
    figures = [x for x in COLUMNS if any(x in row.figures for row in rows)]
    headings = ["case", "side", *(f"{what}, ms" for what in whats)]
    headings += [COLUMNS[x][0] for x in figures]
    lines = []
    for row in rows:
        cells = [row.case, row.side]
        cells += [_spread(row.seconds.get(what, [])) for what in whats]
        cells += [_cell(row, figure) for figure in figures]
        lines.append([*cells, row.reason or row.note])
    if any(line[-1] for line in lines):
        return [*headings, "note"], lines
    return headings, [line[:-1] for line in lines]


def ratio_table(ratios: list[Ratio]) -> tuple[list[str], list[list[str]]]:
    """As `table_of`, for ratios."""
    headings = ["case", "of", "side", "to", "ratio"]
    lines = [[x.case, NAMES[x.figure], x.side, x.other, f"{x.ratio:.2f}"] for x in ratios]
    return headings, lines


def _spread(times: list[float]) -> str:
    if not times:
        return ""
    low, middle, high = (1e3 * x for x in quartiles(times))
    digits = 0 if middle >= 1000 else 1 if middle >= 10 else 3
    return f"{middle:,.{digits}f} ±{(high - low) / 2 / middle:.0%}"


def _cell(row: Row, figure: str) -> str:
    return format(row.figures[figure], COLUMNS[figure][1]) if figure in row.figures else ""


def show(report: Report) -> None:
    """Prints the report's tables."""
    # A pipe or a file says nothing of its width.
    console = rich.console.Console(width=None if sys.stdout.isatty() else 140)
    tables = {report.suite: table_of(report.rows), "ratios": ratio_table(report.ratios)}
    for name, (headings, lines) in tables.items():
        if lines:
            table = rich.table.Table(title=name, box=rich.box.SIMPLE_HEAD)
            for heading in headings:
                left = heading in ("case", "side", "to", "of", "note")
                table.add_column(heading, justify="left" if left else "right")
            for line in _without_repeats(lines):
                table.add_row(*line)
            console.print(table)


def _without_repeats(lines: list[list[str]]) -> Iterator[list[str]]:
    """The case only where another one begins."""
    case = None
    for first, *others in lines:
        yield ["" if first == case else first, *others]
        case = first


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
