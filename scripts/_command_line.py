"""What the programs' command lines share: whole numbers, a directory, refusals."""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn


def refuse(program: str, reason: str) -> NoReturn:
    """Ends `program` with one line on stderr and exit status 2."""
    print(f"{program}: {' '.join(reason.split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Reads the command line of `python -m scripts.PROGRAM`; refuses what it cannot."""

    def __init__(self, program: str, description: str, **options: Any):
        super().__init__(
            prog=f"python -m scripts.{program}",
            description=description,
            allow_abbrev=False,
            **options,
        )
        self._program = program

    def error(self, message: str) -> NoReturn:
        refuse(self._program, message)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Makes what reads a whole number from `low` to `high`, written in plain digits."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no whole number from {low} to {high}"
            )
        return int(text)

    return number


def make_directory(program: str, path: pathlib.Path, option: str = "--out") -> None:
    """Makes the directory that `option` names, or refuses one that cannot be written."""
    try:
        if path.exists() and not path.is_dir():
            refuse(program, f"{option} {path}: is a file, not a directory")
        path.mkdir(parents=True, exist_ok=True)
        # Only a try tells whether files can be made in it.
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        refuse(program, f"{option} {path}: {error.strerror}")
