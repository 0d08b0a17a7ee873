"""Measures the GPU kernels on a GPU: `python -m scripts.bench_gpu`.

First whether they compute attention there, then what the GPU reaches at best (a copy, a
matrix product), then steps of decode, of prefill and of both, with each of our
implementations and beside others: JAX's own Pallas kernels, cuDNN, and PyTorch in a second
process. All rows go into JSON as they are found, so that what breaks off is not lost.

`--dry-run` goes through all of it with tiny shapes on a CPU. Its times mean nothing.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

import jax

from ._bench_gpu_cases import CASES
from ._bench_gpu_plots import draw
from ._bench_gpu_record import read_devices, read_rows, Recorder
from ._bench_gpu_run import IMPLEMENTATIONS, OURS, Run, run_part
from ._command_line import make_directory, Parser, refuse, whole


PROGRAM = "bench_gpu"
# Minutes: less than eight each, and less than 25 in all, with what runs over.
PARTS = {"correctness": 4.0, "ceilings": 1.0, "decode": 7.0, "prefill": 6.5, "mixed": 3.0}
REHEARSED = 60.0  # of each part, where kernels are interpreted


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads `arguments` (the process's own if None), or refuses them."""
    parser = Parser(PROGRAM, "Measures the GPU kernels, beside others.")
    parser.add_argument(
        "--parts",
        type=_parts,
        default=[*PARTS],
        metavar="PART,PART",
        help=f"of {','.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=[case.name for case in CASES],
        default=[],
        metavar="CASE",
        help="of those parts' cases, such as D1 (default: all)",
    )
    parser.add_argument(
        "--minutes",
        type=whole(1, 60),
        metavar="N",
        help="at most so many for each part, rather than "
        + ", ".join(f"{minutes} for {part}" for part, minutes in PARTS.items()),
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=[],
        metavar="NAME",
        help="of " + ", ".join(IMPLEMENTATIONS) + " (default: all)",
    )
    parser.add_argument(
        "--torch",
        metavar="PYTHON",
        default=sys.executable,
        help="the Python that has PyTorch (default: this one)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        help="where the files go; plots are of all parts there (default: build/bench_gpu, "
        "of a dry run build/bench_gpu_dry_run)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, on a CPU, to see that it runs"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw what was measured, from the files"
    )
    options = parser.parse_args(arguments)
    if options.out is None:
        name = "bench_gpu_dry_run" if options.dry_run else "bench_gpu"
        options.out = pathlib.Path("build") / name
    if shutil.which(options.torch) is None:
        parser.error(f"--torch {options.torch}: no such program")
    return options


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]


def describe(*, dry_run: bool) -> dict[str, Any]:
    """On what, and by what, is measured."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "eqx_paged", "nvidia-cudnn-cu13", "jax-cuda13-plugin")
        if _installed(name)
    }
    return {
        "dry_run": dry_run,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **versions,
        "nvidia_smi": _nvidia_smi(),
    }


def _installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


def _nvidia_smi() -> str | None:
    """The GPU's driver and clocks, where that can be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = [program, f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    """Ends with exit status 1 if a kernel of ours fails. One that is wrong is not timed."""
    options = parse_options(arguments)
    make_directory(PROGRAM, options.out)
    if options.draw:
        _draw(options.out)
        return
    # PyTorch's process needs some of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu" and not options.dry_run:
        refuse(PROGRAM, "JAX finds no GPU here; --dry-run rehearses all of it on a CPU")
    checked = options.out / "correctness.jsonl"
    cases = tuple(options.cases)
    only, torch = tuple(options.only), options.torch
    about = describe(dry_run=options.dry_run)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    broken: set[str] = set()
    with tempfile.TemporaryDirectory() as baselines:
        folder = pathlib.Path(baselines)
        run = Run(options.dry_run, cases, only, torch, folder, _wrong(checked))
        for part in options.parts:
            print(f"\n{part}\n")
            minutes = REHEARSED if options.dry_run else PARTS[part]
            with Recorder(options.out / f"{part}.jsonl", about) as recorder:
                run_part(part, run, float(options.minutes or minutes), recorder)
            broken |= {
                row.implementation
                for row in recorder.rows
                if row.status in ("failed", "broken") and row.implementation in OURS
            }
            run = dataclasses.replace(run, wrong=_wrong(checked))
    _draw(options.out)
    if run.wrong:
        print(f"{PROGRAM}: wrong are {', '.join(sorted(run.wrong))}", file=sys.stderr)
    if broken - run.wrong:
        said = ", ".join(sorted(broken - run.wrong))
        print(f"{PROGRAM}: something failed of {said}", file=sys.stderr)
    if run.wrong or broken:
        raise SystemExit(1)


def _draw(folder: pathlib.Path) -> None:
    """Draws the rows that are there, if they are of one device."""
    files = sorted(folder.glob("*.jsonl"))
    drawn: list[pathlib.Path] = []
    devices = {device for file in files for device in read_devices(file)}
    if not _installed("matplotlib"):
        print("\nnot drawn: there is no matplotlib here")
    elif len(devices) > 1:
        print(f"\nnot drawn: rows of different devices: {', '.join(sorted(devices))}")
    else:
        drawn = draw([row for file in files for row in read_rows(file)], folder)
    print("\nwritten:", *files, *drawn)


def _wrong(checked: pathlib.Path) -> frozenset[str]:
    """The implementations that the last check in the folder found wrong."""
    rows = read_rows(checked) if checked.exists() else []
    return frozenset(row.implementation for row in rows if row.status == "failed")


if __name__ == "__main__":
    # So that a timeout or a terminal that is closed ends the process of a kernel as well.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    main()
