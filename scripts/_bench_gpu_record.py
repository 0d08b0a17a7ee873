"""What the GPU benchmark finds: rows of JSON, written as they are found, and a table."""

import dataclasses
import json
import pathlib
from typing import Any, Literal, TextIO

import numpy as np

from ._bench_gpu_cases import BenchCase


Status = Literal["timed", "right", "absent", "failed", "broken", "skipped"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A case with one implementation.

    - `status`: "right" where only the result was looked at, "absent" where the
        implementation is not there or does not take the case, "failed" where its result
        is wrong or never came, "broken" where its process broke, "skipped" where the time
        was up; `reason` says more.
    - `max_difference`: of its first result from that of our XLA path, or, of one that is
        "right", from plain attention in float64.
    """

    part: str
    case: str
    implementation: str
    config: str
    status: Status
    reason: str = ""
    median_us: float | None = None
    fastest_us: float | None = None
    slowest_us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    max_difference: float | None = None

    def timed(self, median_us: float, fastest_us: float, slowest_us: float) -> "Row":
        return dataclasses.replace(
            self,
            status="timed",
            median_us=median_us,
            fastest_us=fastest_us,
            slowest_us=slowest_us,
        )

    def compared(self, out: np.ndarray, wanted: np.ndarray, tolerance: float) -> "Row":
        """With its difference, relative where the number is above 1; "failed" if that is
        more than `tolerance`."""
        error = np.abs(out - wanted) / np.maximum(1, np.abs(wanted))
        found = dataclasses.replace(self, max_difference=float(np.max(error)))
        if np.max(error) <= tolerance:  # which NaN is not
            return found
        reason = f"it is {np.max(error):.1e} off, more than {tolerance}"
        # JSON has no NaN.
        return dataclasses.replace(
            self, status="failed", reason=reason, max_difference=None
        )

    def moving(self, num_bytes: int, flops: int) -> "Row":
        """With speeds, for so much work a call."""
        if self.median_us is None:
            return self
        return dataclasses.replace(
            self,
            gb_per_s=num_bytes / self.median_us / 1e3,
            tflop_per_s=flops / self.median_us / 1e6,
        )


def row_of(case: BenchCase, implementation: str, config: str = "") -> Row:
    """A row to be filled."""
    return Row(case.part, case.name, implementation, config, "skipped")


HEADER = """\
| case | implementation | config | median us | fastest to slowest | GB/s | TFLOP/s | note |
|---|---|---|---|---|---|---|---|"""


def format_row(row: Row) -> str:
    """A line of the table that `HEADER` begins."""
    times = ["", "", "", ""]
    if row.median_us is not None:
        times = [
            f"{row.median_us:,.1f}",
            f"{row.fastest_us:,.1f} to {row.slowest_us:,.1f}",
            "" if row.gb_per_s is None else f"{row.gb_per_s:,.0f}",
            "" if row.tflop_per_s is None else f"{row.tflop_per_s:,.1f}",
        ]
    notes = [] if row.status == "timed" else [row.status]
    if row.max_difference is not None:
        notes.append(f"differs by {row.max_difference:.1e}")
    if row.reason:
        notes.append(row.reason)
    cells = [row.case, row.implementation, row.config, *times, ": ".join(notes)]
    return "| " + " | ".join(cells) + " |"


class Recorder:
    """Writes and prints rows as they come; what is written stays if the rest breaks off."""

    def __init__(self, path: pathlib.Path, about: dict[str, Any]):
        self._file: TextIO = path.open("w")
        self.rows: list[Row] = []
        self.note(about)
        print(HEADER, flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(dataclasses.asdict(row))
        print(format_row(row), flush=True)

    def note(self, about: dict[str, Any]) -> None:
        """What else the rows are of."""
        self._write({"about": about})

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_rows(path: pathlib.Path) -> list[Row]:
    return [Row(**line) for line in _lines(path) if "about" not in line]


def read_devices(path: pathlib.Path) -> set[str]:
    """On what its rows were found: one, if it is written by one command."""
    about = [line["about"] for line in _lines(path) if "about" in line]
    return {x["device"] for x in about if "device" in x}


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
