"""The command line of `python -m scripts.generate`: what it takes and refuses."""

import argparse
import dataclasses
import functools
import json
import math
import pathlib

from . import _command_line, _prompts_file
from ._command_line import Parser, whole
from ._prompts_file import check_prompt, is_json, read_lines


PAGE_SIZES = (8, 16, 32, 64, 128, 256)
DTYPES = ("float32", "bfloat16", "float16")
EMBEDDED_MODEL = pathlib.Path(__file__).resolve().parent.parent / "models" / "tiny"

refuse = functools.partial(_command_line.refuse, "generate")
check_text = functools.partial(_prompts_file.check_text, "generate")


@dataclasses.dataclass(frozen=True)
class Options:
    """One checked command line. In a chat, `prompts` are its turns, all that there are if
    there is any.
    """

    model: str
    prompts: tuple[str, ...]
    chat: bool
    system: str | None
    max_new_tokens: int
    max_len: int | None
    stops: tuple[str, ...]
    page_size: int
    dtype: str | None
    temperature: float
    seed: int
    stream: bool
    json: bool
    show_pages: bool


def parse_options(arguments: list[str] | None) -> Options:
    """Reads and checks `arguments` (the process's own if None), or refuses them."""
    given = _parser().parse_args(arguments)
    prompts = _prompts(given.prompt, given.prompts_file)
    if not (prompts or given.chat):
        refuse("give at least one --prompt or a --prompts-file, or --chat")
    if given.system is not None and not given.chat:
        refuse("argument --system: only with --chat")
    return Options(
        model=_text(given.model, "--model"),
        prompts=prompts,
        chat=given.chat,
        system=None if given.system is None else _text(given.system, "--system"),
        max_new_tokens=given.max_new_tokens or (512 if given.chat else 64),
        max_len=given.max_len,
        stops=tuple(_text(stop, "--stop") for stop in given.stop),
        page_size=given.page_size,
        dtype=given.dtype,
        temperature=given.temperature,
        seed=given.seed,
        stream=given.stream,
        json=given.json,
        show_pages=given.show_pages,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("generate", "Continues prompts with a model, through a paged cache.")
    add_generation_options(parser)
    add = parser.add_argument
    add(
        "--prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="a text to continue; may be given several times",
    )
    add(
        "--prompts-file",
        metavar="FILE",
        type=pathlib.Path,
        help="more prompts: one a line, or, if the name ends in .jsonl, one JSON"
        " string a line (which may then hold line breaks)",
    )
    add(
        "--chat",
        action="store_true",
        help="a conversation: each prompt is its next turn; without prompts, each line of"
        " stdin is",
    )
    add(
        "--system",
        metavar="TEXT",
        help="what a chat begins with, in the role `system`",
    )
    add(
        "--max-new-tokens",
        metavar="N",
        type=whole(1, 2**31 - 1),
        help="how many tokens to add to each prompt at most (default: 64, in a chat 512)",
    )
    add(
        "--max-len",
        metavar="N",
        type=whole(2, 2**31 - 1),
        help="how long a prompt and what is added to it, or a chat, may become at most, in"
        " tokens (default: what the model reads, in a chat no more than 4096)",
    )
    add(
        "--stream",
        action="store_true",
        help="show text as it is made (on stderr with --json)",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add(
        "--show-pages",
        action="store_true",
        help="draw which sequence holds which page (on stderr with --json)",
    )
    return parser


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """What a program takes that continues prompts with a model."""
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        default=str(EMBEDDED_MODEL),
        help="a folder with config.json, model.safetensors and tokenizer.json, or the"
        " name of one on the Hugging Face hub, as in organisation/model (default: the"
        " model that comes with the sources)",
    )
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="ends a continuation where TEXT appears in it; may be given several"
        " times; the model's own end-of-text tokens always end it",
    )
    add(
        "--page-size",
        metavar="N",
        type=whole(1, 2**31 - 1),
        choices=PAGE_SIZES,
        default=16,
        help="tokens a page: a power of two from 8 to 256 (default: 16)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights and the cache (default: as the checkpoint is stored)",
    )
    add(
        "--temperature",
        metavar="T",
        type=temperature,
        default=0.0,
        help="draw tokens with probabilities softmax(logits / T); 0 takes the"
        " likeliest token each time (default: 0)",
    )
    add(
        "--seed",
        metavar="N",
        type=whole(0, 2**32 - 1),
        default=0,
        help="of the draws; without effect at temperature 0 (default: 0)",
    )


def temperature(text: str) -> float:
    """Reads a temperature."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(number) and (number == 0 or 1e-3 <= number <= 1e3)):
        raise argparse.ArgumentTypeError(f"must be 0, or from 0.001 to 1000, not {text}")
    return number


def _prompts(given: list[str], path: pathlib.Path | None) -> tuple[str, ...]:
    prompts = [_text(prompt, "--prompt") for prompt in given]
    if path is not None:
        prompts += _read_prompts(path)
    return tuple(prompts)


def _text(text: str, option: str) -> str:
    return check_prompt("generate", text, f"argument {option}")


def _read_prompts(path: pathlib.Path) -> list[str]:
    lines = [*read_lines("generate", path).values()]
    return [_json_text(line, path) for line in lines] if is_json(path) else lines


def _json_text(line: str, path: pathlib.Path) -> str:
    try:
        text = json.loads(line)
    except (ValueError, RecursionError):
        text = None
    if not isinstance(text, str):
        refuse(f"argument --prompts-file: in '{path}', not a JSON string: {line[:40]}")
    return _text(text, f"--prompts-file: in '{path}'")
