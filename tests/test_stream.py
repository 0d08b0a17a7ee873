"""Tokens in bursts: those of the one call, and what becomes of prompts that are ended."""

import jax
import numpy as np
import pytest

from .helpers import assert_trees_identical, count_compilations, told
from .sampling import chain_of, empty, table
from .test_generate import answers
from .test_sampled_generation import (
    by_index,  # noqa: F401  a fixture
    KEY,
    LENGTHS,
    LENS,
    MAX_NEW_TOKENS,
    PADDED,
    PARAMETERS,
)


def stream(cache, prompts=PADDED, lens=LENS, **options):
    import eqx_paged

    options = dict(max_new_tokens=MAX_NEW_TOKENS, burst=3) | options
    return eqx_paged.stream(
        table(),
        cache,
        prompts,
        lens,
        sampler=chain_of(PARAMETERS),
        key=KEY,
        prefill_chunk=16,
        **options,
    )


def copied(cache):
    return jax.tree.map(np.array, cache)


def joined(items):
    """What the items of a stream say of each prompt."""
    made = [()] * len(LENGTHS)
    for item in items:
        for prompt, tokens in item.items():
            assert 0 < len(tokens) <= 3
            made[prompt] += tuple(tokens)
    return made


# All in rows; and in turn, with so few pages that rows are put back.
@pytest.mark.parametrize(
    "num_seqs, num_pages",
    (pytest.param(8, 24, marks=pytest.mark.slow), (3, 5)),
)
def test_the_tokens_are_those_of_one_call(by_index, num_seqs, num_pages):  # noqa: F811
    cache = empty(num_seqs, num_pages)
    before = copied(cache)
    bursts = stream(cache)
    assert bursts.finished.tolist() == [n == 0 for n in LENGTHS]
    items = list(bursts)
    assert joined(items) == by_index
    assert len(items) > 3 and bursts.finished.all()
    generation, after = bursts.finish()
    assert told(generation.result) == "successful"
    assert answers(generation) == by_index
    held = [max(0, n + 9) if n else 0 for n in LENGTHS]
    assert after.kv_lens.tolist() == (held if num_seqs == 8 else [0] * 3)
    assert_trees_identical(cache, before)


def test_a_cancelled_prompt_makes_room_for_others(by_index):  # noqa: F811
    bursts, made = stream(empty(3, 5)), [()] * 8
    for item in bursts:
        made = [old + new for old, new in zip(made, joined([item]))]
        if made[1] and not bursts.finished[1]:
            bursts.cancel(1)
            bursts.cancel(7)  # which has not begun
            assert bursts.finished[[1, 7]].all()
    assert 0 < len(made[1]) < MAX_NEW_TOKENS and made[7] == ()
    for prompt, whole in enumerate(by_index):
        assert made[prompt] == (whole[: len(made[1])] if prompt == 1 else whole) or (
            prompt == 7
        )
    generation, cache = bursts.finish()
    assert answers(generation) == made
    assert int(cache.table.num_free_pages) == 5
    assert not np.any(cache.table.ref_counts)


def test_a_row_is_emptied_by_cancel_and_kept_by_stop(by_index):  # noqa: F811
    bursts = stream(empty(8, 24))
    made = joined([next(bursts), next(bursts), next(bursts)])
    bursts.cancel(1)
    bursts.stop(3)
    generation, cache = bursts.finish()  # which stops all others
    assert answers(generation) == made
    assert [whole[: len(new)] for whole, new in zip(by_index, made)] == made
    held = [n + max(0, len(new) - 1) for n, new in zip(LENGTHS, made)]
    assert len(made[3]) > 0
    assert cache.kv_lens.tolist() == [0 if i == 1 else n for i, n in enumerate(held)]
    assert list(bursts) == []
    with pytest.raises(ValueError, match="finished"):
        bursts.finish()


def test_an_interrupted_stream_leaves_the_cache_alone(monkeypatch):
    from eqx_paged import _stream

    class Interrupted:
        """What is still being computed when it is asked for."""

        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    def before_it_begins(inputs, state):
        raise KeyboardInterrupt

    def while_it_is_waited_for(inputs, state):
        state, (_, *report) = run_burst(inputs, state)
        return state, (Interrupted(), *report)

    run_burst, cache = _stream._run_burst, empty(8, 24)
    before = copied(cache)
    for interrupted in (before_it_begins, while_it_is_waited_for):
        bursts = stream(cache)
        next(bursts)
        with monkeypatch.context() as patched:
            patched.setattr(_stream, "_run_burst", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(bursts)
        # Its tokens are lost: to go on would be to leave them out.
        for call in (bursts.__next__, bursts.finish, lambda: bursts.num_free_pages):
            with pytest.raises(ValueError, match="interrupted"):
                call()
        assert_trees_identical(cache, before)


def test_a_run_that_fails_tells_what_was_made(by_index):  # noqa: F811
    # Read on three pages, the longest prompt needs a fourth in the end.
    bursts, items = stream(empty(3, 3)), []
    with pytest.raises(RuntimeError, match="not enough free pages"):
        for item in bursts:
            items.append(item)
    assert bursts.finished.all() and list(bursts) == []
    generation, cache = bursts.finish()
    assert told(generation.result) == "out_of_pages"
    made = answers(generation)
    assert [whole[: len(new)] for whole, new in zip(by_index, made)] == made
    assert int(cache.table.num_free_pages) == 3


def test_another_stream_compiles_nothing():
    list(stream(empty(8, 24)))
    cache = empty(8, 24)
    with count_compilations() as compilations:
        bursts = stream(cache, PADDED[::-1], LENS[::-1])
        next(bursts)
        bursts.cancel(2)
        list(bursts)
        bursts.finish()
    assert not compilations


def test_a_stream_may_only_read():
    bursts = stream(empty(8, 24), max_new_tokens=0)
    items = list(bursts)
    assert len(items) > 1 and not any(items)
    generation, cache = bursts.finish()
    assert generation.tokens.shape == (8, 0)
    assert cache.kv_lens.tolist() == list(LENGTHS)


def test_pages_are_counted_between_bursts():
    import eqx_paged

    bursts = stream(empty(8, 24))
    assert bursts.num_free_pages == 24
    next(bursts)
    # All prompts have been read, and two tokens after the first one.
    pages = [-(-(n + 2) // 8) for n in LENGTHS if n]
    while any(n and not made for n, made in zip(LENGTHS, joined([next(bursts)]))):
        pass
    used = 24 - bursts.num_free_pages
    assert sum(pages) <= used <= 24
    bursts.cancel(1)
    next(bursts)
    assert 24 - bursts.num_free_pages < used
    _, cache = bursts.finish()
    with pytest.raises(ValueError, match="finished"):
        _ = bursts.num_free_pages
    contiguous = eqx_paged.RaggedKVCache.empty(
        num_layers=1, num_seqs=8, max_len=64, num_kv_heads=1, head_dim=8
    )
    with pytest.raises(ValueError, match="RaggedKVCache has no pages"):
        _ = stream(contiguous).num_free_pages


def test_misuse_is_told(no_type_hook):
    cache = empty(8, 24)
    bursts = stream(cache)
    for prompt in (-1, 8):
        with pytest.raises(ValueError, match=f"no prompt {prompt} of 8"):
            bursts.cancel(prompt)
    for prompt in (1.0, True, None, "1"):
        with pytest.raises(ValueError, match=f"prompt must be an int, but is {prompt!r}"):
            bursts.stop(prompt)
    with pytest.raises(ValueError, match="burst must be at least 1"):
        stream(cache, burst=0)
    with pytest.raises(ValueError, match=f"burst must be at most {2**31 - 1}"):
        stream(cache, burst=2**31)
    with pytest.raises(ValueError, match="Prompt 1 needs 3 pages"):
        stream(empty(3, 2))
    with pytest.raises(ValueError, match="jit"):
        jax.jit(lambda lens: list(stream(cache, lens=lens)))(LENS)
