"""What a run of `generate` is to do, and how far it is."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Key

from ._cache import PagedKVCache
from ._draft_model import DraftModel
from ._log_probs import LogProbs
from ._prompt_lookup import PromptLookup
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
    - `draft`: where more tokens are proposed from, or None; a model without its cache.
    - `num_tokens`: of a mixed step; at least one a row.
    - `window`: the most tokens that any layer sees, or None: pages before them are freed.
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
    draft: PromptLookup | DraftModel | None
    max_new_tokens: int = eqx.field(static=True)
    num_log_probs: int | None = eqx.field(static=True)
    num_tokens: int = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    in_turn: bool = eqx.field(static=True)

    @property
    def num_prompts(self) -> int:
        return self.prompts.shape[0]

    @property
    def only_decodes(self) -> bool:
        """Whether every prompt is read as a row's last token is, one token long."""
        one = self.prompts.shape[1] == 1 and self.max_new_tokens > 0
        return one and not self.in_turn

    @property
    def most_per_step(self) -> int:
        """The most tokens that a step makes of a prompt."""
        return 1 if self.draft is None else 1 + self.draft.num_tokens


class Drafted(eqx.Module):
    """What became of drafts.

    - `cache`: of the model that drafts; as many tokens a row as the other one. None of
        another kind of draft.
    - `proposed`, `accepted`: how many tokens of each prompt were drafted, and how many of
        these the model would have made as well.
    """

    cache: Cache | None
    proposed: Int32[Array, " num_prompts"]
    accepted: Int32[Array, " num_prompts"]

    def changed(self, change: Callable[[Cache], Cache]) -> "Drafted":
        """With its cache changed, if it has one."""
        if self.cache is None:
            return self
        return dataclasses.replace(self, cache=change(self.cache))


class State(eqx.Module):
    """What the loops carry.

    - `prompt`: the prompt in each row; `num_prompts` in a row without one.
    - `held`: tokens that each row held before its prompt.
    - `waiting`: the prompts that have no row yet, or no more.
    - `tokens`, `lengths`: what was made of each prompt.
    - `log_probs`: of these tokens, if they are asked for.
    - `step`: how many steps there were.
    - `drafted`: of the draft, if there is one.
    """

    cache: Cache
    prompt: Int32[Array, " num_seqs"]
    held: Int32[Array, " num_seqs"]
    waiting: Bool[Array, " num_prompts"]
    tokens: Int32[Array, "num_prompts max_new_tokens"]
    lengths: Int32[Array, " num_prompts"]
    log_probs: LogProbs | None
    step: Int32[Array, ""]
    drafted: Drafted | None
    result: RESULTS

    @property
    def is_well(self) -> Bool[Array, ""]:
        return self.result == RESULTS.successful

    @property
    def num_read(self) -> Int32[Array, " num_seqs"]:
        """How many tokens of its prompt and of what was made of it each row holds."""
        return self.cache.kv_lens - self.held

    def with_caches(self, change: Callable[[Cache], Cache]) -> "State":
        """With its cache, and that of a model that drafts, changed alike."""
        drafted = None if self.drafted is None else self.drafted.changed(change)
        return dataclasses.replace(self, cache=change(self.cache), drafted=drafted)

    def with_drafts(
        self,
        proposed: Int32[Array, " num_seqs"],
        accepted: Int32[Array, " num_seqs"],
    ) -> "State":
        """With so many more tokens drafted for each row's prompt."""
        assert self.drafted is not None
        drafted = dataclasses.replace(
            self.drafted,
            proposed=self.drafted.proposed.at[self.prompt].add(proposed, mode="drop"),
            accepted=self.drafted.accepted.at[self.prompt].add(accepted, mode="drop"),
        )
        return dataclasses.replace(self, drafted=drafted)

    def free(self, rows: Bool[Array, " num_seqs"]) -> "State":
        """With some rows empty."""
        return self.with_caches(lambda cache: cache.free(rows))


def active(state: State, plan: Plan) -> Bool[Array, " num_seqs"]:
    """The rows that have a prompt."""
    return state.prompt < plan.num_prompts


def known(state: State, plan: Plan) -> Int32[Array, " num_prompts"]:
    """The tokens of each prompt and of what was made of it."""
    return plan.prompt_lens + state.lengths


def left(state: State, plan: Plan) -> Int32[Array, " num_seqs"]:
    """The tokens that each row has yet to read: the last one made, while it decodes."""
    lengths = known(state, plan).at[state.prompt].get(mode="fill", fill_value=0)
    return jnp.where(active(state, plan), lengths - state.num_read, 0)


def reading(state: State, plan: Plan) -> Bool[Array, " num_seqs"]:
    """The rows that have more to read than the last token made."""
    made = state.lengths.at[state.prompt].get(mode="fill", fill_value=1)
    return (left(state, plan) > 1) | (made == 0)


def tokens_at(
    state: State,
    plan: Plan,
    prompt: Int32[Array, " *#shape"],
    position: Int32[Array, " *#shape"],
) -> Int32[Array, " *shape"]:
    """The tokens at positions of prompts and of what was made of them."""
    tokens = plan.prompts.at[prompt, position].get(mode="clip")
    if plan.max_new_tokens == 0:
        return tokens
    past = position - plan.prompt_lens.at[prompt].get(mode="clip")
    made = state.tokens.at[prompt, past].get(mode="clip")
    return jnp.where(past < 0, tokens, made)


def limits_of_rows(state: State, plan: Plan) -> Int32[Array, " num_seqs"]:
    """The most tokens to make of each row's prompt."""
    limits = jnp.full(state.prompt.shape, plan.max_new_tokens, jnp.int32)
    if plan.limits is None:
        return limits
    return jnp.minimum(limits, plan.limits.at[state.prompt].get(mode="clip"))
