"""From the arguments of `generate` to what its loop is to do."""

import jax
import jax.numpy as jnp
import numpy as np

from ._cache import PagedKVCache
from ._checks import check_int, check_positive, first_of, INT32_MAX
from ._draft_model import DraftModel
from ._generation_checks import (
    check_cache_of_loop,
    check_draft,
    check_draft_pages,
    check_key,
    check_limits,
    check_prompts,
    check_sampler,
    check_stop_sequences,
    check_stop_tokens,
    is_traced,
)
from ._generation_state import Plan
from ._page_needs import pages_before_work
from ._results import RESULTS
from .samplers._chain import Chain, typed_keys


def plan_of(
    cache,
    prompts,
    prompt_lens,
    *,
    max_new_tokens,
    limits,
    stop_tokens,
    stop_sequences,
    sampler,
    key,
    log_probs,
    draft,
    window,
    prefill_chunk,
):
    """The arguments of `generate`, checked, as a plan, and the cache of a model that
    drafts.

    The plan has as many prompts as the cache has rows, at least: so another number of
    prompts that all have a row is no other program.
    """
    check_cache_of_loop(cache)
    check_int(max_new_tokens=max_new_tokens, least=0, greatest=INT32_MAX)
    check_positive(prefill_chunk=prefill_chunk)
    if window is not None:
        check_int(window=window, least=1, greatest=INT32_MAX)
    check_sampler(sampler)
    check_prompts(prompts, prompt_lens)
    check_stop_tokens(stop_tokens)
    check_stop_sequences(stop_sequences)
    if log_probs is not None:
        check_int(log_probs=log_probs, least=0)
    num_prompts = prompts.shape[0]
    num_padded = max(num_prompts, cache.num_seqs)
    check_key(key, num_prompts)
    draft_cache = None
    if draft is not None:
        check_draft(draft, cache)
    if isinstance(draft, DraftModel):
        draft, draft_cache = draft.without_cache(), draft.cache
    if limits is not None:
        check_limits(limits, num_prompts)
        limits = _padded(limits, num_padded)
    if isinstance(sampler, Chain):
        sampler = sampler.of_prompts(num_prompts, num_padded)
    plan = Plan(
        prompts=_padded(prompts, num_padded),
        prompt_lens=_padded(prompt_lens, num_padded),
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        stop_sequences=jnp.asarray(_padded_sequences(stop_sequences), jnp.int32),
        limits=limits,
        key=None if key is None else _padded_key(typed_keys(key), num_padded),
        sampler=sampler,
        draft=draft,
        max_new_tokens=int(max_new_tokens),
        num_log_probs=None if log_probs is None else int(log_probs),
        # Each row that goes on takes part in every step.
        num_tokens=max(
            min(int(prefill_chunk), num_padded * prompts.shape[1]), cache.num_seqs
        ),
        window=None if window is None else int(window),
        in_turn=num_prompts > cache.num_seqs,
    )
    if isinstance(draft_cache, PagedKVCache):
        check_draft_pages(draft_cache, cache, plan)
    return plan, draft_cache


def result_of_prompts(cache, plan):
    """Whether the prompts can be read, before any work."""
    max_prompt_len = plan.prompts.shape[1]
    invalid = jnp.any((plan.prompt_lens > max_prompt_len) | (plan.prompt_lens < 0))
    room = cache.max_len - (0 if plan.in_turn else cache.kv_lens)
    too_few = jnp.array(False)
    if isinstance(cache, PagedKVCache):
        # All of them at once, so that a chunk cannot fail after another has been read.
        needed = pages_before_work(cache.table, plan, plan.prompt_lens, plan.limits)
        needed = jnp.max(needed) if plan.in_turn else jnp.sum(needed, dtype=jnp.int32)
        too_few = needed > cache.table.num_free_pages
    return first_of(
        (invalid, RESULTS.invalid_argument),
        (jnp.any(plan.prompt_lens > room), RESULTS.sequence_too_long),
        (jnp.any(cache.kv_lens > 0) & plan.in_turn, RESULTS.row_in_use),
        (too_few, RESULTS.out_of_pages),
    )


def _padded(array, num_padded):
    # In NumPy, which compiles nothing for another number of prompts.
    xp = jnp if is_traced(array) else np
    array = xp.asarray(array, xp.int32)
    padding = ((0, num_padded - len(array)), *[(0, 0)] * (array.ndim - 1))
    return jnp.asarray(xp.pad(array, padding))


def _padded_sequences(sequences):
    """Stop sequences as one array, with -1 before the shorter ones."""
    if hasattr(sequences, "dtype"):
        return sequences
    padded = np.full((len(sequences), max(map(len, sequences), default=0)), -1, np.int32)
    for row, tokens in zip(padded, sequences, strict=True):
        row[len(row) - len(tokens) :] = tokens
    return padded


def _padded_key(key, num_padded):
    if key.ndim == 0 or len(key) == num_padded:
        return key
    bits = jax.random.key_data(key)
    xp = jnp if is_traced(bits) else np
    bits = xp.pad(xp.asarray(bits), ((0, num_padded - len(key)), (0, 0)))
    return jax.random.wrap_key_data(jnp.asarray(bits), impl=jax.random.key_impl(key))
