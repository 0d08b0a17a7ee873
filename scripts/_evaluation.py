"""How many answers of a decoder are right, to the last character."""

from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32
from models import Decoder, tasks
from tokenizers import Tokenizer


# One compiled program serves all questions that fit the same length.
_LENGTHS = (32, 64, 256, 1024, 2048)
_TOKENS_AT_ONCE = 4096


def accuracy(
    decoder: Decoder, tokenizer: Tokenizer, questions: Sequence[tasks.Question]
) -> float:
    """The share of questions that greedy decoding answers exactly.

    Greedy decoding gives an answer if and only if every token of it has the highest
    score after the right ones before it, so no decoding is needed to know.

    **Arguments:**

    - `decoder`, `tokenizer`: what is asked.
    - `questions`: what to ask, each by itself.

    **Returns:**

    A number from 0 to 1.
    """
    pairs = [_encode(tokenizer, question) for question in questions]
    longest = max(len(tokens) for tokens, _ in pairs)
    length = next((size for size in _LENGTHS if size >= longest), longest)
    at_once = max(_TOKENS_AT_ONCE // length, 1)
    num_right = 0
    for start in range(0, len(pairs), at_once):
        part = pairs[start : start + at_once]
        tokens = np.zeros((at_once, length), np.int32)
        asked = np.zeros((at_once, length), bool)
        for row, (ids, prompt_len) in enumerate(part):
            tokens[row, : len(ids)] = ids
            asked[row, prompt_len : len(ids)] = True
        right = _rows_right(decoder, jnp.asarray(tokens), jnp.asarray(asked))
        num_right += int(right[: len(part)].sum())
    return num_right / len(pairs)


def report(
    decoder: Decoder, tokenizer: Tokenizer, context: int, *, sample: int
) -> Iterable[tuple[str, float]]:
    """Examines a decoder that was trained on `models.tasks`.

    **Arguments:**

    - `decoder`, `tokenizer`: what is asked.
    - `context`: the longest context, in tokens.
    - `sample`: how many questions of each kind to draw.

    **Returns:**

    What was asked, and the share of right answers.
    """
    rng = np.random.default_rng(2**32)  # A seed that no run can be given.
    yield "facts", accuracy(decoder, tokenizer, tasks.facts())
    sums = [tasks.addition(rng) for _ in range(sample)]
    yield "held-out additions", accuracy(decoder, tokenizer, sums)
    for length in (64, 256, 1024, 2000):
        if length <= context:
            num_records = _num_records(length)
            asked = [tasks.lookup(rng, num_records) for _ in range(sample)]
            name = f"held-out look-ups in {length} tokens"
            yield name, accuracy(decoder, tokenizer, asked)
    num_records = _num_records(min(context, 2000))
    contexts = [tasks.records(rng, num_records) for _ in range(sample)]
    spread = tasks.facts()[:: len(tasks.facts()) // sample]
    after = [
        tasks.Question(told.text + question.prompt, question.answer)
        for told, question in zip(contexts, spread, strict=False)
    ]
    yield "facts after a full context", accuracy(decoder, tokenizer, after)


def _num_records(length: int) -> int:
    """How many fit beside the start, a question and its answer."""
    return (length - 6) // tasks.TOKENS_PER_RECORD


def _encode(tokenizer: Tokenizer, question: tasks.Question) -> tuple[list[int], int]:
    """All tokens, and how many of them are the prompt's."""
    prompt = tokenizer.encode(question.prompt).ids
    answer = tokenizer.encode(question.answer, add_special_tokens=False).ids
    return prompt + answer, len(prompt)


@eqx.filter_jit
def _rows_right(
    decoder: Decoder,
    tokens: Int32[Array, "num_rows length"],
    asked: Bool[Array, "num_rows length"],
) -> Bool[Array, " num_rows"]:
    hidden = decoder.dense(tokens)
    logits = jax.lax.map(decoder.unembed, hidden)
    best = jnp.argmax(logits[:, :-1], axis=-1).astype(jnp.int32)
    return jnp.all((best == tokens[:, 1:]) | ~asked[:, 1:], axis=1)
