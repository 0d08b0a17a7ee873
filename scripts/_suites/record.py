"""What a suite finds: rows, in a file of JSON that says on what they were found."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from .._whole_file import write_whole
from .measure import num_cores, quartiles


ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Row:
    """One side in one case.

    - `case`: its name; `shape`: what it is.
    - `side`: whose time it is.
    - `seconds`: of each timed run, by what was timed.
    - `figures`: what follows from their medians, such as `gb_per_s`.
    - `note`: what else there is to say.
    - `reason`: why there is no time, where there is none.
    """

    case: str
    shape: dict[str, Any]
    side: str
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    reason: str = ""

    def median(self, what: str) -> float:
        return quartiles(self.seconds[what])[1]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as good a side is as another in one case, by one figure."""

    case: str
    figure: str
    side: str
    other: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What some of a report's cases were taken on, which are of another run."""

    cases: list[str]
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a suite found."""

    suite: str
    about: dict[str, Any]
    rows: list[Row]
    ratios: list[Ratio]
    earlier: list[Earlier] = dataclasses.field(default_factory=list)

    def with_earlier(self, other: "Report") -> "Report":
        """With the cases of `other` that this one lacks, and what they were taken on."""
        now = {row.case for row in self.rows}
        older = {case for part in other.earlier for case in part.cases}
        its_own = dict.fromkeys(row.case for row in other.rows if row.case not in older)
        parts = [*other.earlier, Earlier(list(its_own), other.about)]
        left = [Earlier([x for x in y.cases if x not in now], y.about) for y in parts]
        return dataclasses.replace(
            self,
            rows=[*self.rows, *(x for x in other.rows if x.case not in now)],
            ratios=[*self.ratios, *(x for x in other.ratios if x.case not in now)],
            earlier=[part for part in left if part.cases],
        )

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        content = dataclasses.asdict(self)
        for row in content["rows"]:
            row["quartiles"] = {
                what: quartiles(times) for what, times in row["seconds"].items() if times
            }
        path = folder / f"{self.suite}.json"
        text = json.dumps(content, indent=1) + "\n"
        write_whole(path, lambda path: path.write_text(text))
        return path

    @classmethod
    def read(cls, path: pathlib.Path) -> "Report":
        """What `write` wrote; a `ValueError` that names the file if that is not it."""
        try:
            content = json.loads(path.read_text())
            for row in content["rows"]:
                row.pop("quartiles")
            report = cls(
                content["suite"],
                content["about"],
                [Row(**row) for row in content["rows"]],
                [Ratio(**ratio) for ratio in content["ratios"]],
                [Earlier(**part) for part in content["earlier"]],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a report: {error!r}") from None
        if path.stem != report.suite:
            raise ValueError(f"{path} is a report of {report.suite}")
        return report


# Of these the smaller is the better.
COSTS = ("first_token_s", "peak_gib")


def ratios_of(
    rows: list[Row], figures: tuple[str, ...], sides: tuple[str, ...]
) -> list[Ratio]:
    """Of `sides` to every other side of the same case."""
    return [
        Ratio(row.case, figure, row.side, other.side, _times_as_good(row, other, figure))
        for row in rows
        for other in rows
        for figure in figures
        if row.side in sides and row.case == other.case and row.side != other.side
        if figure in row.figures and figure in other.figures
    ]


def _times_as_good(row: Row, other: Row, figure: str) -> float:
    ratio = row.figures[figure] / other.figures[figure]
    return 1 / ratio if figure in COSTS else ratio


def describe(**others: Any) -> dict[str, Any]:
    """On what, when and by what is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "processor": processor(),
        "num_cores": num_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{x: importlib.metadata.version(x) for x in ("jax", "jaxlib", "numpy")},
        **others,
    }


def processor() -> str:
    """The processor's name and kind, where the system tells them."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    parts = (line.partition(":") for line in lines)
    found = {name.strip(): value.strip() for name, _, value in parts}
    if "model name" not in found:
        return platform.processor()
    kind = [f"{x} {found[x]}" for x in ("cpu family", "model") if x in found]
    return ", ".join([found["model name"], *kind])


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str | None:
    """The commit of the checkout; with a `+` if it has changes. None outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
