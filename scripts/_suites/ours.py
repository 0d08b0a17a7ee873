"""Our side of `generate` and `startup`: `python -m scripts._suites.ours KIND`, with KIND
"paged" or "contiguous". Speaks as `protocol` says."""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
from eqx_paged import (
    generate,
    Generation,
    PagedAttention,
    PagedKVCache,
    RaggedAttention,
    RaggedKVCache,
    RESULTS,
)

from .._engine import Job, run
from .protocol import Memory, serve, timed


PAGE_SIZE = 64
MAX_STOPS = 8
# Audited texts are filled up to a multiple of so many tokens.
AUDITED = 256
# A step that reads prompts reads so many tokens, however few there are, while other rows
# make one each.
QUEUE_CHUNK = 64

Cache = PagedKVCache | RaggedKVCache
Tokens = list[list[int]]


class Ours(Memory):
    """The decoder of `models` over one of our caches."""

    def __init__(self, kind: str):
        attention = {"paged": PagedAttention(), "contiguous": RaggedAttention()}
        self._attention = attention[kind]

    @classmethod
    def of_random_weights(cls, kind: str, config: models.DecoderConfig) -> "Ours":
        """As after `load`, always with the same weights."""
        side = cls(kind)
        side._model = models.Decoder(
            config, attention=side._attention, key=jax.random.key(0)
        )
        return side

    def load(self, checkpoint: str, dtype: str) -> dict[str, Any]:
        model = models.load_checkpoint(
            checkpoint, jnp.dtype(dtype), attention=self._attention
        )
        self._model = jax.block_until_ready(model)
        return {}

    def run(
        self, prefix: list[int], prompts: Tokens, max_new_tokens: int, stops: list[int]
    ) -> dict[str, Any]:
        """Continues `prefix` + each of `prompts`, from an empty cache.

        **Returns:**

        `tokens`, without padding; `seconds`, from tokens to tokens; `cache_bytes`.
        """
        run = timed(self._generate)
        (made, cache), seconds = run(prefix, prompts, max_new_tokens, stops)
        if made.result != RESULTS.successful:
            raise RuntimeError(RESULTS[made.result])
        tokens, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        kept = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        return {"tokens": kept, "seconds": seconds, "cache_bytes": cache.num_bytes}

    def _generate(
        self, prefix: list[int], prompts: Tokens, max_new_tokens: int, stops: list[int]
    ) -> tuple[Generation, Cache]:
        if not isinstance(self._attention, PagedAttention):
            prompts = [prefix + prompt for prompt in prompts]
            prefix = []
        cache = self._empty_cache(prefix, prompts, max_new_tokens)
        if prefix:
            cache = _shared(self._model, cache, prefix, len(prompts))
        inputs = self._model, *_padded(prompts), _stops(stops)
        return jax.block_until_ready(_extend(inputs, cache, max_new_tokens))

    def _empty_cache(
        self, prefix: list[int], prompts: Tokens, max_new_tokens: int
    ) -> Cache:
        lens = [len(prompt) + max_new_tokens for prompt in prompts]
        shape = self._shape(num_seqs=len(prompts), max_len=len(prefix) + max(lens))
        if not isinstance(self._attention, PagedAttention):
            return RaggedKVCache.empty(**shape)
        # The prefix once, then each row's own tokens, the first in a page with its end.
        own = [_num_pages(length + len(prefix) % PAGE_SIZE) for length in lens]
        num_pages = _num_pages(len(prefix)) + sum(own)
        return PagedKVCache.empty(num_pages=num_pages, page_size=PAGE_SIZE, **shape)

    def _shape(self, **sizes: int) -> dict[str, Any]:
        config = self._model.config
        return {
            "num_layers": config.num_hidden_layers,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "dtype": self._model.embed_tokens.weight.dtype,
            **sizes,
        }

    def serve(
        self, prompts: Tokens, limits: list[int], num_rows: int, in_turn: bool
    ) -> dict[str, Any]:
        """Makes `limits[i]` tokens of prompt `i`, through `num_rows` rows: as rows become
        free, or batch after batch. As `run`."""
        run = timed(self._serve)
        tokens, seconds = run(prompts, limits, num_rows, in_turn)
        return {"tokens": tokens, "seconds": seconds}

    def _serve(
        self, prompts: Tokens, limits: list[int], num_rows: int, in_turn: bool
    ) -> Tokens:
        size, chunk = (len(prompts), QUEUE_CHUNK) if in_turn else (num_rows, 512)
        padded, lens = _padded(prompts)
        # The last batch may be smaller; of the others' shape it compiles nothing.
        missing = -len(prompts) % size
        padded, lens = np.pad(padded, ((0, missing), (0, 0))), np.pad(lens, (0, missing))
        kept = np.pad(np.array(limits, np.int32), (0, missing))
        most = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        shape = self._shape(num_seqs=num_rows, max_len=max(most))
        num_pages = num_rows * _num_pages(max(most))
        cache = PagedKVCache.empty(num_pages=num_pages, page_size=PAGE_SIZE, **shape)
        tokens = []
        for i in range(0, len(padded), size):
            part = slice(i, i + size)
            inputs = self._model, padded[part], lens[part], _stops([])
            made, cache = _extend(inputs, cache, max(limits), kept[part], chunk)
            cache = _freed(cache)
            if made.result != RESULTS.successful:
                raise RuntimeError(RESULTS[made.result])
            rows = zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True)
            tokens += [row[:length].tolist() for row, length in rows]
        return tokens[: len(prompts)]

    def first(self, prompt: list[int]) -> dict[str, float]:
        """The first token as `scripts.generate --stream` makes it, compiling what is not
        compiled yet; gives the seconds that the compiler took."""
        compiling = []

        def listen(event: str, duration_secs: float, **_: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiling.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        job = Job((tuple(prompt),), max_new_tokens=128, page_size=PAGE_SIZE, burst=1)
        self._progress = run(self._model, job)
        next(self._progress)
        return {"of it compiling": sum(compiling)}

    def second(self) -> dict[str, Any]:
        """The second token, once `first` is done; compiles the loop that makes it and all
        later ones."""
        next(self._progress)
        return {}

    def audit(self, tokens: list[int], num_prompt_tokens: int) -> dict[str, Any]:
        """How far each token after the prompt is from the greedy choice, by attention
        without a cache: its logit below the largest, in standard deviations of the
        logits."""
        # Of few lengths, so that few are compiled: no token sees a later one.
        padded = np.pad(np.array(tokens, np.int32), (0, -len(tokens) % AUDITED))
        gaps = np.asarray(_gaps(self._model, padded))
        return {"gaps": gaps[num_prompt_tokens - 1 : len(tokens) - 1].tolist()}


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def _padded(prompts: Tokens) -> tuple[np.ndarray, np.ndarray]:
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lens.max()), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return padded, lens


def _stops(stops: list[int]) -> np.ndarray:
    # Their number is a shape; no token is -1.
    padded = np.full(MAX_STOPS, -1, np.int32)
    padded[: len(stops)] = stops
    return padded


@eqx.filter_jit(donate="all-except-first")
def _extend(inputs, cache, max_new_tokens, limits=None, prefill_chunk=512):
    model, prompts, prompt_lens, stops = inputs
    return generate(
        model,
        cache,
        prompts,
        prompt_lens,
        max_new_tokens=max_new_tokens,
        limits=limits,
        stop_tokens=stops,
        prefill_chunk=prefill_chunk,
        throw=False,
    )


def _shared(model: models.Decoder, cache: Cache, prefix: list[int], num_rows: int) -> Cache:
    """With `prefix` in all rows, and once in memory."""
    prompts = np.zeros((num_rows, len(prefix)), np.int32)
    prompts[0] = prefix
    lens = np.zeros(num_rows, np.int32)
    lens[0] = len(prefix)
    _, cache = _extend((model, prompts, lens, _stops([])), cache, 0)
    return _forked(cache)


@eqx.filter_jit(donate="all")
def _freed(cache):
    return cache.free(jnp.ones(cache.num_seqs, bool))


@eqx.filter_jit(donate="all")
def _forked(cache):
    others = jnp.arange(1, cache.num_seqs, dtype=jnp.int32)
    return cache.fork(jnp.zeros_like(others), others)[0]


@eqx.filter_jit
def _gaps(model, tokens):
    logits = model.unembed(model.dense(tokens[None])[0]).astype(jnp.float32)[:-1]
    chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
    return (logits.max(axis=1) - chosen) / logits.std(axis=1)


if __name__ == "__main__":
    serve(Ours(sys.argv[1]))
