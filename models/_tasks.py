"""Questions whose answers are known: what the embedded checkpoint was trained on.

A question is a prompt and the exact answer, which ends with a newline. Where memory
alone must not suffice, a fixed rule holds some questions out of training:
`held_out=True` asks only those, `held_out=False` only the others.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from ._elements import ELEMENTS


# The shape of every question. `scripts.train` builds its tokenizer from these.
RECORD = "{key}={value}\n"
LOOKUP = "{key}?"
ADDITION = "{first}+{second}="
_FACTS = (
    ("What is the symbol of {name}?", " {symbol}\n"),
    ("What is the atomic number of {name}?", " {number}\n"),
    ("What is the atomic mass of {name}?", " {mass}\n"),
    ("Which element has the symbol {symbol}?", " {name}\n"),
    ("Which element has the atomic number {number}?", " {name}\n"),
)
NUM_KEYS = 512
NUM_VALUES = 100
# As the embedded checkpoint's tokenizer cuts them: word, `=`, two digits, newline.
TOKENS_PER_RECORD = 5


class Question(NamedTuple):
    """A prompt, and the one right answer to it."""

    prompt: str
    answer: str


@functools.cache
def facts() -> tuple[Question, ...]:
    """Five questions on each of the 118 chemical elements: its symbol, number and mass,
    and which one has a symbol or a number.

    **Returns:**

    All 590 questions. They can only be learnt by heart, so none is held out.
    """
    return tuple(
        Question(prompt.format(**element), answer.format(**element))
        for element in ELEMENTS
        for prompt, answer in _FACTS
    )


def addition(rng: np.random.Generator, *, held_out: bool = True) -> Question:
    """Asks for the sum of two numbers of two or three digits.

    **Arguments:**

    - `rng`: what chooses.
    - `held_out`: whether the pair is one that training never saw, in either order.

    **Returns:**

    One question, such as `123+456=` with the answer `579`.
    """
    while True:
        first, second = _operand(rng), _operand(rng)
        if _addition_is_held_out(first, second) == held_out:
            prompt = ADDITION.format(first=first, second=second)
            return Question(prompt, f"{first + second}\n")


@dataclasses.dataclass(frozen=True)
class Records:
    """A text that assigns a number to each of some invented words, one a line.

    **Arguments:**

    - `keys`: the words, all distinct.
    - `values`: the number of each, two digits.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """The context that the questions are about."""
        pairs = zip(self.keys, self.values, strict=True)
        return "".join(RECORD.format(key=key, value=value) for key, value in pairs)

    def lookup(self, index: int) -> Question:
        """Asks for the number of a word.

        **Arguments:**

        - `index`: which record.

        **Returns:**

        The question alone, to be asked after `text`, or after another such question
        and its answer.
        """
        prompt = LOOKUP.format(key=self.keys[index])
        return Question(prompt, self.values[index] + "\n")


def records(
    rng: np.random.Generator, num_records: int, *, held_out: bool = True
) -> Records:
    """Draws a context for look-ups.

    **Arguments:**

    - `rng`: what chooses.
    - `num_records`: how many lines, at most `NUM_KEYS`.
    - `held_out`: whether every word is paired with a number that it never had in
        training, or only with such as it may have had.

    **Returns:**

    The records.
    """
    if not 1 <= num_records <= NUM_KEYS:
        raise ValueError(f"num_records must be 1 to {NUM_KEYS}, not {num_records}")
    chosen = rng.permutation(NUM_KEYS)[:num_records]
    offered, counts = _values_of_keys(held_out)
    picks = rng.integers(counts[chosen])
    values = offered[chosen, picks]
    return Records(
        keys=tuple(keys()[index] for index in chosen),
        values=tuple(f"{value:02d}" for value in values),
    )


def lookup(
    rng: np.random.Generator, num_records: int, *, held_out: bool = True
) -> Question:
    """Asks for one number out of a context.

    **Arguments:**

    - `rng`: what chooses.
    - `num_records`: how many lines the context has.
    - `held_out`: as in `records`.

    **Returns:**

    One question, its context included.
    """
    context = records(rng, num_records, held_out=held_out)
    question = context.lookup(int(rng.integers(num_records)))
    return Question(context.text + question.prompt, question.answer)


@functools.cache
def keys() -> tuple[str, ...]:
    """The invented words that records are about.

    **Returns:**

    `NUM_KEYS` words of two syllables, such as `tomin`.
    """
    first = [consonant + vowel for consonant in "bdklmnprstv" for vowel in "aeiou"]
    last = [open_ + end for open_ in first for end in ("", "l", "n", "r")]
    words = [start + end for start in first for end in last]
    order = np.random.default_rng(0).permutation(len(words))
    return tuple(words[index] for index in order[:NUM_KEYS])


def _operand(rng: np.random.Generator) -> int:
    low, high = ((10, 100), (100, 1000))[int(rng.integers(2))]
    return int(rng.integers(low, high))


def _addition_is_held_out(first: int, second: int) -> bool:
    low, high = sorted((first, second))
    # There are only 8,100 pairs of two-digit numbers, so fewer of these are kept back.
    share = 64 if high < 100 else 16
    return bool(_mix(np.uint64(low * 1000 + high)) % np.uint64(share) == 0)


@functools.cache
def _values_of_keys(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each key the values that it may have, first in its row, and how many."""
    pairs = np.arange(NUM_KEYS * NUM_VALUES, dtype=np.uint64)
    allowed = (_mix(pairs + np.uint64(1_000_000)) % np.uint64(16) == 0) == held_out
    allowed = allowed.reshape(NUM_KEYS, NUM_VALUES)
    return np.argsort(~allowed, axis=1, kind="stable"), allowed.sum(axis=1)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The last steps of splitmix64. A rule without such mixing, say one on the sum of
    the digits, would hold out a class of questions instead of a sample of all."""
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
