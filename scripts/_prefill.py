"""Reads prompts layer by layer, and chooses the token after each.

A program for one layer is compiled in a small part of the time that one for a whole model
takes, so that the first tokens come soon.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
from eqx_paged import PagedKVCache, RaggedBatch, RESULTS, Sampler
from jaxtyping import Array, Float, Int32, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Prefill:
    """How prompts are read.

    **Arguments:**

    - `model`: what reads them.
    - `num_tokens`: how many tokens a step reads, of all prompts together.
    - `sampler`, `key`: how to choose a token from its logits.
    """

    model: models.Decoder
    num_tokens: int
    sampler: Sampler
    key: PRNGKeyArray

    def compile(self, cache: PagedKVCache) -> PagedKVCache:
        """Compiles for this size of cache, which is used up; gives it as it was."""
        window = self.model.config.window
        kinds = [window(i) for i in range(len(self.model.layers))]
        # Up to the first layer of the last kind.
        return self._step([], cache, 1 + max(map(kinds.index, set(kinds))))[1]

    def first_tokens(
        self, unread: Sequence[Sequence[int]], cache: PagedKVCache
    ) -> tuple[list[int], PagedKVCache]:
        """Extends the rows of `cache`, row `i` by `unread[i]`, and chooses what follows.

        **Arguments:**

        - `unread`: at least a token each.
        - `cache`: with room for them. It is used up.

        **Returns:**

        A token a row, and the cache.
        """
        first = [0] * len(unread)
        while any(unread):
            taken, rest = _shared_out(unread, self.num_tokens)
            made, cache = self._step(taken, cache)
            for row, tokens in enumerate(taken):
                if tokens and not rest[row]:
                    first[row] = made[row]
            unread = rest
        return first, cache

    def _step(
        self,
        taken: Sequence[Sequence[int]],
        cache: PagedKVCache,
        num_layers: int | None = None,
    ) -> tuple[list[int], PagedKVCache]:
        """The token that follows in each row after some more were read, by the first
        layers alone if so many are given."""
        q_lens = np.zeros(cache.num_seqs, np.int32)
        q_lens[: len(taken)] = list(map(len, taken))
        tokens = np.zeros(self.num_tokens, np.int32)
        tokens[: q_lens.sum()] = np.concatenate([*taken, ()])
        cache, batch, result = _append((jnp.asarray(q_lens), self.num_tokens), cache)
        if result != RESULTS.successful:
            raise RuntimeError(RESULTS[result])
        model = eqx.tree_at(lambda x: x.layers, self.model, self.model.layers[:num_layers])
        part = dataclasses.replace(cache, layers=cache.layers[:num_layers])
        hidden, part = model.by_layers(jnp.asarray(tokens), part, batch)
        others = () if num_layers is None else cache.layers[num_layers:]
        cache = dataclasses.replace(cache, layers=(*part.layers, *others))
        made = _chosen(self.model, hidden[batch.last_tokens], self.sampler, self.key)
        return np.asarray(made).tolist(), cache


def _shared_out(
    unread: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """What a step reads of each prompt, in order, and what is left."""
    taken, rest = [], []
    for tokens in unread:
        taken.append(tokens[:num_tokens])
        rest.append(tokens[num_tokens:])
        num_tokens -= len(taken[-1])
    return taken, rest


@eqx.filter_jit(donate="all-except-first")
def _append(
    how: tuple[Int32[Array, " num_seqs"], int], cache: PagedKVCache
) -> tuple[PagedKVCache, RaggedBatch, RESULTS]:
    return cache.append(*how)


@eqx.filter_jit
def _chosen(
    model: models.Decoder,
    hidden: Float[Array, "num_seqs hidden_size"],
    sampler: Sampler,
    key: PRNGKeyArray,
) -> Int32[Array, " num_seqs"]:
    rows = jnp.arange(hidden.shape[0], dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return sampler(model.unembed(hidden), keys)
