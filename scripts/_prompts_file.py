"""Files of prompts: their lines, and what a text may be."""

import pathlib

from ._command_line import refuse


OPTION = "argument --prompts-file"


def check_text(program: str, text: str, source: str) -> str:
    """Refuses what is not UTF-8: such bytes arrive as lone surrogates."""
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        refuse(program, f"{source}: {text!r} is not UTF-8")
    return text


def check_prompt(program: str, text: str, source: str) -> str:
    """Refuses an empty text as well."""
    if not text:
        refuse(program, f"{source}: an empty text")
    return check_text(program, text, source)


def read_lines(program: str, path: pathlib.Path) -> dict[int, str]:
    """The lines that are not blank, by their number from 1; refuses a file without."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        refuse(program, f"{OPTION}: cannot read '{path}': {error.strerror}")
    except UnicodeDecodeError as error:
        refuse(program, f"{OPTION}: '{path}' is not UTF-8 (byte {error.start})")
    numbered = enumerate((line.removesuffix("\r") for line in lines), start=1)
    kept = {number: line for number, line in numbered if line.strip()}
    if not kept:
        refuse(program, f"{OPTION}: '{path}' has no prompt in it")
    return kept


def is_json(path: pathlib.Path) -> bool:
    return path.suffix == ".jsonl"
