"""Stored ceilings of cycles, so that a change that makes a schedule worse is seen."""

import importlib.metadata
import json
import math
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from ._tpu_measure import Report, ROOT


PATH = ROOT / "tests" / "kernels" / "tpu_schedules.json"
# A ceiling is so much above the count it is made from, and too high where a count is less
# than so much of it.
MARGIN = 1.02
TIGHT = 0.95


class Ceilings(NamedTuple):
    """The most `row_cycles` of each case and generation, by one version of libtpu."""

    libtpu: str
    cycles: dict[str, dict[str, int]]


def libtpu_version() -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def read_ceilings(path: pathlib.Path = PATH) -> Ceilings:
    return Ceilings(**json.loads(path.read_text()))


def complaint(report: Report, ceiling: int) -> str | None:
    """What is wrong with a count, or with its ceiling."""
    where = f"{report.case} on {report.generation}: {report.row_cycles:.0f} cycles"
    if report.row_cycles > ceiling:
        return f"{where}, more than its ceiling of {ceiling}"
    if report.row_cycles < TIGHT * ceiling:
        return (
            f"{where}, far below its ceiling of {ceiling}; lower it:"
            f" python -m scripts.tpu_report --update --cases {report.case}"
            f" --generations {report.generation}"
        )
    return None


def write_ceilings(reports: Iterable[Report], path: pathlib.Path = PATH) -> None:
    """Stores ceilings for what was counted. Those of other cases stay, if they are by the
    same libtpu."""
    version, stored = libtpu_version(), read_ceilings(path)
    cycles = stored.cycles if stored.libtpu == version else {}
    for report in reports:
        ceiling = math.ceil(MARGIN * report.row_cycles)
        cycles.setdefault(report.case, {})[report.generation] = ceiling
    content = json.dumps({"libtpu": version, "cycles": cycles}, indent=2)
    path.write_text(content + "\n")
