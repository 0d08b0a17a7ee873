"""What the GPU kernels take, found without a GPU: `python -m scripts.gpu_report`.

Every case is compiled for each architecture by the GPU's own compilers, in an environment
with the extra gpu-aot. That tells the registers of a thread, the shared memory of a block
and what does not fit in registers. Nothing is run, and nothing is measured.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.progress import track

from ._command_line import Parser, refuse
from ._gpu_budgets import read_budgets, write_budgets
from ._gpu_cases import CASES, GPUReport, measure
from ._gpu_compile import missing, versions
from ._gpu_table import print_table
from ._gpu_targets import TARGETS


PROGRAM = "gpu_report"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks `arguments` (the process's own if None), or refuses them."""
    parser = Parser(PROGRAM, "Compiles the GPU kernels and tells what they take.")
    parser.add_argument(
        "--architectures",
        nargs="+",
        choices=[*TARGETS],
        default=[*TARGETS],
        metavar="NAME",
        help=f"of {', '.join(TARGETS)} (default: all)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only cases with one of these in their names, as decode-d128 (default: all)",
    )
    parser.add_argument(
        "--json", metavar="PATH", type=pathlib.Path, help="write all figures here, too"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="store what is found as the budgets that tests hold the kernels to",
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The cases and architectures that are asked for. Refuses, before anything is compiled,
    what cannot be done."""
    if (why := missing()) is not None:
        refuse(PROGRAM, why)
    asked = [
        (name, architecture)
        for name, case in CASES.items()
        for architecture in case.architectures
        if architecture in options.architectures and any(x in name for x in options.cases)
    ]
    if not asked:
        refuse(PROGRAM, f"--cases {' '.join(options.cases)}: there is no such case")
    whole = len(asked) == sum(len(case.architectures) for case in CASES.values())
    if options.update and not whole and read_budgets().versions != versions():
        refuse(
            PROGRAM,
            f"--update of some: the others are by {read_budgets().versions}, not by"
            f" {versions()}",
        )
    if options.json is not None:
        try:
            options.json.open("a").close()
        except OSError as error:
            refuse(PROGRAM, f"--json {options.json}: {error.strerror}")
    return asked


def measure_all(
    asked: Sequence[tuple[str, str]], *, update: bool
) -> tuple[list[GPUReport], list[str]]:
    """The reports, and what did not compile. Budgets are stored as they are found, so that
    what breaks off is not lost."""
    reports, failures = [], []
    for case, architecture in track(
        asked, description="compiling", console=Console(stderr=True), transient=True
    ):
        try:
            reports.append(measure(case, architecture))
            if update:
                write_budgets(reports[-1:])
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            said = str(error).splitlines()[0]
            failures.append(f"{case} for {architecture} does not compile: {said}")
    return reports, failures


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; ends with exit status 1 if something does not compile."""
    options = parse_options(arguments)
    reports, failures = measure_all(check(options), update=options.update)
    print_table(reports, versions())
    if options.json is not None:
        rows = [dataclasses.asdict(x) for x in reports]
        content = json.dumps({"about": versions(), "compiled": rows}, indent=2)
        options.json.write_text(content + "\n")
    for failure in failures:
        print(f"{PROGRAM}: {failure}", file=sys.stderr)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
