"""Any number of prompts through the rows of one cache, with a look between bursts.

The prompts go in turn even where each could have a row, so that one that is done gives its
pages back, and one that finds none waits for them. Every shape is rounded up to a bucket,
as in `_engine`.
"""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import models
import numpy as np
from eqx_paged import greedy, PagedKVCache, Sampler, samplers, Stream, stream

from ._engine import (
    bucket,
    Keep,
    MIN_NEW_TOKENS,
    MIN_PAGES,
    MIN_PROMPT_LEN,
    padded_prompts,
    padded_stops,
    Row,
    shape_of_cache,
)
from ._serve_options import Request


@dataclasses.dataclass(frozen=True)
class Batch:
    """What to continue, and through what.

    **Arguments:**

    - `requests`, `prompts`: how to continue each prompt, and its tokens.
    - `max_rows`: the most prompts to continue at a time.
    - `page_size`, `burst`, `stop_tokens`, `keep`, `seed`: as in `_engine.Job`.
    - `num_pages`: of the pool; what the rows may need at most if None.
    """

    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    max_rows: int
    page_size: int
    burst: int
    stop_tokens: tuple[int, ...]
    keep: Keep
    seed: int
    num_pages: int | None = None

    def cache_shape(self, config: models.DecoderConfig) -> dict[str, int]:
        """The sizes of the cache."""
        num_rows = min(self.max_rows, len(self.prompts))
        most = sum(sorted(map(self.pages_of, range(len(self.prompts))))[-num_rows:])
        pairs = zip(self.prompts, self.requests, strict=True)
        longest = max(len(tokens) + request.max_new_tokens for tokens, request in pairs)
        return shape_of_cache(
            config,
            num_pages=self.num_pages or bucket(most, MIN_PAGES),
            page_size=self.page_size,
            num_seqs=num_rows,
            longest=longest,
        )

    def pages_of(self, index: int) -> int:
        """The most pages that a prompt needs: the last token made is never read."""
        new = self.requests[index].max_new_tokens
        return -(-(len(self.prompts[index]) + new - 1) // self.page_size)

    @property
    def num_padded(self) -> int:
        """How many prompts there are with padding; more than rows, so that they go in
        turn."""
        return max(bucket(len(self.prompts)), min(self.max_rows, len(self.prompts)) + 1)


@dataclasses.dataclass(frozen=True)
class Burst:
    """Where a run stands after a burst.

    **Arguments:**

    - `finished`: the new tokens of each prompt that is finished since the last burst.
    - `num_prompt_tokens`: of the prompts that have been read.
    - `num_new_tokens`: made of all prompts, and kept.
    - `seconds`: since the first burst began.
    - `pages_used`: of the pool.
    """

    finished: dict[int, tuple[int, ...]]
    num_prompt_tokens: int
    num_new_tokens: int
    seconds: float
    pages_used: int


def begin(model: models.Decoder, batch: Batch) -> Stream:
    """The stream of the prompts, before its first burst."""
    dtype = model.embed_tokens.weight.dtype
    cache = PagedKVCache.empty(**batch.cache_shape(model.config), dtype=dtype)
    width = bucket(max(map(len, batch.prompts)), MIN_PROMPT_LEN)
    prompts, lens = padded_prompts(batch.prompts, batch.num_padded, width)
    limits = np.ones(batch.num_padded, np.int32)
    limits[: len(batch.requests)] = [x.max_new_tokens for x in batch.requests]
    sampler, keys = _sampler(batch)
    return stream(
        model,
        cache,
        prompts,
        lens,
        max_new_tokens=bucket(int(limits.max()), MIN_NEW_TOKENS),
        burst=batch.burst,
        limits=limits,
        stop_tokens=padded_stops(batch.stop_tokens),
        sampler=sampler,
        key=keys,
        donate_cache=True,
    )


def _sampler(batch: Batch) -> tuple[Sampler, jax.Array | None]:
    """The sampler, and a key a prompt: of its own seed, or else of the batch's seed and
    its index, so that neither depends on the other prompts."""
    if not any(request.temperature for request in batch.requests):
        return greedy, None
    temperatures = np.zeros(batch.num_padded, np.float32)
    seeds = np.zeros(batch.num_padded, np.uint32)
    has_seed = np.zeros(batch.num_padded, bool)
    for i, request in enumerate(batch.requests):
        temperatures[i] = request.temperature
        seeds[i], has_seed[i] = request.seed or 0, request.seed is not None
    own = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    indices = jnp.arange(batch.num_padded)
    folded = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(batch.seed), indices)
    keys = jnp.where(jnp.asarray(has_seed), own, folded)
    chain = samplers.chain(samplers.temperature(temperatures), samplers.categorical)
    return chain, keys


def serve(bursts: Stream, batch: Batch, num_pages: int) -> Iterator[Burst]:
    """Continues the prompts; tells after each burst where the run stands."""
    pairs = zip(batch.prompts, batch.requests, strict=True)
    rows = [Row(tokens, request.max_new_tokens) for tokens, request in pairs]
    num_prompt_tokens = num_new_tokens = 0
    start = time.perf_counter()
    for made in bursts:
        finished = {}
        for i, new in made.items():
            old, rows[i] = rows[i], rows[i].extend(new, batch.stop_tokens, batch.keep)
            num_new_tokens += len(rows[i].tokens) - len(old.tokens)
            num_prompt_tokens += 0 if old.tokens else len(old.prompt)
            if rows[i].finished:
                bursts.stop(i)
                finished[i] = rows[i].tokens
        yield Burst(
            finished,
            num_prompt_tokens,
            num_new_tokens,
            time.perf_counter() - start,
            num_pages - bursts.num_free_pages,
        )
