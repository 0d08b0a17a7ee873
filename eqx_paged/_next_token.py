"""What a step of generation makes of the logits: the next token, and whether it ends."""

import jax
import jax.numpy as jnp

from .samplers._chain import Chain, draw_tokens
from .samplers._history import History


def choose(logits, state, plan):
    """The next token of each row. It depends on the prompt, its key and its parameters.

    And on nothing else: not on the row, the step, or what is in the other rows.
    """
    sampler, keys = plan.sampler, _keys(state, plan)
    if not isinstance(sampler, Chain):
        return draw_tokens(sampler, logits, keys)
    history = _history(state, plan) if sampler.uses_history else None
    return sampler.of_rows(state.prompt)(logits, keys, history)


def has_stopped(new, state, plan):
    """Whether tokens, the last in `state`, end their prompts."""
    stopped = jnp.any(new[:, None] == plan.stop_tokens[None], axis=1)
    num_sequences, width = plan.stop_sequences.shape
    if num_sequences == 0:
        return stopped
    num_made = state.lengths.at[state.prompt].get(mode="clip")
    column = num_made[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]
    last = state.tokens.at[state.prompt[:, None], jnp.maximum(column, 0)].get(mode="clip")
    # No sequence has a token before the first one made; its padding is there, and negative.
    last = jnp.where(column < 0, -1, last)
    sequences = plan.stop_sequences[None]
    matches = jnp.all((sequences < 0) | (last[:, None] == sequences), axis=2)
    is_sequence = plan.stop_sequences[:, -1] >= 0
    return stopped | jnp.any(matches & is_sequence[None], axis=1)


def _keys(state, plan):
    """The key of each row's next token: of the prompt, and of how many it has."""
    if plan.key is None:
        return None
    if plan.key.ndim == 0:
        of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(plan.key, state.prompt)
    else:
        of_prompt = plan.key.at[state.prompt].get(mode="clip")
    num_made = state.lengths.at[state.prompt].get(mode="clip")
    return jax.vmap(jax.random.fold_in)(of_prompt, num_made)


def _history(state, plan):
    prompt = state.prompt
    return History(
        prompts=plan.prompts.at[prompt].get(mode="clip"),
        prompt_lens=plan.prompt_lens.at[prompt].get(mode="clip"),
        new=state.tokens.at[prompt].get(mode="clip"),
        num_new=state.lengths.at[prompt].get(mode="clip"),
    )
