"""Generation: prefill in chunks, then a loop of decode steps, as one program."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from ._batch import RaggedBatch
from ._cache import PagedKVCache
from ._checks import check_int, check_positive, first_of
from ._generation_loop import Cache, Plan, run
from ._results import RESULTS
from .kernels._arguments import check_array


Sampler = Callable[
    [Float[Array, "num_seqs vocab_size"], PRNGKeyArray | None],
    Int32[Array, " num_seqs"],
]
"""Chooses a token a row: called with the logits of each row's next token, and a key or
None; returns the tokens."""


@runtime_checkable
class Model(Protocol):
    """What `generate` asks of a model."""

    def __call__(
        self, tokens: Int32[Array, " num_tokens"], cache: Any, batch: RaggedBatch
    ) -> tuple[Float[Array, "num_tokens hidden_size"], Any]:
        """The hidden state of each token, and the cache with their keys and values."""
        ...

    def unembed(
        self, hidden: Float[Array, "num_tokens hidden_size"]
    ) -> Float[Array, "num_tokens vocab_size"]:
        """The logits of the token after each."""
        ...


class Generation(eqx.Module):
    """What [`eqx_paged.generate`][] made.

    - `tokens`: the new tokens of each prompt; 0 past its length.
    - `lengths`: how many there are, a stop token included.
    - `result`: `successful`, or what ended the run early. `tokens` holds what was made
        until then.
    """

    tokens: Int32[Array, "num_prompts max_new_tokens"]
    lengths: Int32[Array, " num_prompts"]
    result: RESULTS


def greedy(
    logits: Float[Array, "num_seqs vocab_size"], key: PRNGKeyArray | None = None
) -> Int32[Array, " num_seqs"]:
    """The sampler that takes the most probable token.

    **Arguments:**

    - `logits`: of each row's next token.
    - `key`: not used.

    **Returns:**

    A token a row; the first of several equally probable ones.
    """
    del key
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def generate(
    model: Model,
    cache: Cache,
    prompts: Int[Array | np.ndarray, "num_prompts max_prompt_len"],
    prompt_lens: Int[Array | np.ndarray, " num_prompts"],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | Int[Array | np.ndarray, " num_stops"] = (),
    sampler: Sampler = greedy,
    key: PRNGKeyArray | None = None,
    prefill_chunk: int = 512,
    throw: bool = True,
) -> tuple[Generation, Cache]:
    """Continues prompts, each until a stop token or `max_new_tokens`.

    One compiled program: the prompts are read in chunks, beside rows that have been read
    and go on, and then a loop makes a token a row and turn. Prompts, their lengths and the
    stop tokens are data; a program is compiled for each `max_prompt_len`,
    `max_new_tokens`, `prefill_chunk`, number of stop tokens, sampler, kind of cache, with
    and without a key, and for each number of prompts beyond the cache's rows.

    With at most as many prompts as rows, prompt `i` extends row `i`, whatever the row
    holds: a second turn of a conversation gives its own text only, which begins with the
    last token of the first turn's answer. A row that is done only keeps its slot.

    More prompts go through the rows in turn, in order, each waiting for a row and for
    pages to read it into; a row that is done is freed for the next. Where rows that go on
    need a page and there is none, the youngest is put back: its pages are freed, its
    tokens kept and read again later. What is made of a prompt is the same in any case.

    **Arguments:**

    - `model`: called as `model(tokens, cache, batch) -> (hidden, cache)`, with an `unembed`
        method from hidden states to logits. Any PyTree.
    - `cache`: a [`eqx_paged.PagedKVCache`][] or a [`eqx_paged.RaggedKVCache`][], empty if
        it has fewer rows than there are prompts.
    - `prompts`: padded with any int32.
    - `prompt_lens`: the tokens of each prompt; one of length 0 leaves its row idle.
    - `max_new_tokens`: the most tokens to make a prompt. 0 only reads the prompts.
    - `stop_tokens`: tokens after which a row is done.
    - `sampler`: `(logits, key) -> tokens`. Pass the same function object each time: another
        one, an equal lambda included, compiles again.
    - `key`: for the sampler, split for each step that makes tokens. May be None if the
        sampler needs none.
    - `prefill_chunk`: how many tokens to read a step while there are prompts to read, of
        all rows together; at least one a row.
    - `throw`: whether to raise an error if the run fails. Must be False under `jit`.

    **Returns:**

    The [`eqx_paged.Generation`][] and the cache. Each row holds its prompt and all new
    tokens but the last, whose key and value were not needed; if the prompts went in turn,
    it is empty.

    **Raises:**

    `ValueError` for arguments that do not fit together. With `throw`, also a `ValueError`
    if the prompts do not fit the cache, before any work; and a `RuntimeError` if the run
    failed later. `cache` is as it was, in any case.

    !!! info

        `generate` does not donate the cache, so that the program begins with a copy of it.
        Where there is no room for two, donate it yourself:

        ```python
        @eqx.filter_jit(donate="all-except-first")
        def run(inputs, cache):
            model, prompts, prompt_lens = inputs
            return eqx_paged.generate(
                model, cache, prompts, prompt_lens, max_new_tokens=64, throw=False
            )
        ```
    """
    check_int(max_new_tokens=max_new_tokens, least=0)
    check_positive(prefill_chunk=prefill_chunk)
    _check_prompts(prompts, prompt_lens)
    _check_stop_tokens(stop_tokens)
    num_prompts, max_prompt_len = prompts.shape
    arguments = (model, cache, prompts, prompt_lens, stop_tokens, key)
    if throw and _is_traced(arguments):
        raise ValueError("generate needs throw=False under jit: it cannot raise there.")
    if throw:
        _check_prompts_fit(cache, max_prompt_len, np.asarray(prompt_lens))
    # Rows and not prompts, and outside the program: another number of prompts that all
    # have a row is no other program.
    xp = jnp if _is_traced((prompts, prompt_lens)) else np
    extra = max(0, cache.num_seqs - num_prompts)
    prompts = xp.pad(xp.asarray(prompts, xp.int32), ((0, extra), (0, 0)))
    prompt_lens = xp.pad(xp.asarray(prompt_lens, xp.int32), (0, extra))
    plan = Plan(
        prompts=jnp.asarray(prompts),
        prompt_lens=jnp.asarray(prompt_lens),
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        key=key,
        sampler=sampler,
        max_new_tokens=int(max_new_tokens),
        # Each row that goes on takes part in every step.
        num_tokens=max(min(int(prefill_chunk), prompts.size), cache.num_seqs),
        in_turn=num_prompts > cache.num_seqs,
    )
    tokens, lengths, result, cache = _run(model, cache, plan)
    if throw and result != RESULTS.successful:
        raise RuntimeError(
            f"{RESULTS[result]} {int(lengths.sum())} tokens had been made until then; "
            "`throw=False` returns them."
        )
    if extra > 0:
        xp = jnp if _is_traced(tokens) else np
        tokens, lengths = (xp.asarray(x)[:num_prompts] for x in (tokens, lengths))
    # Put and not converted, which would compile for each number of prompts.
    generation = Generation(jax.device_put(tokens), jax.device_put(lengths), result)
    return generation, cache


@eqx.filter_jit
def _run(model, cache, plan):
    state = run(model, cache, plan, _result_of_prompts(cache, plan))
    return state.tokens, state.lengths, state.result, state.cache


def _result_of_prompts(cache, plan):
    """Whether the prompts can be read, before any work."""
    max_prompt_len = plan.prompts.shape[1]
    invalid = jnp.any((plan.prompt_lens > max_prompt_len) | (plan.prompt_lens < 0))
    if not plan.in_turn:
        # All of them at once, so that a chunk cannot fail after another has been read.
        _, _, result = cache.append(plan.prompt_lens, plan.num_prompts * max_prompt_len)
        return RESULTS.where(invalid, RESULTS.invalid_argument, result)
    longest = jnp.max(plan.prompt_lens)
    faults = [
        (invalid, RESULTS.invalid_argument),
        (longest > cache.max_len, RESULTS.sequence_too_long),
        (jnp.any(cache.kv_lens > 0), RESULTS.row_in_use),
    ]
    if isinstance(cache, PagedKVCache):
        most = cache.table.num_pages * cache.page_size
        faults.insert(2, (longest > most, RESULTS.out_of_pages))
    return first_of(*faults)


def _is_traced(tree):
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _check_prompts(prompts, prompt_lens):
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


def _check_stop_tokens(tokens):
    array = tokens
    if not hasattr(tokens, "dtype"):
        array = (jnp if _is_traced(tokens) else np).asarray(tokens)
    integers = array.size == 0 or jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim != 1 or not integers:
        raise ValueError(f"stop_tokens must be a list of integers, but is {tokens!r}.")
    _check_int32("stop_tokens", array)


def _check_int32(name, array):
    # An array of int32 on a device stays there.
    if np.can_cast(array.dtype, np.int32) or _is_traced(array):
        return
    array = np.asarray(array)
    int32 = np.iinfo(np.int32)
    if array.size and not int32.min <= array.min() <= array.max() <= int32.max:
        raise ValueError(
            f"{name} must be int32, but reach from {array.min()} to {array.max()}."
        )


def _check_prompts_fit(cache, max_prompt_len, prompt_lens):
    in_turn = len(prompt_lens) > cache.num_seqs
    held = np.asarray(cache.kv_lens)
    if in_turn and held.any():
        raise ValueError(
            f"{len(prompt_lens)} prompts go through {cache.num_seqs} rows in turn, which "
            f"must be empty, but they hold {held.sum()} tokens."
        )
    held = np.resize(held, len(prompt_lens))  # 0 for prompts without a row
    for i, (old, new) in enumerate(zip(held, prompt_lens, strict=True)):
        if not 0 <= new <= max_prompt_len:
            raise ValueError(
                f"Prompt {i} has length {new}, but prompts has room for 0 to "
                f"{max_prompt_len} tokens each."
            )
        if old + new > cache.max_len:
            where = "" if in_turn else f" and row {i} of the cache holds {old}"
            raise ValueError(
                f"Prompt {i} has {new} tokens{where}, but a row has room for "
                f"{cache.max_len}."
            )
    if isinstance(cache, PagedKVCache):
        size, num_free = cache.page_size, int(cache.table.num_free_pages)
        pages = -(-(held + prompt_lens) // size) - -(-held // size)
        if in_turn:
            needed, who = int(pages.max()), f"Prompt {int(pages.argmax())} needs"
        else:
            needed = int(pages.sum()) + _num_copies(cache.table, held, prompt_lens)
            who = "The prompts need"
        if needed > num_free:
            raise ValueError(
                f"{who} {needed} pages of {size} tokens, but {num_free} are free."
            )


def _num_copies(table, held, prompt_lens):
    """Pages that the prompts' rows share with others, and must copy to write to."""
    writers = np.flatnonzero((prompt_lens > 0) & (held % table.page_size > 0))
    tails = np.asarray(table.page_indices)[writers, held[writers] // table.page_size]
    pages, counts = np.unique(tails, return_counts=True)
    # Where all holders write, one of them keeps the page.
    return int(np.sum(counts - (counts == np.asarray(table.ref_counts)[pages])))
