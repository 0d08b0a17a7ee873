"""Checks of a configuration's values. Each error names the key and its value."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn


def check_size(name: str, value: Any) -> None:
    # Larger ones cannot be the length of an array's axis, nor all of them be a float.
    if not (is_int(value) and 0 < value < 2**31):
        refuse(name, value, "a positive whole number below 2**31")


def check_positive(name: str, value: Any) -> None:
    # Whole numbers may be too large to become a float.
    if not (is_number(value) and 0 < value <= sys.float_info.max):
        refuse(name, value, "a positive number in a float's range")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        refuse(name, value, "true or false")


def check_token(name: str, value: Any, vocab_size: int) -> None:
    if not (is_int(value) and 0 <= value < vocab_size):
        refuse(name, value, f"a token, 0 to {vocab_size - 1}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    # Not by `in` a set: what a file holds need not be hashable.
    if value not in choices:
        raise ValueError(
            f"{name} {value!r} is not supported (only {', '.join(map(repr, choices))})"
        )


def refuse(name: str, value: Any, wanted: str) -> NoReturn:
    raise ValueError(f"{name} must be {wanted}, not {value!r}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)
