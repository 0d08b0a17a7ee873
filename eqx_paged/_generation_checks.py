"""What is checked of the arguments of `generate` before any work."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._cache import PagedKVCache
from ._draft_model import DraftModel
from ._prompt_lookup import PromptLookup
from .kernels._arguments import check_array


def is_traced(tree):
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def check_prompts(prompts, prompt_lens):
    check_array("prompts", prompts)
    check_array("prompt_lens", prompt_lens)
    if prompts.ndim != 2 or prompt_lens.shape != prompts.shape[:1]:
        raise ValueError(
            "prompts must be [num_prompts, max_prompt_len] and prompt_lens [num_prompts], "
            f"but their shapes are {prompts.shape} and {prompt_lens.shape}."
        )
    for name, array in (("prompts", prompts), ("prompt_lens", prompt_lens)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, but is {array.dtype}.")
    num_prompts, max_prompt_len = prompts.shape
    if num_prompts < 1:
        raise ValueError("prompts must have a row a prompt, but num_prompts is 0.")
    if max_prompt_len < 1:
        raise ValueError("prompts must have room for a token, but max_prompt_len is 0.")
    _check_int32("prompts", prompts)
    _check_int32("prompt_lens", prompt_lens)


def check_stop_tokens(tokens):
    array = tokens
    if not hasattr(tokens, "dtype"):
        array = (jnp if is_traced(tokens) else np).asarray(tokens)
    integers = array.size == 0 or jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim != 1 or not integers:
        raise ValueError(f"stop_tokens must be a list of integers, but is {tokens!r}.")
    _check_int32("stop_tokens", array)


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
    if not plan.in_turn:
        rows = np.arange(len(prompt_lens))
        check_rows_fit(cache, max_prompt_len, prompt_lens, rows, plan.most_pages)
        return
    num_held = int(np.sum(cache.kv_lens))
    if num_held > 0:
        raise ValueError(
            f"{len(prompt_lens)} prompts go through {cache.num_seqs} rows in turn, which "
            f"must be empty, but they hold {num_held} tokens."
        )
    held = np.zeros_like(prompt_lens)
    _check_lens(cache, max_prompt_len, prompt_lens, held, [""] * len(held))
    if isinstance(cache, PagedKVCache):
        pages = _new_pages(cache, held, prompt_lens, plan.most_pages)
        _check_pages(cache, int(pages.max()), f"Prompt {int(pages.argmax())} needs")


def check_rows_fit(cache, max_prompt_len, prompt_lens, rows, most_pages=lambda size: None):
    """Whether there is room for prompts beside what the rows that they extend hold."""
    held = np.asarray(cache.kv_lens)[rows]
    beside = [
        f" and row {r} of the cache holds {n}" for r, n in zip(rows, held, strict=True)
    ]
    _check_lens(cache, max_prompt_len, prompt_lens, held, beside)
    if isinstance(cache, PagedKVCache):
        needed = int(np.sum(_new_pages(cache, held, prompt_lens, most_pages)))
        needed += _num_copies(cache.table, rows, held, prompt_lens)
        _check_pages(cache, needed, "The prompts need")


def _check_lens(cache, max_prompt_len, prompt_lens, held, beside):
    for i, (old, new) in enumerate(zip(held, prompt_lens, strict=True)):
        if not 0 <= new <= max_prompt_len:
            raise ValueError(
                f"Prompt {i} has length {new}, but prompts has room for 0 to "
                f"{max_prompt_len} tokens each."
            )
        if old + new > cache.max_len:
            raise ValueError(
                f"Prompt {i} has {new} tokens{beside[i]}, but a row has room for "
                f"{cache.max_len}."
            )


def _new_pages(cache, held, prompt_lens, most_pages):
    """The pages that each prompt takes at a time."""
    pages = -(-(held + prompt_lens) // cache.page_size) - -(-held // cache.page_size)
    most = most_pages(cache.page_size)
    return pages if most is None else np.minimum(pages, most)


def _check_pages(cache, needed, who):
    num_free = int(cache.table.num_free_pages)
    if needed > num_free:
        raise ValueError(
            f"{who} {needed} pages of {cache.page_size} tokens, but {num_free} are free."
        )


def _num_copies(table, rows, held, prompt_lens):
    """Pages that the prompts' rows share with others, and must copy to write to."""
    writes = (prompt_lens > 0) & (held % table.page_size > 0)
    columns = held[writes] // table.page_size
    tails = np.asarray(table.page_indices)[rows[writes], columns]
    pages, counts = np.unique(tails, return_counts=True)
    # Where all holders write, one of them keeps the page.
    return int(np.sum(counts - (counts == np.asarray(table.ref_counts)[pages])))


def check_limits(limits, num_prompts):
    check_array("limits", limits)
    if limits.shape != (num_prompts,) or not jnp.issubdtype(limits.dtype, jnp.integer):
        raise ValueError(
            f"limits must be integers of shape {(num_prompts,)}, one a prompt, but is "
            f"{limits.dtype} of shape {limits.shape}."
        )
    _check_int32("limits", limits)


def check_key(key, num_prompts):
    if key is None:
        return
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
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
    if isinstance(own, PagedKVCache):
        _check_draft_pages(own, cache)


def _check_draft_pages(own, cache):
    free = int(own.table.num_free_pages)
    if isinstance(cache, PagedKVCache):
        needed = int(cache.table.num_free_pages)
    else:
        room = cache.max_len // own.page_size
        needed = int(np.sum(room - np.asarray(cache.kv_lens) // own.page_size))
    if free < needed:
        raise ValueError(
            f"The cache of a DraftModel has {free} free pages, but the other one can take "
            f"{needed} more."
        )


def padded_sequences(sequences):
    """Stop sequences as one array, with -1 before the shorter ones."""
    if hasattr(sequences, "dtype"):
        if sequences.ndim != 2 or not jnp.issubdtype(sequences.dtype, jnp.integer):
            raise ValueError(
                "stop_sequences must be lists of tokens, or integers of shape "
                "[num_sequences, max_sequence_len], but is "
                f"{sequences.dtype} of shape {sequences.shape}."
            )
        _check_int32("stop_sequences", sequences)
        return sequences
    arrays = [np.asarray(sequence) for sequence in sequences]
    for array, sequence in zip(arrays, sequences, strict=True):
        integers = jnp.issubdtype(array.dtype, jnp.integer)
        if array.ndim != 1 or array.size == 0 or not integers or array.min() < 0:
            raise ValueError(
                "stop_sequences must be lists of tokens, each at least one long, but has "
                f"{sequence!r}."
            )
        _check_int32("stop_sequences", array)
    width = max(map(len, arrays), default=0)
    padded = np.full((len(arrays), width), -1, np.int32)
    for row, array in zip(padded, arrays, strict=True):
        row[width - len(array) :] = array
    return padded
