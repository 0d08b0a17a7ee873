"""What a run leaves for the next: a cache, and which tokens are in it."""

import dataclasses
import itertools
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from eqx_paged import PagedKVCache
from jaxtyping import Array, Int32


@dataclasses.dataclass(frozen=True)
class Held:
    """A cache, and the tokens whose keys and values its first rows hold."""

    cache: PagedKVCache
    rows: tuple[tuple[int, ...], ...]

    def rewind(self, known: Sequence[Sequence[int]]) -> "Held":
        """Drops from each row what is not the beginning of what it shall hold."""
        pairs = zip(self.rows, known, strict=True)
        rows = tuple(row[: _num_common(row, new)] for row, new in pairs)
        return Held(shortened(self.cache, rows), rows)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def shortened(cache: PagedKVCache, rows: Sequence[Sequence[int]]) -> PagedKVCache:
    """The cache with its rows cut to the lengths of `rows`."""
    kv_lens = np.zeros(cache.num_seqs, np.int32)
    kv_lens[: len(rows)] = [len(row) for row in rows]
    return _truncate(jnp.asarray(kv_lens), cache)


@eqx.filter_jit(donate="all-except-first")
def _truncate(kv_lens: Int32[Array, " num_seqs"], cache: PagedKVCache) -> PagedKVCache:
    return cache.truncate(kv_lens)
