"""Prompts in turn: which get a row next, and which have to give theirs back."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ._cache import PagedKVCache
from ._generation_state import (
    active,
    known,
    left,
    num_pages,
    pages_at_once,
    Plan,
    State,
)
from ._generation_step import share


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
        needed = pages_at_once(state.cache, plan, lengths)
        needed = jnp.where(state.waiting, needed, 0)
        # Rows that are being read have yet to take theirs, and each may soon need one
        # more: a prompt that had to be put back at once would be read for nothing.
        in_rows = lengths.at[state.prompt].get(mode="fill", fill_value=0)
        promised = pages_at_once(state.cache, plan, in_rows) + is_active.astype(jnp.int32)
        promised = jnp.maximum(promised - _num_held(state.cache), 0)
        num_free = state.cache.table.num_free_pages - jnp.sum(promised, dtype=jnp.int32)
        fits &= jnp.cumsum(needed, dtype=jnp.int32) <= num_free
    return fits


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

    def is_short(state):
        kv_lens = state.cache.kv_lens
        new = kv_lens + share(left(state, plan), num_tokens)
        needed = num_pages(state.cache, new) - num_pages(state.cache, kv_lens)
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


def _num_held(cache):
    """The pages of each row; without those of tokens that were dropped."""
    return num_pages(cache, cache.kv_lens) - cache.table.starts // cache.page_size
