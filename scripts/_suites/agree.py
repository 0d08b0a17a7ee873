"""Whether two sides made the same tokens, and what it means if they did not."""

from collections.abc import Callable

from .process import Process


# How far below the largest a logit may be, in standard deviations of the logits, to be
# called the greedy choice: what rounding does to the logits of a few dozen layers. The
# largest and the second largest of 50,000 normal ones are 0.2 apart in the mean.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.2}

# `(tokens, num_prompt_tokens) -> gaps` of the tokens after the prompt.
Audit = Callable[[list[int], int], list[float]]


class Wrong(Exception):
    """Ours made a token that is not the greedy one."""


def auditor(side: Process) -> Audit:
    """By a side of ours."""

    def audit(tokens: list[int], num_prompt_tokens: int) -> list[float]:
        found = side.ask("audit", tokens=tokens, num_prompt_tokens=num_prompt_tokens)
        return found["gaps"]

    return audit


def check_greedy(prompt: list[int], tokens: list[int], audit: Audit, dtype: str) -> None:
    """Raises a `Wrong` if what ours made after `prompt` is not greedy."""
    gap = max(audit(prompt + tokens, len(prompt)))
    if gap > ROUNDING[dtype]:
        raise Wrong(f"paged: a token is {gap:.1e} std off")


def first_difference(
    tokens: list[list[int]], reference: list[list[int]]
) -> tuple[int, int] | None:
    """The row and the position where `tokens` first are not the reference's."""
    for row, (ours, theirs) in enumerate(zip(tokens, reference, strict=True)):
        if ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            return row, (same.index(False) if False in same else len(same))
    return None


def compare(
    tokens: list[list[int]],
    reference: list[list[int]],
    prompts: list[list[int]],
    audit: Audit,
    dtype: str,
) -> tuple[bool, str]:
    """Whether `tokens` are as good as the reference's, and what to note of them."""
    found = first_difference(tokens, reference)
    if found is None:
        return True, ""
    row, place = found
    where = f"row {row} differs from token {place} on"
    if place >= min(len(tokens[row]), len(reference[row])):
        return False, f"{where}: {len(tokens[row])} tokens, not {len(reference[row])}"
    prompt = prompts[row] + reference[row][:place]
    gaps = [audit([*prompt, x[row][place]], len(prompt))[0] for x in (tokens, reference)]
    text = f"{where}, whose logit is {max(gaps):.1e} std below the largest"
    return max(gaps) <= ROUNDING[dtype], text
