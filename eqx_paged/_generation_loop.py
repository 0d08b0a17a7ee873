"""The loop of `generate`: steps of all rows, prompts that wait for a row, one program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Key

from ._batch import row_of_token
from ._cache import PagedKVCache
from ._log_probs import LogProbs
from ._next_token import choose, has_stopped
from ._ragged_cache import RaggedKVCache
from ._results import RESULTS


Cache = PagedKVCache | RaggedKVCache


class Plan(eqx.Module):
    """What a run is to do.

    - `prompts`, `prompt_lens`: what to continue.
    - `stop_tokens`, `stop_sequences`: tokens after which a prompt is done; a sequence is
        padded at its front with negative numbers.
    - `limits`: the most tokens to make of each prompt, or None.
    - `key`: for the sampler: one, one a prompt, or None.
    - `sampler`: `(logits, key) -> tokens`, with a place for each prompt in its parameters.
    - `max_new_tokens`: the most tokens to make of any prompt.
    - `num_log_probs`: how many of the most probable tokens to tell the log-probabilities
        of, besides that of the chosen one; None for none at all.
    - `num_tokens`: of a mixed step; at least one a row.
    - `in_turn`: whether rows are freed for prompts that wait. If not, prompt `i` extends
        row `i`, and stays in it.
    """

    prompts: Int32[Array, "num_prompts max_prompt_len"]
    prompt_lens: Int32[Array, " num_prompts"]
    stop_tokens: Int32[Array, " num_stops"]
    stop_sequences: Int32[Array, "num_sequences max_sequence_len"]
    limits: Int32[Array, " num_prompts"] | None
    key: Key[Array, ""] | Key[Array, " num_prompts"] | None
    sampler: Callable[..., Any]
    max_new_tokens: int = eqx.field(static=True)
    num_log_probs: int | None = eqx.field(static=True)
    num_tokens: int = eqx.field(static=True)
    in_turn: bool = eqx.field(static=True)

    @property
    def num_prompts(self) -> int:
        return self.prompts.shape[0]

    @property
    def only_decodes(self) -> bool:
        """Whether every prompt is read as a row's last token is, one token long."""
        one = self.prompts.shape[1] == 1 and self.max_new_tokens > 0
        return one and not self.in_turn


class State(eqx.Module):
    """What the loops carry.

    - `prompt`: the prompt in each row; `num_prompts` in a row without one.
    - `held`: tokens that each row held before its prompt.
    - `waiting`: the prompts that have no row yet, or no more.
    - `tokens`, `lengths`: what was made of each prompt.
    - `log_probs`: of these tokens, if they are asked for.
    - `step`: how many steps there were.
    """

    cache: Cache
    prompt: Int32[Array, " num_seqs"]
    held: Int32[Array, " num_seqs"]
    waiting: Bool[Array, " num_prompts"]
    tokens: Int32[Array, "num_prompts max_new_tokens"]
    lengths: Int32[Array, " num_prompts"]
    log_probs: LogProbs | None
    step: Int32[Array, ""]
    result: RESULTS

    @property
    def is_well(self) -> Bool[Array, ""]:
        return self.result == RESULTS.successful

    @property
    def num_read(self) -> Int32[Array, " num_seqs"]:
        """How many tokens of its prompt and of what was made of it each row holds."""
        return self.cache.kv_lens - self.held


def run(model: Any, cache: Cache, plan: Plan, result: RESULTS) -> State:
    """Continues all prompts, if `result` is that they can be."""
    state = advance(model, begin(cache, plan, result), plan)
    return free_all(state) if plan.in_turn else state


def begin(cache: Cache, plan: Plan, result: RESULTS) -> State:
    """What there is before the first step."""
    exists = plan.prompt_lens > 0
    none = jnp.full(cache.num_seqs, plan.num_prompts, jnp.int32)
    rows = jnp.arange(cache.num_seqs, dtype=jnp.int32)
    shape = (plan.num_prompts, plan.max_new_tokens)
    log_probs = None
    if plan.num_log_probs is not None:
        log_probs = LogProbs.zeros(*shape, plan.num_log_probs)
    return State(
        cache=cache,
        prompt=none if plan.in_turn else jnp.where(exists, rows, none),
        held=cache.kv_lens,
        waiting=exists & plan.in_turn,
        tokens=jnp.zeros(shape, jnp.int32),
        lengths=jnp.zeros(plan.num_prompts, jnp.int32),
        log_probs=log_probs,
        step=jnp.array(0, jnp.int32),
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
            state = _put_back(_admit(state, plan), plan, plan.num_tokens)
        return _step(model, state, plan, plan.num_tokens)

    def decode(state):
        if plan.in_turn:
            state = _put_back(state, plan, None)
        return _step(model, state, plan, None)

    def reads(state):
        some = jnp.any(_reading(state, plan))
        if plan.in_turn:
            some |= jnp.any(_admissible(state, plan))
        return goes_on(state) & some

    def decodes(state):
        some = jnp.any(_active(state, plan))
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

    if not plan.in_turn:
        return turn(state)
    return jax.lax.while_loop(
        lambda state: goes_on(state) & is_unfinished(state, plan), turn, state
    )


def is_unfinished(state: State, plan: Plan) -> Bool[Array, ""]:
    """Whether there are prompts to go on with."""
    return jnp.any(_active(state, plan)) | jnp.any(state.waiting)


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
        state,
        cache=state.cache.free(leaves if plan.in_turn else cancelled),
        prompt=jnp.where(leaves, plan.num_prompts, state.prompt),
        waiting=state.waiting & ~ended,
    )


def free_all(state: State) -> State:
    """With all rows empty."""
    everything = jnp.ones(state.cache.num_seqs, bool)
    return dataclasses.replace(state, cache=state.cache.free(everything))


# --- A step


def _step(model, state, plan, num_tokens):
    left = _left(state, plan)
    q_lens = _share(left, num_tokens)
    cache, batch, result = state.cache.append(q_lens, num_tokens)
    if num_tokens is None:
        row, exists = jnp.arange(left.shape[0], dtype=jnp.int32), q_lens > 0
        position = state.num_read
    else:
        row, exists = row_of_token(batch.cu_q_lens, num_tokens)
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        position = state.num_read[row] + token - batch.cu_q_lens[row]
    tokens = _tokens_at(state, plan, state.prompt[row], position)
    hidden, cache = model(jnp.where(exists, tokens, 0), cache, batch)
    state = dataclasses.replace(state, cache=cache, result=result, step=state.step + 1)
    complete = (q_lens > 0) & (q_lens == left) & state.is_well
    return _sample(model, state, plan, hidden, batch, complete)


def _share(left, num_tokens):
    """The tokens of each row in a step: one a row, and the others in order of rows."""
    ones = (left > 0).astype(jnp.int32)
    if num_tokens is None:
        return ones
    more = left - ones
    before = jnp.cumsum(more, dtype=jnp.int32) - more
    spare = num_tokens - jnp.sum(ones, dtype=jnp.int32)
    return ones + jnp.clip(spare - before, 0, more)


def _tokens_at(state, plan, prompt, position):
    """The tokens at positions of prompts and of what was made of them."""
    tokens = plan.prompts.at[prompt, position].get(mode="clip")
    if plan.max_new_tokens == 0:
        return tokens
    past = position - plan.prompt_lens.at[prompt].get(mode="clip")
    made = state.tokens.at[prompt, past].get(mode="clip")
    return jnp.where(past < 0, tokens, made)


def _sample(model, state, plan, hidden, batch, complete):
    """Puts the next token after those of the rows that have read all they have."""
    goes_on = jnp.zeros_like(complete)
    if plan.max_new_tokens > 0:
        logits = model.unembed(hidden[batch.last_tokens])
        new = choose(logits, state, plan)
        limit, makes = plan.max_new_tokens, complete
        column = state.lengths.at[state.prompt].get(mode="clip")
        if plan.limits is not None:
            limit = jnp.minimum(limit, plan.limits.at[state.prompt].get(mode="clip"))
            makes = complete & (column < limit)
        prompt = jnp.where(makes, state.prompt, plan.num_prompts)
        state = dataclasses.replace(
            state,
            tokens=state.tokens.at[prompt, column].set(new, mode="drop"),
            lengths=state.lengths.at[prompt].add(1, mode="drop"),
        )
        if state.log_probs is not None:
            log_probs = state.log_probs.put(prompt, column, logits, new)
            state = dataclasses.replace(state, log_probs=log_probs)
        goes_on = makes & ~has_stopped(new, state, plan) & (column + 1 < limit)
    finished = complete & ~goes_on
    prompt = jnp.where(finished, plan.num_prompts, state.prompt)
    cache = state.cache.free(finished) if plan.in_turn else state.cache
    return dataclasses.replace(state, prompt=prompt, cache=cache)


# --- What rows have yet to do


def _active(state, plan):
    return state.prompt < plan.num_prompts


def _left(state, plan):
    """The tokens that each row has yet to read: the last one made, while it decodes."""
    known = _known(state, plan).at[state.prompt].get(mode="fill", fill_value=0)
    return jnp.where(_active(state, plan), known - state.num_read, 0)


def _known(state, plan):
    """The tokens of each prompt and of what was made of it."""
    return plan.prompt_lens + state.lengths


def _reading(state, plan):
    """The rows that have more to read than the last token made."""
    made = state.lengths.at[state.prompt].get(mode="fill", fill_value=1)
    return (_left(state, plan) > 1) | (made == 0)


# --- Prompts in turn


def _admissible(state, plan):
    """The prompts that there is a row for, and pages for all that is known of them.

    In order, so that none is passed over for ever: where one does not fit, those after
    it wait as well.
    """
    active, known = _active(state, plan), _known(state, plan)
    num_rows = jnp.sum(~active, dtype=jnp.int32)
    rank = jnp.cumsum(state.waiting, dtype=jnp.int32) - 1
    fits = state.waiting & (rank < num_rows)
    if isinstance(state.cache, PagedKVCache):
        needed = jnp.where(state.waiting, _num_pages(state.cache, known), 0)
        # Rows that are being read have yet to take theirs, and each may soon need one
        # more: a prompt that had to be put back at once would be read for nothing.
        in_rows = known.at[state.prompt].get(mode="fill", fill_value=0)
        promised = _num_pages(state.cache, in_rows) + active.astype(jnp.int32)
        promised -= _num_pages(state.cache, state.cache.kv_lens)
        num_free = state.cache.table.num_free_pages - jnp.sum(promised, dtype=jnp.int32)
        fits &= jnp.cumsum(needed, dtype=jnp.int32) <= num_free
    return fits


def _admit(state, plan):
    """Gives rows to the first prompts that wait."""
    admitted = _admissible(state, plan)
    free_first = jnp.argsort(_active(state, plan), stable=True).astype(jnp.int32)
    rank = jnp.cumsum(admitted, dtype=jnp.int32) - 1
    row = free_first.at[rank].get(mode="clip")
    row = jnp.where(admitted, row, free_first.shape[0])
    prompts = jnp.arange(plan.num_prompts, dtype=jnp.int32)
    return dataclasses.replace(
        state,
        prompt=state.prompt.at[row].set(prompts, mode="drop"),
        waiting=state.waiting & ~admitted,
    )


def _put_back(state, plan, num_tokens):
    """Frees the youngest rows until there are pages for a step of the others.

    What was made of a prompt is kept, and read again with it when it is admitted again.
    The oldest row stays: if it alone has too few pages, the run fails.
    """
    if not isinstance(state.cache, PagedKVCache):
        return state

    def is_short(state):
        kv_lens = state.cache.kv_lens
        new = kv_lens + _share(_left(state, plan), num_tokens)
        needed = _num_pages(state.cache, new) - _num_pages(state.cache, kv_lens)
        too_few = jnp.sum(needed, dtype=jnp.int32) > state.cache.table.num_free_pages
        return too_few & (jnp.sum(_active(state, plan)) > 1)

    def without_the_youngest(state):
        # Prompts are admitted in order, so the last of them is the youngest.
        active = _active(state, plan)
        youngest = jnp.max(jnp.where(active, state.prompt, -1))
        return dataclasses.replace(
            state,
            cache=state.cache.free(state.prompt == youngest),
            prompt=jnp.where(state.prompt == youngest, plan.num_prompts, state.prompt),
            waiting=state.waiting.at[youngest].set(True),
        )

    return jax.lax.while_loop(is_short, without_the_youngest, state)


def _num_pages(cache, length):
    return -(-length // cache.page_size)
