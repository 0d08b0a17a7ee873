"""Drafts by a smaller model."""

import equinox as eqx
from jaxtyping import Array, Int32

from ._cache import PagedKVCache
from ._checks import check_positive
from ._model import Model
from ._ragged_cache import RaggedKVCache
from ._results import RESULTS


class DraftModel(eqx.Module):
    """A smaller model that proposes tokens, one after the other, for a larger one to check.

    It draws with the sampler and the keys of the larger one, so that both draw the same
    where their distributions are alike.

    - `model`: as [`eqx_paged.Model`][] says, of the same vocabulary.
    - `cache`: its own, with as many rows as the larger one's, which hold the same tokens,
        and room for as many more. With a `window` of `generate` it needs pages for whole
        prompts and what is made of them, since it drops none.
    - `num_tokens`: how many tokens to propose at a time.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
    https://arxiv.org/abs/2211.17192.
    """

    model: Model
    cache: PagedKVCache | RaggedKVCache | None
    num_tokens: int = eqx.field(static=True)

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache | RaggedKVCache | None,
        *,
        num_tokens: int = 4,
    ):
        """**Arguments:**

        - `model`: any PyTree that is such a model.
        - `cache`: its own. After a run, the one to go on with is
            `Generation.drafted.cache`.
        - `num_tokens`: how many tokens to propose at a time.

        **Raises:**

        `ValueError` if `num_tokens` is below 1.
        """
        check_positive(num_tokens=num_tokens)
        self.model = model
        self.cache = cache
        self.num_tokens = num_tokens

    def without_cache(self) -> "DraftModel":
        """The same, to go with a cache that is kept elsewhere."""
        return DraftModel(self.model, None, num_tokens=self.num_tokens)

    def read(
        self,
        tokens: Int32[Array, " num_tokens"],
        cache: PagedKVCache | RaggedKVCache,
        q_lens: Int32[Array, " num_seqs"],
        num_tokens: int | None,
    ) -> tuple[PagedKVCache | RaggedKVCache, RESULTS]:
        """Reads what the larger model reads in a step.

        **Arguments:**

        - `tokens`: the step's.
        - `cache`: what it has read so far.
        - `q_lens`, `num_tokens`: as `append` takes them.

        **Returns:**

        The cache with these tokens, and whether there was room for them.
        """
        cache, batch, result = cache.append(q_lens, num_tokens)
        _, cache = self.model(tokens, cache, batch)
        return cache, result
