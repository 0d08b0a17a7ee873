import functools as ft
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from .. import oracle
from ..helpers import (
    array_function,
    assert_close,
    check_paged,
    count_compilations,
    every_implementation,
    expected_paged,
    ints,
    OPTIONS,
    paged_case,
    quick_jit,
    rng_of,
    run,
)


check = ft.partial(check_paged, "ragged_paged_attention")


def mixed_rows(page_size):
    """Decode, whole prompts, chunks of prompts and idle rows, at the edges of a page."""
    p = page_size
    rows = (
        *((0, 0), (1, 1), (p - 1, p - 1), (p, p), (p + 1, p + 1)),  # prompts
        *((p, 1), (p + 1, 1), (2 * p, 1)),  # decode
        *((p, 0), (2 * p + 1, 0)),  # idle, with a past
        *((2 * p, p), (2 * p + 1, p), (3 * p + 2, 5), (2 * p + 3, p + 2)),  # chunks
        *((0, 0), (4 * p, 4 * p), (1, 1)),
    )
    kv_lens, q_lens = zip(*rows)
    return dict(kv_lens=kv_lens, q_lens=q_lens)


@every_implementation
def test_the_largest_pages(getkey, implementation):
    case = paged_case(
        getkey(), kv_lens=(256, 257, 3), q_lens=(1, 2, 3), page_size=256, num_heads=2
    )
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize("page_size", (8, 16, 128))
def test_mixed_batches_at_the_edges_of_a_page(getkey, implementation, page_size):
    case = paged_case(getkey(), **mixed_rows(page_size), page_size=page_size, num_heads=2)
    check(case, implementation)


@every_implementation
def test_padding_tokens_give_zero_and_rows_past_num_seqs_are_ignored(
    getkey, implementation
):
    rows = mixed_rows(8)
    case = paged_case(
        getkey(), **rows, page_size=8, num_tokens=sum(rows["q_lens"]) + 19, capacity=25
    )
    check(case, implementation, return_residuals=True)


@every_implementation
@pytest.mark.parametrize("group, num_kv_heads", ((1, 3), (3, 2), (4, 1), (7, 2), (8, 2)))
def test_head_ratios(getkey, implementation, group, num_kv_heads):
    case = paged_case(
        getkey(),
        kv_lens=(17, 0, 33, 1),
        q_lens=(17, 0, 2, 1),
        num_tokens=24,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
    )
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize(
    "head_dim, storage",
    [
        *itertools.product((64, 80, 128, 256), ("f32", "u16")),
        (64, "f32-rows"),
        (16, "f32-rows"),
        *(
            pytest.param(64, storage, marks=pytest.mark.slow)
            for storage in ("bf16", "bf16-rows", "u16-rows")
        ),
    ],
)
def test_head_sizes_in_every_storage(getkey, implementation, head_dim, storage):
    case = paged_case(
        getkey(),
        kv_lens=(0, 15, 16, 17, 50),
        q_lens=(0, 15, 1, 3, 20),
        num_tokens=40,
        head_dim=head_dim,
        storage=storage,
    )
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize("storage", ("bf16", "u16-rows"))
def test_output_has_the_dtype_of_the_queries(getkey, implementation, storage):
    case = paged_case(
        getkey(), kv_lens=(17, 40), q_lens=(17, 3), storage=storage, q_dtype="float32"
    )
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(getkey, implementation, options):
    options = options(6, 2)
    case = paged_case(
        getkey(),
        kv_lens=(0, 1, 7, 19, 9, 19, 40, 30),
        q_lens=(0, 1, 7, 19, 1, 5, 20, 0),
        num_tokens=64,
        num_heads=6,
        page_size=8,
        storage="f32-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, implementation, **options)


@every_implementation
@pytest.mark.parametrize("sliding_window", (1, 8, 9, 17))
def test_window_boundaries_on_and_around_page_edges(getkey, implementation, sliding_window):
    case = paged_case(
        getkey(),
        kv_lens=(18, 24, 25, 41, 16, 17, 40),
        q_lens=(18, 1, 8, 9, 16, 2, 0),
        num_tokens=60,
        num_heads=2,
        page_size=8,
        sliding_window=sliding_window,
    )
    check(case, implementation, sliding_window=sliding_window)


@pytest.mark.parametrize(
    "implementation, how",
    (
        ("reference", {}),
        ("xla", {}),
        ("pallas_gpu", dict(interpret=True)),
    ),
)
def test_the_widest_window_is_none(getkey, implementation, how):
    # Queries before a row's first token too, from which it is far down to the window's.
    case = paged_case(getkey(), kv_lens=(40, 9), q_lens=(40, 9), num_heads=2, page_size=8)
    lens = ints((5, 9))
    args = (*case.mixed_args[:3], lens, *case.mixed_args[4:])
    out = run("ragged_paged_attention", implementation, args, **how)
    windowed = dict(sliding_window=2**31 - 1, **how)
    assert_close(run("ragged_paged_attention", implementation, args, **windowed), out)


@every_implementation
@pytest.mark.parametrize("page_size, sliding_window", ((16, None), (16, 100), (128, 100)))
def test_rows_of_many_blocks(getkey, implementation, page_size, sliding_window):
    # A decode step, the last chunk of a long prompt, and one whole prompt of 700.
    case = paged_case(
        getkey(),
        kv_lens=(3000, 0, 2100, 700, 1),
        q_lens=(1, 0, 150, 700, 1),
        num_tokens=900,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        page_size=page_size,
        sliding_window=sliding_window,
    )
    check(case, implementation, sliding_window=sliding_window)


@every_implementation
def test_many_short_rows(getkey, implementation):
    rng = rng_of(getkey())
    kv_lens = rng.integers(0, 20, 150)
    q_lens = rng.integers(0, kv_lens + 1)
    case = paged_case(
        getkey(),
        kv_lens=tuple(map(int, kv_lens)),
        q_lens=tuple(map(int, q_lens)),
        num_tokens=int(q_lens.sum()) + 5,
        num_heads=2,
        head_dim=16,
    )
    check(case, implementation)


@every_implementation
def test_a_batch_of_padding_only(getkey, implementation):
    case = paged_case(
        getkey(), kv_lens=(0, 9, 0), q_lens=(0, 0, 0), num_tokens=8, capacity=4
    )
    attend = quick_jit(array_function("ragged_paged_attention", implementation))
    for num_seqs in (0, 3):
        out = attend(*case.mixed_args[:6], jnp.int32(num_seqs))
        assert_close(out, np.zeros(case.q.shape))


@every_implementation
def test_one_token_rows_equal_decode(getkey, implementation):
    case = paged_case(getkey(), kv_lens=(1, 16, 17, 90), q_lens=(1, 1, 1, 1))
    decode = run("paged_attention", implementation, case.decode_args)
    mixed = run("ragged_paged_attention", implementation, case.mixed_args)
    assert_close(mixed, decode)


@every_implementation
def test_chunks_of_a_prompt_equal_the_prompt(getkey, implementation):
    # The same row asked in three chunks, and at once. Positions past a chunk are written
    # already, and must be hidden by causality alone.
    case = paged_case(getkey(), kv_lens=(50,), q_lens=(50,))
    attend = quick_jit(array_function("ragged_paged_attention", implementation))
    whole = attend(*case.mixed_args)
    parts = []
    for first, last in ((0, 16), (16, 33), (33, 50)):
        args = (
            jnp.pad(case.q[first:last], ((0, 50 - last + first), (0, 0), (0, 0))),
            *case.mixed_args[1:3],
            jnp.array([last], jnp.int32),
            case.page_indices,
            jnp.array([0, last - first], jnp.int32),
            case.num_seqs,
        )
        parts.append(attend(*args)[: last - first])
    assert_close(jnp.concatenate(parts), whole)


@every_implementation
def test_merged_halves_equal_the_whole(getkey, implementation):
    import eqx_paged

    # One token a row, so that the last position of either half is in the past.
    case = paged_case(getkey(), kv_lens=(1, 16, 17, 90), q_lens=(1, 1, 1, 1))
    cut = 2
    lens_a = jnp.minimum(case.kv_lens, cut * 16)
    function = array_function("ragged_paged_attention", implementation)
    attend = quick_jit(ft.partial(function, return_residuals=True))
    parts = [
        attend(*case.mixed_args[:3], lens, indices, *case.mixed_args[5:])
        for lens, indices in (
            (lens_a, case.page_indices),
            (case.kv_lens - lens_a, jnp.roll(case.page_indices, -cut, axis=1)),
        )
    ]
    merged = eqx_paged.merge_residuals(*zip(*parts))
    for actual, wanted in zip(merged, expected_paged(case)):
        assert_close(actual, wanted)


@every_implementation
def test_shared_pages_serve_several_rows(getkey, implementation):
    case = paged_case(getkey(), kv_lens=(37, 37), q_lens=(5, 20))
    page_indices = jnp.stack([case.page_indices[0], case.page_indices[0]])
    args = (*case.mixed_args[:4], page_indices, *case.mixed_args[5:])
    out = run("ragged_paged_attention", implementation, args)
    ks, vs = [case.ks[0], case.ks[0]], [case.vs[0], case.vs[0]]
    assert_close(out, oracle.attention_rows(case.qs, ks, vs)[0])


def test_changing_lengths_and_pages_compiles_nothing(getkey):
    import eqx_paged

    a = paged_case(getkey(), kv_lens=(1, 90, 0), q_lens=(1, 30, 0), num_tokens=32)
    b = paged_case(getkey(), kv_lens=(90, 0, 1), q_lens=(7, 0, 1), num_tokens=32)
    out = eqx_paged.ragged_paged_attention(*a.mixed_args)
    assert_close(out, expected_paged(a)[0])
    with count_compilations() as compilations:
        eqx_paged.ragged_paged_attention(*b.mixed_args).block_until_ready()
    assert not compilations


@pytest.mark.slow
@pytest.mark.parametrize("page_size", (8, 16, 32, 64, 128))
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("group", (1, 3, 4, 7, 8))
@pytest.mark.parametrize("storage", ("f32", "u16"))
def test_full_grid(getkey, page_size, head_dim, group, storage):
    if head_dim == 64 and group % 2:
        storage += "-rows"
    case = paged_case(
        getkey(),
        **mixed_rows(page_size),
        num_heads=group,
        num_kv_heads=1,
        head_dim=head_dim,
        page_size=page_size,
        storage=storage,
    )
    check(case, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_options_on_random_shapes(getkey, seed):
    del seed  # in the test's id, and so in its key
    rng = rng_of(getkey())
    group, num_kv_heads = int(rng.choice((1, 3, 4))), int(rng.choice((1, 2, 5)))
    page_size = int(rng.choice((8, 16, 32)))
    options = OPTIONS[rng.choice(list(OPTIONS))](group * num_kv_heads, num_kv_heads)
    if "sliding_window" in options:
        options["sliding_window"] = int(rng.integers(1, 4 * page_size))
    storage = str(rng.choice(("f32", "f32-rows", "u16", "u16-rows", "bf16")))
    kv_lens = rng.integers(0, 6 * page_size, 7)
    q_lens = rng.integers(0, kv_lens + 1)
    case = paged_case(
        getkey(),
        kv_lens=tuple(map(int, kv_lens)),
        q_lens=tuple(map(int, q_lens)),
        num_tokens=int(q_lens.sum() + rng.integers(0, 9)),
        capacity=7 + int(rng.integers(0, 3)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        storage=storage,
        sliding_window=options.get("sliding_window"),
    )
    check(case, "xla", **options)
