"""Runs a part of the GPU benchmark: each implementation in a process of its own.

A kernel that hangs, or that leaves the device unusable, costs its own rows and no others.
"""

import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from ._bench_gpu_cases import BenchCase, cases_of
from ._bench_gpu_clock import Clock
from ._bench_gpu_record import Recorder, Row


ROOT = pathlib.Path(__file__).resolve().parents[1]
# In order: what was never run on a GPU comes last.
OURS = ("xla", "triton", "mosaic")
PEERS = ("jax-paged", "cudnn-paged", "cudnn-contiguous", "jax-contiguous")
IMPLEMENTATIONS = ("xla", "triton", *PEERS, "torch", "mosaic")
GRACE = 15.0  # seconds after its time, in which a process may end what it has begun
# A kernel and its program compile in far less. Where kernels are interpreted, not.
SILENCE, REHEARSED_SILENCE = 90.0, 900.0
NUM_BEST = 2  # of a sweep over one page size, timed on the other cases


@dataclasses.dataclass(frozen=True)
class Run:
    """How a part is run.

    - `cases`: names of those to time; all if empty.
    - `only`: implementations to run; all if empty.
    - `torch`: the Python that has PyTorch.
    - `baselines`: the folder where XLA's results are kept for the others.
    - `wrong`: implementations whose results are, which are not timed.
    """

    dry_run: bool
    cases: tuple[str, ...]
    only: tuple[str, ...]
    torch: str
    baselines: pathlib.Path
    wrong: frozenset[str] = frozenset()

    def chosen(self, part: str) -> list[BenchCase]:
        cases = cases_of(part, dry_run=self.dry_run)
        return [x for x in cases if not self.cases or x.name in self.cases]

    @property
    def implementations(self) -> tuple[str, ...]:
        return tuple(x for x in IMPLEMENTATIONS if not self.only or x in self.only)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one process does.

    - `weight`: of the time that is left, its share is that of this in all weights.
    - `cases`: all of the part's if empty.
    - `sweep`: None, "first" for all configs on the first case of each page size, or "rest"
        for the best of them on the others.
    """

    implementation: str
    weight: int
    sweep: str | None = None


def works_of(part: str, run: Run) -> list[Work]:
    """In order; what is not used of one's time is the next ones'."""
    if part == "ceilings":
        works = [Work("jax", 1), Work("torch", 1)]
        return [x for x in works if not run.only or x.implementation in (*run.only, "jax")]
    if part == "correctness":
        works = [Work("xla", 1), Work("triton", 2), Work("mosaic", 2)]
        return [x for x in works if x.implementation in run.implementations]
    first = [Work("xla", 4), Work("triton", 4), *(Work(name, 1) for name in PEERS)]
    sweeps = ["triton", "jax-paged"] if part == "decode" else ["triton"]
    works = [
        *first,
        Work("torch", 8),
        *(Work(name, 4, sweep) for sweep in ("first", "rest") for name in sweeps),
        Work("mosaic", 4),
    ]
    return [x for x in works if x.implementation in run.implementations]


def run_part(part: str, run: Run, minutes: float, recorder: Recorder) -> None:
    clock = Clock(minutes)
    works = works_of(part, run)
    for i, work in enumerate(works):
        row = Row(part, "all", work.implementation, "", "skipped")
        if work.implementation in run.wrong and part != "correctness":
            reason = "its results are wrong here"
            recorder.add(dataclasses.replace(row, reason=reason))
            continue
        command = _command(part, run, work, recorder.rows)
        if command is None:
            continue
        share = work.weight / sum(x.weight for x in works[i:])
        if clock.seconds_left < 0:
            recorder.add(dataclasses.replace(row, reason="the time was up"))
            continue
        silence = REHEARSED_SILENCE if run.dry_run else SILENCE
        for found in child_rows(command, row, share * clock.seconds_left, silence):
            if isinstance(found, Row):
                recorder.add(found)
            else:
                recorder.note(found)


def _command(part: str, run: Run, work: Work, rows: list[Row]) -> list[str] | None:
    """Of a process, or None where there is nothing to do."""
    cases = [case.name for case in run.chosen(part)]
    if work.implementation == "torch":
        command = [run.torch, "-m", "scripts._bench_gpu_torch", part]
    else:
        command = [
            sys.executable,
            "-m",
            "scripts._bench_gpu_child",
            part,
            work.implementation,
        ]
        command += ["--baselines", str(run.baselines)]
    command += ["--dry-run"] if run.dry_run else []
    if part in ("correctness", "ceilings"):
        return command
    if work.sweep is not None:
        first = first_of_each_page_size(run.chosen(part))
        command += ["--sweep"]
        if work.sweep == "first":
            cases = first
        else:
            cases = [name for name in cases if name not in first]
            configs = best_configs(rows, work.implementation, first)
            if not configs:
                return None
            command += ["--configs", *configs]
    return [*command, "--cases", *cases] if cases else None


def first_of_each_page_size(cases: list[BenchCase]) -> list[str]:
    first: dict[int, str] = {}
    for case in cases:
        first.setdefault(case.page_size, case.name)
    return list(first.values())


def best_configs(rows: list[Row], implementation: str, cases: list[str]) -> list[str]:
    """The fastest few of each of `cases`."""
    best: dict[str, None] = {}
    for case in cases:
        found = [
            (row.median_us, row.config)
            for row in rows
            if (row.case, row.implementation) == (case, implementation)
            and row.config
            and row.median_us is not None
        ]
        best |= dict.fromkeys(config for _, config in sorted(found)[:NUM_BEST])
    return list(best)


def child_rows(
    command: list[str], row: Row, seconds: float, silence: float
) -> Iterator[Row | dict[str, Any]]:
    """The rows that a process prints within so many seconds, and what it says it is.

    One that breaks is followed by another, which goes on after what broke. One that hangs
    is ended, and no other follows. `row` is filled where nothing was begun.
    """
    clock, first = Clock(seconds / 60), 0
    while True:
        begun = row
        limits = ["--seconds", f"{clock.seconds_left:.1f}", "--first", str(first)]
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            with subprocess.Popen(
                [*command, *limits],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            ) as process:
                try:
                    for content in _contents(process, clock, silence):
                        if "about" in content:
                            yield content["about"]
                        elif "begun" in content:
                            begun, first = Row(**content["row"]), content["begun"] + 1
                        else:
                            yield Row(**content)
                    code = process.wait()
                finally:  # nothing stays on the device if this process is ended
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
            if code == 0:
                return
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or [f"exit status {code}"]
        if code == -signal.SIGKILL:
            in_time = clock.seconds_left > 0
            status = "failed" if in_time else "skipped"
            reason = f"nothing came for {silence:g} s" if in_time else "the time was up"
            yield dataclasses.replace(begun, status=status, reason=reason)
            return
        reason = " ".join(last[0].split())[:200]
        yield dataclasses.replace(begun, status="broken", reason=reason)
        if begun is row or clock.seconds_left < 0:
            return


def _contents(
    process: subprocess.Popen, clock: Clock, silence: float
) -> Iterator[dict[str, Any]]:
    """The JSON objects that it prints, one a line; what else it prints is skipped."""
    for line in _lines(process, clock, silence):
        try:
            content = json.loads(line)
        except ValueError:  # no JSON, or no text
            continue
        if isinstance(content, dict):
            yield content


def _lines(process: subprocess.Popen, clock: Clock, silence: float) -> Iterator[bytes]:
    """The whole lines that it prints. It and what it has started are ended when it is
    silent for too long, or its time is up.

    One thread: a signal that ends this process leaves none behind.
    """
    assert process.stdout is not None
    rest, heard = b"", time.monotonic()
    while True:
        of_silence = heard + silence - time.monotonic()
        limit = min(of_silence, clock.seconds_left + GRACE)
        if limit <= 0 or not select.select([process.stdout], [], [], limit)[0]:
            os.killpg(process.pid, signal.SIGKILL)
            return
        found = os.read(process.stdout.fileno(), 1 << 16)
        if not found:
            return
        *lines, rest = (rest + found).split(b"\n")
        if lines:
            heard = time.monotonic()
        yield from lines
