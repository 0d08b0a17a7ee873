"""Prompts in turn: which get a row next, and which have to give theirs back."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ._cache import PagedKVCache
from ._generation_state import active, known, left, Plan, reading, State
from ._generation_step import share
from ._page_needs import most_pages, num_pages, pages_at_once


def admissible(state: State, plan: Plan) -> Bool[Array, " num_prompts"]:
    """The prompts that there is a row for, and pages for all that is known of them.

    In order, so that none is passed over for ever: where one does not fit, those after
    it wait as well.
    """
    is_active, lengths = active(state, plan), known(state, plan)
    num_rows = jnp.sum(~is_active, dtype=jnp.int32)
    rank = jnp.cumsum(state.waiting, dtype=jnp.int32) - 1
    fits = state.waiting & (rank < num_rows)
    if isinstance(state.cache, PagedKVCache):
        size = state.cache.page_size
        most = most_pages(plan, size, plan.num_tokens)
        needed = jnp.where(state.waiting, pages_at_once(lengths, size, most), 0)
        promised = jnp.sum(_promised(state, plan), dtype=jnp.int32)
        num_free = state.cache.table.num_free_pages - promised
        fits &= jnp.cumsum(needed, dtype=jnp.int32) <= num_free
    return fits


def _promised(state, plan):
    """The free pages that are for each row: those it has yet to take, of what it reads, and
    one more that it may soon need. A prompt that had to be put back at once would be read
    for nothing."""
    size, is_active = state.cache.page_size, active(state, plan)
    lengths = known(state, plan).at[state.prompt].get(mode="fill", fill_value=0)
    pages = num_pages(lengths, size) + is_active.astype(jnp.int32)
    of_step = jnp.where(reading(state, plan), plan.num_tokens, plan.most_per_step)
    most = most_pages(plan, size, of_step)
    if most is not None:
        pages = jnp.minimum(pages, most)
    # Without those of tokens that were dropped.
    held = num_pages(state.cache.kv_lens, size) - state.cache.table.starts // size
    return jnp.maximum(pages - held, 0)


def admit(state: State, plan: Plan) -> State:
    """Gives rows to the first prompts that wait."""
    admitted = admissible(state, plan)
    free_first = jnp.argsort(active(state, plan), stable=True).astype(jnp.int32)
    rank = jnp.cumsum(admitted, dtype=jnp.int32) - 1
    row = free_first.at[rank].get(mode="clip")
    row = jnp.where(admitted, row, free_first.shape[0])
    prompts = jnp.arange(plan.num_prompts, dtype=jnp.int32)
    return dataclasses.replace(
        state,
        prompt=state.prompt.at[row].set(prompts, mode="drop"),
        waiting=state.waiting & ~admitted,
    )


def put_back(state: State, plan: Plan, num_tokens: int | None) -> State:
    """Frees the youngest rows until there are pages for a step of the others.

    What was made of a prompt is kept, and read again with it when it is admitted again.
    The oldest row stays: if it alone has too few pages, the run fails.
    """
    if not isinstance(state.cache, PagedKVCache):
        return state

    size = state.cache.page_size

    def is_short(state):
        kv_lens = state.cache.kv_lens
        new = kv_lens + share(left(state, plan), num_tokens)
        needed = num_pages(new, size) - num_pages(kv_lens, size)
        too_few = jnp.sum(needed, dtype=jnp.int32) > state.cache.table.num_free_pages
        return too_few & (jnp.sum(active(state, plan)) > 1)

    def without_the_youngest(state):
        # Prompts are admitted in order, so the last of them is the youngest.
        youngest = jnp.max(jnp.where(active(state, plan), state.prompt, -1))
        return dataclasses.replace(
            state.free(state.prompt == youngest),
            prompt=jnp.where(state.prompt == youngest, plan.num_prompts, state.prompt),
            waiting=state.waiting.at[youngest].set(True),
        )

    return jax.lax.while_loop(is_short, without_the_youngest, state)
