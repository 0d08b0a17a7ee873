"""eqx-zoo: `python -m scripts._suites.peers.eqx_zoo_side`, by a Python that has it."""

# pyright: reportMissingImports=false
# It is not among what is installed for development.

import importlib.metadata

import eqx_zoo
import jax
import jax.numpy as jnp
import numpy as np

from ..protocol import Memory, serve, timed
from .common import cut


class EqxZoo(Memory):
    """Its `generate` for one prompt, its `generate_batch` for several."""

    def versions(self):
        return {
            "eqx-zoo": importlib.metadata.version("eqx-zoo"),
            "jax of eqx-zoo": jax.__version__,
        }

    def load(self, checkpoint, dtype):
        model = eqx_zoo.CausalLM.from_pretrained(checkpoint, dtype=jnp.dtype(dtype))
        self._model = jax.block_until_ready(model)
        return {}

    def run(self, prefix, prompts, max_new_tokens, stops):
        whole = [prefix + prompt for prompt in prompts]
        tokens, seconds = self._generate(whole, max_new_tokens)
        # It has no stop tokens: its guide says to truncate afterwards.
        return {"tokens": [cut(row, stops) for row in tokens], "seconds": seconds}

    def first(self, prompt):
        self.run([], [prompt], 1, [])
        return {}

    @timed
    def _generate(self, prompts, max_new_tokens):
        if len(prompts) == 1:
            ids = jnp.asarray(prompts[0], jnp.int32)
            return [np.asarray(eqx_zoo.generate(self._model, ids, max_new_tokens)).tolist()]
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = np.arange(longest) >= longest - np.array([[len(p)] for p in prompts])
        made = eqx_zoo.generate_batch(
            self._model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask), max_new_tokens
        )
        return np.asarray(made).tolist()


if __name__ == "__main__":
    serve(EqxZoo())
