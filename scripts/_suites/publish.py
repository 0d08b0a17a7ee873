"""Puts reports into the documentation: plots, and the tables of a page."""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from .record import Report, ROOT, Row
from .tables import markdown, ratio_table, table_of


DOCS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"


def draw(report: Report, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what there is of a report; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in report.rows if not row.reason]
    drawn = []
    for name, plot in _PLOTS.get(report.suite, {}).items():
        figure = plot(rows, report.about)
        if figure is not None:
            path = folder / f"{report.suite}_{name}.svg"
            # Nothing that differs from one drawing of the same to the next.
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            drawn.append(path)
    return drawn


def with_published(report: Report, folder: pathlib.Path) -> Report:
    """With the published cases that were not measured again."""
    path = folder / f"{report.suite}.json"
    return report.with_earlier(Report.read(path)) if path.exists() else report


def rewrite(page: pathlib.Path, reports: Sequence[Report]) -> None:
    """Replaces what stands between `<!-- SUITE -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for report in reports:
        begin, end = f"<!-- {report.suite} -->\n", "<!-- end -->"
        place = re.compile(f"{re.escape(begin)}.*?{end}", re.DOTALL)
        filled = f"{begin}\n{content(report)}\n{end}"
        text, count = place.subn(lambda _, filled=filled: filled, text)
        if count != 1:
            raise ValueError(f"{page}: {begin.strip()} is there {count} times, not once")
    page.write_text(text, encoding="utf-8")


def content(report: Report) -> str:
    """A report as Markdown: on what it was taken, its tables, who won where."""
    parts = [f"Taken on: {_listed(report.about)}."]
    for run in report.earlier:
        parts.append(f"Of another run are {'; '.join(run.cases)}: {_listed(run.about)}.")
    parts.append(markdown(*table_of(report.rows)))
    if report.ratios:
        parts += ["Times as good:", markdown(*ratio_table(report.ratios))]
        lost = [x for x in report.ratios if x.ratio < 1]
        headings, lines = ratio_table(lost)
        parts += ["Where another side wins:"]
        parts += [markdown(headings, lines) if lost else "nowhere."]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _listed(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())


# --- Plots


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    import matplotlib
    import matplotlib.figure

    matplotlib.rcParams["svg.hashsalt"] = "eqx_paged"

    figure = matplotlib.figure.Figure(figsize=(7, 3.6))
    axis = figure.subplots()
    axis.set(title=title, xlabel=x, ylabel=y)
    return figure, axis


def _lines(
    rows: list[Row], title: str, x: tuple[str, str], y: tuple[str, str], keep: Callable
) -> tuple[Any, Any] | None:
    """A line a side, if any has two points. `x` is a key of the shape and its label, `y` a
    figure and its."""
    rows = [row for row in rows if y[0] in row.figures and keep(row)]
    sides: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        sides.setdefault(row.side, []).append((row.shape[x[0]], row.figures[y[0]]))
    if not any(len(points) > 1 for points in sides.values()):
        return None
    figure, axis = _axes(title, x[1], y[1])
    for side, points in sides.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=side)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_ylim(bottom=0)
    return figure, axis


def _finished(drawn: tuple[Any, Any] | None, ceiling: float | None = None) -> Any:
    if drawn is None:
        return None
    figure, axis = drawn
    if ceiling is not None:
        axis.axhline(ceiling, color="black", linestyle=":", label="read of memory")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _is_plain(row: Row, **shape: Any) -> bool:
    wanted = {"head_dim": 64, "dtype": "float32", "ragged": False, **shape}
    return all(row.shape[name] == value for name, value in wanted.items())


def _against_context(rows: list[Row], about: dict[str, Any]) -> Any:
    x, y = ("context", "tokens of each sequence"), ("gb_per_s", "GB/s of keys and values")
    title = "8 sequences, 9 heads over 3 of 64, float32"
    drawn = _lines(rows, title, x, y, lambda row: _is_plain(row, num_seqs=8))
    return _finished(drawn, about["read_ceiling_gb_s"])


def _against_batch(rows: list[Row], about: dict[str, Any]) -> Any:
    x, y = ("num_seqs", "sequences"), ("gb_per_s", "GB/s of keys and values")
    title = "4096 tokens each, 9 heads over 3 of 64, float32"
    drawn = _lines(rows, title, x, y, lambda row: _is_plain(row, context=4096))
    return _finished(drawn, about["read_ceiling_gb_s"])


def _against_size(rows: list[Row], about: dict[str, Any]) -> Any:
    figure, axis = _axes("The same tokens in larger caches", "MiB of cache", "ms a step")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        shape = row.shape
        if shape["page_size"] == 64 or len({x.shape["page_size"] for x in rows}) == 1:
            label = f"{row.side}, {shape['dtype']}"
            point = shape["cache_mib"], 1e3 * row.median("step")
            lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_ylim(bottom=0)
    return _finished((figure, axis))


def _bars(figure_name: str, title: str, label: str) -> Callable:
    def plot(rows: list[Row], about: dict[str, Any]) -> Any:
        rows = [row for row in rows if figure_name in row.figures]
        if not rows:
            return None
        figure, axis = _axes(title, "", label)
        cases = list(dict.fromkeys(row.case for row in rows))
        sides = list(dict.fromkeys(row.side for row in rows))
        figure.set_size_inches(max(7, 1.3 * len(cases)), 3.6)
        width = 0.8 / len(sides)
        for i, side in enumerate(sides):
            found = {x.case: x.figures[figure_name] for x in rows if x.side == side}
            places = [cases.index(case) + (i - len(sides) / 2) * width for case in found]
            axis.bar(places, list(found.values()), width, align="edge", label=side)
        labels = [case.replace(" ", "\n", 2) for case in cases]
        axis.set_xticks(range(len(cases)), labels, fontsize="small")
        return _finished((figure, axis))

    return plot


_PLOTS: dict[str, dict[str, Callable]] = {
    "attention": {"context": _against_context, "batch": _against_batch},
    "update": {"size": _against_size},
    "generate": {
        "roofline": _bars(
            "of_roofline", "Weights read, of what memory gives", "of the roofline"
        ),
        "decode": _bars("decode_tok_s", "Decode", "tokens/s"),
        "prefill": _bars("prefill_tok_s", "Prefill", "tokens/s"),
    },
    "startup": {"first": _bars("first_token_s", "From start to first token", "s")},
}
