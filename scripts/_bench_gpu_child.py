"""One implementation's work in a part of the GPU benchmark, in a process of its own:
`python -m scripts._bench_gpu_child PART IMPLEMENTATION`.

What breaks there breaks that process alone: the parent tells what was begun, and goes on
after it in another one. Prints what it begins, and a row of JSON as soon as it is found.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._bench_gpu_candidates import Candidate, NotHere, ours, swept
from ._bench_gpu_cases import BenchCase, cases_of
from ._bench_gpu_ceilings import ceilings
from ._bench_gpu_clock import Clock, Effort, REHEARSAL
from ._bench_gpu_correctness import checked, checked_large, checks, TOLERANCE
from ._bench_gpu_data import data_of
from ._bench_gpu_peers import peers, swept_peers
from ._bench_gpu_record import Row, row_of
from ._bench_gpu_timer import time_calls


class Task(NamedTuple):
    """A row to be filled, and what fills it."""

    row: Row
    fill: Callable[[Row], Row]


def tasks_of(asked: argparse.Namespace) -> Iterator[Task]:
    """What is asked for, always in the same order."""
    effort = REHEARSAL if asked.dry_run else Effort()
    if asked.part == "ceilings":
        for row, fill in ceilings(effort, dry_run=asked.dry_run):
            yield Task(row, fill)
    elif asked.part == "correctness":
        name = asked.implementation
        row = Row("correctness", "a pool of 4 GiB", name, "", "skipped")
        yield Task(row, functools.partial(checked_large, dry_run=asked.dry_run))
        for check in checks(dry_run=asked.dry_run):
            row = Row("correctness", check.name, name, "", "skipped")
            fill = functools.partial(checked, check, interpret=asked.dry_run)
            yield Task(row, fill)
    else:
        for case in cases_of(asked.part, dry_run=asked.dry_run):
            if not asked.cases or case.name in asked.cases:
                yield from _timings(case, effort, asked)


def _timings(case: BenchCase, effort: Effort, asked: argparse.Namespace) -> Iterator[Task]:
    on_gpu = jax.default_backend() == "gpu"
    data = functools.partial(data_of, case, effort.pools_for(case.kv_bytes))
    if asked.sweep:
        found = [
            *swept(case, data, interpret=not on_gpu),
            *swept_peers(case, data, on_gpu=on_gpu),
        ]
    else:
        found = [
            *ours(case, data, interpret=not on_gpu),
            *peers(case, data, on_gpu=on_gpu),
        ]
    found = [x for x in found if x.implementation == asked.implementation]
    if asked.configs:
        found = [x for x in found if x.config in asked.configs]
    # A rehearsal needs one of each.
    for candidate in found[:1] if asked.dry_run else found:
        row = row_of(case, candidate.implementation, candidate.config)
        fill = functools.partial(_timed, case, candidate, effort, asked.baselines)
        yield Task(row, fill)


def _timed(
    case: BenchCase, candidate: Candidate, effort: Effort, baselines: pathlib.Path, row: Row
) -> Row:
    """The row of a candidate, which is not timed if its result is not XLA's."""
    prepared = candidate.prepare()
    out = np.asarray(prepared.first().astype(jnp.float32)).reshape(-1)
    baseline = baselines / f"{case.name}.npy"
    if row.implementation == "xla":
        np.save(baseline, out.astype(np.float16))
        # It takes several times as long.
        effort = dataclasses.replace(effort, num_calls=len(prepared.pools))
    elif baseline.exists():
        wanted = np.load(baseline).astype(np.float32)
        row = row.compared(out, wanted, TOLERANCE)
        if row.status == "failed":
            return row
    return row.timed(*time_calls(prepared, effort)).moving(case.kv_bytes, case.flops)


def say(content: object) -> None:
    print(json.dumps(content), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("implementation")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--configs", nargs="+")
    parser.add_argument("--baselines", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    if asked.dry_run:
        # An interpreted warpgroup waits in a thread of XLA's for others, which need theirs,
        # and each device has a few.
        jax.config.update("jax_num_cpu_devices", 4)
    clock = Clock(asked.seconds / 60)
    for i, (row, fill) in enumerate(tasks_of(asked)):
        if i < asked.first:
            continue
        if clock.seconds_left < 0:
            say(dataclasses.asdict(dataclasses.replace(row, reason="the time was up")))
            continue
        say({"begun": i, "row": dataclasses.asdict(row)})
        try:
            row = fill(row)
        except (NotHere, NotImplementedError) as error:
            said = " ".join(str(error).split())[:200]
            row = dataclasses.replace(row, status="absent", reason=said)
        say(dataclasses.asdict(row))


if __name__ == "__main__":
    main()
