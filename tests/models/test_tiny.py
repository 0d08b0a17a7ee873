"""The embedded checkpoint's figures, by greedy generation through the paged cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tasks

from . import asking
from .asking import Examinee, lookups, records


PAGE_SIZE = 16
# The start token, then five tokens a record: 1,981 in all.
FULL = 396


@pytest.fixture(scope="module")
def examinee():
    return Examinee.load(jnp.float32)


def test_the_checkpoint_is_small_and_says_what_it_is(examinee):
    files = {path.name: path.stat().st_size for path in asking.TINY.iterdir()}
    assert sum(files.values()) <= 8 * 2**20
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    config = examinee.decoder.config
    (newline,) = examinee.encode("\n", first=False)
    assert newline in config.eos_token_id
    assert examinee.encode("")[0] == config.bos_token_id
    assert examinee.tokenizer.get_vocab_size() == config.vocab_size


def test_any_text_can_be_encoded(examinee):
    for text in ("nul\x00 tab\t", "Zürich 東京 🙂", "a  b\r\n\n"):
        ids = examinee.encode(text)
        assert examinee.tokenizer.decode(ids) == text


def test_a_question_and_its_answer_are_cut_apart(examinee):
    rng = np.random.default_rng(5)
    questions = [*tasks.facts()[:20], tasks.addition(rng), tasks.lookup(rng, 7)]
    for prompt, answer in questions:
        apart = examinee.encode(prompt) + examinee.encode(answer, first=False)
        assert examinee.encode(prompt + answer) == apart
    context = tasks.records(rng, 512)
    assert len(examinee.encode(context.text)) == 1 + 5 * 512


def test_facts(examinee):
    assert examinee.share_right(tasks.facts()) >= 0.99


def test_held_out_additions(examinee):
    rng = np.random.default_rng(6)
    questions = [tasks.addition(rng) for _ in range(512)]
    assert examinee.share_right(questions) >= 0.95


@pytest.mark.parametrize(
    "num_records",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in (10, 25, 100)),
        200,
    ],
)
def test_held_out_lookups_of_every_record(examinee, num_records):
    contexts = [records(seed, num_records) for seed in (7, 8)]
    shares = [
        examinee.share_right_after(examinee.read(context.text), lookups(context))
        for context in contexts
    ]
    assert np.mean(shares) >= 0.95


@pytest.fixture(scope="module")
def full_context():
    return records(9, FULL)


@pytest.fixture(scope="module")
def full_cache(examinee, full_context):
    cache = examinee.read(full_context.text)
    assert int(cache.kv_lens[0]) == 1 + 5 * FULL
    return cache


@pytest.mark.slow
def test_held_out_lookups_of_every_record_of_a_full_context(
    examinee, full_context, full_cache
):
    share = examinee.share_right_after(full_cache, lookups(full_context))
    assert share >= 0.95


def test_facts_and_sums_after_a_full_context(examinee, full_cache):
    rng = np.random.default_rng(10)
    asked = [*tasks.facts()[::10], *(tasks.addition(rng) for _ in range(64))]
    assert examinee.share_right_after(full_cache, asked) >= 0.9


def record_of_page(page):
    """The first record that lies within a page as a whole, at `1 + 5 * record`."""
    return -(-(PAGE_SIZE * page - 1) // 5)


def with_other_pages(cache, changes):
    """Makes row `1 + i` read other pages, as `changes[i] = {place: place}` says."""
    page_indices = np.array(cache.table.page_indices)
    for row, places in enumerate(changes, start=1):
        old = page_indices[row].copy()
        for place, other in places.items():
            page_indices[row, place] = old[other]
    table = dataclasses.replace(cache.table, page_indices=jnp.asarray(page_indices))
    return dataclasses.replace(cache, table=table)


def test_a_wrong_page_gives_a_wrong_answer(examinee, full_context, full_cache):
    forked = examinee.fork(full_cache)
    pages = np.linspace(1, 121, asking.NUM_FORKS).astype(int).tolist()
    asked = [full_context.lookup(record_of_page(page)) for page in pages]
    assert asking.right(asked, examinee.answers(forked, asked)) >= 30
    # Instead of the page with the record, each row reads the one after it again. One
    # guess in a hundred is right.
    mixed_up = with_other_pages(forked, [{page: page + 1} for page in pages])
    assert asking.right(asked, examinee.answers(mixed_up, asked)) <= 2


def test_the_order_of_full_pages_does_not_matter(examinee, full_context, full_cache):
    # A stored key was turned by its position: where it lies says nothing any more.
    forked = examinee.fork(full_cache)
    asked = lookups(full_context)[:: FULL // asking.NUM_FORKS][: asking.NUM_FORKS]
    num_full = (1 + 5 * FULL) // PAGE_SIZE
    order = np.random.default_rng(11).permutation(num_full)
    shuffled = with_other_pages(forked, [dict(enumerate(order))] * asking.NUM_FORKS)
    assert examinee.answers(shuffled, asked) == examinee.answers(forked, asked)


@pytest.mark.slow
def test_bfloat16_throughout_answers_as_well():
    examinee = Examinee.load()
    assert {x.dtype for x in jax.tree.leaves(examinee.decoder)} == {jnp.dtype(jnp.bfloat16)}
    assert examinee.share_right(tasks.facts()[::3]) >= 0.99
