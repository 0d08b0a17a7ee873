"""Steps of more than one token a row: drafted ones that the model would have made.

A step gives the model each row's last token and the drafted ones after it. At each of them
the next token is chosen as it would be without a draft, of the same logits and by the same
key, and as long as it is the drafted one, the row goes on to the next. So what is made is
what would be made without a draft, whatever the sampler; the draft decides only how many
tokens a step makes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._batch import row_of_token
from ._cache import PagedKVCache
from ._draft_model import DraftModel
from ._generation_state import (
    Cache,
    known,
    left,
    limits_of_rows,
    Plan,
    State,
    tokens_at,
)
from ._generation_step import add_token, both, drop_unseen, leave_rows
from ._next_token import choose
from ._page_needs import num_pages
from ._prompt_lookup import PromptLookup
from ._results import RESULTS


def speculate(model: Any, state: State, plan: Plan) -> State:
    """A step of rows that all have their last token to read, and no more."""
    draft, drafted = plan.draft, state.drafted
    assert draft is not None and drafted is not None
    reads = left(state, plan) > 0
    most = _most(state, plan, reads, draft.num_tokens)
    last = tokens_at(state, plan, state.prompt, state.num_read)
    draft_cache, draft_result = drafted.cache, RESULTS.successful
    if isinstance(draft, PromptLookup):
        proposed, num_proposed = _look_up(draft, state, plan, most)
    else:
        assert draft_cache is not None
        proposed, draft_cache, draft_result = _let_draft(
            draft, draft_cache, state, plan, last, jnp.where(reads, most + 1, 0)
        )
        num_proposed = most
    texts = jnp.concatenate([last[:, None], proposed], axis=1)
    q_lens = reads.astype(jnp.int32) + num_proposed
    logits, cache, result = _logits_after(model, state.cache, texts, q_lens)
    held = state.cache.kv_lens
    state = dataclasses.replace(
        state,
        cache=cache,
        drafted=dataclasses.replace(drafted, cache=draft_cache),
        result=both(result, draft_result),
        step=state.step + 1,
    )
    before = state.lengths
    state, finished, accepted = _accept(state, plan, logits, proposed, num_proposed, reads)
    made = (state.lengths - before).at[state.prompt].get(mode="clip")
    # A row that reads its last token only to have read it holds it none the less. After a
    # failure, neither cache holds more than before.
    held += jnp.where(reads & state.is_well, jnp.maximum(made, 1), 0)
    state = state.with_caches(lambda cache: cache.truncate(held))
    state = state.with_drafts(num_proposed, accepted)
    return leave_rows(drop_unseen(state, plan), plan, finished)


# --- Proposals


def _most(state, plan, reads, num_tokens):
    """How many tokens may be drafted: there are to be as many after the next one, the row
    has room for them, and there are pages."""
    cache, kv_lens = state.cache, state.cache.kv_lens
    made = state.lengths.at[state.prompt].get(mode="clip")
    room = jnp.minimum(limits_of_rows(state, plan) - made, cache.max_len - kv_lens) - 1
    most = jnp.where(reads, jnp.clip(room, 0, num_tokens), 0)
    if not isinstance(cache, PagedKVCache):
        return most
    ones = reads.astype(jnp.int32)
    size = cache.page_size
    needed = num_pages(kv_lens + ones + most, size) - num_pages(kv_lens, size)
    # A row may have to copy a page that it shares.
    needed = jnp.sum(needed + ones, dtype=jnp.int32)
    in_page = -(kv_lens + 1) % size
    is_enough = needed <= cache.table.num_free_pages
    return jnp.where(is_enough, most, jnp.minimum(most, in_page))


def _look_up(draft: PromptLookup, state, plan, most):
    width = plan.prompts.shape[1] + plan.max_new_tokens
    position = jnp.arange(width, dtype=jnp.int32)[None]
    texts = tokens_at(state, plan, state.prompt[:, None], position)
    lengths = known(state, plan).at[state.prompt].get(mode="fill", fill_value=0)
    proposed, num_proposed = draft.look_up(texts, lengths)
    return proposed, jnp.minimum(num_proposed, most)


def _let_draft(draft: DraftModel, cache: Cache, state, plan, last, q_lens):
    """Lets the smaller model make tokens, and read each row's `q_lens`: the last one made
    and those it proposes, also the last of these, to be as far as the other model."""
    prompt = state.prompt

    def read_one(carry, place):
        cache, result, token, tokens, lengths = carry
        going = place < q_lens
        cache, batch, appended = cache.append(going.astype(jnp.int32), None)
        hidden, cache = draft.model(jnp.where(going, token, 0), cache, batch)
        drafting = dataclasses.replace(state, tokens=tokens, lengths=lengths)
        logits = draft.model.unembed(hidden[batch.last_tokens])
        new = choose(logits, drafting, plan)
        column = lengths.at[prompt].get(mode="clip")
        tokens = tokens.at[prompt, column].set(new, mode="drop")
        lengths = lengths.at[prompt].add(1, mode="drop")
        return (cache, both(result, appended), new, tokens, lengths), new

    carry = (cache, state.result, last, state.tokens, state.lengths)
    places = jnp.arange(draft.num_tokens + 1, dtype=jnp.int32)
    (cache, result, *_), new = jax.lax.scan(read_one, carry, places)
    return new[: draft.num_tokens].T, cache, result


# --- Verification


def _logits_after(model, cache, texts, q_lens):
    """The logits after each of the first `q_lens` tokens of the rows of `texts`."""
    num_seqs, width = texts.shape
    num_tokens = num_seqs * width
    cache, batch, result = cache.append(q_lens, num_tokens)
    row, exists = row_of_token(batch.cu_q_lens, num_tokens)
    first = batch.cu_q_lens[:-1]
    place = jnp.arange(num_tokens, dtype=jnp.int32) - first[row]
    tokens = jnp.where(exists, texts.at[row, place].get(mode="clip"), 0)
    hidden, cache = model(tokens, cache, batch)
    token = first[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    hidden = hidden.at[token.reshape(-1)].get(mode="clip")
    return model.unembed(hidden).reshape(num_seqs, width, -1), cache, result


def _accept(state, plan, logits, proposed, num_proposed, reads):
    """Makes tokens as long as they are the proposed ones, and one more. Tells which rows
    are finished, and how many of the proposed tokens each has made."""

    def add(carry, x):
        state, going, finished, accepted = carry
        place, logits, proposed = x
        state, new, goes_on = add_token(logits, state, plan, going)
        finished |= going & ~goes_on
        agrees = going & (place < num_proposed) & (new == proposed)
        accepted += agrees.astype(jnp.int32)
        return (state, goes_on & agrees, finished, accepted), None

    num_seqs, width = logits.shape[:2]
    # None is proposed for the last place.
    proposed = jnp.pad(proposed, ((0, 0), (0, 1)))
    xs = (jnp.arange(width, dtype=jnp.int32), jnp.swapaxes(logits, 0, 1), proposed.T)
    none = jnp.zeros(num_seqs, jnp.int32)
    carry = (state, reads & state.is_well, jnp.zeros(num_seqs, bool), none)
    (state, _, finished, accepted), _ = jax.lax.scan(add, carry, xs)
    return state, finished, accepted
