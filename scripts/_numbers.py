"""Numbers on a command line."""

import argparse
from collections.abc import Callable


def whole(low: int, high: int) -> Callable[[str], int]:
    """Makes what reads a whole number from `low` to `high`, written in plain digits."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no whole number from {low} to {high}"
            )
        return int(text)

    return number
