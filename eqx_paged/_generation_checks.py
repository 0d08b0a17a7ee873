"""What is checked of the arguments of `generate` before any work."""

from collections.abc import Collection

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._cache import PagedKVCache
from ._draft_model import DraftModel
from ._page_needs import num_copies, num_pages, pages_before_work, whole_lens
from ._prompt_lookup import PromptLookup
from ._ragged_cache import RaggedKVCache
from .kernels._arguments import check_array
from .samplers._processor import Processor


def is_traced(tree):
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def check_prompts(prompts, prompt_lens, names=("prompts", "prompt_lens")):
    named = tuple(zip(names, (prompts, prompt_lens), strict=True))
    for name, array in named:
        check_array(name, array)
    if prompts.ndim != 2 or prompt_lens.shape != prompts.shape[:1]:
        raise ValueError(
            f"{names[0]} must be [num_prompts, max_prompt_len] and {names[1]} "
            f"[num_prompts], but their shapes are {prompts.shape} and {prompt_lens.shape}."
        )
    for name, array in named:
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, but is {array.dtype}.")
    num_prompts, max_prompt_len = prompts.shape
    if num_prompts < 1:
        raise ValueError(f"{names[0]} must have a row a prompt, but num_prompts is 0.")
    if max_prompt_len < 1:
        raise ValueError(f"{names[0]} must have room for a token, but max_prompt_len is 0.")
    for name, array in named:
        _check_int32(name, array)


def check_cache_of_loop(cache):
    if not isinstance(cache, (PagedKVCache, RaggedKVCache)):
        raise ValueError(
            f"cache must be a PagedKVCache or a RaggedKVCache, but is {cache!r}."
        )


def check_sampler(sampler):
    if isinstance(sampler, Processor):
        raise ValueError(
            f"sampler must choose tokens, but {sampler.name} is a step of samplers.chain, "
            "which ends in what does."
        )
    if not callable(sampler):
        raise ValueError(
            f"sampler must be a function (logits, key) -> tokens, but is {sampler!r}."
        )


def check_stop_tokens(tokens):
    array = tokens
    if not hasattr(tokens, "dtype"):
        array = (jnp if is_traced(tokens) else np).asarray(tokens)
    integers = array.size == 0 or jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim != 1 or not integers:
        raise ValueError(f"stop_tokens must be a list of integers, but is {tokens!r}.")
    _check_int32("stop_tokens", array)


def check_stop_sequences(sequences):
    if hasattr(sequences, "dtype"):
        _check_padded_sequences(sequences)
        return
    if not isinstance(sequences, Collection):
        raise ValueError(f"stop_sequences must be lists of tokens, but is {sequences!r}.")
    for sequence in sequences:
        array = np.asarray(sequence)
        integers = jnp.issubdtype(array.dtype, jnp.integer)
        if array.ndim != 1 or array.size == 0 or not integers or array.min() < 0:
            raise ValueError(
                "stop_sequences must be lists of tokens, each at least one long, but has "
                f"{sequence!r}."
            )
        _check_int32("stop_sequences", array)


def _check_padded_sequences(array):
    integers = jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim != 2 or not integers or (array.shape[0] > 0 and array.shape[1] == 0):
        raise ValueError(
            "stop_sequences must be lists of tokens, or integers of shape "
            "[num_sequences, max_sequence_len] with room for a token, but is "
            f"{array.dtype} of shape {array.shape}."
        )
    _check_int32("stop_sequences", array)
    if is_traced(array):
        return
    array = np.asarray(array)
    for sequence in array[np.any((array[:, 1:] < 0) & (array[:, :-1] >= 0), axis=1)]:
        raise ValueError(
            "stop_sequences must have negative numbers only before the tokens of a "
            f"sequence, but has {sequence.tolist()}."
        )


def _check_int32(name, array):
    # An array of int32 on a device stays there.
    if np.can_cast(array.dtype, np.int32) or is_traced(array):
        return
    array = np.asarray(array)
    int32 = np.iinfo(np.int32)
    if array.size and not int32.min <= array.min() <= array.max() <= int32.max:
        raise ValueError(
            f"{name} must be int32, but reach from {array.min()} to {array.max()}."
        )


def check_prompts_fit(cache, prompts, prompt_lens, plan):
    """Whether there is room for prompts, each in its row or one after the other."""
    prompt_lens, max_prompt_len = np.asarray(prompt_lens), prompts.shape[1]
    rows = None if plan.in_turn else np.arange(len(prompt_lens))
    num_held = int(np.sum(cache.kv_lens)) if plan.in_turn else 0
    if num_held > 0:
        raise ValueError(
            f"{len(prompt_lens)} prompts go through {cache.num_seqs} rows in turn, which "
            f"must be empty, but they hold {num_held} tokens."
        )
    check_lens(cache, max_prompt_len, prompt_lens, rows)
    if not isinstance(cache, PagedKVCache):
        return
    table, lens, limits = jax.device_get((cache.table, plan.prompt_lens, plan.limits))
    pages = pages_before_work(table, plan, lens, limits)
    if plan.in_turn:
        check_pages(cache, pages.max(), f"Prompt {pages.argmax()} needs")
    else:
        check_pages(cache, pages.sum(), "The prompts need")


def check_lens(cache, max_prompt_len, prompt_lens, rows=None):
    """Whether there is room for prompts beside what the rows that they extend hold; without
    rows, each in an empty one."""
    held = np.zeros_like(prompt_lens) if rows is None else np.asarray(cache.kv_lens)[rows]
    for i, (old, new) in enumerate(zip(held, prompt_lens, strict=True)):
        if not 0 <= new <= max_prompt_len:
            raise ValueError(
                f"Prompt {i} has length {new}, but prompts has room for 0 to "
                f"{max_prompt_len} tokens each."
            )
        if old + new > cache.max_len:
            beside = "" if rows is None else f" and row {rows[i]} of the cache holds {old}"
            raise ValueError(
                f"Prompt {i} has {new} tokens{beside}, but a row has room for "
                f"{cache.max_len}."
            )


def check_pages(cache, needed, who):
    num_free = int(cache.table.num_free_pages)
    if needed > num_free:
        raise ValueError(
            f"{who} {needed} pages of {cache.page_size} tokens, but {num_free} are free."
        )


def check_limits(limits, num_prompts):
    check_array("limits", limits)
    if limits.shape != (num_prompts,) or not jnp.issubdtype(limits.dtype, jnp.integer):
        raise ValueError(
            f"limits must be integers of shape {(num_prompts,)}, one a prompt, but is "
            f"{limits.dtype} of shape {limits.shape}."
        )
    _check_int32("limits", limits)
    if not is_traced(limits) and np.any(np.asarray(limits) < 0):
        raise ValueError(f"limits must be at least 0, but one is {np.min(limits)}.")


def check_key(key, num_prompts):
    if key is None:
        return
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and (dtype != jnp.uint32 or key.ndim < 1):
        raise ValueError(f"key must be one that jax.random makes, but is {key!r}.")
    shape = key.shape if is_typed else key.shape[:-1]
    if shape not in ((), (num_prompts,)):
        raise ValueError(
            f"key must be one key, or one for each of {num_prompts} prompts, but is of "
            f"shape {shape}."
        )


def check_draft(draft, cache):
    if not isinstance(draft, (PromptLookup, DraftModel)):
        raise ValueError(
            f"draft must be a PromptLookup, a DraftModel or None, but is {draft!r}."
        )
    if isinstance(draft, DraftModel):
        _check_draft_cache(draft.cache, cache)


def _check_draft_cache(own, cache):
    """Whether it has room for whatever the other cache has room for."""
    if own is None:
        raise ValueError("A DraftModel needs a cache of its own, but its cache is None.")
    numbers = [("num_seqs", own.num_seqs, cache.num_seqs)]
    if isinstance(own, PagedKVCache) and isinstance(cache, PagedKVCache):
        numbers.append(("page_size", own.page_size, cache.page_size))
    for name, has, other in numbers:
        if has != other:
            raise ValueError(
                f"The cache of a DraftModel must have the {name} of the other one, but has "
                f"{has} and the other {other}."
            )
    if own.max_len < cache.max_len:
        raise ValueError(
            f"The cache of a DraftModel has room for {own.max_len} tokens a row, but the "
            f"other one for {cache.max_len}."
        )
    if is_traced((own, cache)):
        return
    held, other = np.asarray(own.kv_lens).tolist(), np.asarray(cache.kv_lens).tolist()
    if held != other:
        raise ValueError(
            "The cache of a DraftModel must hold the tokens of the other one, but its rows "
            f"hold {held} tokens and those of the other {other}."
        )


def check_draft_pages(own, cache, plan):
    """Whether there are pages for whatever the other cache may come to hold."""
    if is_traced((own, cache, plan.prompt_lens, plan.limits)):
        return
    num_free, needed = int(own.table.num_free_pages), _pages_of_draft(own, cache, plan)
    if needed > num_free:
        raise ValueError(
            f"The cache of a DraftModel has {num_free} free pages, but may need {needed}."
        )


def _pages_of_draft(own, cache, plan):
    table, lens, limits = jax.device_get((own.table, plan.prompt_lens, plan.limits))
    # Rows that take prompts in turn are empty, and share nothing.
    num_copied = 0 if plan.in_turn else int(num_copies(table, lens).sum())
    if isinstance(cache, PagedKVCache) and plan.window is None:
        # Both take the same pages, but for what one shares and the other does not.
        other = jax.device_get(cache.table)
        num_copied -= 0 if plan.in_turn else int(num_copies(other, lens).sum())
        return int(other.num_free_pages) + num_copied
    # The other one's pages do not tell: it drops what is not seen any more, or has none.
    held = np.zeros_like(lens) if plan.in_turn else table.kv_lens
    ends = np.minimum(held + whole_lens(plan, lens, limits), cache.max_len)
    pages = num_pages(ends, own.page_size) - num_pages(held, own.page_size)
    return int(np.sort(pages)[-own.num_seqs :].sum()) + num_copied
