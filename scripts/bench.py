"""Measures speed on a CPU, beside others: `python -m scripts.bench`."""

import argparse
import pathlib

from ._command_line import make_directory, Parser
from ._suites import generate
from ._suites.tables import show


PROGRAM = "bench"
CACHE = pathlib.Path.home() / ".cache" / "eqx_paged_bench"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(PROGRAM, "x")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/bench"))
    options = parser.parse_args(arguments)
    make_directory(PROGRAM, options.out)
    plan = generate.Plan(
        ((options.model, options.dtype),), options.quick, {}, {}, CACHE, options.out
    )
    report = generate.run(plan)
    report.write(options.out)
    show(report)


if __name__ == "__main__":
    main()
