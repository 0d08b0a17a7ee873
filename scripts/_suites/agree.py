"""Whether two sides made the same tokens, and what it means if they did not."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from .process import ours


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


@contextlib.contextmanager
def auditor(checkpoint: str, dtype: str, folder: pathlib.Path) -> Iterator[Audit]:
    """By a process of its own, whose memory is nobody's: that of a checkpoint. Its log and
    compiled programs go to `folder`."""
    with ours("paged", folder / "audit.log", folder / "jax") as side:
        side.ready()
        side.ask("load", checkpoint=checkpoint, dtype=dtype)

        def audit(tokens: list[int], num_prompt_tokens: int) -> list[float]:
            found = side.ask("audit", tokens=tokens, num_prompt_tokens=num_prompt_tokens)
            return found["gaps"]

        yield audit


def check_greedy(
    case: str, prompts: Tokens, tokens: Tokens, audit: Audit, dtype: str
) -> None:
    """Raises a `Wrong` if what ours made after any of `prompts` is not greedy."""
    for row, (prompt, made) in enumerate(zip(prompts, tokens, strict=True)):
        gap = max(audit(prompt + made, len(prompt)))
        if gap > ROUNDING[dtype]:
            raise Wrong(
                f"paged, {case}: in row {row} a token is {gap:.1e} std below the largest "
                f"logit, more than {ROUNDING[dtype]:.1e}"
            )


def compare(
    tokens: Tokens, reference: Tokens, prompts: Tokens, audit: Audit, dtype: str
) -> tuple[bool, str]:
    """Whether `tokens` are as good as the reference's, and what to note of them.

    A row may go another way where two logits are nearly the same; what it makes from there
    on must be the greedy continuation of that.
    """
    notes = []
    for row, (made, wanted) in enumerate(zip(tokens, reference, strict=True)):
        if made == wanted:
            continue
        same = [a == b for a, b in zip(made, wanted, strict=False)]
        place = same.index(False) if False in same else len(same)
        where = f"row {row} differs from token {place} on"
        if place == len(same):
            return False, f"{where}: {len(made)} tokens, not {len(wanted)}"
        gap = max(audit(prompts[row] + made, len(prompts[row])))
        notes.append(f"{where}, at most {gap:.1e} std below the largest logit")
        if gap > ROUNDING[dtype]:
            return False, notes[-1]
    return True, "; ".join(notes)
