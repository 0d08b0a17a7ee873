"""Beam search: a beam is a row, forked from another beam's and freed, in one program."""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._beam_step import begin, Hypotheses, SearchPlan, step
from ._cache import PagedKVCache
from ._checks import check_positive, first_of
from ._generate import generate
from ._generation_checks import (
    check_lens,
    check_pages,
    check_prompts,
    check_stop_tokens,
    is_traced,
)
from ._model import Model
from ._page_needs import pages_to_read
from ._results import RESULTS


EarlyStopping = bool | np.bool_ | Literal["never"]


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
        favours long hypotheses, below 0 short ones. Finite.
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
    if not isinstance(cache, PagedKVCache):
        raise ValueError(
            "beam_search forks rows of a PagedKVCache, but cache is a "
            f"{type(cache).__name__}."
        )
    check_prompts(prompts, prompt_lens)
    check_stop_tokens(stop_tokens)
    _check_length_penalty(length_penalty)
    is_never = isinstance(early_stopping, str) and early_stopping == "never"
    if not is_never and not isinstance(early_stopping, (bool, np.bool_)):
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
    plan = SearchPlan(
        prompts=jnp.asarray(prompts, jnp.int32),
        prompt_lens=jnp.asarray(prompt_lens, jnp.int32),
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        length_penalty=jnp.asarray(length_penalty, jnp.float32),
        num_beams=int(num_beams),
        max_new_tokens=int(max_new_tokens),
        stops_early=jnp.array(not is_never and bool(early_stopping)),
        never_stops_early=jnp.array(is_never),
        prefill_chunk=int(prefill_chunk),
    )
    found, cache = _search(model, cache, plan)
    if throw and found.result != RESULTS.successful:
        raise RuntimeError(
            f"{RESULTS[found.result]} {int(jnp.sum(found.lengths > 0))} hypotheses had "
            "been found until then; `throw=False` returns them."
        )
    return found, cache


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
    state = begin(cache, plan, result)
    state = jax.lax.while_loop(
        lambda state: jnp.any(state.open), lambda state: step(model, state, plan), state
    )
    return state.found, state.cache


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
    check_lens(cache, max_prompt_len, prompt_lens, rows)
    lens = np.zeros(cache.num_seqs, np.int32)
    lens[rows] = prompt_lens
    needed = pages_to_read(jax.device_get(cache.table), lens)
    check_pages(cache, needed.sum(), "The prompts need")


def _check_length_penalty(penalty):
    if is_traced(penalty):
        return
    array = np.asarray(penalty)
    is_real = any(jnp.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating))
    # As what it is used: a larger one is infinite in float32.
    largest = np.finfo(np.float32).max
    if array.shape != () or not is_real or not abs(array) <= largest:
        raise ValueError(f"length_penalty must be a finite number, but is {penalty!r}.")
