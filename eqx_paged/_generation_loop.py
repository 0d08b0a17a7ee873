"""The loop of `generate`: steps of all rows, prompts that wait for a row, one program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from ._admission import admissible, admit, put_back
from ._generation_state import active, Cache, Drafted, Plan, reading, State
from ._generation_step import step
from ._log_probs import LogProbs
from ._results import RESULTS
from ._speculation import speculate


def run(
    model: Any,
    cache: Cache,
    plan: Plan,
    result: RESULTS,
    draft_cache: Cache | None = None,
) -> State:
    """Continues all prompts, if `result` is that they can be."""
    state = advance(model, begin(cache, plan, result, draft_cache), plan)
    return free_all(state) if plan.in_turn else state


def begin(
    cache: Cache, plan: Plan, result: RESULTS, draft_cache: Cache | None = None
) -> State:
    """What there is before the first step."""
    exists = plan.prompt_lens > 0
    none = jnp.full(cache.num_seqs, plan.num_prompts, jnp.int32)
    rows = jnp.arange(cache.num_seqs, dtype=jnp.int32)
    shape = (plan.num_prompts, plan.max_new_tokens)
    log_probs = None
    if plan.num_log_probs is not None:
        log_probs = LogProbs.zeros(*shape, plan.num_log_probs)
    drafted, none_yet = None, jnp.zeros(plan.num_prompts, jnp.int32)
    if plan.draft is not None:
        drafted = Drafted(draft_cache, proposed=none_yet, accepted=none_yet)
    return State(
        cache=cache,
        prompt=none if plan.in_turn else jnp.where(exists, rows, none),
        held=cache.kv_lens,
        waiting=exists & plan.in_turn,
        tokens=jnp.zeros(shape, jnp.int32),
        lengths=none_yet,
        log_probs=log_probs,
        step=jnp.array(0, jnp.int32),
        drafted=drafted,
        result=result,
    )


def advance(
    model: Any, state: State, plan: Plan, end: Int32[Array, ""] | None = None
) -> State:
    """Continues the prompts until all are done, or until step `end`.

    What a step does depends on the state alone, so that it is the same with and without
    ends between.
    """

    def goes_on(state):
        return state.is_well if end is None else state.is_well & (state.step < end)

    def read(state):
        if plan.in_turn:
            state = put_back(admit(state, plan), plan, plan.num_tokens)
        return step(model, state, plan, plan.num_tokens)

    def decode(state):
        if plan.in_turn:
            state = put_back(state, plan, None)
        if plan.draft is not None:
            return speculate(model, state, plan)
        return step(model, state, plan, None)

    def reads(state):
        some = jnp.any(reading(state, plan))
        if plan.in_turn:
            some |= jnp.any(admissible(state, plan))
        return goes_on(state) & some

    def decodes(state):
        some = jnp.any(active(state, plan))
        if not plan.only_decodes:
            some &= ~reads(state)
        return goes_on(state) & some

    # What a program never does is not compiled: each loop holds the whole model.
    def turn(state):
        if not plan.only_decodes:
            state = jax.lax.while_loop(reads, read, state)
        if plan.only_decodes or plan.max_new_tokens > 1:
            state = jax.lax.while_loop(decodes, decode, state)
        return state

    def turn_of_some(state):
        return turn(_unless_stuck(state, plan))

    if not plan.in_turn:
        return turn(state)
    return jax.lax.while_loop(
        lambda state: goes_on(state) & is_unfinished(state, plan), turn_of_some, state
    )


def _unless_stuck(state, plan):
    """Fails where no row has a prompt and none can get one: that would be so for ever."""
    some = jnp.any(active(state, plan)) | jnp.any(admissible(state, plan))
    result = RESULTS.where(some, state.result, RESULTS.out_of_pages)
    return dataclasses.replace(state, result=result)


def is_unfinished(state: State, plan: Plan) -> Bool[Array, ""]:
    """Whether there are prompts to go on with."""
    return jnp.any(active(state, plan)) | jnp.any(state.waiting)


def open_prompts(state: State) -> Bool[Array, " num_prompts"]:
    """The prompts to go on with."""
    return state.waiting.at[state.prompt].set(True, mode="drop")


def end_prompts(
    state: State,
    plan: Plan,
    ended: Bool[Array, " num_prompts"],
    cancelled: Bool[Array, " num_prompts"],
) -> State:
    """Without some prompts; the rows of cancelled ones are emptied, whatever they hold."""
    leaves = ended.at[state.prompt].get(mode="fill", fill_value=False)
    return dataclasses.replace(
        state.free(leaves if plan.in_turn else cancelled),
        prompt=jnp.where(leaves, plan.num_prompts, state.prompt),
        waiting=state.waiting & ~ended,
    )


def free_all(state: State) -> State:
    """With all rows empty."""
    return state.free(jnp.ones(state.cache.num_seqs, bool))
