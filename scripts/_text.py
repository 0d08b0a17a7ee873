"""Between text and tokens: prompts in, continuations out."""

import dataclasses
import functools
from collections.abc import Sequence

import models
from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Codec:
    """A checkpoint's tokenizer with what ends a continuation.

    **Arguments:**

    - `tokenizer`, `config`: the checkpoint's.
    - `end_tokens`: the tokens that the checkpoint says end a text.
    - `stops`: the texts that end a continuation besides.
    """

    tokenizer: Tokenizer
    config: models.DecoderConfig
    end_tokens: tuple[int, ...]
    stops: tuple[str, ...] = ()

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The prompt's tokens, and those that the tokenizer puts around every text.

        Those alone: a configuration may name a first token that no text begins with.
        """
        return tuple(self.tokenizer.encode(prompt).ids)

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """The tokens of a text in which the special ones are written out."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def check(self, tokens: Sequence[int]) -> None:
        """Raises a `ValueError` for a token that the model does not have."""
        if max(tokens) >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {max(tokens)}, the model has only"
                f" {self.config.vocab_size}"
            )

    def decode(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to `prompt`, up to the first stop text."""
        text = self.added(prompt, tokens)
        found = [text.find(stop) for stop in self.stops if stop in text]
        return text[: min(found, default=len(text))]

    def certain(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """As `decode`, without a tail that later tokens may yet change."""
        # An unfinished character shows as U+FFFD.
        text = self.decode(prompt, tokens).rstrip("\ufffd")
        held = [
            length
            for stop in self.stops
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return text[: len(text) - max(held, default=0)]

    def keep(self, prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many tokens it takes to complete a stop text, if one is complete."""

        def stopped(count: int) -> bool:
            text = self.added(prompt, tokens[:count])
            return any(stop in text for stop in self.stops)

        if not self.stops or not stopped(len(tokens)):
            return None
        return next(filter(stopped, range(1, len(tokens) + 1)))

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a continuation by themselves."""
        encoded = [
            self.tokenizer.encode(stop, add_special_tokens=False).ids for stop in self.stops
        ]
        alone = {tokens[0] for tokens in encoded if len(tokens) == 1}
        return tuple(sorted(alone | set(self.end_tokens)))

    def added(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to `prompt`."""
        # Decoded with a neighbour, since some decoders drop a text's first blank.
        before = self.tokenizer.decode(list(prompt[-1:]))
        return self.tokenizer.decode([*prompt[-1:], *tokens]).removeprefix(before)
