"""A step of `generate`: one call of the model, and what follows from its logits."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ._batch import row_of_token
from ._cache import PagedKVCache
from ._checks import first_of
from ._draft_model import DraftModel
from ._generation_state import active, left, limits_of_rows, Plan, State, tokens_at
from ._next_token import choose, has_stopped
from ._results import RESULTS


def step(model: Any, state: State, plan: Plan, num_tokens: int | None) -> State:
    """Reads tokens of all rows, `num_tokens` at most, and makes the next token of each row
    that has then read all it has. None is for one token a row."""
    to_read, held = left(state, plan), state.cache.kv_lens
    q_lens = share(to_read, num_tokens)
    cache, batch, result = state.cache.append(q_lens, num_tokens)
    if num_tokens is None:
        row, exists = jnp.arange(to_read.shape[0], dtype=jnp.int32), q_lens > 0
        position = state.num_read
    else:
        row, exists = row_of_token(batch.cu_q_lens, num_tokens)
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        position = state.num_read[row] + token - batch.cu_q_lens[row]
    tokens = tokens_at(state, plan, state.prompt[row], position)
    tokens = jnp.where(exists, tokens, 0)
    hidden, cache = model(tokens, cache, batch)
    drafted, draft_result = state.drafted, RESULTS.successful
    if isinstance(plan.draft, DraftModel):
        assert drafted is not None and drafted.cache is not None
        draft_cache, draft_result = plan.draft.read(
            tokens, drafted.cache, q_lens, num_tokens
        )
        drafted = dataclasses.replace(drafted, cache=draft_cache)
    state = dataclasses.replace(
        state,
        cache=cache,
        drafted=drafted,
        result=both(result, draft_result),
        step=state.step + 1,
    )
    if isinstance(plan.draft, DraftModel):
        # Both models read the step's tokens, or neither does.
        held = jnp.where(state.is_well, cache.kv_lens, held)
        state = state.with_caches(lambda cache: cache.truncate(held))
    complete = (q_lens > 0) & (q_lens == to_read) & state.is_well
    goes_on = jnp.zeros_like(complete)
    if plan.max_new_tokens > 0:
        logits = model.unembed(hidden[batch.last_tokens])
        state, _, goes_on = add_token(logits, state, plan, complete)
    return leave_rows(drop_unseen(state, plan), plan, complete & ~goes_on)


def share(
    to_read: Int32[Array, " num_seqs"], num_tokens: int | None
) -> Int32[Array, " num_seqs"]:
    """The tokens of each row in a step: one a row, and the others in order of rows."""
    ones = (to_read > 0).astype(jnp.int32)
    if num_tokens is None:
        return ones
    more = to_read - ones
    before = jnp.cumsum(more, dtype=jnp.int32) - more
    spare = num_tokens - jnp.sum(ones, dtype=jnp.int32)
    return ones + jnp.clip(spare - before, 0, more)


def add_token(
    logits: Float[Array, "num_seqs vocab_size"],
    state: State,
    plan: Plan,
    complete: Bool[Array, " num_seqs"],
) -> tuple[State, Int32[Array, " num_seqs"], Bool[Array, " num_seqs"]]:
    """Puts the next token after those of some rows.

    Returns with the state the next token of every row, and the rows that go on after it.
    """
    new = choose(logits, state, plan)
    limit = limits_of_rows(state, plan)
    column = state.lengths.at[state.prompt].get(mode="clip")
    makes = complete & (column < limit)
    prompt = jnp.where(makes, state.prompt, plan.num_prompts)
    log_probs = state.log_probs
    if log_probs is not None:
        log_probs = log_probs.put(prompt, column, logits, new)
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[prompt, column].set(new, mode="drop"),
        lengths=state.lengths.at[prompt].add(1, mode="drop"),
        log_probs=log_probs,
    )
    goes_on = makes & ~has_stopped(new, state, plan) & (column + 1 < limit)
    return state, new, goes_on


def drop_unseen(state: State, plan: Plan) -> State:
    """Without the pages of the active rows that no layer sees any more."""
    if plan.window is None or not isinstance(state.cache, PagedKVCache):
        return state
    # The next token sees itself as well.
    seen_from = state.cache.kv_lens + 1 - plan.window
    seen_from = jnp.where(active(state, plan), seen_from, 0)
    return dataclasses.replace(state, cache=state.cache.drop_before(seen_from))


def leave_rows(state: State, plan: Plan, finished: Bool[Array, " num_seqs"]) -> State:
    """Without the prompts of some rows, which are freed if others are to have them."""
    prompt = jnp.where(finished, plan.num_prompts, state.prompt)
    state = dataclasses.replace(state, prompt=prompt)
    return state.free(finished) if plan.in_turn else state


def both(result: RESULTS, other: RESULTS) -> RESULTS:
    """The first that is not a success."""
    return first_of((result != RESULTS.successful, result), (jnp.array(True), other))
