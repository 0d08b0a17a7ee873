"""Drafts that are looked up in the prompt and in what was made of it."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int32

from ._checks import check_positive


class PromptLookup(eqx.Module):
    """Proposes what followed the last tokens where they last stood before.

    It costs no second model, and helps where answers repeat what was said: extracts,
    corrections, code. Of all earlier places of the last `max_ngram` tokens the latest
    decides, if there is none those of one token less, and so on down to `min_ngram`. A
    text that repeats itself is proposed to go on doing so.

    - `num_tokens`: the most tokens to propose at a time.
    - `max_ngram`, `min_ngram`: how many of the last tokens are looked up.

    Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    num_tokens: int = eqx.field(static=True)
    max_ngram: int = eqx.field(static=True)
    min_ngram: int = eqx.field(static=True)

    def __init__(self, num_tokens: int = 4, *, max_ngram: int = 3, min_ngram: int = 1):
        """**Arguments:**

        - `num_tokens`: the most tokens to propose at a time.
        - `max_ngram`, `min_ngram`: how many of the last tokens are looked up, at most and
            at least.

        **Raises:**

        `ValueError` if one is below 1, or `min_ngram` above `max_ngram`.
        """
        check_positive(num_tokens=num_tokens, max_ngram=max_ngram, min_ngram=min_ngram)
        if min_ngram > max_ngram:
            raise ValueError(
                f"min_ngram must be at most max_ngram, but is {min_ngram} of {max_ngram}."
            )
        self.num_tokens = num_tokens
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def look_up(
        self,
        tokens: Int32[Array, "num_seqs max_len"],
        lengths: Int32[Array, " num_seqs"],
    ) -> tuple[Int32[Array, "num_seqs num_proposed"], Int32[Array, " num_seqs"]]:
        """What it proposes to come after some texts.

        **Arguments:**

        - `tokens`: of each text; anything past its length.
        - `lengths`: of each text.

        **Returns:**

        `num_tokens` tokens each, and how many of them are proposed: all or none.
        """
        max_len = tokens.shape[1]
        place = jnp.arange(max_len, dtype=jnp.int32)[None]
        # How many of the last tokens stand before each place, up to max_ngram.
        num_same = jnp.zeros(tokens.shape, jnp.int32)
        goes_on = (place > 0) & (place < lengths[:, None])
        for back in range(1, self.max_ngram + 1):
            last = jnp.take_along_axis(
                tokens, jnp.maximum(lengths - back, 0)[:, None], axis=1
            )
            before = jnp.roll(tokens, back, axis=1)
            goes_on &= (place >= back) & (before == last)
            num_same += goes_on.astype(jnp.int32)
        # The longest match, and the latest of these.
        score = jnp.where(num_same >= self.min_ngram, num_same * max_len + place, -1)
        start = jnp.argmax(score, axis=1).astype(jnp.int32)
        found = jnp.max(score, axis=1) >= 0
        period = jnp.maximum(lengths - start, 1)[:, None]
        offset = jnp.arange(self.num_tokens, dtype=jnp.int32)[None] % period
        proposed = jnp.take_along_axis(tokens, start[:, None] + offset, axis=1)
        return proposed, jnp.where(found, self.num_tokens, 0).astype(jnp.int32)
