"""Log-probabilities of the tokens that were made."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


class LogProbs(eqx.Module):
    """Natural logarithms of the probabilities that the model gave to tokens.

    They are of the model's own distribution, `log_softmax(logits)` in float32, before a
    sampler changes anything: no temperature, no penalty, nothing cut. 0 past a prompt's
    length.

    - `chosen`: of each new token.
    - `top_tokens`, `top`: the most probable tokens in its place, the most probable first,
        and theirs; of equally probable ones the first tokens.
    """

    chosen: Float32[Array, "num_prompts max_new_tokens"]
    top_tokens: Int32[Array, "num_prompts max_new_tokens num_top"]
    top: Float32[Array, "num_prompts max_new_tokens num_top"]

    @classmethod
    def zeros(cls, num_prompts: int, max_new_tokens: int, num_top: int) -> "LogProbs":
        """Of no token yet.

        **Arguments:**

        - `num_prompts`, `max_new_tokens`: how many tokens there may be.
        - `num_top`: how many of the most probable ones to tell.
        """
        shape = (num_prompts, max_new_tokens)
        return cls(
            chosen=jnp.zeros(shape, jnp.float32),
            top_tokens=jnp.zeros((*shape, num_top), jnp.int32),
            top=jnp.zeros((*shape, num_top), jnp.float32),
        )

    def put(
        self,
        prompt: Int32[Array, " num_seqs"],
        column: Int32[Array, " num_seqs"],
        logits: Float[Array, "num_seqs vocab_size"],
        tokens: Int32[Array, " num_seqs"],
    ) -> "LogProbs":
        """With those of one more token of some prompts.

        **Arguments:**

        - `prompt`, `column`: its place; what is past the end is dropped.
        - `logits`: the model's.
        - `tokens`: the chosen ones.
        """
        num_top = self.top.shape[2]
        if num_top > logits.shape[1]:
            raise ValueError(
                f"log_probs asks for the {num_top} most probable tokens, but there are "
                f"{logits.shape[1]}."
            )
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
        chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
        changed = {"chosen": self.chosen.at[prompt, column].set(chosen, mode="drop")}
        if num_top > 0:
            top, top_tokens = jax.lax.top_k(log_probs, num_top)
            top_tokens = top_tokens.astype(jnp.int32)
            changed["top"] = self.top.at[prompt, column].set(top, mode="drop")
            changed["top_tokens"] = self.top_tokens.at[prompt, column].set(
                top_tokens, mode="drop"
            )
        return dataclasses.replace(self, **changed)
