"""Questions to the embedded checkpoint, answered through a paged cache."""

import dataclasses
import pathlib

import eqx_paged
import jax.numpy as jnp
import models
import numpy as np
from models import tasks
from tokenizers import Tokenizer

from .cases import paged_cache


TINY = pathlib.Path(models.__file__).parent / "tiny"
NUM_FORKS = 32
MAX_CONTEXT = 2000


@dataclasses.dataclass(frozen=True)
class Examinee:
    """The checkpoint with its tokenizer."""

    decoder: models.Decoder
    tokenizer: Tokenizer

    @classmethod
    def load(cls, dtype=None):
        return cls(models.load_checkpoint(TINY, dtype), models.load_tokenizer(TINY))

    def encode(self, text, *, first=True):
        """The tokens of a text, with the first token of all if it begins a row."""
        return self.tokenizer.encode(text, add_special_tokens=first).ids

    def generate(self, cache, prompts, *, max_prompt_len, max_new_tokens=12):
        """Continues each row by its prompt, a list of tokens, up to a newline."""
        padded = np.zeros((len(prompts), max_prompt_len), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        generation, cache = eqx_paged.generate(
            self.decoder,
            cache,
            padded,
            np.asarray([len(prompt) for prompt in prompts], np.int32),
            max_new_tokens=max_new_tokens,
            stop_tokens=self.decoder.config.eos_token_id,
        )
        made = zip(generation.tokens, generation.lengths, strict=True)
        texts = [self.tokenizer.decode(list(tokens[:n])) for tokens, n in made]
        return texts, cache

    def share_right(self, questions):
        """Asks each question by itself, in a fresh row."""
        num_right = 0
        for start in range(0, len(questions), 128):
            part = questions[start : start + 128]
            cache = paged_cache(self.decoder, num_seqs=128, max_len=32)
            prompts = [self.encode(question.prompt) for question in part]
            texts, _ = self.generate(cache, prompts, max_prompt_len=16)
            num_right += right(part, texts)
        return num_right / len(questions)

    def read(self, text):
        """A cache whose row 0 holds the text and whose other rows are empty."""
        cache = paged_cache(
            self.decoder,
            num_seqs=1 + NUM_FORKS,
            max_len=MAX_CONTEXT + 32,
            # The context once, and for each fork what it writes by itself.
            num_pages=MAX_CONTEXT // 16 + 3 * NUM_FORKS,
        )
        prompt = self.encode(text)
        _, cache = self.generate(
            cache, [prompt], max_prompt_len=MAX_CONTEXT, max_new_tokens=0
        )
        return cache

    def fork(self, cache):
        """Makes every other row a copy of row 0."""
        rows = jnp.arange(1, 1 + NUM_FORKS, dtype=jnp.int32)
        cache = cache.free(jnp.arange(1 + NUM_FORKS) > 0)
        cache, result = cache.fork(jnp.zeros_like(rows), rows)
        assert result == eqx_paged.RESULTS.successful
        return cache

    def answers(self, forked, questions):
        """Asks each fork one question."""
        prompts = [self.encode(question.prompt, first=False) for question in questions]
        texts, _ = self.generate(forked, [[], *prompts], max_prompt_len=16)
        return texts[1:]

    def share_right_after(self, cache, questions):
        """Asks each question in a fork of its own of row 0."""
        forked = self.fork(cache)
        num_right = 0
        for start in range(0, len(questions), NUM_FORKS):
            part = questions[start : start + NUM_FORKS]
            num_right += right(part, self.answers(forked, part))
        return num_right / len(questions)


def right(questions, texts):
    pairs = zip(questions, texts, strict=True)
    return sum(question.answer == text for question, text in pairs)


def lookups(context):
    """A look-up of every record."""
    return [context.lookup(index) for index in range(len(context.keys))]


def records(seed, num_records) -> tasks.Records:
    return tasks.records(np.random.default_rng(seed), num_records)
