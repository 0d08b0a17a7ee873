"""Asks the embedded model questions whose answers are known: `python -m scripts.demo`.

All are answered in one batch over one paged cache: facts, sums, and look-ups in two long
texts. Each text is read once, and the rows that ask about it share its pages.
"""

import dataclasses
import sys
import time

import jax
import models
import numpy as np
from eqx_paged import PagedKVCache, RESULTS
from models import tasks
from tokenizers import Tokenizer

from ._draw_pages import draw_pages
from ._engine import bucket, Clock, Program
from ._options import EMBEDDED_MODEL
from ._programs import keep_programs


PAGE_SIZE = 16
MAX_NEW_TOKENS = 8
NUM_RECORDS = (380, 100)
QUESTIONS_PER_TEXT = 3
SEED = 1


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question, and which of the texts it is about, if it is about one."""

    question: tasks.Question
    text: int | None = None


def make_questions(seed: int) -> tuple[list[str], list[Ask]]:
    """Draws the texts and the questions."""
    rng = np.random.default_rng(seed)
    facts = tasks.facts()
    chosen = [facts[index] for index in rng.choice(len(facts), 4, replace=False)]
    sums = [tasks.addition(rng) for _ in range(3)]
    texts = [tasks.records(rng, num_records) for num_records in NUM_RECORDS]
    lookups = [
        Ask(text.lookup(int(index)), number)
        for number, text in enumerate(texts)
        for index in rng.choice(len(text.keys), QUESTIONS_PER_TEXT, replace=False)
    ]
    asks = [Ask(question) for question in (*chosen, *sums)]
    return [text.text for text in texts], [*asks, *lookups]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What came of the questions."""

    texts: list[str]
    cache: PagedKVCache
    prefill: Clock
    decode: Clock


def answer(
    model: models.Decoder, tokenizer: Tokenizer, texts: list[str], asks: list[Ask]
) -> Answers:
    """Answers all questions in one batch, a row each."""
    contexts = [tokenizer.encode(text).ids for text in texts]
    prompts = [_encode(tokenizer, ask) for ask in asks]
    cache = _empty_cache(model, contexts, prompts)
    stop = tokenizer.encode("\n", add_special_tokens=False).ids
    read = Program(model, bucket(max(map(len, contexts))), 0)
    reply = Program(model, bucket(max(map(len, prompts))), MAX_NEW_TOKENS, tuple(stop))
    for program in (read, reply):
        cache, _ = program.compile(cache)

    # The first row that asks about a text reads it; the others become its copies.
    rows = [[r for r, ask in enumerate(asks) if ask.text == t] for t in range(len(texts))]
    reading: list[list[int]] = [[] for _ in asks]
    for context, (first, *_) in zip(contexts, rows, strict=True):
        reading[first] = context
    _, cache, seconds = read.call(reading, cache)
    prefill = Clock(sum(map(len, contexts)), seconds)
    for first, *others in rows:
        for other in others:
            cache, result = cache.fork(first, other)
            assert result == RESULTS.successful, "the rows are empty"
    made, cache, seconds = reply.call(prompts, cache)
    decode = Clock(sum(map(len, made)), seconds)
    return Answers([tokenizer.decode(new) for new in made], cache, prefill, decode)


def _encode(tokenizer: Tokenizer, ask: Ask) -> list[int]:
    # What goes on after a text does not begin with the token that every text begins with.
    return tokenizer.encode(ask.question.prompt, add_special_tokens=ask.text is None).ids


def _empty_cache(
    model: models.Decoder, contexts: list[list[int]], prompts: list[list[int]]
) -> PagedKVCache:
    tail = max(map(len, prompts)) + MAX_NEW_TOKENS
    pages = [-(-len(context) // PAGE_SIZE) for context in contexts]
    return PagedKVCache.empty(
        num_layers=model.config.num_hidden_layers,
        # A text's pages once; and for each row its own tail and a copied page.
        num_pages=sum(pages) + len(prompts) * (-(-tail // PAGE_SIZE) + 1),
        page_size=PAGE_SIZE,
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
        num_seqs=len(prompts),
        max_len=max(map(len, contexts)) + tail,
        dtype=model.embed_tokens.weight.dtype,
    )


def _print_answers(texts: list[str], asks: list[Ask], answers: list[str]) -> int:
    """Prints each question with its answer, and returns how many are right."""
    num_right = 0
    for row, (ask, given) in enumerate(zip(asks, answers, strict=True)):
        question, expected = ask.question
        right = given == expected
        num_right += right
        verdict = "right" if right else f"WRONG, it is {expected.strip()}"
        asked = question
        if ask.text is not None:
            num_lines = texts[ask.text].count("\n")
            asked = f"(in a text of {num_lines} lines) {question}"
        print(f"  {row:>2}  {asked:<48} {given.strip():<14} {verdict}")
    return num_right


def _print_cache(cache: PagedKVCache, num_rows: int) -> None:
    table = cache.table
    used = table.num_pages - int(table.num_free_pages)
    unshared = int(np.sum(-(-np.asarray(table.kv_lens) // table.page_size)))
    print(
        f"\n{used} pages used; without sharing it would be {unshared}. The cache has"
        f" {cache.num_bytes / 2**20:.1f} MiB.\n"
    )
    print(draw_pages(table, num_rows))


def main(seed: int = SEED) -> int:
    """Runs the demonstration, and returns the exit status: 1 if an answer is wrong."""
    start = time.perf_counter()
    model = models.load_checkpoint(EMBEDDED_MODEL, dtype="float32")
    tokenizer = models.load_tokenizer(EMBEDDED_MODEL)
    weights = sum(x.size for x in jax.tree.leaves(model))
    print(f"{weights:,} weights on {jax.devices()[0].device_kind}; compiling ...")
    texts, asks = make_questions(seed)
    answers = answer(model, tokenizer, texts, asks)
    print(f"ready after {time.perf_counter() - start:.0f} s\n")
    num_right = _print_answers(texts, asks, answers.texts)
    prefill, decode = answers.prefill, answers.decode
    print(
        f"\n{num_right} of {len(asks)} right. Read {prefill.tokens} tokens at"
        f" {prefill.tokens_per_second:,.0f} tokens/s, made {decode.tokens} at"
        f" {decode.tokens_per_second:,.0f} tokens/s."
    )
    _print_cache(answers.cache, len(asks))
    return 0 if num_right == len(asks) else 1


if __name__ == "__main__":
    keep_programs()
    sys.exit(main())
