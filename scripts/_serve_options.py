"""The command line of `python -m scripts.serve_batch`, and the file of prompts it names."""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from . import _command_line
from ._command_line import Parser, whole
from ._options import add_generation_options, temperature
from ._prompts_file import check_prompt, is_json, OPTION, read_lines


PROGRAM = "serve_batch"
DEFAULT_OUT = pathlib.Path("build/serve_batch")

_MAX = 2**31 - 1
# What a JSON line may set, and how the command line reads the same.
_READERS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": whole(1, _MAX),
    "temperature": temperature,
    "seed": whole(0, 2**32 - 1),
}

refuse = functools.partial(_command_line.refuse, PROGRAM)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, from a line of the file, and how to continue it.

    `seed` is None where the draws are those of the command line's seed.
    """

    line: int
    text: str
    max_new_tokens: int
    temperature: float
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """One checked command line. At most one of `num_pages` and `memory`, the bytes of the
    pool, is given.
    """

    model: str
    requests: tuple[Request, ...]
    out: pathlib.Path
    rows: int
    num_pages: int | None
    memory: int | None
    burst: int
    stops: tuple[str, ...]
    page_size: int
    dtype: str | None
    temperature: float
    seed: int


def parse_options(arguments: list[str] | None) -> Options:
    """Reads and checks `arguments` (the process's own if None), or refuses them."""
    given = _parser().parse_args(arguments)
    return Options(
        model=_text(given.model, "--model"),
        requests=_requests(given),
        out=given.out,
        rows=given.rows,
        num_pages=given.num_pages,
        memory=None if given.memory is None else given.memory * 2**20,
        burst=given.burst,
        stops=tuple(_text(stop, "--stop") for stop in given.stop),
        page_size=given.page_size,
        dtype=given.dtype,
        temperature=given.temperature,
        seed=given.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        PROGRAM, "Continues any number of prompts, through the rows of one paged cache."
    )
    add = parser.add_argument
    add(
        "--prompts-file",
        metavar="FILE",
        type=pathlib.Path,
        required=True,
        help="one prompt a line; or, if the name ends in .jsonl, a JSON string a line, or"
        " an object with `prompt` and, if they differ from the options, `max_new_tokens`,"
        " `temperature` and `seed`",
    )
    add(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        default=DEFAULT_OUT,
        help="where results.jsonl, summary.json and pages.png go, in place of those of an"
        f" earlier run (default: {DEFAULT_OUT})",
    )
    add_generation_options(parser)
    add(
        "--max-new-tokens",
        metavar="N",
        type=whole(1, _MAX),
        default=64,
        help="how many tokens to add to each prompt at most (default: 64)",
    )
    add(
        "--rows",
        metavar="N",
        type=whole(1, _MAX),
        default=16,
        help="how many prompts are continued at a time, at most (default: 16)",
    )
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument(
        "--num-pages",
        metavar="N",
        type=whole(1, _MAX),
        help="pages in the pool (default: what the rows may need at most)",
    )
    pool.add_argument(
        "--memory",
        metavar="MIB",
        type=whole(1, _MAX),
        help="the MiB that the pool may take, instead",
    )
    add(
        "--burst",
        metavar="N",
        type=whole(1, _MAX),
        default=8,
        help="tokens of a prompt between two looks at it (default: 8)",
    )
    return parser


def _text(text: str, option: str) -> str:
    return check_prompt(PROGRAM, text, f"argument {option}")


def _requests(given: argparse.Namespace) -> tuple[Request, ...]:
    path = given.prompts_file
    read = _json_request if is_json(path) else _plain_request
    lines = read_lines(PROGRAM, path)
    return tuple(read(line, number, given) for number, line in lines.items())


def _plain_request(line: str, number: int, given: argparse.Namespace) -> Request:
    return Request(number, line, given.max_new_tokens, given.temperature)


def _json_request(line: str, number: int, given: argparse.Namespace) -> Request:
    where = f"{OPTION}: line {number} of '{given.prompts_file}'"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        refuse(f"{where} is not JSON: {line[:40]}")
    fields = {"prompt": found} if isinstance(found, str) else found
    if not (isinstance(fields, dict) and isinstance(fields.get("prompt"), str)):
        refuse(f"{where} is neither a string nor an object with `prompt`: {line[:40]}")
    unknown = sorted(set(fields) - {"prompt", *_READERS})
    if unknown:
        names = ", ".join(["prompt", *_READERS])
        refuse(f"{where}: {unknown[0]!r} is none of {names}")
    text = check_prompt(PROGRAM, fields.pop("prompt"), where)
    usual = _plain_request(text, number, given)
    try:
        changed = {name: _number(name, value) for name, value in fields.items()}
    except argparse.ArgumentTypeError as error:
        refuse(f"{where}: {error}")
    return dataclasses.replace(usual, **changed)


def _number(name: str, value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise argparse.ArgumentTypeError(f"{name}: {value!r} is no number")
    try:
        return _READERS[name](str(value))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None
