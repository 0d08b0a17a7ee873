"""Generation: prefill in chunks, then a loop of decode steps, as one program."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from ._draft_model import DraftModel
from ._generation_checks import check_prompts_fit, is_traced
from ._generation_loop import run
from ._generation_plan import plan_of, result_of_prompts
from ._generation_state import Cache, Drafted
from ._log_probs import LogProbs
from ._model import Model
from ._prompt_lookup import PromptLookup
from ._results import RESULTS
from .samplers._chain import greedy, Keys


Sampler = Callable[
    [Float[Array, "num_seqs vocab_size"], PRNGKeyArray | None],
    Int32[Array, " num_seqs"],
]
"""Chooses a token a row: called with the logits of each row's next token, and a key or
None; returns the tokens. With a key, `generate` calls it for one row at a time, under
`jax.vmap`, each with a key of its own. [`eqx_paged.samplers`](samplers.md) makes them."""


StopSequences = Sequence[Sequence[int]] | Int[Array | np.ndarray, "num_sequences max_len"]
"""Lists of tokens; as an array, the shorter ones padded in front with negative numbers."""


class Generation(eqx.Module):
    """What [`eqx_paged.generate`][] made.

    - `tokens`: the new tokens of each prompt; 0 past its length.
    - `lengths`: how many there are, a stop token included.
    - `log_probs`: theirs, if they were asked for.
    - `drafted`: what became of drafts, if there were any.
    - `result`: `successful`, or what ended the run early. `tokens` holds what was made
        until then.
    """

    tokens: Int32[Array, "num_prompts max_new_tokens"]
    lengths: Int32[Array, " num_prompts"]
    result: RESULTS
    log_probs: LogProbs | None = None
    drafted: Drafted | None = None


def generate(
    model: Model,
    cache: Cache,
    prompts: Int[Array | np.ndarray, "num_prompts max_prompt_len"],
    prompt_lens: Int[Array | np.ndarray, " num_prompts"],
    *,
    max_new_tokens: int,
    limits: Int[Array | np.ndarray, " num_prompts"] | None = None,
    stop_tokens: Sequence[int] | Int[Array | np.ndarray, " num_stops"] = (),
    stop_sequences: StopSequences = (),
    sampler: Sampler = greedy,
    key: PRNGKeyArray | Keys | None = None,
    log_probs: int | None = None,
    draft: PromptLookup | DraftModel | None = None,
    window: int | None = None,
    prefill_chunk: int = 512,
    throw: bool = True,
) -> tuple[Generation, Cache]:
    """Continues prompts, each until a stop token or `max_new_tokens`.

    One compiled program: the prompts are read in chunks, beside rows that have been read
    and go on, and then a loop makes a token a row and turn. Prompts, their lengths, limits,
    keys, what stops them and the sampler's parameters are data; a program is compiled for
    each `max_prompt_len`, `max_new_tokens`, `prefill_chunk`, `window`, shape of
    `stop_tokens` and `stop_sequences`, kind of sampler, kind and sizes of `draft`,
    `log_probs`, and kind and sizes of the cache, with and without limits, with one key,
    many or none, and for each number of prompts beyond the cache's rows.

    With at most as many prompts as rows, prompt `i` extends row `i`, whatever the row
    holds: a second turn of a conversation gives its own text only, which begins with the
    last token of the first turn's answer. A row that is done only keeps its slot.

    More prompts go through the rows in turn, in order, each waiting for a row and for
    pages to read it into; a row that is done is freed for the next. Where rows that go on
    need a page and there is none, the youngest is put back: its pages are freed, its
    tokens kept and read again later. What is made of a prompt depends on none of this, but
    for how its logits round: beside others, a matrix product may be rounded in another way.

    **Arguments:**

    - `model`: called as `model(tokens, cache, batch) -> (hidden, cache)`, with an `unembed`
        method from hidden states to logits. Any PyTree.
    - `cache`: a [`eqx_paged.PagedKVCache`][] or a [`eqx_paged.RaggedKVCache`][], empty if
        it has fewer rows than there are prompts, also of what
        [`eqx_paged.PrefixIndex`][]'s `fork` puts there.
    - `prompts`: padded with any int32.
    - `prompt_lens`: the tokens of each prompt; one of length 0 leaves its row idle.
    - `max_new_tokens`: the most tokens to make a prompt. 0 only reads the prompts.
    - `limits`: for each prompt, the most tokens to make of it, from 0, if less.
    - `stop_tokens`: tokens after which a row is done.
    - `stop_sequences`: the same for several tokens in a row, all of them new. A text can be
        made of other tokens than those that a tokenizer cuts it into, so that this does not
        find every stop string; [`eqx_paged.stream`][] lets you look at the text.
    - `sampler`: `(logits, key) -> tokens`, such as [`eqx_paged.samplers.chain`][] makes.
        Pass the same function object each time: another one, an equal lambda included,
        compiles again.
    - `key`: for the sampler: one, from which each prompt's own is folded by its index, or
        one a prompt. A prompt's `i`-th new token, from 0, is drawn by its own key folded by
        `i`, so that what is drawn does not depend on the other prompts, the rows or the
        pages. May be None if the sampler needs none.
    - `log_probs`: whether to tell the log-probabilities of the new tokens, and of how many
        of the most probable ones in the place of each; 0 tells those of the new ones only.
        See [`eqx_paged.LogProbs`][]. None, the default, computes nothing.
    - `draft`: where to take more tokens from, for the model to check several at a time:
        [`eqx_paged.PromptLookup`][] or [`eqx_paged.DraftModel`][]. The tokens made are the
        same, but for what the model itself makes of more of them at a time; of what a
        sampler draws, too. `Generation.drafted` tells how many were accepted.
    - `window`: the most tokens that any layer sees, the query's own included, if all have a
        sliding window. Pages of a paged cache that all layers have left behind are then
        freed on the way, so that a row needs pages for `window + prefill_chunk` tokens
        (or `window` and one a row of the cache, if that is more), and one page more, at
        most, however long it becomes. Prompts in turn are refused where fewer are free than
        that, and than a prompt with what may be made of it needs. The cache of a
        `DraftModel` drops none.
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
    arguments = (model, cache, prompts, prompt_lens, limits, stop_tokens)
    if throw and is_traced((*arguments, stop_sequences, sampler, key, draft)):
        raise ValueError("generate needs throw=False under jit: it cannot raise there.")
    plan, draft_cache = plan_of(
        cache,
        prompts,
        prompt_lens,
        max_new_tokens=max_new_tokens,
        limits=limits,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        sampler=sampler,
        key=key,
        log_probs=log_probs,
        draft=draft,
        window=window,
        prefill_chunk=prefill_chunk,
    )
    if throw:
        check_prompts_fit(cache, prompts, prompt_lens, plan)
    made, result, cache, draft_cache = _run(model, cache, plan, draft_cache)
    if throw and result != RESULTS.successful:
        raise RuntimeError(
            f"{RESULTS[result]} {int(made[1].sum())} tokens had been made until then; "
            "`throw=False` returns them."
        )
    made = first_prompts(made, prompts.shape[0])
    return generation_of(made, result, draft_cache), cache


@eqx.filter_jit
def _run(model, cache, plan, draft_cache):
    state = run(model, cache, plan, result_of_prompts(cache, plan), draft_cache)
    made, draft_cache = made_in(state)
    return made, state.result, state.cache, draft_cache


def made_in(state):
    """What was made of each prompt; and the cache of a model that drafts."""
    of_drafts, draft_cache = None, None
    if state.drafted is not None:
        of_drafts = state.drafted.proposed, state.drafted.accepted
        draft_cache = state.drafted.cache
    return (state.tokens, state.lengths, state.log_probs, of_drafts), draft_cache


def generation_of(made, result, draft_cache):
    tokens, lengths, log_probs, of_drafts = made
    drafted = None if of_drafts is None else Drafted(draft_cache, *of_drafts)
    return Generation(tokens, lengths, result, log_probs, drafted)


def first_prompts(made, num_prompts):
    """What was made of the prompts, without that of padding."""
    if jax.tree.leaves(made)[0].shape[0] == num_prompts:
        return made
    xp = jnp if is_traced(made) else np
    # Put and not converted, which would compile for each number of prompts.
    return jax.tree.map(lambda x: jax.device_put(xp.asarray(x)[:num_prompts]), made)
