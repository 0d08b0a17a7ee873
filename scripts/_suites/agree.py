"""Whether two sides made the same tokens, and what it means if they did not."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .process import Broken, ours


Tokens = list[list[int]]


# How far below the largest a logit may be, in standard deviations of the logits, to be
# called the greedy choice: what rounding does to the logits of a few dozen layers, of the
# side and of the auditor. The largest and the second largest of 50,000 normal ones are 0.2
# apart in the mean, and a token of another context is 4 below.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.3}

# `(tokens, num_prompt_tokens) -> gaps` of the tokens after the prompt.
Audit = Callable[[list[int], int], list[float]]


class Wrong(Exception):
    """Ours made a token that is not the greedy one."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What every side was asked to continue.

    - `prompts`: with the prefix, if they have one.
    - `limits`: how many tokens to make of each, at most.
    - `stops`: tokens after which a row is done.
    """

    prompts: Tokens
    limits: Sequence[int]
    stops: Sequence[int] = ()

    def ends_early(self, row: int, made: list[int]) -> bool:
        """Whether tokens are missing at the end, or too many."""
        limit = self.limits[row]
        is_stopped = 0 < len(made) < limit and made[-1] in self.stops
        return len(made) != limit and not is_stopped


@contextlib.contextmanager
def auditor(checkpoint: str, dtype: str, folder: pathlib.Path) -> Iterator[Audit]:
    """By a process of its own, whose memory is nobody's: that of a checkpoint. Its log and
    compiled programs go to `folder`."""
    with ours("paged", folder / "audit.log", folder / "jax") as side:
        side.ready()
        side.ask("load", checkpoint=checkpoint, dtype=dtype)

        def audit(tokens: list[int], num_prompt_tokens: int) -> list[float]:
            asked = {"tokens": tokens, "num_prompt_tokens": num_prompt_tokens}
            try:
                return side.ask("audit", **asked)["gaps"]
            except Broken as error:
                raise Broken(f"the auditor: {error}") from None

        yield audit


def check_greedy(case: str, asked: Asked, tokens: Tokens, audit: Audit, dtype: str) -> None:
    """Raises a `Wrong` if what ours made after any of the prompts is not greedy, or not all
    that was asked for."""
    for row, (prompt, made) in enumerate(zip(asked.prompts, tokens, strict=True)):
        if asked.ends_early(row, made):
            wanted = asked.limits[row]
            raise Wrong(f"paged, {case}: row {row} has {len(made)} tokens, not {wanted}")
        gap = _largest(audit(prompt + made, len(prompt)))
        if not gap <= ROUNDING[dtype]:
            raise Wrong(
                f"paged, {case}: in row {row} a token is {gap:.1e} std below the largest "
                f"logit, more than {ROUNDING[dtype]:.1e}"
            )


def compare(
    tokens: Tokens, reference: Tokens, asked: Asked, audit: Audit, dtype: str
) -> tuple[bool, str]:
    """Whether `tokens` are as good as the reference's, and what to note of them.

    A row may go another way where two logits are nearly the same; what it makes from there
    on must be the greedy continuation of that.
    """
    if len(tokens) != len(reference):
        return False, f"{len(tokens)} rows, not {len(reference)}"
    notes = []
    for row, (made, wanted) in enumerate(zip(tokens, reference, strict=True)):
        if made == wanted:
            continue
        same = [a == b for a, b in zip(made, wanted, strict=False)]
        place = same.index(False) if False in same else len(same)
        where = f"row {row} differs from token {place} on"
        if place == len(same) or asked.ends_early(row, made):
            return False, f"{where}: {len(made)} tokens, not {len(wanted)}"
        prompt = asked.prompts[row]
        gap = _largest(audit(prompt + made, len(prompt)))
        notes.append(f"{where}, at most {gap:.1e} std below the largest logit")
        if not gap <= ROUNDING[dtype]:
            return False, f"{notes[-1]}, more than {ROUNDING[dtype]:.1e}"
    return True, "; ".join(notes)


def _largest(gaps: list[float]) -> float:
    # Not `max`, which may pass over what is not a number.
    return float(np.max(gaps, initial=0.0))
