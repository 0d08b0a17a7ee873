"""The TPU kernel for mixed batches: interpreted, raced, and compiled ahead of time."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ..helpers import (
    array_function,
    assert_close,
    check_paged,
    expected_paged,
    fails_naming,
    head_values,
    OPTIONS,
    paged_case,
    quick_jit,
    run,
)
from ..tpu import (
    both_dma_modes,
    compile_for,
    copies_in,
    large_copies,
    MODELS,
    needs_libtpu,
    races_of,
    TOPOLOGIES,
)


def config(**options):
    import eqx_paged

    return eqx_paged.TPUConfig(**options)


def small(case, num_queries_per_block=16):
    """The smallest blocks that there are."""
    return config(
        pages_per_compute_block=max(1, 128 // case.k_pages.shape[2]),
        num_queries_per_block=num_queries_per_block,
    )


def check(case, **options):
    how = dict(interpret=True, config=options.pop("config", small(case)))
    check_paged("ragged_paged_attention", case, "pallas_tpu", how=how, **options)


def check_all(cases, **how):
    """Cases of one shape, by one compiled program."""
    attend = quick_jit(
        ft.partial(
            array_function("ragged_paged_attention", "pallas_tpu"), interpret=True, **how
        )
    )
    for case in cases:
        assert_close(attend(*case.mixed_args), expected_paged(case)[0], case.dtype)


# (kv_lens, q_lens): decode, prompts, chunks and idle rows, at the edges of pages of 64, of
# tiles of 16 queries and of blocks of 128 tokens; several tiles a row, several rows a tile.
MIXES = [
    ((0, 1, 63, 64, 65, 33, 0, 127, 128, 129, 300), (0, 1, 63, 1, 17, 0, 0, 1, 5, 129, 40)),
    ((300, 129, 128, 127, 0, 33, 65, 64, 63, 1, 0), (1, 2, 128, 16, 0, 33, 1, 15, 3, 1, 0)),
    ((1, 300, 0, 64, 65, 63, 33, 127, 0, 128, 129), (1, 150, 0, 16, 2, 1, 18, 4, 0, 1, 1)),
    ((128, 1, 63, 300, 64, 0, 0, 129, 127, 65, 33), (1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1)),
]


# Small pages are many copies, and take the interpreter long.
@pytest.mark.parametrize(
    "head_dim, page_size, storage",
    (
        (128, 64, "f32"),
        pytest.param(128, 16, "f32", marks=pytest.mark.slow),
        pytest.param(64, 16, "u16-rows", marks=pytest.mark.slow),
        pytest.param(64, 64, "f32-rows", marks=pytest.mark.slow),
        pytest.param(128, 16, "u16", marks=pytest.mark.slow),
        pytest.param(256, 32, "f32", marks=pytest.mark.slow),
        pytest.param(80, 64, "f32-padded", marks=pytest.mark.slow),
    ),
)
def test_mixed_batches_at_the_edges_of_pages_tiles_and_blocks(
    getkey, head_dim, page_size, storage
):
    cases = [
        paged_case(
            getkey(),
            kv_lens=kv_lens,
            q_lens=q_lens,
            num_tokens=260,
            capacity=13,
            head_dim=head_dim,
            page_size=page_size,
            storage=storage,
        )
        for kv_lens, q_lens in MIXES
    ]
    check_all(cases, config=small(cases[0]))


# Tiles of 64 queries of 4 heads, of which an item may have a few or all.
FEW = [
    ((500, 20, 270, 64, 400), (5, 3, 64, 33, 70)),
    ((400, 270, 20, 500, 64), (128, 2, 20, 2, 31)),
    ((20, 500, 64, 270, 400), (20, 200, 1, 6, 6)),
]


@pytest.mark.parametrize("sliding_window", (None, 100))
@pytest.mark.slow
def test_few_queries_in_a_large_tile(getkey, sliding_window):
    cases = [
        paged_case(
            getkey(),
            kv_lens=kv_lens,
            q_lens=q_lens,
            num_tokens=240,
            num_kv_heads=1,
            head_dim=128,
            page_size=128,
            sliding_window=sliding_window,
        )
        for kv_lens, q_lens in FEW
    ]
    options = {} if sliding_window is None else dict(sliding_window=sliding_window)
    attend = quick_jit(
        ft.partial(
            array_function("ragged_paged_attention", "pallas_tpu"),
            interpret=True,
            config=small(cases[0], num_queries_per_block=64),
            **options,
        )
    )
    for case in cases:
        assert_close(attend(*case.mixed_args), expected_paged(case, **options)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_heads, num_kv_heads, page_size",
    ((7, 1, 8), (9, 3, 32), (16, 1, 64), (2, 2, 128), (2, 1, 256), (8, 4, 16)),
)
def test_shapes_of_heads_and_pages(getkey, num_heads, num_kv_heads, page_size):
    case = paged_case(
        getkey(),
        kv_lens=(17, 0, 270, 1, 129),
        q_lens=(17, 0, 30, 1, 2),
        num_tokens=64,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        page_size=page_size,
    )
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_options(getkey, name):
    options = OPTIONS[name](4, 2)
    case = paged_case(
        getkey(),
        kv_lens=(5, 0, 150, 16, 140),
        q_lens=(5, 0, 20, 1, 3),
        num_tokens=40,
        head_dim=64,
        page_size=64,
        storage="u16-rows" if name == "everything" else "f32-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", (1, 16, 17, 128, 129, 1000))
def test_windows_at_the_edges_of_pages_and_blocks(getkey, sliding_window):
    kv_lens, q_lens = MIXES[0]
    case = paged_case(
        getkey(),
        kv_lens=kv_lens,
        q_lens=q_lens,
        head_dim=128,
        sliding_window=sliding_window,
    )
    check(case, sliding_window=sliding_window)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("batch", "kv_head"))
def test_ways_to_share_out_the_work(getkey, mode):
    cases = [
        paged_case(
            getkey(),
            kv_lens=kv_lens,
            q_lens=q_lens,
            num_tokens=260,
            head_dim=128,
            page_size=64,
        )
        # The last has items for neither core: one token a row.
        for kv_lens, q_lens in MIXES
    ]
    shared = config(pages_per_compute_block=2, num_queries_per_block=64, megacore_mode=mode)
    check_all(cases, config=shared)


@pytest.mark.slow
def test_a_core_without_items_stays_within_the_arrays(getkey):
    # Of a TPU v4, as by default. InterpretParams, unlike True, keeps to its blocks.
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(20, 9), q_lens=(9, 7), **ONE_HEAD)
    attend = ft.partial(eqx_paged.ragged_paged_attention, *case.mixed_args)
    out = attend(implementation="pallas_tpu", interpret=pltpu.InterpretParams())
    assert_close(out, expected_paged(case)[0])


@pytest.mark.slow
def test_contexts_of_thousands_of_tokens_by_the_chosen_plan(getkey):
    case = paged_case(
        getkey(),
        kv_lens=(4096, 513, 3000, 0, 1),
        q_lens=(1, 513, 150, 0, 1),
        num_tokens=700,
        head_dim=128,
    )
    check(case, config=None)


@pytest.mark.slow
def test_queries_before_the_first_token_of_a_row_see_nothing(getkey):
    case = paged_case(
        getkey(), kv_lens=(40, 40, 40), q_lens=(40, 40, 40), head_dim=128, page_size=64
    )
    lens = jnp.asarray((0, 3, 39), jnp.int32)
    args = (*case.mixed_args[:3], lens, *case.mixed_args[4:])
    how = dict(interpret=True, config=small(case))
    out = run("ragged_paged_attention", "pallas_tpu", args, **how)
    assert_close(out, run("ragged_paged_attention", "xla", args))


@pytest.mark.slow
def test_eight_bits_a_number(getkey):
    import eqx_paged

    case = paged_case(
        getkey(), kv_lens=(40, 1, 130), q_lens=(40, 1, 9), head_dim=128, page_size=32
    )
    values = np.random.default_rng(0).integers(-127, 128, (2, *case.k_pages.shape))
    scales = dict(k_scale=jnp.asarray(head_values(2)) / 127, v_scale=1 / 127)
    q, _, _, *rest = case.mixed_args
    args = (q.astype(jnp.bfloat16), *jnp.asarray(values, jnp.int8), *rest)
    attend = ft.partial(eqx_paged.ragged_paged_attention, **scales)
    out = attend(*args, implementation="pallas_tpu", interpret=True, config=small(case))
    exact = (q.astype(jnp.bfloat16).astype(jnp.float32), *args[1:])
    np.testing.assert_allclose(
        out.astype(jnp.float32), attend(*exact, implementation="xla"), atol=1e-2
    )


# --- What it reads, and when


ONE_HEAD = dict(num_heads=2, num_kv_heads=1, head_dim=128)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kv_lens, q_lens, sliding_window, pages, tables",
    (
        # One token a row: as in a decode step, and no tile.
        pytest.param((40, 33), (1, 1), None, 3 + 3, 0, marks=pytest.mark.slow),
        # Tiles of 16 tokens; the second row's lie in three. Each reads up to its own end.
        pytest.param((40, 90), (1, 40), None, 3 + (5 + 6 + 6), 3, marks=pytest.mark.slow),
        ((40, 90), (1, 40), 20, 2 + (4 + 4 + 3), 3),
    ),
)
def test_pages_that_no_query_sees_are_not_fetched(
    getkey, fresh_traces, monkeypatch, kv_lens, q_lens, sliding_window, pages, tables
):
    import eqx_paged

    case = paged_case(
        getkey(),
        kv_lens=kv_lens,
        q_lens=q_lens,
        sliding_window=sliding_window,
        **ONE_HEAD,
    )
    attend = ft.partial(
        eqx_paged.ragged_paged_attention,
        *case.mixed_args,
        sliding_window=sliding_window,
        implementation="pallas_tpu",
        config=small(case),
    )
    found = copies_in(lambda mode: attend(interpret=mode), monkeypatch)
    assert found == 2 * pages + tables


@both_dma_modes
@pytest.mark.parametrize(
    "page_size, kv_lens, q_lens",
    (
        pytest.param(16, (5, 150, 0, 40), (1, 20, 0, 7), marks=pytest.mark.slow),
        # Blocks that are seen whole, while the next one is full.
        (128, (512, 640, 384), (3, 17, 1)),
    ),
)
def test_no_access_races(getkey, dma_execution_mode, page_size, kv_lens, q_lens):
    import eqx_paged

    case = paged_case(
        getkey(), kv_lens=kv_lens, q_lens=q_lens, page_size=page_size, **ONE_HEAD
    )
    attend = ft.partial(
        eqx_paged.ragged_paged_attention, *case.mixed_args, config=small(case)
    )
    out, found = races_of(
        lambda mode: attend(implementation="pallas_tpu", interpret=mode), dma_execution_mode
    )
    assert not found
    assert_close(out, expected_paged(case)[0])


@pytest.mark.parametrize(
    "name",
    ("wait", pytest.param("wait_all", marks=pytest.mark.slow)),
)
def test_a_wait_that_is_left_out_is_found(getkey, fresh_traces, monkeypatch, name):
    import eqx_paged
    from eqx_paged.kernels import _tpu

    monkeypatch.setattr(_tpu.PageFetch, name, lambda fetch, *count: None)
    # Two blocks, of which the first is seen whole while the next one is full.
    case = paged_case(getkey(), kv_lens=(256,), q_lens=(3,), **ONE_HEAD)
    attend = ft.partial(
        eqx_paged.ragged_paged_attention, *case.mixed_args, config=small(case)
    )
    _, found = races_of(
        lambda mode: attend(implementation="pallas_tpu", interpret=mode), "eager"
    )
    assert found


# --- What the compiler says


def mixed_shapes(model, page_size, dtype, num_seqs=8, max_len=2048, num_tokens=512):
    import eqx_paged

    num_heads, num_kv_heads, head_dim = MODELS[model]
    pages = jax.eval_shape(
        lambda: eqx_paged.KVPages.empty(
            num_pages=num_seqs * max_len // page_size,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
    ).k_pages
    pool = jax.ShapeDtypeStruct(pages.shape, dtype)
    q_dtype = jnp.float32 if dtype == "float32" else jnp.bfloat16
    ints = ft.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return (
        jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), q_dtype),
        pool,
        pool,
        ints((num_seqs,)),
        ints((num_seqs, max_len // page_size)),
        ints((num_seqs + 1,)),
        ints(()),
    )


GRID = [
    *itertools.product(MODELS, (16, 128), ("bfloat16", "float32", "int8"), TOPOLOGIES),
    *itertools.product(("8b", "135m"), (16, 128), ("float8_e4m3fn",), TOPOLOGIES),
]


@needs_libtpu
@pytest.mark.parametrize(
    "model, page_size, dtype, generation",
    [
        pytest.param(*x, marks=() if i == 0 else pytest.mark.slow)
        for i, x in enumerate(GRID)
    ],
)
def test_it_compiles_and_copies_no_pool(model, page_size, dtype, generation):
    import eqx_paged

    shapes = mixed_shapes(model, page_size, dtype)
    compiled = compile_for(generation, eqx_paged.ragged_paged_attention, shapes)
    # The decode kernel, and that of longer rows.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert not large_copies(compiled, least=np.prod(shapes[1].shape))


@needs_libtpu
@pytest.mark.parametrize(
    "options, words",
    (
        (dict(num_queries_per_block=24), ("24", "16")),
        (dict(num_queries_per_block=2**14), ("16384", "VMEM")),
        (dict(pages_per_compute_block=3), ("3", "128")),
    ),
    ids=str,
)
def test_a_config_that_cannot_work_is_refused_before_compiling(options, words):
    import eqx_paged

    shapes = mixed_shapes("8b", 16, "bfloat16")
    attend = ft.partial(eqx_paged.ragged_paged_attention, config=config(**options))
    with fails_naming(words):
        compile_for("v5e", attend, shapes)


def test_no_gradient_goes_through_it(getkey):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(3,), q_lens=(2,), head_dim=128)
    q, *rest = case.mixed_args

    def loss(q):
        out = eqx_paged.ragged_paged_attention(
            q, *rest, implementation="pallas_tpu", interpret=True
        )
        return jnp.sum(out)

    with pytest.raises(NotImplementedError, match="no gradient as 'pallas_tpu'"):
        jax.grad(loss)(q)
