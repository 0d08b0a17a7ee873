"""Draws what the GPU benchmark measured: bars for the implementations of each case."""

import pathlib
from collections.abc import Iterable

from ._bench_gpu_record import Row


UNITS = {
    "decode": ("gb_per_s", "GB/s of keys and values"),
    "prefill": ("tflop_per_s", "TFLOP/s"),
    "mixed": ("median_us", "microseconds"),
}
CEILINGS = {"decode": ("copy", "gb_per_s"), "prefill": ("matmul", "tflop_per_s")}


def draw(rows: Iterable[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """A file for each part that has times, in `folder`; returns them."""
    rows = [row for row in rows if row.status == "timed"]
    parts = {row.part for row in rows} & set(UNITS)
    return [_draw_part(part, rows, folder / f"{part}.svg") for part in sorted(parts)]


def _draw_part(part: str, rows: list[Row], path: pathlib.Path) -> pathlib.Path:
    # Not needed to measure. Chosen before pyplot is imported: no window is needed to write
    # a file.
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    quantity, unit = UNITS[part]
    best = _best([row for row in rows if row.part == part])
    cases = list(dict.fromkeys(case for case, _ in best))
    names = list(dict.fromkeys(name for _, name in best))
    figure, axis = plt.subplots(figsize=(max(8, 1.2 * len(cases)), 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        found = [
            (x, best[case, name]) for x, case in enumerate(cases) if (case, name) in best
        ]
        axis.bar(
            [x + (i - (len(names) - 1) / 2) * width for x, _ in found],
            [getattr(row, quantity) for _, row in found],
            width,
            label=name,
        )
    if part in CEILINGS:
        case, of = CEILINGS[part]
        ceilings = [getattr(row, of) for row in rows if row.case == case]
        if ceilings:
            axis.axhline(max(ceilings), color="black", linestyle=":", label=case)
    axis.set_xticks(range(len(cases)), cases)
    axis.set_ylabel(unit)
    axis.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def _best(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """The fastest config of each implementation for each case; of the Triton kernels the
    defaults, and apart from them the fastest that was swept."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        swept = row.implementation == "triton" and row.config
        key = row.case, row.implementation + (", swept" if swept else "")
        if key not in best or _time(row) < _time(best[key]):
            best[key] = row
    return best


def _time(row: Row) -> float:
    assert row.median_us is not None
    return row.median_us
