"""Two thousand prompts through sixteen rows and a quarter of the pages these may need."""

import jax
import numpy as np
import pytest

from .helpers import told
from .sampling import empty, prompts_of, state_of, table
from .test_generate import (
    answers,
    continued,
    empty as empty_of_model,
    MAX_NEW_TOKENS,
    model,  # noqa: F401  a fixture
    padded,
    prompt,
)


NUM_PROMPTS, NUM_ROWS, MAX_LEN = 2000, 16, 64
RNG = np.random.default_rng(11)


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def continued_by_table(logits, prompt, limit, stops):
    new = []
    while prompt and len(new) < limit and not (new and new[-1] in stops):
        tokens = [*prompt, *new]
        new.append(int(np.argmax(logits[state_of(tokens[-1], len(tokens) - 1)])))
    return new


def served(decoder, cache, prompts, lens, **options):
    """The new tokens of each prompt, and the bytes that are alive after each burst."""
    import eqx_paged

    bursts = eqx_paged.stream(decoder, cache, prompts, lens, donate_cache=True, **options)
    made, alive = [[] for _ in lens], []
    for new in bursts:
        for i, tokens in new.items():
            assert 0 < len(tokens) <= 8
            made[i] += tokens
        alive.append(live_bytes())
    return made, alive, bursts.finish()


@pytest.mark.slow
def test_nothing_is_lost_or_made_twice_and_the_memory_is_flat():
    lengths = RNG.integers(0, 40, NUM_PROMPTS)
    limits = RNG.integers(0, MAX_LEN - 40 + 1, NUM_PROMPTS)
    prompts, rows, lens = prompts_of(lengths.tolist())
    logits, stops = np.asarray(table().logits), (3, 14)
    whole = [
        continued_by_table(logits, prompt, limit, stops)
        for prompt, limit in zip(prompts, limits)
    ]
    ends = [len(new) < limit for new, limit in zip(whole, limits) if new]
    assert 0.1 < np.mean(ends) < 0.9
    num_pages = NUM_ROWS * MAX_LEN // 8 // 4
    made, alive, (generation, cache) = served(
        table(),
        empty(NUM_ROWS, num_pages),
        rows,
        lens,
        max_new_tokens=int(limits.max()),
        limits=limits,
        stop_tokens=stops,
        prefill_chunk=64,
    )
    assert made == whole
    assert told(generation.result) == "successful"
    assert answers(generation) == [tuple(new) for new in whole]
    assert int(cache.table.num_free_pages) == num_pages
    assert len(alive) > 100 and len(set(alive)) == 1


@pytest.mark.slow
def test_attention_over_so_many_prompts_is_that_of_each(model):  # noqa: F811
    lengths = RNG.integers(1, 21, NUM_PROMPTS)
    prompts = [prompt(1000 + i, int(n)) for i, n in enumerate(lengths)]
    num_pages = NUM_ROWS * (20 + MAX_NEW_TOKENS) // 8 // 4
    cache = empty_of_model(num_seqs=NUM_ROWS, num_pages=num_pages, max_len=32)
    rows, lens = padded(prompts)
    options = dict(max_new_tokens=MAX_NEW_TOKENS, prefill_chunk=64)
    made, alive, (_, cache) = served(model, cache, rows, lens, **options)
    assert {len(new) for new in made} == {MAX_NEW_TOKENS}
    assert int(cache.table.num_free_pages) == num_pages
    assert len(set(alive)) == 1
    # The first, the last, and those between whose next tokens are not near ties.
    compared = 0
    for i in range(0, NUM_PROMPTS, 20):
        try:
            whole = continued(prompts[i])
        except AssertionError:
            continue
        assert tuple(made[i]) == whole
        compared += 1
    assert compared > 80
