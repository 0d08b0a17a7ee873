"""Runs ragged prompts through a model and a paged cache that is sized to them.

A run is one prefill, which makes the first tokens, and then a stream of bursts of decode
steps; between bursts the host sees the tokens, and ends prompts whose text is complete.
Every shape is rounded up to a bucket, so that jobs of about the same size share their
programs, and each program is compiled before its clock starts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.stages
import models
import numpy as np
from eqx_paged import (
    generate,
    Generation,
    PagedKVCache,
    RaggedKVCache,
    RESULTS,
    Sampler,
    samplers,
    Stream,
    stream,
)
from jaxtyping import Array, Int32

from ._held import Held, shortened
from ._prefill import Prefill


MAX_PREFILL_CHUNK = 512
# Below these sizes a smaller program or cache would gain nothing.
MIN_PROMPT_LEN = 32
MIN_LEN = 128
MIN_PAGES = 16
MIN_STOPS = 8
MIN_NEW_TOKENS = 64

# As a chain it takes a key a row, as those that draw do.
GREEDY = samplers.chain(samplers.greedy)

# Looks at a prompt's new tokens; None lets it go on, a number ends it and says how many of
# them to keep.
Keep = Callable[[Sequence[int], Sequence[int]], int | None]


@dataclasses.dataclass(frozen=True)
class Clock:
    """How many tokens were processed, and the seconds that this took."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Clock") -> "Clock":
        return Clock(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None


@dataclasses.dataclass(frozen=True)
class Program:
    """`eqx_paged.generate`, compiled for one size of input. The cache is donated.

    **Arguments:**

    - `model`: what to run.
    - `max_prompt_len`: the longest prompt of a call.
    - `max_new_tokens`: how many tokens a call makes of each prompt at most.
    - `stop_tokens`: as in `eqx_paged.generate`.
    """

    model: models.Decoder
    max_prompt_len: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()

    def compile(self, cache: PagedKVCache) -> tuple[PagedKVCache, int]:
        """Compiles for this size of cache.

        **Returns:**

        The cache, and the most bytes that the program holds at one time: weights, cache
        and what it needs besides.
        """
        compiled = _extend.lower(self._inputs([], cache), cache).compile().compiled
        _, cache, _ = self.call([], cache)
        return cache, bytes_of(compiled)

    def call(
        self, prompts: Sequence[Sequence[int]], cache: PagedKVCache
    ) -> tuple[list[list[int]], PagedKVCache, float]:
        """Continues the rows of `cache`, row `i` by `prompts[i]`.

        **Arguments:**

        - `prompts`: tokens; a row with none is left alone.
        - `cache`: with room for them and the new tokens.

        **Returns:**

        The new tokens of each prompt, the cache, and the seconds that it took.
        """
        inputs = self._inputs(prompts, cache)
        start = time.perf_counter()
        made, cache = jax.block_until_ready(_extend(inputs, cache))
        seconds = time.perf_counter() - start
        if made.result != RESULTS.successful:
            raise RuntimeError(RESULTS[made.result])
        tokens, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        new = [tokens[row, : lengths[row]].tolist() for row in range(len(prompts))]
        return new, cache, seconds

    def _inputs(
        self, prompts: Sequence[Sequence[int]], cache: PagedKVCache
    ) -> tuple[Any, ...]:
        padded, lens = padded_prompts(prompts, cache.num_seqs, self.max_prompt_len)
        arrays = jnp.asarray(padded), jnp.asarray(lens), padded_stops(self.stop_tokens)
        return self.model, *arrays, self.max_new_tokens


@eqx.filter_jit(donate="all-except-first")
def _extend(
    inputs: tuple[Any, ...], cache: PagedKVCache
) -> tuple[Generation, PagedKVCache]:
    model, prompts, prompt_lens, stop_tokens, max_new_tokens = inputs
    made, extended = generate(
        model,
        cache,
        prompts,
        prompt_lens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        prefill_chunk=min(MAX_PREFILL_CHUNK, prompts.size),
        throw=False,
    )
    assert isinstance(extended, PagedKVCache), "generate returns the kind it was given"
    return made, extended


def padded_prompts(
    prompts: Sequence[Sequence[int]], num_prompts: int, max_prompt_len: int
) -> tuple[Int32[np.ndarray, "num_prompts max_prompt_len"], Int32[np.ndarray, " _"]]:
    """Prompts as an array, and how many tokens each has; 0 past the last."""
    padded = np.zeros((num_prompts, max_prompt_len), np.int32)
    lens = np.zeros(num_prompts, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
        lens[row] = len(prompt)
    return padded, lens


def padded_stops(stop_tokens: tuple[int, ...]) -> Int32[Array, " num_stops"]:
    """Stop tokens as an array, of which the number is a shape too; no token is -1."""
    padded = np.full(bucket(len(stop_tokens), MIN_STOPS), -1, np.int32)
    padded[: len(stop_tokens)] = stop_tokens
    return jnp.asarray(padded)


def bytes_of(compiled: jax.stages.Compiled) -> int:
    """The most bytes that a program holds at one time, as XLA reports."""
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA tells it on every platform that has a device"
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What to continue, and how.

    **Arguments:**

    - `prompts`: the tokens of each, at least one.
    - `max_new_tokens`: how many to add to each at most.
    - `max_len`: how long each may become at most, its prompt included.
    - `page_size`: of the cache.
    - `burst`: how many tokens to make between two looks at them.
    - `stop_tokens`: each ends its row, as the row's last token.
    - `keep`: called with a prompt and its new tokens, to end it.
    - `sampler`, `seed`: how to choose a token from its logits.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    max_len: int = 2**31 - 1
    page_size: int = 16
    burst: int = 8
    stop_tokens: tuple[int, ...] = ()
    keep: Keep = lambda *_: None
    sampler: Sampler = GREEDY
    seed: int = 0

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt may get."""
        return min(self.max_new_tokens, self.max_len - len(prompt))

    def cache_shape(self, config: models.DecoderConfig) -> dict[str, int]:
        """The sizes of a cache with room for all that the job may make."""
        lens = [len(prompt) + self.room(prompt) for prompt in self.prompts]
        num_pages = sum(-(-length // self.page_size) for length in lens)
        return shape_of_cache(
            config,
            num_pages=bucket(num_pages, MIN_PAGES),
            page_size=self.page_size,
            num_seqs=bucket(len(self.prompts)),
            longest=max(lens),
        )


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    **Arguments:**

    - `tokens`: the new tokens of each prompt.
    - `finished`: whether each is complete.
    - `cached`: how many of each prompt's tokens the cache held before the run.
    - `prefill`, `decode`: the speeds.
    - `peak_bytes`: the most bytes that were in use at one time, as far as XLA reports: of
        the weights and the cache alone until there is a burst.
    - `left`: once the run is complete, the cache and what it holds.
    """

    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    cached: tuple[int, ...]
    prefill: Clock
    decode: Clock
    peak_bytes: int
    left: Held | None

    @property
    def held(self) -> Held:
        assert self.left is not None, "a run that is not complete holds its cache itself"
        return self.left


def bucket(count: int, least: int = 1) -> int:
    """Rounds up to `least`, or to `m * 2**k` with `m` in 4..7: at most a quarter more."""
    step = 1 << max(0, count.bit_length() - 3)
    return max(least, -(-count // step) * step)


def shape_of_cache(
    config: models.DecoderConfig,
    *,
    num_pages: int,
    page_size: int,
    num_seqs: int,
    longest: int,
) -> dict[str, int]:
    """The sizes of a model's cache, with rows for texts of up to `longest` tokens."""
    return {
        "num_layers": config.num_hidden_layers,
        "num_pages": num_pages,
        "page_size": page_size,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_seqs": num_seqs,
        "max_len": _row_len(longest, page_size, config.short_len),
    }


def _row_len(length: int, page_size: int, short_len: int | None) -> int:
    """Rounded up, but not so far that a model takes the row for a long one."""
    rounded = bucket(length, MIN_LEN)
    # Of whole pages.
    short = (short_len or 0) // page_size * page_size
    return min(rounded, short) if length <= short else rounded


def nothing_held(model: models.Decoder, job: Job) -> Held:
    """An empty cache with room for the job."""
    dtype = model.embed_tokens.weight.dtype
    cache = PagedKVCache.empty(**job.cache_shape(model.config), dtype=dtype)
    return Held(cache, ((),) * len(job.prompts))


def run(model: models.Decoder, job: Job, held: Held | None = None) -> Iterator[Progress]:
    """Continues the job's prompts.

    **Arguments:**

    - `model`: what continues them.
    - `job`: what to continue.
    - `held`: what an earlier run left, with as many rows and room for the job. It is
        used up. Of a prompt that begins with what its row holds, only the rest is read.

    **Returns:**

    Where the run stands with the first token of each prompt, and after each burst. The
    cache of the last one holds exactly the prompts and the tokens kept, but for the last
    of each row.
    """
    # At least a prompt's last token is read, since the next one follows from it.
    known = [prompt[:-1] for prompt in job.prompts]
    held = nothing_held(model, job) if held is None else held.rewind(known)
    cached = tuple(map(len, held.rows))
    unread = [tokens[n:] for tokens, n in zip(job.prompts, cached, strict=True)]
    first, cache, prefill = _read(model, job, unread, held.cache)
    rows = [Row(prompt, job.room(prompt)) for prompt in job.prompts]
    rows = _extended(rows, {i: [token] for i, token in enumerate(first)}, job)
    begun = Progress(
        tokens=tuple(row.tokens for row in rows),
        finished=tuple(row.finished for row in rows),
        cached=cached,
        prefill=prefill,
        decode=Clock(),
        peak_bytes=_num_bytes(model, cache),
        left=None,
    )
    if all(begun.finished):
        yield dataclasses.replace(begun, left=_left(cache, rows))
        return
    yield begun
    bursts = _bursts(model, job, rows, cache)
    peak_bytes, seconds = bytes_of(bursts.compile()), 0.0
    while not all(row.finished for row in rows):
        start = time.perf_counter()
        made = next(bursts)
        seconds += time.perf_counter() - start
        rows = _extended(rows, made, job)
        for i, row in enumerate(rows):
            if row.finished:
                bursts.stop(i)
        finished = tuple(row.finished for row in rows)
        yield dataclasses.replace(
            begun,
            tokens=tuple(row.tokens for row in rows),
            finished=finished,
            # Only what is kept counts, though more may have been made.
            decode=Clock(sum(max(0, len(row.tokens) - 1) for row in rows), seconds),
            peak_bytes=peak_bytes,
            left=_left(bursts.finish()[1], rows) if all(finished) else None,
        )


def _read(
    model: models.Decoder,
    job: Job,
    unread: Sequence[Sequence[int]],
    cache: PagedKVCache,
) -> tuple[list[int], PagedKVCache, Clock]:
    """Reads prompts; returns the token after each, the cache, and the speed."""
    num_unread = sum(map(len, unread))
    num_tokens = min(MAX_PREFILL_CHUNK, bucket(num_unread, MIN_PROMPT_LEN))
    key = jax.random.fold_in(jax.random.key(job.seed), 0)
    prefill = Prefill(model, num_tokens, job.sampler, key)
    cache = jax.block_until_ready(prefill.compile(cache))
    start = time.perf_counter()
    first, cache = jax.block_until_ready(prefill.first_tokens(unread, cache))
    return first, cache, Clock(num_unread, time.perf_counter() - start)


def _extended(rows: list["Row"], made: dict[int, list[int]], job: Job) -> list["Row"]:
    """With what was made of each."""
    return [
        row.extend(made.get(i, []), job.stop_tokens, job.keep) for i, row in enumerate(rows)
    ]


def _num_bytes(model: models.Decoder, cache: PagedKVCache) -> int:
    arrays = jax.tree.leaves(eqx.filter((model, cache), eqx.is_array))
    return sum(array.nbytes for array in arrays)


def _bursts(
    model: models.Decoder, job: Job, rows: Sequence["Row"], cache: PagedKVCache
) -> Stream:
    """What follows the first token of each row."""
    return stream(
        model,
        cache,
        np.array([[row.tokens[-1] if row.tokens else 0] for row in rows]),
        np.array([0 if row.finished else 1 for row in rows], np.int32),
        max_new_tokens=bucket(max(map(job.room, job.prompts)), MIN_NEW_TOKENS),
        burst=job.burst,
        limits=np.array([max(1, row.room - 1) for row in rows]),
        stop_tokens=padded_stops(job.stop_tokens),
        sampler=job.sampler,
        key=jax.random.fold_in(jax.random.key(job.seed), 1),
        donate_cache=True,
    )


def _left(cache: PagedKVCache | RaggedKVCache, rows: Sequence["Row"]) -> Held:
    assert isinstance(cache, PagedKVCache), "a stream returns the kind it was given"
    # Nothing reads a row's last token, so the cache never had it; nor is there to be
    # what was made past the end of a row.
    read = tuple((*row.prompt, *row.tokens)[:-1] for row in rows)
    return Held(shortened(cache, read), read)


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, room for so many new tokens, and those that were made and kept."""

    prompt: tuple[int, ...]
    room: int
    tokens: tuple[int, ...] = ()
    finished: bool = False

    def extend(self, new: list[int], stop_tokens: tuple[int, ...], keep: Keep) -> "Row":
        """With more tokens; `stop_tokens` and `keep` as in `Job`."""
        if self.finished:
            return self
        tokens = (*self.tokens, *new)
        kept = keep(self.prompt, tokens)
        is_full = len(tokens) == self.room
        finished = kept is not None or is_full or tokens[-1] in stop_tokens
        return dataclasses.replace(self, tokens=tokens[:kept], finished=finished)
