import dataclasses
import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import (
    check_paged,
    fails_naming,
    head_values,
    OPTIONS,
    paged_case,
    stored_as_on,
)
from ..tpu import (
    both_dma_modes,
    compile_for,
    large_copies,
    MODELS,
    needs_libtpu,
    races_of,
    TOPOLOGIES,
)


def config(**options):
    import eqx_paged

    return eqx_paged.TPUConfig(**options)


def small(page_size, head_dim):
    """The smallest blocks there are: 128 rows of lanes, or a page."""
    num_tokens = 128 * max(1, 128 // head_dim)
    return config(pages_per_compute_block=max(1, num_tokens // page_size))


def check(case, **options):
    head_dim, (_, _, rows, lanes) = case.q.shape[2], case.k_pages.shape
    case_config = small(rows * (lanes // head_dim), head_dim)
    how = dict(interpret=True, config=options.pop("config", case_config))
    check_paged("paged_attention", case, "pallas_tpu", how=how, **options)


@pytest.fixture
def as_generation(monkeypatch):
    """Chooses as on another TPU than that which interprets."""
    from eqx_paged.kernels import _tpu
    from eqx_paged.kernels.paged_attention import pallas_tpu, tpu_plan

    def choose(name):
        for module in (pallas_tpu, tpu_plan):
            monkeypatch.setattr(module, "generation", lambda: _tpu.GENERATIONS[name])

    yield choose


# Around pages and blocks of 128 tokens, several blocks, idle rows between the others.
LENS = (0, 1, 15, 16, 17, 0, 63, 64, 65, 127, 128, 129, 300)


# Small pages are many copies, and take the interpreter long.
@pytest.mark.parametrize(
    "page_size, storage",
    (
        (64, "u16"),
        pytest.param(64, "f32", marks=pytest.mark.slow),
        pytest.param(16, "f32", marks=pytest.mark.slow),
        pytest.param(8, "f32", marks=pytest.mark.slow),
        pytest.param(128, "u16", marks=pytest.mark.slow),
    ),
)
def test_lengths_at_the_edges_of_pages_and_blocks(getkey, page_size, storage):
    check(
        paged_case(
            getkey(), kv_lens=LENS, head_dim=128, page_size=page_size, storage=storage
        )
    )


# Rows of some blocks, so that there are none, one and several steady ones, in either slot.
@pytest.mark.slow
@pytest.mark.parametrize(
    "sliding_window", (None, pytest.param(300, marks=pytest.mark.slow))
)
def test_runs_of_whole_blocks(getkey, sliding_window):
    case = paged_case(
        getkey(),
        kv_lens=(128, 384, 0, 512, 640, 640, 256, 300, 129, 128, 896),
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        page_size=128,
        sliding_window=sliding_window,
    )
    options = {} if sliding_window is None else dict(sliding_window=sliding_window)
    check(case, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim, page_size, storage",
    (
        (8, 2, 64, 64, "u16-rows"),
        pytest.param(8, 2, 64, 16, "u16-rows", marks=pytest.mark.slow),
        pytest.param(9, 3, 64, 32, "f32-rows", marks=pytest.mark.slow),
        pytest.param(7, 1, 128, 8, "f32", marks=pytest.mark.slow),
        pytest.param(3, 3, 80, 16, "bf16-padded", marks=pytest.mark.slow),
        pytest.param(4, 2, 96, 16, "f32-padded", marks=pytest.mark.slow),
        pytest.param(4, 4, 160, 16, "f32-padded", marks=pytest.mark.slow),
        pytest.param(16, 1, 128, 32, "u16", marks=pytest.mark.slow),
        pytest.param(2, 2, 256, 16, "f32", marks=pytest.mark.slow),
        pytest.param(4, 4, 128, 128, "u16", marks=pytest.mark.slow),
        pytest.param(6, 2, 128, 64, "f32", marks=pytest.mark.slow),
    ),
)
def test_shapes_of_heads_and_pages(
    getkey, num_heads, num_kv_heads, head_dim, page_size, storage
):
    case = paged_case(
        getkey(),
        kv_lens=(17, 0, 270, 1, 129),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        storage=storage,
    )
    check(case)


def test_queries_of_another_dtype_are_multiplied_in_float32(getkey):
    case = paged_case(
        getkey(),
        kv_lens=(20, 1),
        head_dim=128,
        page_size=128,
        storage="u16",
        q_dtype="float32",
    )
    case.dtype = "float32"
    check(case)


IN_SHORT = ("everything",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIONS
        if name != "plain"
    ],
)
def test_options(getkey, name):
    options = OPTIONS[name](4, 2)
    window = options.get("sliding_window")
    case = paged_case(
        getkey(), kv_lens=(5, 0, 150, 16), head_dim=128, page_size=64, sliding_window=window
    )
    check(case, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", (1, 128, 129, 200, 1000))
def test_windows_at_the_edges_of_pages_and_blocks(getkey, sliding_window):
    case = paged_case(getkey(), kv_lens=LENS, head_dim=128, sliding_window=sliding_window)
    check(case, sliding_window=sliding_window)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    (
        pytest.param(dict(inline_seq_dim=False), marks=pytest.mark.slow),
        pytest.param(dict(megacore_mode="batch"), marks=pytest.mark.slow),
        pytest.param(
            dict(megacore_mode="batch", inline_seq_dim=False), marks=pytest.mark.slow
        ),
        pytest.param(dict(megacore_mode="kv_head"), marks=pytest.mark.slow),
        dict(megacore_mode="kv_head", inline_seq_dim=False),
    ),
    ids=str,
)
def test_ways_to_share_out_the_work(getkey, options):
    case = paged_case(getkey(), kv_lens=(17, 0, 200, 1, 129), head_dim=128, page_size=64)
    check(case, config=config(pages_per_compute_block=2, **options))


@pytest.mark.slow
def test_contexts_of_thousands_of_tokens_by_the_chosen_plan(getkey):
    case = paged_case(getkey(), kv_lens=(4096, 513, 4000, 0, 512), head_dim=128)
    check(case, config=None)


@pytest.mark.slow
def test_eight_bits_a_number(getkey):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(40, 1, 130), head_dim=128, page_size=128)
    values = np.random.default_rng(0).integers(-127, 128, (2, *case.k_pages.shape))
    scales = dict(k_scale=jnp.asarray(head_values(2)) / 127, v_scale=1 / 127)
    q, _, _, kv_lens, page_indices = case.decode_args
    args = (q.astype(jnp.bfloat16), *jnp.asarray(values, jnp.int8), kv_lens, page_indices)
    attend = ft.partial(eqx_paged.paged_attention, **scales)
    out = attend(*args, implementation="pallas_tpu", interpret=True, config=small(128, 128))
    exact = (q.astype(jnp.bfloat16).astype(jnp.float32), *args[1:])
    np.testing.assert_allclose(
        out.astype(jnp.float32), attend(*exact, implementation="xla"), atol=1e-2
    )


def of_eight_bits(case):
    """A case with keys and values 32 times as large, rounded. Absent ones are garbage."""

    def rounded(x):
        return np.clip(np.round(32 * np.asarray(x, np.float32)), -127, 127)

    def pool(pages):
        return jnp.asarray(np.where(np.isnan(pages), 99, rounded(pages)), jnp.int8)

    return dataclasses.replace(
        case,
        k_pages=pool(case.k_pages),
        v_pages=pool(case.v_pages),
        ks=[rounded(k) for k in case.ks],
        vs=[rounded(v) for v in case.vs],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "generation, heads, head_dim, storage, options",
    (
        # A few keys outweigh the many whose probabilities are small.
        ("v5e", (4, 2), 128, "f32", dict(k_scale=1 / 3)),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("v5e", (4, 2), 128, "f32", dict(k_scale=1 / 32)),
                ("v6e", (16, 1), 128, "f32", dict(k_scale=1 / 32, return_residuals=True)),
                ("v6e", (8, 2), 64, "f32-rows", dict(k_scale=1 / 20, soft_cap=2.0)),
                ("v5e", (4, 2), 128, "f32", dict(k_scale=1 / 32, sliding_window=140)),
            )
        ),
    ),
)
def test_products_of_int8_are_as_exact_as_of_float32(
    getkey, as_generation, generation, heads, head_dim, storage, options
):
    as_generation(generation)
    case = paged_case(
        getkey(),
        kv_lens=(17, 0, 300, 1, 129),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=32,
        storage=storage,
        sliding_window=options.get("sliding_window"),
    )
    check(of_eight_bits(case), **options, v_scale=1 / 32)


@pytest.mark.parametrize(
    "generation, head_dim, storage, num_pages",
    # Of the last, two parts of a block that is not full are worked on one by one.
    (
        pytest.param("v4", 128, "f32", 8, marks=pytest.mark.slow),
        pytest.param("v4", 64, "f32-rows", 8, marks=pytest.mark.slow),
        pytest.param("7x", 128, "f32", 8, marks=pytest.mark.slow),
        pytest.param("7x", 128, "f32", 32, marks=pytest.mark.slow),
    ),
)
def test_eight_bits_on_a_tpu_without_products_of_int8(
    getkey, as_generation, generation, head_dim, storage, num_pages
):
    as_generation(generation)
    case = paged_case(
        getkey(),
        kv_lens=(700, 0, 17, 1),
        num_heads=4,
        num_kv_heads=4,
        head_dim=head_dim,
        page_size=32 * 128 // head_dim,  # whole tiles
        storage=storage,
        q_dtype="bfloat16",
        sliding_window=640,
    )
    options = dict(k_scale=1 / 32, v_scale=1 / 32, sliding_window=640)
    blocks = config(pages_per_compute_block=num_pages)
    check(of_eight_bits(case), **options, config=blocks)


@pytest.mark.slow
def test_pages_of_float8(getkey):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(300, 0, 129), head_dim=128, page_size=128)
    pages = (x.astype(jnp.float8_e4m3fn) for x in (case.k_pages, case.v_pages))
    args = (case.q.astype(jnp.bfloat16), *pages, case.kv_lens, case.page_indices)
    attend = ft.partial(eqx_paged.paged_attention, k_scale=0.5, v_scale=2.0)
    out = attend(*args, implementation="pallas_tpu", interpret=True, config=small(128, 128))
    # The same numbers in float32: what differs is the rounding of queries and products.
    exact = attend(args[0].astype(jnp.float32), *args[1:], implementation="xla")
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=1e-2)


RACED = dict(kv_lens=(5, 0, 40, 33), num_heads=2, num_kv_heads=2, head_dim=128)


@both_dma_modes
@pytest.mark.parametrize(
    "page_size, kv_lens",
    # Rows within a block; and blocks that are seen whole, while the next one is full.
    (
        pytest.param(16, RACED["kv_lens"], marks=pytest.mark.slow),
        (128, (512, 512, 0, 640)),
    ),
)
def test_no_access_races(getkey, dma_execution_mode, page_size, kv_lens):
    import eqx_paged

    case = paged_case(getkey(), **{**RACED, "kv_lens": kv_lens}, page_size=page_size)
    attend = ft.partial(eqx_paged.paged_attention, *case.decode_args)
    how = dict(implementation="pallas_tpu", config=small(page_size, 128))
    out, found = races_of(lambda mode: attend(interpret=mode, **how), dma_execution_mode)
    assert not found
    np.testing.assert_allclose(out, attend(implementation="xla"), atol=2e-5)


@both_dma_modes
def test_a_wait_that_is_left_out_is_found(
    getkey, fresh_traces, monkeypatch, dma_execution_mode
):
    import eqx_paged
    from eqx_paged.kernels import _tpu

    monkeypatch.setattr(_tpu.PageFetch, "wait", lambda fetch, count: None)
    case = paged_case(getkey(), **RACED, page_size=16)
    attend = ft.partial(eqx_paged.paged_attention, *case.decode_args)
    how = dict(implementation="pallas_tpu", config=small(16, 128))
    out, found = races_of(lambda mode: attend(interpret=mode, **how), dma_execution_mode)
    if dma_execution_mode == "eager":
        assert found
    else:  # a copy that is made when it is waited for is not made at all
        assert not np.allclose(out, attend(implementation="xla"), atol=2e-5)


@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("num_kv_heads", (1, 8))
@pytest.mark.parametrize("pages_per_seq", (1, 1500, 30000))
def test_tables_fit_the_scalar_memory_and_few_rows_are_added(
    generation, num_kv_heads, pages_per_seq
):
    from eqx_paged.kernels import _tpu
    from eqx_paged.kernels.paged_attention import tpu_plan

    chip = _tpu.GENERATIONS[generation]
    pool = jnp.zeros((1, num_kv_heads, 16, 128), jnp.bfloat16)
    for num_seqs in (1, 2, 7, 44, 64, 86, 172, 500):
        q = jnp.zeros((num_seqs, 4 * num_kv_heads, 128), jnp.bfloat16)
        config = _tpu.rows_on_all_cores(chip)
        plan = tpu_plan.plan_of(q, pool, pages_per_seq, config, chip)
        assert 4 * plan.rows_per_call * (pages_per_seq + 2) < _tpu.SMEM_BYTES * 3 / 4
        groups_added = plan.steps + plan.num_calls * plan.row_cores
        added = plan.num_calls * plan.rows_per_call - num_seqs
        assert 0 <= added <= groups_added * plan.rows * plan.row_cores


@pytest.mark.slow
def test_tables_larger_than_the_scalar_memory_are_worked_off_in_parts(
    getkey, fresh_traces, monkeypatch
):
    from eqx_paged.kernels.paged_attention import tpu_plan

    monkeypatch.setattr(tpu_plan, "SMEM_BYTES", 2 * 4 * 12 * 4)
    case = paged_case(
        getkey(), kv_lens=(17, 0, 200, 1, 129, 5, 90), head_dim=128, page_size=64
    )
    check(case)


# --- What the compiler says


def decode_shapes(model, page_size, dtype, num_seqs=8, max_len=1024):
    """`model` is a name of MODELS, or what these say of one."""
    import eqx_paged

    num_heads, num_kv_heads, head_dim = MODELS.get(model, model)
    with stored_as_on("tpu"):
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
    return (
        jax.ShapeDtypeStruct((num_seqs, num_heads, head_dim), q_dtype),
        pool,
        pool,
        jax.ShapeDtypeStruct((num_seqs,), jnp.int32),
        jax.ShapeDtypeStruct((num_seqs, max_len // page_size), jnp.int32),
    )


FLOAT8 = "float8_e4m3fn"
GRID = [
    pytest.param(
        model,
        page_size,
        dtype,
        generation,
        marks=() if i % 26 == 5 else pytest.mark.slow,
    )
    for i, (model, page_size, dtype, generation) in enumerate(
        (model, page_size, dtype, generation)
        for model in MODELS
        for page_size in (16, 128)
        for dtype in ("bfloat16", "float32", "int8")
        for generation in TOPOLOGIES
    )
]
GRID_OF_FLOAT8 = [
    pytest.param(*x, marks=() if x == ("8b", 16, FLOAT8, "7x") else pytest.mark.slow)
    for x in itertools.product(("8b", "135m"), (16, 128), (FLOAT8,), TOPOLOGIES)
]


@needs_libtpu
@pytest.mark.parametrize("model, page_size, dtype, generation", GRID + GRID_OF_FLOAT8)
def test_it_compiles_and_copies_no_pool(model, page_size, dtype, generation):
    import eqx_paged

    shapes = decode_shapes(model, page_size, dtype)
    attend = ft.partial(eqx_paged.paged_attention, implementation="pallas_tpu")
    compiled = compile_for(generation, attend, shapes)
    assert "tpu_custom_call" in compiled.as_text()
    assert not large_copies(compiled, least=np.prod(shapes[1].shape))


@needs_libtpu
@pytest.mark.parametrize(
    "head_dim, dtype, generation",
    [
        pytest.param(*x, marks=() if x == (80, "bfloat16", "v5e") else pytest.mark.slow)
        for x in itertools.product((80, 96), ("bfloat16", "float32"), TOPOLOGIES)
    ],
)
def test_it_copies_no_pool_of_pages_rounded_up(head_dim, dtype, generation):
    import eqx_paged

    # As a cache stores them on a TPU, and by its choice.
    shapes = decode_shapes((32, 8, head_dim), 16, dtype)
    assert shapes[1].shape[3] == 128
    compiled = compile_for(generation, eqx_paged.paged_attention, shapes)
    assert "tpu_custom_call" in compiled.as_text()
    assert not large_copies(compiled, least=np.prod(shapes[1].shape))


@needs_libtpu
def test_it_is_what_runs_on_a_tpu_by_itself():
    import eqx_paged

    shapes = decode_shapes("8b", 16, "bfloat16")
    assert (
        "tpu_custom_call" in compile_for("7x", eqx_paged.paged_attention, shapes).as_text()
    )
    # Pages of 48 lanes are no tiles of a TPU, and float16 is no dtype of it.
    q, pool, _, *rest = shapes
    for head_dim, dtype in ((48, "bfloat16"), (128, "float16")):
        q = jax.ShapeDtypeStruct((8, 32, head_dim), dtype)
        pool = jax.ShapeDtypeStruct((*pool.shape[:3], head_dim), dtype)
        plain = compile_for("7x", eqx_paged.paged_attention, (q, pool, pool, *rest))
        assert "tpu_custom_call" not in plain.as_text()


@needs_libtpu
@pytest.mark.parametrize(
    "options, generation, words",
    (
        (dict(megacore_mode="batch"), "7x", ("batch", "7x")),
        (dict(megacore_mode="kv_head"), "v5p", ("3", "2")),
        (dict(pages_per_compute_block=3), "v4", ("3", "128")),
        (dict(pages_per_compute_block=4096), "v4", ("4096", "VMEM")),
    ),
    ids=str,
)
def test_a_config_that_cannot_work_is_refused_before_compiling(options, generation, words):
    import eqx_paged

    shapes = decode_shapes("135m", 16, "bfloat16")
    attend = ft.partial(
        eqx_paged.paged_attention, implementation="pallas_tpu", config=config(**options)
    )
    with fails_naming(words):
        compile_for(generation, attend, shapes)


def test_no_gradient_goes_through_it(getkey):
    import eqx_paged

    q, *rest = paged_case(getkey(), kv_lens=(3,), head_dim=128).decode_args

    def loss(q, **options):
        return jnp.sum(eqx_paged.paged_attention(q, *rest, **options))

    with pytest.raises(NotImplementedError, match="no gradient as 'pallas_tpu'"):
        jax.grad(loss)(q, implementation="pallas_tpu", interpret=True)
    assert np.all(np.isfinite(jax.grad(loss)(q)))
