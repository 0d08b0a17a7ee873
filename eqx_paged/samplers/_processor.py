"""One step from logits to logits, with its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from ._history import History


class Processor(eqx.Module):
    """A step of [`eqx_paged.samplers.chain`][], as `top_k` and its like make it.

    The first axis of each parameter is one prompt a place, or 1 if all have the same. They
    are data: another value compiles nothing.

    - `name`: of the function that made it.
    - `apply`: called as `apply(logits, *parameters)`, or, if `uses_history`, as
        `apply(logits, history, *parameters)`; each parameter with one place a row, or one.
    - `parameters`: see above.
    - `uses_history`: whether the tokens so far decide.
    """

    name: str = eqx.field(static=True)
    apply: Callable[..., Any] = eqx.field(static=True)
    parameters: tuple[Shaped[Array | np.ndarray, "..."], ...]
    uses_history: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        logits: Float[Array, "num_seqs vocab_size"],
        history: History | None = None,
    ) -> Float[Array, "num_seqs vocab_size"]:
        """**Arguments:**

        - `logits`: of each row's next token.
        - `history`: the tokens so far, for a penalty.

        **Returns:**

        The logits to go on with.
        """
        if not self.uses_history:
            return self.apply(logits, *self.parameters)
        if history is None:
            raise ValueError(f"{self.name} needs the history: the tokens of each row.")
        return self.apply(logits, history, *self.parameters)

    def of_prompts(self, num_prompts: int, num_padded: int) -> "Processor":
        """With a place for each prompt in each parameter.

        **Arguments:**

        - `num_prompts`: how many there are.
        - `num_padded`: the same, with those that are only padding.

        **Raises:**

        `ValueError` if the parameters are those of another number of prompts.
        """

        def of_prompts(x):
            if x.shape[0] not in (1, num_prompts):
                raise ValueError(
                    f"{self.name} was given for {x.shape[0]} prompts, but there are "
                    f"{num_prompts}."
                )
            xp = jnp if isinstance(x, jax.core.Tracer) else np
            x = xp.broadcast_to(x, (num_prompts, *x.shape[1:]))
            padding = ((0, num_padded - num_prompts), *[(0, 0)] * (x.ndim - 1))
            return xp.pad(x, padding, mode="edge")

        return dataclasses.replace(self, parameters=tuple(map(of_prompts, self.parameters)))

    def of_rows(self, prompt: Int32[Array, " num_seqs"]) -> "Processor":
        """With the parameters of the prompt that is in each row.

        **Arguments:**

        - `prompt`: which it is; past the last for a row without one.
        """
        rows = (x.at[prompt].get(mode="clip") for x in map(jnp.asarray, self.parameters))
        return dataclasses.replace(self, parameters=tuple(rows))
