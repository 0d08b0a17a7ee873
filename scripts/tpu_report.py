"""Counts the cycles of the TPU kernels without a TPU: `python -m scripts.tpu_report`.

Every case is compiled for every generation by the TPU's own compiler, and the schedule
that it makes is counted. These are static counts: what the instructions take if nothing is
waited for longer than the compiler assumes. Nothing is run, and nothing is measured.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ._command_line import Parser, refuse
from ._tpu_cases import CASES
from ._tpu_ceilings import libtpu_version, read_ceilings, write_ceilings
from ._tpu_chips import CHIPS
from ._tpu_measure import CompileError, measure, Report


PROGRAM = "tpu_report"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks `arguments` (the process's own if None), or refuses them."""
    parser = Parser(PROGRAM, "Compiles the TPU kernels and counts their schedules.")
    for option, choices in (("--generations", [*CHIPS]), ("--cases", [*CASES])):
        parser.add_argument(
            option,
            nargs="+",
            choices=choices,
            default=choices,
            metavar="NAME",
            help=f"of {', '.join(choices)} (default: all)",
        )
    parser.add_argument(
        "--json", metavar="PATH", type=pathlib.Path, help="write all figures here, too"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="store the counts, and a little more, as the ceilings that tests hold them to",
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuses, before anything is compiled, what cannot be done."""
    if libtpu_version() is None:
        reason = 'libtpu, the compiler, is missing: pip install "eqx_paged[tpu]"'
        refuse(PROGRAM, reason)
    if options.update and (options.cases, options.generations) != ([*CASES], [*CHIPS]):
        stored, installed = read_ceilings().libtpu, libtpu_version()
        if stored != installed:
            refuse(
                PROGRAM,
                f"--update of some: the others are of libtpu {stored}, not {installed}",
            )
    if options.json is not None:
        try:
            options.json.open("a").close()
        except OSError as error:
            refuse(PROGRAM, f"--json {options.json}: {error.strerror}")


def measure_all(
    cases: Sequence[str], generations: Sequence[str]
) -> tuple[list[Report], list[str]]:
    """The reports, and what did not compile."""
    reports, failures = [], []
    for case, generation in track(
        [*itertools.product(cases, generations)],
        description="compiling",
        console=Console(stderr=True),
        transient=True,
    ):
        try:
            reports.append(measure(case, generation))
        except CompileError as error:
            failures.append(f"{case} on {generation} does not compile: {error}")
    return reports, failures


def table_of(reports: Sequence[Report]) -> Table:
    """A row for each report. Cycles are those of 1,024 tokens of all heads."""
    table = Table(box=box.MARKDOWN)
    table.add_column("case")
    table.add_column("TPU")
    for name in (
        *("compile s", "VMEM MiB", "block", "with loop", "whole rows"),
        *("memory", "slack", "matrix units", "spills in block", "spills"),
    ):
        table.add_column(name, justify="right")
    for x in reports:
        table.add_row(
            *(x.case, x.generation),
            *(f"{x.compile_seconds:.1f}", f"{x.vmem_bytes / 2**20:.1f}"),
            *(f"{x.body_cycles:,.0f}", f"{x.loop_cycles:,.0f}", f"{x.row_cycles:,.0f}"),
            *(f"{x.floor_cycles:,.0f}", f"{x.slack:.2f}", f"{x.matrix_use:.0%}"),
            f"{x.steady_spill_stores}/{x.steady_spill_loads}",
            f"{x.spill_stores}/{x.spill_loads}",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; ends with exit status 1 if something does not compile."""
    options = parse_options(arguments)
    check(options)
    reports, failures = measure_all(options.cases, options.generations)
    versions = {"libtpu": libtpu_version(), "jax": importlib.metadata.version("jax")}
    # A table that is not for a screen is not cut to one.
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(table_of(reports))
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(f"Cycles in 1,024 tokens of all heads; counted, not measured. {about}")
    if options.json is not None:
        rows = [{**dataclasses.asdict(x), "slack": x.slack} for x in reports]
        content = json.dumps({"about": versions, "static_counts": rows}, indent=2)
        options.json.write_text(content + "\n")
    if options.update:
        write_ceilings(reports)
    for failure in failures:
        print(f"{PROGRAM}: {failure}", file=sys.stderr)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
