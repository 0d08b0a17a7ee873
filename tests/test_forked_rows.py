"""Several samples of one prompt through forked rows, against rows that each read it."""

import jax
import jax.numpy as jnp
import numpy as np

from .helpers import ints, poison_free_pages, told
from .test_generate import (
    answers,
    categorical,
    continued,
    empty,
    expected,
    generate,
    model,  # noqa: F401  a fixture
    PAGE_SIZE,
    prompt,
)
from .test_prompts_in_turn import poisoned


PROMPT = prompt(2, 20)
SAMPLES = dict(sampler=categorical, key=jax.random.key(5))


def read(model, tokens):  # noqa: F811
    """Tokens in all four rows, read once."""
    cache = poisoned(empty())
    _, cache = generate(model, cache, (tokens,), max_new_tokens=0)
    cache, result = cache.fork(ints((0, 0, 0)), ints((1, 2, 3)))
    assert told(result) == "successful"
    return poison_free_pages(cache)


def num_pages(cache):
    return cache.table.num_pages - int(cache.table.num_free_pages)


def test_samples_that_share_a_prompt_are_those_of_copies_of_it(model):  # noqa: F811
    cache = read(model, PROMPT[:-1])
    assert num_pages(cache) == 3
    shared, cache = generate(model, cache, (PROMPT[-1:],) * 4, **SAMPLES)
    apart, copies = generate(model, empty(), (PROMPT,) * 4, **SAMPLES)
    assert answers(shared) == answers(apart)
    assert len(set(answers(shared))) == 4
    # 20 tokens and 11: two pages that all hold, and two of each.
    assert (num_pages(cache), num_pages(copies)) == (2 + 4 * 2, 4 * 4)
    indices = np.asarray(cache.table.page_indices)
    assert len({tuple(row[:2]) for row in indices}) == 1
    assert len(set(indices[:, 2:4].reshape(-1))) == 8


def test_branches_of_a_prefix_are_those_of_the_whole(model):  # noqa: F811
    texts = (prompt(21, 4), prompt(22, 1), (), prompt(23, 6))
    cache = read(model, PROMPT)
    branches, cache = generate(model, cache, texts)
    whole = [(*PROMPT, *text) if text else () for text in texts]
    assert answers(branches) == expected(whole)
    # Of 20 tokens two full pages are common. The third is the idle row's, since the others
    # copied it; and each of them has what its text and 11 tokens more need after 16.
    ends = [-(-(20 + len(t) + 11 - 16) // PAGE_SIZE) for t in texts if t]
    assert num_pages(cache) == 2 + 1 + sum(ends)
    cache = cache.free(jnp.array([True, True, False, True]))
    assert num_pages(cache) == 3
    again, _ = generate(model, cache, ((), (), prompt(21, 4), ()))
    assert answers(again)[2] == continued((*PROMPT, *prompt(21, 4)))
