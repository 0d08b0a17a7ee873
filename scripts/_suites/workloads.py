"""What is asked of every side of the benchmarks of generation."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts to continue greedily.

    - `prompt_lens`: of each prompt, without the prefix.
    - `prefix_len`: tokens that all prompts begin with.
    - `max_new_tokens`: for each prompt.
    - `stops`: whether prompts end early, each at its own length.
    """

    name: str
    prompt_lens: tuple[int, ...]
    prefix_len: int = 0
    max_new_tokens: int = 128
    stops: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether prefill and decode can be told apart: all rows do the same."""
        return not (self.stops or self.prefix_len) and len(set(self.prompt_lens)) == 1

    @property
    def num_prompt_tokens(self) -> int:
        return self.prefix_len * len(self.prompt_lens) + sum(self.prompt_lens)

    def shape(self) -> dict[str, Any]:
        return {
            "batch": len(self.prompt_lens),
            "prompt_lens": list(self.prompt_lens),
            "prefix_len": self.prefix_len,
            "max_new_tokens": self.max_new_tokens,
            "stops": self.stops,
        }

    def tokens(self, vocab_size: int) -> tuple[list[int], list[list[int]]]:
        """The prefix, and what follows it in each prompt."""
        rng = np.random.default_rng(1)
        lens = (self.prefix_len, *self.prompt_lens)
        prefix, *prompts = (rng.integers(0, vocab_size, n).tolist() for n in lens)
        return prefix, prompts


@dataclasses.dataclass(frozen=True)
class Queue:
    """More prompts than rows, to continue greedily.

    - `longest_prompt`: of 16 tokens to so many, as many of each order of magnitude.
    - `longest_answer`: of 4 tokens to so many; most are short, a quarter in the mean.
    """

    num_prompts: int
    num_rows: int
    longest_prompt: int = 256
    longest_answer: int = 256

    @property
    def name(self) -> str:
        return f"{self.num_prompts} through {self.num_rows}"

    def prompts(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """The prompts, and how many tokens to make of each."""
        rng = np.random.default_rng(2)
        bounds = np.log(16), np.log(self.longest_prompt + 1)
        lens = np.exp(rng.uniform(*bounds, self.num_prompts)).astype(int)
        limits = rng.exponential(self.longest_answer / 4, self.num_prompts).astype(int)
        limits = np.clip(limits, 4, self.longest_answer)
        prompts = [rng.integers(0, vocab_size, length).tolist() for length in lens]
        return prompts, limits.tolist()


WORKLOADS = (
    Workload("1 x 128", (128,)),
    Workload("1 x 1024", (1024,)),
    Workload("8 x 128", (128,) * 8),
    Workload("8 ragged", (512, 16, 256, 64, 384, 32, 128, 96), stops=True),
    Workload("8 of one prefix", (16,) * 8, prefix_len=512, max_new_tokens=64),
)
# For what the others say as well.
SHORT = (
    Workload("1 x 128", (128,), max_new_tokens=32),
    Workload("8 x 128", (128,) * 8, max_new_tokens=32),
)
QUICK = (
    Workload("1 x 128", (128,), max_new_tokens=32),
    Workload("1 x 1024", (1024,), max_new_tokens=1),
    Workload("8 x 128", (128,) * 8, max_new_tokens=16),
)
# The same in small, to see that all of it works.
REHEARSAL = (
    Workload("1 x 8", (8,), max_new_tokens=4),
    Workload("3 ragged", (9, 2, 5), max_new_tokens=4, stops=True),
    Workload("2 of one prefix", (2,) * 2, prefix_len=9, max_new_tokens=4),
)

QUEUE = Queue(128, 16)
SHORT_QUEUE = Queue(32, 8)
SMALL_QUEUE = Queue(5, 2, longest_prompt=17, longest_answer=8)


def chosen_stops(tokens: list[list[int]]) -> list[int]:
    """Tokens to stop at, so that rows that would make `tokens` end one after the other:
    the first row first."""
    ends = np.linspace(0, len(tokens[0]), len(tokens) + 1)[1:]
    return [row[int(end) - 1] for row, end in zip(tokens, ends, strict=True)]
