"""Samplers: the composition of steps, and the draw at its end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, PRNGKeyArray, UInt32

from ._history import History
from ._processor import Processor


Keys = Key[Array, " num_seqs"] | UInt32[Array, "num_seqs _"]
"""A key for each of several."""


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


def categorical(
    logits: Float[Array, "num_seqs vocab_size"], key: PRNGKeyArray | None
) -> Int32[Array, " num_seqs"]:
    """The sampler that draws each token with its probability, the softmax of the logits.

    **Arguments:**

    - `logits`: of each row's next token.
    - `key`: what decides.

    **Returns:**

    A token a row.

    **Raises:**

    `ValueError` without a key.
    """
    if key is None:
        raise ValueError("samplers.categorical draws, and needs a key, but key is None.")
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


class Chain(eqx.Module):
    """A sampler made of steps: see [`eqx_paged.samplers.chain`][].

    - `processors`: from logits to logits, in order.
    - `draw`: chooses a token a row.
    """

    processors: tuple[Callable[..., Any], ...]
    draw: Callable[..., Any]

    @property
    def uses_history(self) -> bool:
        """Whether the tokens so far decide."""
        return any(isinstance(p, Processor) and p.uses_history for p in self.processors)

    def process(
        self,
        logits: Float[Array, "num_seqs vocab_size"],
        history: History | None = None,
    ) -> Float[Array, "num_seqs vocab_size"]:
        """The logits of the distribution that is drawn from.

        **Arguments:**

        - `logits`: of each row's next token.
        - `history`: the tokens so far, for penalties.

        **Returns:**

        float32, `-inf` for a token that cannot be drawn.
        """
        logits = logits.astype(jnp.float32)
        for processor in self.processors:
            if isinstance(processor, Processor):
                logits = processor(logits, history)
            else:
                logits = _processed(processor, logits)
        return logits

    def __call__(
        self,
        logits: Float[Array, "num_seqs vocab_size"],
        key: PRNGKeyArray | Keys | None = None,
        history: History | None = None,
    ) -> Int32[Array, " num_seqs"]:
        """**Arguments:**

        - `logits`: of each row's next token.
        - `key`: one for all rows, or one a row, which then decides about it alone.
        - `history`: the tokens so far, for penalties.

        **Returns:**

        A token a row.
        """
        return draw_tokens(self.draw, self.process(logits, history), key)

    def of_prompts(self, num_prompts: int, num_padded: int) -> "Chain":
        """As [`eqx_paged.samplers.Processor`][]'s, for each of them."""
        return self._each(lambda p: p.of_prompts(num_prompts, num_padded))

    def of_rows(self, prompt: Int32[Array, " num_seqs"]) -> "Chain":
        """As [`eqx_paged.samplers.Processor`][]'s, for each of them."""
        return self._each(lambda p: p.of_rows(prompt))

    def _each(self, change):
        changed = (change(p) if isinstance(p, Processor) else p for p in self.processors)
        return dataclasses.replace(self, processors=tuple(changed))


def chain(*steps: Callable[..., Any]) -> Chain:
    """A sampler that changes logits step by step, and then chooses a token.

    ```python
    from eqx_paged import samplers

    sampler = samplers.chain(
        samplers.repetition_penalty(1.1),
        samplers.temperature(0.7),
        samplers.top_p(0.95),
        samplers.categorical,
    )
    ```

    Steps come in the order given, which matters: `top_p` after `temperature` cuts the
    distribution that is drawn from. Every cut leaves the most probable token, so what is
    drawn never has probability 0 before it. A row of logits that are all `-inf` gives token
    0; of a row with NaN only this is certain, that it gives a token of the vocabulary and
    changes no other row.

    **Arguments:**

    - `steps`: all but the last from logits to logits: what the functions beside this one
        make, or any `logits -> logits` of your own, `[num_seqs, vocab_size]` in float32,
        which must treat each row by itself. The last is a sampler,
        `(logits, key) -> tokens`: `greedy`, `categorical` or your own.

    **Returns:**

    The sampler, for [`eqx_paged.generate`][] or to be called as it is. Chains of the same
    steps share a compiled program, whatever their parameters; functions of your own must
    be the same objects for that.

    **Raises:**

    `ValueError` if there is no step, or the last is none that chooses a token.
    """
    if not steps or isinstance(steps[-1], Processor):
        last = f"{steps[-1].name}" if steps else "nothing"
        raise ValueError(
            "chain must end in a sampler, such as samplers.categorical or samplers.greedy, "
            f"but ends in {last}."
        )
    for step in steps:
        if not callable(step):
            raise ValueError(f"chain is made of functions, but {step!r} is none.")
    return Chain(tuple(steps[:-1]), steps[-1])


def draw_tokens(
    sampler: Callable[..., Any],
    logits: Float[Array, "num_seqs vocab_size"],
    key: PRNGKeyArray | Keys | None,
) -> Int32[Array, " num_seqs"]:
    """Calls a sampler, with a row at a time where each has a key of its own."""
    keys = None if key is None else typed_keys(key)
    if keys is None or keys.ndim == 0:
        tokens = sampler(logits, keys)
        _check_sampled(tokens, logits.shape[0])
        return tokens.astype(jnp.int32)

    def of_row(logits, key):
        tokens = sampler(logits[None], key)
        _check_sampled(tokens, 1)
        return tokens[0].astype(jnp.int32)

    return jax.vmap(of_row)(logits, keys)


def typed_keys(key: PRNGKeyArray | Keys) -> Array:
    """One key or several; the older ones of `jax.random.PRNGKey` are their bits."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def _check_sampled(tokens, num_seqs):
    if tokens.shape != (num_seqs,) or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"sampler must return integers of shape {(num_seqs,)}, a token a row, but "
            f"returned {tokens.dtype} of shape {tokens.shape}."
        )


def _processed(processor, logits):
    out = processor(logits)
    if out.shape != logits.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"A step of a chain must return logits of shape {logits.shape}, but one "
            f"returned {out.dtype} of shape {out.shape}."
        )
    return out.astype(jnp.float32)
