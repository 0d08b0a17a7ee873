"""The tokens that penalties look back at."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


class History(eqx.Module):
    """The tokens of each row's prompt, and those made of it so far.

    - `prompts`, `prompt_lens`: each row's prompt, and how much of it is no padding.
    - `new`, `num_new`: the same of what was made of it.
    """

    prompts: Int32[Array, "num_seqs max_prompt_len"]
    prompt_lens: Int32[Array, " num_seqs"]
    new: Int32[Array, "num_seqs max_new_tokens"]
    num_new: Int32[Array, " num_seqs"]

    def seen(self, vocab_size: int) -> Bool[Array, "num_seqs vocab_size"]:
        """Whether each token is in the prompt or was made.

        **Arguments:**

        - `vocab_size`: how many tokens there are.
        """
        in_prompt = _counts(self.prompts, self.prompt_lens, vocab_size)
        return (in_prompt > 0) | (self.counts(vocab_size) > 0)

    def counts(self, vocab_size: int) -> Int32[Array, "num_seqs vocab_size"]:
        """How many times each token was made.

        **Arguments:**

        - `vocab_size`: how many tokens there are.
        """
        return _counts(self.new, self.num_new, vocab_size)


def _counts(tokens, lens, vocab_size):
    num_seqs, width = tokens.shape
    exists = jnp.arange(width, dtype=jnp.int32)[None] < lens[:, None]
    rows = jnp.arange(num_seqs, dtype=jnp.int32)[:, None]
    counts = jnp.zeros((num_seqs, vocab_size), jnp.int32)
    return counts.at[rows, jnp.where(exists, tokens, vocab_size)].add(1, mode="drop")
