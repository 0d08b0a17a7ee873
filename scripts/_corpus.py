"""What `scripts.train` learns from: the questions of `models.tasks`, or any text.

A corpus makes its batches from nothing but a seed and the number of the step, so that a
run can be repeated, and taken up again in the middle.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import numpy as np
from models import tasks
from tokenizers import decoders, models, pre_tokenizers, processors, Regex, Tokenizer
from tokenizers.trainers import BpeTrainer


BOS, EOS = "<bos>", "<eos>"
# Digits one by one, so that a sum has a digit a token; words with the blank before them.
_TASK_PIECES = r"\d|\n| ?[A-Za-z]+|[^A-Za-z\d\n]"
_TEXT_PIECES = r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"
# Of the tokens of a batch no more than this share are answers, except by a rare chance.
_MAX_ANSWER_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some sequences of one length, and which of their tokens are to be predicted.

    **Arguments:**

    - `tokens`: `[num_rows, length]`, what the decoder reads.
    - `positions`: `[num_targets]`, the places in the flattened `tokens` after which a
        token is to be predicted.
    - `targets`: the token after each place.
    - `weights`: how much each one counts; 0 for padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[np.ndarray, np.ndarray]], max_share: float) -> "Rows":
        """Stacks rows of `length + 1` tokens and their weights."""
        tokens = np.stack([row for row, _ in rows])
        weights = np.stack([weight for _, weight in rows])[:, 1:].reshape(-1)
        num_targets = int(max_share * weights.size)
        positions = np.flatnonzero(weights)[:num_targets]
        padding = (0, num_targets - positions.size)
        return cls(
            tokens=tokens[:, :-1],
            positions=np.pad(positions, padding).astype(np.int32),
            targets=np.pad(tokens[:, 1:].reshape(-1)[positions], padding),
            weights=np.pad(weights[positions], padding),
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run in which all batches have the same shape.

    **Arguments:**

    - `length`: of the long rows.
    - `num_rows`: how many of them.
    - `num_short_rows`: how many rows of `SHORT` tokens go with them.
    - `share`: this stage's part of all steps.
    """

    length: int
    num_rows: int
    num_short_rows: int
    share: float


SHORT = 64


class TaskCorpus:
    """The questions of `models.tasks`.

    A long row is a context of records and questions on it; a short row is facts and
    sums, one after another. Only answers are to be predicted.
    """

    stages = (
        Stage(64, 16, 32, 0.10),
        Stage(256, 4, 32, 0.52),
        Stage(1024, 1, 32, 0.22),
        Stage(2048, 1, 32, 0.16),
    )

    def __init__(self):
        self.tokenizer = _train_tokenizer(_vocabulary(), _TASK_PIECES, vocab_size=4096)
        self._encode = functools.lru_cache(maxsize=16_384)(self._encode_anew)

    def batch(self, seed: int, step: int, stage: Stage) -> tuple[Rows, ...]:
        """The batch of one step."""
        rng = np.random.default_rng((seed, step))
        long = [self._long_row(rng, stage.length) for _ in range(stage.num_rows)]
        short = [self._short_row(rng, SHORT) for _ in range(stage.num_short_rows)]
        return Rows.of(long, _MAX_ANSWER_SHARE), Rows.of(short, _MAX_ANSWER_SHARE)

    def _short_row(self, rng, length):
        return self._row(length, (_other(rng) for _ in range(length)))

    def _long_row(self, rng, length):
        # Most rows ask as much as they tell; some are nearly full of records, as a
        # user's context is.
        full = rng.random() < 0.1
        share = rng.uniform(0.85, 0.98) if full else rng.uniform(0.2, 0.6)
        most = int(share * length / tasks.TOKENS_PER_RECORD)
        num_records = min(max(most, 2), tasks.NUM_KEYS)
        context = tasks.records(rng, num_records, held_out=False)
        return self._row(length, _about(context, rng, length), context)

    def _row(self, length, questions, context=None):
        tokens, weights = [self.tokenizer.token_to_id(BOS)], [0.0]
        if context is not None:
            for key, value in zip(context.keys, context.values, strict=True):
                ids = (*self._encode(f"{key}="), *self._encode(f"{value}\n"))
                tokens.extend(ids)
                weights.extend([0.0] * len(ids))
        for question, first_weight in questions:
            prompt, answer = map(self._encode, question)
            tokens.extend(prompt + answer)
            weights.extend([0.0] * len(prompt) + [first_weight])
            weights.extend([1.0] * (len(answer) - 1))
            if len(tokens) > length:
                break
        end = length + 1
        return np.array(tokens[:end], np.int32), np.array(weights[:end], np.float32)

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _other(rng) -> tuple[tasks.Question, float]:
    """A question without a context: three facts to seven sums."""
    if rng.random() < 0.3:
        facts = tasks.facts()
        return facts[int(rng.integers(len(facts)))], 1.0
    return tasks.addition(rng, held_out=False), 1.0


def _about(
    context: tasks.Records, rng, length: int
) -> Iterator[tuple[tasks.Question, float]]:
    """Endless questions after a context, each record's first. The first token of an
    answer out of the context is the only hard one, so it counts twice."""
    num_records = len(context.keys)
    # In a long row the rest is asked as well, as in a conversation that goes on.
    other_share = 0.05 if length <= 256 else 0.1
    while True:
        for index in map(int, rng.permutation(num_records)):
            while rng.random() < other_share:
                yield _other(rng)
            yield context.lookup(index), 2.0


class TextCorpus:
    """Any text, cut into rows at random places. Every token is to be predicted.

    The last twentieth of the text is kept for `held_out`.
    """

    def __init__(self, text: str, context: int):
        self.tokenizer = _train_tokenizer(
            text.splitlines(keepends=True), _TEXT_PIECES, vocab_size=2048
        )
        encoded = self.tokenizer.encode(text, add_special_tokens=False).ids
        tokens = np.array(encoded, np.int32)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        cut = tokens.size - max(tokens.size // 20, SHORT + 1)
        if cut <= SHORT:
            raise ValueError(f"the text has {tokens.size} tokens: too short to learn")
        self._tokens, self._rest = tokens[:cut], tokens[cut:]
        lengths = [stage.length for stage in TaskCorpus.stages]
        usable = [length for length in lengths if length <= min(cut - 1, context)]
        self.stages = tuple(
            Stage(length, 4096 // length, 0, 1 / len(usable)) for length in usable
        )

    def batch(self, seed: int, step: int, stage: Stage) -> tuple[Rows, ...]:
        """The batch of one step."""
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(self._tokens.size - stage.length, size=stage.num_rows)
        rows = [self._window(self._tokens, start, stage.length) for start in starts]
        return (Rows.of(rows, max_share=1.0),)

    def held_out(self, max_rows: int = 64) -> Rows:
        """Rows out of the part of the text that no batch has."""
        starts = range(0, self._rest.size - SHORT, SHORT)[:max_rows]
        rows = [self._window(self._rest, start, SHORT) for start in starts]
        return Rows.of(rows, max_share=1.0)

    def _window(self, tokens, start, length):
        window = tokens[start : start + length + 1]
        return window, np.ones(window.size, np.float32)


def _vocabulary() -> list[str]:
    """Every word that a question or an answer has, in the form in which it occurs."""
    texts = [prompt + answer for prompt, answer in tasks.facts()]
    texts += [tasks.LOOKUP.format(key=key) for key in tasks.keys()]
    texts += [tasks.RECORD.format(key=key, value=0) for key in tasks.keys()]
    texts.append(tasks.ADDITION.format(first="01234", second="56789"))
    return texts


def _train_tokenizer(texts: list[str], pieces: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    return tokenizer
