"""Beam search: a beam is a row, forked from another beam's and freed, in one program."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from ._cache import PagedKVCache
from ._checks import check_positive, first_of
from ._generate import generate
from ._generation_checks import (
    check_prompts,
    check_rows_fit,
    check_stop_tokens,
    is_traced,
)
from ._model import Model
from ._results import RESULTS


EarlyStopping = bool | Literal["never"]


class Hypotheses(eqx.Module):
    """What [`eqx_paged.beam_search`][] found, the best of each prompt first.

    - `tokens`: of each hypothesis, a stop token included; 0 past its length.
    - `lengths`: how many there are; 0 where there is no hypothesis.
    - `scores`: the sum of the tokens' log-probabilities, divided by
        `length ** length_penalty`; `-inf` where there is no hypothesis.
    - `result`: `successful`, or what ended the search early. What was found until then is
        kept.
    """

    tokens: Int32[Array, "num_prompts num_beams max_new_tokens"]
    lengths: Int32[Array, "num_prompts num_beams"]
    scores: Float32[Array, "num_prompts num_beams"]
    result: RESULTS


def beam_search(
    model: Model,
    cache: PagedKVCache,
    prompts: Int[Array | np.ndarray, "num_prompts max_prompt_len"],
    prompt_lens: Int[Array | np.ndarray, " num_prompts"],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | Int[Array | np.ndarray, " num_stops"] = (),
    length_penalty: float | Float[Array, ""] = 1.0,
    early_stopping: EarlyStopping = False,
    prefill_chunk: int = 512,
    throw: bool = True,
) -> tuple[Hypotheses, PagedKVCache]:
    """Finds `num_beams` probable continuations of each prompt.

    One compiled program, of `append`, `fork` and `free`: the beams of a prompt share its
    pages, and those of what they have in common. A beam that nothing continues is freed.

    In each step the `max(2, 1 + num_stops) * num_beams` most probable continuations by one
    token are looked at. Those among the first `num_beams` of them that end, in a stop
    token or at `max_new_tokens`, become hypotheses, of which the best `num_beams` by score
    are kept; the best that do not end are the next beams. Scores and stopping are those of
    Hugging Face's `generate`.

    **Arguments:**

    - `model`, `stop_tokens`, `prefill_chunk`, `throw`: as in [`eqx_paged.generate`][].
    - `cache`: with `num_beams` rows a prompt, or more. Prompt `i` extends row
        `i * num_beams`, whatever that holds; the rows after it are for its other beams,
        and must be empty.
    - `prompts`, `prompt_lens`: as in `generate`; nothing is found for one of length 0.
    - `num_beams`: beams a prompt, and hypotheses.
    - `max_new_tokens`: the most tokens of a hypothesis.
    - `length_penalty`: the exponent of the length, by which a score is divided: above 0 it
        favours long hypotheses, below 0 short ones.
    - `early_stopping`: when to stop once a prompt has `num_beams` hypotheses. True: at
        once. False: when the best beam, were it to end now, would be no better than the
        worst of them. `"never"`: when no beam can become better than the worst of them at
        all.

    **Returns:**

    The [`eqx_paged.Hypotheses`][], and the cache, in which the rows of the search are
    empty. To keep what row `i * num_beams` held, fork it to another row before.

    **Raises:**

    `ValueError` for arguments that do not fit together. With `throw`, also a `ValueError`
    if the prompts do not fit the cache, before any work; and a `RuntimeError` if the
    search failed later. `cache` is as it was, in any case.
    """
    check_positive(
        num_beams=num_beams, max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk
    )
    check_prompts(prompts, prompt_lens)
    check_stop_tokens(stop_tokens)
    if early_stopping not in (True, False, "never"):
        raise ValueError(
            f'early_stopping must be True, False or "never", but is {early_stopping!r}.'
        )
    num_prompts, max_prompt_len = prompts.shape
    if num_prompts * num_beams > cache.num_seqs:
        raise ValueError(
            f"{num_prompts} prompts with {num_beams} beams each need "
            f"{num_prompts * num_beams} rows, but the cache has {cache.num_seqs}."
        )
    arguments = (model, cache, prompts, prompt_lens, stop_tokens, length_penalty)
    if throw and is_traced(arguments):
        raise ValueError("beam_search needs throw=False under jit: it cannot raise there.")
    if throw:
        _check_fit(cache, max_prompt_len, np.asarray(prompt_lens), num_beams)
    plan = Plan(
        prompts=jnp.asarray(prompts, jnp.int32),
        prompt_lens=jnp.asarray(prompt_lens, jnp.int32),
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        length_penalty=jnp.asarray(length_penalty, jnp.float32),
        num_beams=int(num_beams),
        max_new_tokens=int(max_new_tokens),
        stops_early=jnp.array(early_stopping is True),
        never_stops_early=jnp.array(early_stopping == "never"),
        prefill_chunk=int(prefill_chunk),
    )
    found, cache = _search(model, cache, plan)
    if throw and found.result != RESULTS.successful:
        raise RuntimeError(
            f"{RESULTS[found.result]} {int(jnp.sum(found.lengths > 0))} hypotheses had "
            "been found until then; `throw=False` returns them."
        )
    return found, cache


class Plan(eqx.Module):
    """What a search is to do: the arguments of `beam_search`."""

    prompts: Int32[Array, "num_prompts max_prompt_len"]
    prompt_lens: Int32[Array, " num_prompts"]
    stop_tokens: Int32[Array, " num_stops"]
    length_penalty: Float32[Array, ""]
    stops_early: Bool[Array, ""]
    never_stops_early: Bool[Array, ""]
    num_beams: int = eqx.field(static=True)
    max_new_tokens: int = eqx.field(static=True)
    prefill_chunk: int = eqx.field(static=True)

    @property
    def num_prompts(self) -> int:
        return self.prompts.shape[0]

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.num_beams

    @property
    def num_candidates(self) -> int:
        """Enough that `num_beams` of them do not end in a stop token."""
        return max(2, 1 + self.stop_tokens.shape[0]) * self.num_beams


class Beams(eqx.Module):
    """The beams of each prompt, in the order of their rows.

    - `tokens`: what each has made, `State.length` tokens.
    - `last`: the token that each has yet to read.
    - `sums`: of the log-probabilities; `-inf` where there is no beam.
    """

    tokens: Int32[Array, "num_prompts num_beams max_new_tokens"]
    last: Int32[Array, "num_prompts num_beams"]
    sums: Float32[Array, "num_prompts num_beams"]


class State(eqx.Module):
    """What the loop carries; a prompt that is not `open` is done."""

    cache: PagedKVCache
    beams: Beams
    found: Hypotheses
    open: Bool[Array, " num_prompts"]
    length: Int32[Array, ""]


@eqx.filter_jit
def _search(model, cache, plan):
    result = _result_of_prompts(cache, plan)
    ok = result == RESULTS.successful
    if plan.prompts.shape[1] > 1:
        # All but the last token, which the first step of the loop reads.
        lens = jnp.where(ok, jnp.maximum(plan.prompt_lens - 1, 0), 0)
        made, cache = generate(
            model,
            cache,
            _in_first_rows(plan.prompts, cache, plan),
            _in_first_rows(lens, cache, plan),
            max_new_tokens=0,
            prefill_chunk=plan.prefill_chunk,
            throw=False,
        )
        result = RESULTS.where(ok, made.result, result)
    state = _begin(cache, plan, result)
    state = jax.lax.while_loop(
        lambda state: jnp.any(state.open), lambda state: _step(model, state, plan), state
    )
    return state.found, state.cache


def _begin(cache, plan, result):
    shape = (plan.num_prompts, plan.num_beams)
    tokens = jnp.zeros((*shape, plan.max_new_tokens), jnp.int32)
    none = jnp.full(shape, -jnp.inf, jnp.float32)
    exists = (plan.prompt_lens > 0) & (result == RESULTS.successful)
    last = plan.prompt_lens - 1
    last = jnp.take_along_axis(plan.prompts, jnp.maximum(last, 0)[:, None], axis=1)
    return State(
        cache=cache,
        # One beam, from which the others are forked.
        beams=Beams(
            tokens=tokens,
            last=jnp.broadcast_to(last, shape),
            sums=none.at[:, 0].set(jnp.where(exists, 0.0, -jnp.inf)),
        ),
        found=Hypotheses(tokens, jnp.zeros(shape, jnp.int32), none, result),
        open=exists,
        length=jnp.array(0, jnp.int32),
    )


# --- A step


class Candidates(eqx.Module):
    """Continuations by one token, the most probable first."""

    sums: Float32[Array, "num_prompts num_candidates"]
    tokens: Int32[Array, "num_prompts num_candidates max_new_tokens"]
    last: Int32[Array, "num_prompts num_candidates"]
    parents: Int32[Array, "num_prompts num_candidates"]
    ends: Bool[Array, "num_prompts num_candidates"]


def _step(model, state, plan):
    logits, cache, result = _read(model, state, plan)
    # After a failure nothing is probable, and all rows are freed.
    goes_on = state.open & (result == RESULTS.successful)
    candidates = _continue(state, plan, logits, goes_on)
    length = state.length + 1
    found = _keep_the_best(state.found, candidates, length, plan)
    sums, chosen = jax.lax.top_k(
        jnp.where(candidates.ends, -jnp.inf, candidates.sums), plan.num_beams
    )
    still_open = goes_on & _can_improve(found, sums, length, plan)
    sums = jnp.where(still_open[:, None], sums, -jnp.inf)
    parents = _take(candidates.parents, chosen)
    rows, stays = _rows_of(parents, sums > -jnp.inf)
    beams = Beams(_take(candidates.tokens, chosen), _take(candidates.last, chosen), sums)
    return State(
        cache=_reorder(cache, plan, parents, rows, stays, sums > -jnp.inf),
        beams=jax.tree.map(lambda x: _put(x, rows), beams),
        found=dataclasses.replace(found, result=result),
        open=still_open,
        length=length,
    )


def _read(model, state, plan):
    """The logits of each beam's next token."""
    beams, unused = state.beams, state.cache.num_seqs - plan.num_rows
    lives = jnp.pad((beams.sums > -jnp.inf).reshape(-1), (0, unused))
    tokens = jnp.where(lives, jnp.pad(beams.last.reshape(-1), (0, unused)), 0)
    cache, batch, result = state.cache.append(lives.astype(jnp.int32))
    hidden, cache = model(tokens, cache, batch)
    logits = model.unembed(hidden[: plan.num_rows])
    return logits.reshape(*beams.sums.shape, -1), cache, result


def _continue(state, plan, logits, goes_on):
    beams = state.beams
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    sums = beams.sums[:, :, None] + log_probs
    # An idle row's logits may be anything.
    lives = (beams.sums > -jnp.inf) & goes_on[:, None]
    sums = jnp.where(lives[:, :, None], sums, -jnp.inf)
    vocab_size = logits.shape[-1]
    sums = sums.reshape(plan.num_prompts, -1)
    num_candidates = min(plan.num_candidates, sums.shape[1])
    sums, which = jax.lax.top_k(sums, num_candidates)
    parents, last = (x.astype(jnp.int32) for x in jnp.divmod(which, vocab_size))
    tokens = _take(beams.tokens, parents).at[:, :, state.length].set(last)
    stops = jnp.any(last[:, :, None] == plan.stop_tokens[None, None], axis=2)
    ends = stops | (state.length + 1 == plan.max_new_tokens)
    return Candidates(sums, tokens, last, parents, ends)


def _keep_the_best(found, candidates, length, plan):
    """The hypotheses, with those of the first `num_beams` candidates that end."""
    first = jax.tree.map(lambda x: x[:, : plan.num_beams], candidates)
    scores = first.sums / _penalty(length, plan)
    scores = jnp.where(first.ends, scores, -jnp.inf)
    lengths = jnp.where(scores > -jnp.inf, length, 0)
    tokens = jnp.where((scores > -jnp.inf)[:, :, None], first.tokens, 0)

    def joined(old, new):
        return jnp.concatenate([old, new], axis=1)

    scores, best = jax.lax.top_k(joined(found.scores, scores), plan.num_beams)
    return Hypotheses(
        tokens=_take(joined(found.tokens, tokens), best),
        lengths=_take(joined(found.lengths, lengths), best),
        scores=scores,
        result=found.result,
    )


def _can_improve(found, sums, length, plan):
    """Whether a prompt's beams may yet give a better hypothesis than its worst."""
    worst = jnp.min(found.scores, axis=1)  # -inf while there are too few
    longest = plan.never_stops_early & (plan.length_penalty > 0)
    at = jnp.where(longest, plan.max_new_tokens, length)
    best = jnp.max(sums, axis=1) / _penalty(at, plan)
    return (best > worst) & ~(plan.stops_early & (worst > -jnp.inf))


def _penalty(length, plan):
    return length.astype(jnp.float32) ** plan.length_penalty


# --- The rows of the beams


def _rows_of(parents, lives):
    """A row for each beam, and whether it is its parent's.

    The first of a parent's beams stays in the parent's row; the others, and after them
    those that do not live, get the rows of parents without one.
    """
    num_beams = parents.shape[1]
    row = jnp.arange(num_beams, dtype=jnp.int32)
    siblings = (parents[:, :, None] == parents[:, None, :]) & lives[:, None, :]
    older = row[None, None, :] < row[None, :, None]
    stays = lives & ~jnp.any(siblings & older, axis=2)
    taken = jnp.any(stays[:, :, None] & (parents[:, :, None] == row[None, None]), axis=1)
    vacant = jnp.argsort(taken, axis=1, stable=True).astype(jnp.int32)
    rank = jnp.cumsum(~stays, axis=1, dtype=jnp.int32) - 1
    return jnp.where(stays, parents, _take(vacant, jnp.maximum(rank, 0))), stays


def _reorder(cache, plan, parents, rows, stays, lives):
    """Frees the rows that no beam continues, and forks beams into them."""
    first_row = jnp.arange(plan.num_prompts, dtype=jnp.int32)[:, None] * plan.num_beams
    src, dst = ((x + first_row).reshape(-1) for x in (parents, rows))
    leaves, moves = (x.reshape(-1) for x in (~stays, lives & ~stays))
    # The row of a prompt of length 0 is not ours.
    leaves &= jnp.repeat(plan.prompt_lens > 0, plan.num_beams)
    freed = jnp.zeros(cache.num_seqs, bool).at[dst].set(leaves)
    cache, _ = cache.free(freed).fork(src, dst, where=moves)
    return cache


def _take(x, index):
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _put(x, index):
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(x).at[rows, index].set(x)


# --- Checks


def _result_of_prompts(cache, plan):
    """Whether the prompts can be read, before any work."""
    lens = plan.prompt_lens
    held = cache.kv_lens[: plan.num_rows].reshape(-1, plan.num_beams)
    faults = first_of(
        (jnp.any((lens > plan.prompts.shape[1]) | (lens < 0)), RESULTS.invalid_argument),
        (jnp.any(held[:, 1:] > 0), RESULTS.row_in_use),
    )
    _, _, result = cache.append(_in_first_rows(lens, cache, plan), plan.prompts.size)
    return RESULTS.where(faults == RESULTS.successful, result, faults)


def _in_first_rows(x, cache, plan):
    """One entry a row, of which each prompt has that of its first."""
    rows = jnp.arange(plan.num_prompts, dtype=jnp.int32) * plan.num_beams
    return jnp.zeros((cache.num_seqs, *x.shape[1:]), x.dtype).at[rows].set(x)


def _check_fit(cache, max_prompt_len, prompt_lens, num_beams):
    held = np.asarray(cache.kv_lens)[: len(prompt_lens) * num_beams]
    for row in np.flatnonzero(held):
        if row % num_beams:
            raise ValueError(
                f"Row {row} is for another beam of prompt {row // num_beams} and must be "
                f"empty, but holds {held[row]} tokens."
            )
    rows = np.arange(len(prompt_lens)) * num_beams
    check_rows_fit(cache, max_prompt_len, prompt_lens, rows)
