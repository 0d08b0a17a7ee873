import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import (
    assert_close,
    check_paged,
    expected_paged,
    OPTIONS,
    paged_case,
    quick_jit,
    run,
)
from ..mosaic_gpu import how, kernels_in, mosaic_config, needs_interpreter
from ..triton import lower, lowered_for


slow = pytest.mark.slow
# Each option at least once: a case takes seconds to interpret.
DISTINCT = ("plain", "everything", "window", "sinks", "residuals, window, soft cap, scales")


def check(case, *, blocks=None, **options):
    check_paged(
        "paged_attention", case, "pallas_gpu", how=how(**(blocks or WHOLE)), **options
    )


# A part a row: each part that there might be is a program that is interpreted.
WHOLE = dict(num_splits=0)


@needs_interpreter
def test_rows_that_end_within_a_page_and_idle_rows(getkey):
    case = paged_case(
        getkey(), kv_lens=(70, 0, 1), num_heads=3, num_kv_heads=1, storage="u16-rows"
    )
    check(case, return_residuals=True)


@needs_interpreter
def test_a_sink_that_counts_for_nothing_and_an_idle_row(getkey):
    case = paged_case(getkey(), kv_lens=(9, 0), num_heads=2, num_kv_heads=1, storage="bf16")
    check(case, sinks=np.asarray([-np.inf, 0], np.float32))


@needs_interpreter
def test_a_window_in_several_parts_with_every_option(getkey):
    options = OPTIONS["everything"](2, 2) | dict(sliding_window=300)
    case = paged_case(
        getkey(),
        kv_lens=(500, 40),
        num_heads=2,
        head_dim=128,
        page_size=8,
        storage="bf16",
        sliding_window=300,
    )
    check(case, blocks=dict(num_splits=2), **options)


# Blocks of several pages, of one, and of a part of one.
@slow
@needs_interpreter
@pytest.mark.parametrize("page_size", (8, 16, 64, 128))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_pages_and_heads(getkey, page_size, head_dim):
    case = paged_case(
        getkey(),
        kv_lens=(63, 64, 65, 200),
        num_heads=5,
        num_kv_heads=1,
        head_dim=head_dim,
        page_size=page_size,
        storage="bf16",
    )
    check(case, return_residuals=True)


@slow
@needs_interpreter
def test_a_full_group_and_a_kv_head_a_query_head(getkey):
    for num_heads, num_kv_heads in ((64, 1), (3, 3)):
        case = paged_case(
            getkey(),
            kv_lens=(20, 65),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            storage="bf16",
        )
        check(case)


@slow
@needs_interpreter
@pytest.mark.parametrize("name", DISTINCT)
def test_options(getkey, name):
    options = OPTIONS[name](4, 2)
    case = paged_case(
        getkey(),
        kv_lens=(0, 9, 130),
        storage="bf16-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, **options)


@slow
@needs_interpreter
@pytest.mark.parametrize("blocks", (dict(num_splits=4), dict(block_size=128)))
def test_configs(getkey, blocks):
    case = paged_case(
        getkey(), kv_lens=(1100, 0, 300), num_heads=2, num_kv_heads=1, storage="bf16"
    )
    check(case, blocks=WHOLE | dict(num_stages=3) | blocks, return_residuals=True)


@slow
@needs_interpreter
def test_float16(getkey):
    case = paged_case(getkey(), kv_lens=(70, 3), num_heads=2, storage="bf16")
    args = [
        x.astype(jnp.float16) if x.dtype == jnp.bfloat16 else x for x in case.decode_args
    ]
    out = run("paged_attention", "pallas_gpu", args, **how(**WHOLE))
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, expected_paged(case)[0], atol=4e-3)


@slow
@needs_interpreter
def test_a_batch_of_calls(getkey):
    import eqx_paged

    cases = [
        paged_case(getkey(), kv_lens=lens, num_kv_heads=4, storage="bf16")
        for lens in ((20, 9), (9, 20))
    ]
    args = jax.tree.map(lambda *x: jnp.stack(x), *(case.decode_args for case in cases))
    attend = ft.partial(
        eqx_paged.paged_attention, implementation="pallas_gpu", **how(**WHOLE)
    )
    out = quick_jit(jax.vmap(attend))(*args)
    for actual, case in zip(out, cases):
        assert_close(actual, expected_paged(case)[0], "bfloat16")


def test_the_config_of_another_platform_is_refused(getkey):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(3,), storage="bf16")
    for implementation, wrong, words in (
        ("pallas_gpu", eqx_paged.TPUConfig(), "TritonConfig or a MosaicGPUConfig.*TPU"),
        ("pallas_tpu", mosaic_config(), "TPUConfig.*MosaicGPUConfig"),
    ):
        with pytest.raises(ValueError, match=f"{implementation}.*{words}"):
            run("paged_attention", implementation, case.decode_args, config=wrong)


# --- Merging the parts


def test_what_no_program_has_written_is_not_merged():
    from eqx_paged.kernels._gpu import splits_of
    from eqx_paged.kernels._online_softmax import merge_residuals
    from eqx_paged.kernels.paged_attention.pallas_mosaic_gpu import merged

    kv_lens = jnp.asarray([0, 200, 64], jnp.int32)
    splits = splits_of(
        kv_lens, block_size=64, num_splits=4, min_part=64, sliding_window=None
    )
    ends = jnp.where(splits.rows < 3, splits.ends, 0)
    splits = splits._replace(ends=ends)
    exists = np.asarray(splits.starts < ends)
    assert exists.sum() == 3 and len(exists) == 7
    rng = np.random.default_rng(0)
    acc = rng.normal(size=(7, 2, 8)).astype(np.float32)
    m, l = rng.normal(size=(2, 7, 2)).astype(np.float32)
    l = np.exp(l)  # noqa: E741
    for x in (acc, m, l):
        x[~exists] = np.nan
    got = merged(splits, *map(jnp.asarray, (acc, m, l)))
    for row in range(3):
        parts = exists & (np.asarray(splits.rows) == row)
        assert parts.sum() == (0, 2, 1)[row]
        if not parts.any():
            assert float(got[2][row].sum()) == 0 and float(jnp.abs(got[0][row]).sum()) == 0
            continue
        of_row = (acc[parts] / l[parts][..., None], m[parts] * np.log(2, dtype=np.float32))
        out, _, l_row = merge_residuals(*map(jnp.asarray, (*of_row, l[parts])))
        np.testing.assert_allclose(got[0][row] / got[2][row][:, None], out, rtol=1e-5)
        np.testing.assert_allclose(got[2][row], l_row, rtol=1e-5)


# --- Lowered, without a GPU


def decode_shapes(*, dtype="bfloat16", q_dtype="bfloat16", head_dim=128, page_size=64):
    pages = jax.ShapeDtypeStruct((8, 1, page_size, head_dim), jnp.dtype(dtype))
    return (
        jax.ShapeDtypeStruct((4, 4, head_dim), jnp.dtype(q_dtype)),
        *(pages, pages),
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((4, 16), jnp.int32),
    )


def attend_on_gpu(*args, **options):
    import eqx_paged

    return eqx_paged.paged_attention(
        *args, implementation="pallas_gpu", config=mosaic_config(**options)
    )


@needs_interpreter
def test_a_config_runs_it_on_hopper_and_none_does_not():
    import eqx_paged

    with lowered_for("NVIDIA H100"):
        assert len(kernels_in(attend_on_gpu, *decode_shapes())) == 1
        assert not kernels_in(
            ft.partial(eqx_paged.paged_attention, implementation="pallas_gpu"),
            *decode_shapes(),
        )


@pytest.mark.parametrize(
    "kind, options, reason",
    (
        ("NVIDIA A100", {}, "9.0.*A100.*8.0"),
        ("NVIDIA B200", {}, "9.0.*B200.*10.0"),
        ("NVIDIA H100", dict(q_dtype="float32"), "bfloat16 or float16.*float32"),
        ("NVIDIA H100", dict(dtype="int8"), "k_pages.*bfloat16.*int8"),
        ("NVIDIA H100", dict(dtype="float16"), "k_pages.*bfloat16.*float16"),
        ("NVIDIA H100", dict(head_dim=96), "64, 128 or 256, not 96"),
        ("NVIDIA H100", dict(page_size=4), "power of two from 8 on, not 4"),
    ),
)
def test_what_cannot_run_is_refused_with_the_reason(kind, options, reason):
    if jax.__version_info__ < (0, 11):
        reason = f"need jax 0.11, but this is {jax.__version__}"
    with lowered_for(kind), pytest.raises(NotImplementedError, match=f"{reason}.*'xla'"):
        lower(attend_on_gpu, *decode_shapes(**options))


@needs_interpreter
def test_what_does_not_fit_shared_memory_is_refused():
    with lowered_for("NVIDIA H100"), pytest.raises(ValueError, match="8 stages.* 128 keys"):
        lower(ft.partial(attend_on_gpu, num_stages=8, block_size=128), *decode_shapes())


@pytest.mark.parametrize(
    "options",
    (
        *(dict(block_size=32), dict(block_size=96), dict(block_size=192)),
        *(dict(num_splits=-1), dict(num_stages=1)),
    ),
)
def test_what_is_no_config_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        mosaic_config(**options)
