"""Runs ragged prompts through a model and a paged cache that is sized to them.

A run is one prefill and then bursts of decode steps, each a call of one compiled
program; between bursts the host sees the tokens. Every shape is rounded up to a bucket,
so that jobs of about the same size share their programs, and each program is compiled
before its clock starts.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
from eqx_paged import generate, Generation, greedy, PagedKVCache, RESULTS, Sampler
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from ._held import Held, shortened


MAX_PREFILL_CHUNK = 512
# Below these sizes a smaller program or cache would gain nothing.
MIN_PROMPT_LEN = 32
MIN_LEN = 128
MIN_PAGES = 16
MIN_STOPS = 8


class Temperature(eqx.Module):
    """Draws each token with probability `softmax(logits / temperature)`."""

    temperature: Float[Array, ""]

    def __call__(
        self, logits: Float[Array, "num_seqs vocab_size"], key: PRNGKeyArray | None
    ) -> Int32[Array, " num_seqs"]:
        """**Arguments:**

        - `logits`: a score for each token, for each row.
        - `key`: where the chance comes from.

        **Returns:**

        One token a row.
        """
        assert key is not None, "a program gives each of its calls a key"
        logits = logits.astype(jnp.float32) / self.temperature
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


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
    - `stop_tokens`, `sampler`: as in `eqx_paged.generate`.
    - `seed`: of the sampler.
    """

    model: models.Decoder
    max_prompt_len: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    sampler: Sampler = greedy
    seed: int = 0

    def compile(self, cache: PagedKVCache) -> tuple[PagedKVCache, int]:
        """Compiles for this size of cache.

        **Returns:**

        The cache, and the most bytes that the program holds at one time: weights, cache
        and what it needs besides.
        """
        compiled = _extend.lower(self._inputs([], cache, 0), cache).compile().compiled
        memory = compiled.memory_analysis()
        peak_bytes = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        _, cache, _ = self.call([], cache)
        return cache, peak_bytes

    def call(
        self, prompts: Sequence[Sequence[int]], cache: PagedKVCache, step: int = 0
    ) -> tuple[list[list[int]], PagedKVCache, float]:
        """Continues the rows of `cache`, row `i` by `prompts[i]`.

        **Arguments:**

        - `prompts`: tokens; a row with none is left alone.
        - `cache`: with room for them and the new tokens.
        - `step`: tells the calls of a run from each other, for the sampler.

        **Returns:**

        The new tokens of each prompt, the cache, and the seconds that it took.
        """
        inputs = self._inputs(prompts, cache, step)
        start = time.perf_counter()
        made, cache = jax.block_until_ready(_extend(inputs, cache))
        seconds = time.perf_counter() - start
        if made.result != RESULTS.successful:
            raise RuntimeError(RESULTS[made.result])
        tokens, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        new = [tokens[row, : lengths[row]].tolist() for row in range(len(prompts))]
        return new, cache, seconds

    def _inputs(
        self, prompts: Sequence[Sequence[int]], cache: PagedKVCache, step: int
    ) -> tuple[Any, ...]:
        padded = np.zeros((cache.num_seqs, self.max_prompt_len), np.int32)
        lens = np.zeros(cache.num_seqs, np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
            lens[row] = len(prompt)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        arrays = jnp.asarray(padded), jnp.asarray(lens), key
        # Their number is a shape too; no token is -1.
        stop_tokens = np.full(bucket(len(self.stop_tokens), MIN_STOPS), -1, np.int32)
        stop_tokens[: len(self.stop_tokens)] = self.stop_tokens
        stops = jnp.asarray(stop_tokens)
        return self.model, *arrays, self.max_new_tokens, stops, self.sampler


@eqx.filter_jit(donate="all-except-first")
def _extend(
    inputs: tuple[Any, ...], cache: PagedKVCache
) -> tuple[Generation, PagedKVCache]:
    model, prompts, prompt_lens, key, max_new_tokens, stop_tokens, sampler = inputs
    made, extended = generate(
        model,
        cache,
        prompts,
        prompt_lens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampler=sampler,
        key=key,
        prefill_chunk=min(MAX_PREFILL_CHUNK, prompts.size),
        throw=False,
    )
    assert isinstance(extended, PagedKVCache), "generate returns the kind it was given"
    return made, extended


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
    - `keep(prompt, tokens)`: looks at a prompt's new tokens; None lets it go on, a
        number ends it and says how many of them to keep.
    - `sampler`, `seed`: how to choose a token from its logits.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    max_len: int = 2**31 - 1
    page_size: int = 16
    burst: int = 8
    stop_tokens: tuple[int, ...] = ()
    keep: Callable[[Sequence[int], Sequence[int]], int | None] = lambda *_: None
    sampler: Sampler = greedy
    seed: int = 0

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt may get."""
        return min(self.max_new_tokens, self.max_len - len(prompt))

    def cache_shape(self, config: models.DecoderConfig) -> dict[str, int]:
        """The sizes of a cache with room for all that the job may make."""
        # The last burst may make tokens that are not wanted.
        unwanted = self.burst - 1
        lens = [len(prompt) + self.room(prompt) + unwanted for prompt in self.prompts]
        num_pages = sum(-(-length // self.page_size) for length in lens)
        return {
            "num_layers": config.num_hidden_layers,
            "num_pages": bucket(num_pages, MIN_PAGES),
            "page_size": self.page_size,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "num_seqs": bucket(len(self.prompts)),
            "max_len": self._row_len(max(lens), config.short_len),
        }

    def _row_len(self, length: int, short_len: int | None) -> int:
        """Rounded up, but not so far that a model takes the row for a long one."""
        rounded = bucket(length, MIN_LEN)
        # Of whole pages.
        short = (short_len or 0) // self.page_size * self.page_size
        return min(rounded, short) if length <= short else rounded


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    **Arguments:**

    - `tokens`: the new tokens of each prompt.
    - `finished`: whether each is complete.
    - `cached`: how many of each prompt's tokens the cache held before the run.
    - `held`: the cache, and what it holds once the run is complete.
    - `prefill`, `decode`: the speeds.
    - `peak_bytes`: as from `Program.compile`.
    """

    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    cached: tuple[int, ...]
    held: Held
    prefill: Clock
    decode: Clock
    peak_bytes: int


def bucket(count: int, least: int = 1) -> int:
    """Rounds up to `least`, or to `m * 2**k` with `m` in 4..7: at most a quarter more."""
    step = 1 << max(0, count.bit_length() - 3)
    return max(least, -(-count // step) * step)


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

    Where the run stands after each burst. The cache of the last one holds exactly the
    prompts and the tokens kept, but for the last of each row.
    """
    # A prompt's last token is the first that a burst reads, as later its own last one.
    known = [prompt[:-1] for prompt in job.prompts]
    held = nothing_held(model, job) if held is None else held.rewind(known)
    cached = tuple(map(len, held.rows))
    decode = Program(
        model, 1, job.burst, job.stop_tokens, sampler=job.sampler, seed=job.seed
    )
    cache, peak_bytes = decode.compile(held.cache)
    unread = [tokens[count:] for tokens, count in zip(known, cached, strict=True)]
    prefill_clock = decode_clock = Clock()
    if any(unread):
        prefill = Program(model, bucket(max(map(len, unread)), MIN_PROMPT_LEN), 0)
        cache, prefill_peak = prefill.compile(cache)
        peak_bytes = max(peak_bytes, prefill_peak)
        _, cache, seconds = prefill.call(unread, cache)
        prefill_clock = Clock(sum(map(len, unread)), seconds)

    rows = [_Row(prompt) for prompt in job.prompts]
    for step in itertools.count():
        made, cache, seconds = decode.call([row.unread for row in rows], cache, step)
        rows = [row.extend(new, job) for row, new in zip(rows, made, strict=True)]
        # Only what is kept counts, though more may have been made.
        num_kept = sum(len(row.tokens) for row in rows)
        decode_clock = Clock(num_kept, decode_clock.seconds + seconds)
        # Nothing reads a row's last token, so the cache never had it.
        read = tuple((*row.prompt, *row.tokens)[:-1] for row in rows)
        finished = all(row.finished for row in rows)
        if finished:
            # Without what was made past the end of a row.
            cache = shortened(cache, read)
        yield Progress(
            tokens=tuple(row.tokens for row in rows),
            finished=tuple(row.finished for row in rows),
            cached=cached,
            held=Held(cache, read),
            prefill=prefill_clock,
            decode=decode_clock,
            peak_bytes=peak_bytes,
        )
        if finished:
            return


@dataclasses.dataclass(frozen=True)
class _Row:
    """A prompt and its new tokens."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    finished: bool = False

    @property
    def unread(self) -> tuple[int, ...]:
        """What the cache lacks: the last token of a row that goes on."""
        return () if self.finished else (*self.prompt, *self.tokens)[-1:]

    def extend(self, new: list[int], job: Job) -> "_Row":
        if self.finished:
            return self
        room = job.room(self.prompt)
        tokens = (*self.tokens, *new)[:room]
        keep = job.keep(self.prompt, tokens)
        finished = keep is not None or len(tokens) == room or tokens[-1] in job.stop_tokens
        return _Row(self.prompt, tokens[:keep], finished)
