"""Files of a checkpoint: found, read and replaced, with errors that name them."""

import json
import os
import pathlib
from typing import Any


def existing_directory(directory: str | os.PathLike) -> pathlib.Path:
    """`directory` as a path; a `FileNotFoundError` if there is none."""
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory")
    return root


def existing_file(root: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file in `root`; a `FileNotFoundError` if there is none."""
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def read_text(path: pathlib.Path) -> str:
    """What a file of UTF-8 says; a `ValueError` if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds; a `ValueError` if it holds none."""
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def optional_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds; an empty one if there is no file."""
    return read_object(path) if path.is_file() else {}


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file as a whole: a reader finds the old content or the new."""
    partial = partial_path(path)
    partial.write_bytes(content)
    os.replace(partial, path)


def partial_path(path: pathlib.Path) -> pathlib.Path:
    """Where a file's new content is kept until it is whole."""
    return path.with_name(path.name + ".part")
