"""The command line of `python -m scripts.train`: what it offers and what it refuses."""

import argparse
import dataclasses
import functools
import math
import pathlib

from . import _command_line
from ._command_line import make_directory, Parser, whole


STATE_FILE = "train_state.bin"
DTYPES = ("bfloat16", "float32")

refuse = functools.partial(_command_line.refuse, "train")


@dataclasses.dataclass(frozen=True)
class Options:
    """One checked command line."""

    out: pathlib.Path
    text: pathlib.Path | None
    steps: int
    seed: int
    context: int
    learning_rate: float
    dtype: str
    save_every: int
    sample: int
    resume: bool


def parse_options(arguments: list[str] | None) -> Options:
    """Reads and checks `arguments` (the process's own if None), or refuses them."""
    parser = Parser(
        "train",
        "Trains a small decoder and writes it as a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    path = pathlib.Path
    add("--out", type=path, default=path("build/tiny"), help="directory to write")
    add("--text", type=path, help="learn this text file instead of the tasks")
    add("--steps", type=whole(1, 10**7), default=2600, help="length of the run")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="fixes all randomness")
    add("--context", type=whole(64, 2048), default=2048, help="longest row, in tokens")
    add("--learning-rate", type=_rate, default=2e-3, help="the highest one")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the written weights")
    add("--save-every", type=whole(1, 10**7), default=200, help="steps between saves")
    add("--sample", type=whole(1, 590), default=256, help="questions to examine with")
    add("--resume", action="store_true", help="go on where a run was interrupted")
    return Options(**vars(parser.parse_args(arguments)))


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to 1")
    return rate


def prepare_out(options: Options) -> None:
    """Makes the directory to write, unless it is not one for this run."""
    out = options.out
    try:
        has_state = (out / STATE_FILE).is_file()
    except OSError as error:
        refuse(f"--out {out}: {error.strerror}")
    if options.resume and not has_state:
        refuse(f"--resume: {out} holds no interrupted run")
    if has_state and not options.resume:
        refuse(
            f"--out {out}: holds an interrupted run; give --resume to go on "
            f"with it, or remove {STATE_FILE}"
        )
    make_directory("train", out)
