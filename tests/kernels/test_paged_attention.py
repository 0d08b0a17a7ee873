import functools as ft
import itertools

import jax
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
    head_values,
    OPTIONS,
    paged_case,
    quick_jit,
    rng_of,
    run,
)


def edge_lens(page_size):
    return (
        *(0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size),
        *(0, 5 * page_size + 3),
    )


check = ft.partial(check_paged, "paged_attention")


def test_equal_layers_trace_it_once(getkey, monkeypatch):
    from eqx_paged.kernels.paged_attention import api

    case = paged_case(getkey(), kv_lens=(3, 20), num_heads=6)
    attend, calls = array_function("paged_attention", None), []
    body = api._OPERATION.xla
    counted = api._OPERATION._replace(
        xla=lambda *args, **kw: calls.append(1) or body(*args, **kw)
    )
    monkeypatch.setattr(api, "_OPERATION", counted)
    q, *rest = case.decode_args

    def model(q):
        for _ in range(30):
            q = attend(q, *rest)
        return q

    jax.jit(model).lower(q)
    assert len(calls) == 1


@every_implementation
@pytest.mark.parametrize("page_size", (8, 16, 32, 64, 128, 256))
def test_lengths_at_the_edges_of_a_page(getkey, implementation, page_size):
    case = paged_case(getkey(), kv_lens=edge_lens(page_size), page_size=page_size)
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize("group, num_kv_heads", ((1, 3), (3, 2), (4, 1), (7, 2), (8, 2)))
def test_head_ratios(getkey, implementation, group, num_kv_heads):
    case = paged_case(
        getkey(),
        kv_lens=(17, 0, 33, 1),
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
        getkey(), kv_lens=(0, 15, 16, 17, 50), head_dim=head_dim, storage=storage
    )
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize("storage", ("bf16", "u16-rows"))
def test_output_has_the_dtype_of_the_queries(getkey, implementation, storage):
    case = paged_case(getkey(), kv_lens=(17, 40), storage=storage, q_dtype="float32")
    check(case, implementation)


@every_implementation
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(getkey, implementation, options):
    options = options(6, 2)
    case = paged_case(
        getkey(),
        kv_lens=(0, 1, 7, 8, 9, 19, 40),
        num_heads=6,
        page_size=8,
        storage="f32-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, implementation, **options)


@every_implementation
@pytest.mark.parametrize("sliding_window", (1, 7, 8, 9, 17, 1000))
def test_window_boundaries_on_and_around_page_edges(getkey, implementation, sliding_window):
    # Every length of the first two pages, and two further on.
    case = paged_case(
        getkey(),
        kv_lens=(*range(18), 40, 41),
        num_heads=2,
        page_size=8,
        sliding_window=sliding_window,
    )
    check(case, implementation, sliding_window=sliding_window)


@every_implementation
@pytest.mark.parametrize("page_size, sliding_window", ((16, None), (16, 700), (128, 700)))
def test_rows_of_many_blocks(getkey, implementation, page_size, sliding_window):
    case = paged_case(
        getkey(),
        kv_lens=(3000, 0, 1, 1025, 0, 2048),
        num_kv_heads=1,
        page_size=page_size,
        sliding_window=sliding_window,
    )
    check(case, implementation, sliding_window=sliding_window)


@every_implementation
def test_many_short_rows(getkey, implementation):
    lens = rng_of(getkey()).integers(0, 20, 200)
    case = paged_case(getkey(), kv_lens=tuple(map(int, lens)), num_heads=2)
    check(case, implementation)


@every_implementation
def test_all_rows_empty(getkey, implementation):
    case = paged_case(getkey(), kv_lens=(0, 0, 0))
    check(case, implementation, return_residuals=True)
    check(case, implementation, sinks=head_values(4))


@every_implementation
def test_one_row(getkey, implementation):
    check(paged_case(getkey(), kv_lens=(21,)), implementation)


@every_implementation
def test_logits_far_apart_neither_overflow_nor_vanish(getkey, implementation):
    # Logits of some hundred: exp overflows float32 unless the maximum goes first.
    case = paged_case(getkey(), kv_lens=(40, 600), num_heads=2, page_size=8)
    out = run("paged_attention", implementation, case.decode_args, sm_scale=30.0)
    wanted, _, _ = oracle.attention_rows(case.qs, case.ks, case.vs, sm_scale=30.0)
    # A logit of 500 has an error of 500 * 2**-23 times a few: 2e-4 in the output.
    np.testing.assert_allclose(np.asarray(out), wanted, atol=1e-3)


@pytest.mark.parametrize("sliding_window", (None, 9))
def test_a_row_ends_where_its_table_does(getkey, sliding_window):
    case = paged_case(getkey(), kv_lens=(80, 7))  # five pages of 16 each
    *arrays, page_indices = case.decode_args
    arrays[3] = jnp.array([85, 7], jnp.int32)
    options = dict(sliding_window=sliding_window)
    out = run("paged_attention", "xla", (*arrays, page_indices[:, :5]), **options)
    assert_close(out, expected_paged(case, **options)[0])


@every_implementation
def test_shared_pages_serve_several_rows(getkey, implementation):
    case = paged_case(getkey(), kv_lens=(37, 37))
    page_indices = jnp.stack([case.page_indices[0], case.page_indices[0]])
    args = (*case.decode_args[:4], page_indices)
    out = run("paged_attention", implementation, args)
    ks, vs = [case.ks[0], case.ks[0]], [case.vs[0], case.vs[0]]
    assert_close(out, oracle.attention_rows(case.qs, ks, vs)[0])


@every_implementation
@pytest.mark.parametrize("storage", ("f32", "u16-rows"))
def test_merged_halves_equal_the_whole(getkey, implementation, storage):
    import eqx_paged

    # Pages of 16: the first cache holds the first `cut` pages of each row, the second the
    # rest, which is nothing for the short rows.
    case = paged_case(getkey(), kv_lens=(1, 15, 16, 17, 90), storage=storage)
    cut = 2
    lens_a = jnp.minimum(case.kv_lens, cut * 16)
    function = array_function("paged_attention", implementation)
    attend = quick_jit(ft.partial(function, return_residuals=True))
    parts = [
        attend(*case.decode_args[:3], lens, indices)
        for lens, indices in (
            (lens_a, case.page_indices),
            (case.kv_lens - lens_a, jnp.roll(case.page_indices, -cut, axis=1)),
        )
    ]
    out, m, l = eqx_paged.merge_residuals(*zip(*parts))
    wanted = expected_paged(case)
    for actual, want in zip((out, m, l), wanted):
        assert_close(actual, want, case.dtype)


def test_changing_lengths_and_pages_compiles_nothing(getkey):
    import eqx_paged

    cases = [
        paged_case(key, kv_lens=lens)
        for key, lens in ((getkey(), (1, 90, 0)), (getkey(), (90, 0, 1)))
    ]
    out = eqx_paged.paged_attention(*cases[0].decode_args)
    assert_close(out, expected_paged(cases[0])[0])
    with count_compilations() as compilations:
        eqx_paged.paged_attention(*cases[1].decode_args).block_until_ready()
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
        kv_lens=edge_lens(page_size),
        num_heads=2 * group,
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
    case = paged_case(
        getkey(),
        kv_lens=tuple(int(n) for n in rng.integers(0, 6 * page_size, 7)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        storage=storage,
        sliding_window=options.get("sliding_window"),
    )
    check(case, "xla", **options)
