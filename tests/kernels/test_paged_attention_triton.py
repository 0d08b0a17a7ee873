import functools as ft
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import (
    assert_close,
    check_paged,
    count_compilations,
    expected_paged,
    head_values,
    OPTIONS,
    paged_case,
    quick_jit,
    run,
)
from ..triton import lower, lowered_for, shapes_of, triton_programs


def config(**options):
    import eqx_paged

    return eqx_paged.TritonConfig(**options)


# Rows of a page or two in the smallest blocks, and long ones in several parts.
SMALL = dict(block_size=16, num_splits=6)


def check(case, *, blocks=SMALL, **options):
    how = dict(interpret=True, config=blocks and config(**blocks))
    check_paged("paged_attention", case, "pallas_gpu", how=how, **options)


def edges(page_size):
    """Around pages and blocks, idle rows between the others, and a row of several parts."""
    around = (page_size - 1, page_size, page_size + 1, 2 * page_size)
    return (0, 1, *around, 0, 15, 16, 17, 700)


slow = pytest.mark.slow


# Blocks of several pages, of one, and of a part of one.
@pytest.mark.parametrize(
    "page_size, storage, group",
    (
        (8, "u16-rows", 3),
        (128, "f32-padded", 16),
        *(
            pytest.param(page_size, storage, group, marks=slow)
            for (page_size, storage), group in zip(
                itertools.product((8, 16, 32, 64, 128), ("f32", "bf16-rows")),
                itertools.cycle((1, 4, 7, 8)),
            )
        ),
    ),
)
def test_lengths_at_the_edges_of_pages_and_blocks(getkey, page_size, storage, group):
    case = paged_case(
        getkey(),
        kv_lens=edges(page_size),
        num_heads=2 * group,
        head_dim=80 if storage.endswith("padded") else 64,
        page_size=page_size,
        storage=storage,
    )
    check(case, return_residuals=True)


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim, storage",
    (
        (7, 1, 96, "bf16"),
        pytest.param(4, 2, 80, "f32", marks=slow),
        pytest.param(2, 2, 256, "u16", marks=slow),
        pytest.param(4, 2, 128, "bf16", marks=slow),
        pytest.param(6, 2, 16, "f32-rows", marks=slow),
        pytest.param(4, 4, 8, "f32-rows", marks=slow),
        pytest.param(4, 1, 96, "f32-padded", marks=slow),
        # More heads a kv head than rows of a tile.
        pytest.param(80, 1, 64, "f32", marks=slow),
    ),
)
def test_shapes_of_heads(getkey, num_heads, num_kv_heads, head_dim, storage):
    case = paged_case(
        getkey(),
        kv_lens=(17, 0, 600, 1, 129),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        storage=storage,
    )
    check(case)


IN_SHORT = ("everything",)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in IN_SHORT else slow) for x in OPTIONS]
)
def test_options(getkey, name):
    options = OPTIONS[name](6, 2)
    case = paged_case(
        getkey(),
        kv_lens=(0, 1, 7, 8, 9, 19, 40, 600),
        num_heads=6,
        page_size=8,
        storage="f32-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, **options)


# A window that begins within a block, on its edge, and one of several parts.
@slow
@pytest.mark.parametrize("sliding_window", (1, 16, 600))
def test_windows(getkey, sliding_window):
    case = paged_case(
        getkey(),
        kv_lens=(*range(0, 40, 3), 600, 1400),
        num_heads=2,
        page_size=8,
        sliding_window=sliding_window,
    )
    check(case, sliding_window=sliding_window)


def test_what_is_chosen_without_a_config(getkey):
    case = paged_case(getkey(), kv_lens=(300, 0, 1, 2000), storage="bf16", head_dim=128)
    check(case, blocks=None)


@pytest.mark.parametrize("implementation", ("xla", "pallas_gpu"))
def test_a_row_of_fewer_than_0_tokens_is_idle_and_costs_the_others_nothing(
    getkey, implementation
):
    # Added up as it is, it would leave the others too few parts.
    case = paged_case(getkey(), kv_lens=(1200, 1200, 0), num_heads=2)
    *arrays, kv_lens, page_indices = case.decode_args
    args = (*arrays, kv_lens.at[2].set(-10_000), page_indices)
    how = dict(interpret=True, config=config(**SMALL))
    how = how if implementation == "pallas_gpu" else {}
    assert_close(
        run("paged_attention", implementation, args, **how), expected_paged(case)[0]
    )


@slow
def test_rows_that_are_left_whole(getkey):
    case = paged_case(getkey(), kv_lens=(300, 0, 1, 1200))
    check(case, blocks=dict(block_size=64, num_splits=0))


@slow
def test_queries_of_another_dtype_are_multiplied_in_float32(getkey):
    case = paged_case(getkey(), kv_lens=(20, 1), storage="u16", q_dtype="float32")
    check(case)


EIGHT_BITS = (
    "int8",
    *(pytest.param(f"float8_{x}", marks=slow) for x in ("e4m3fn", "e5m2")),
)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_eight_bits_a_number(getkey, dtype):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(40, 0, 130), page_size=32, storage="f32-rows")
    scales = dict(k_scale=jnp.asarray(head_values(2)) / 32, v_scale=1 / 32)
    # Of a slot that was never written: NaN, or in int8 what would change the result.
    pages = [
        jnp.where(jnp.isnan(x), 99 if dtype == "int8" else jnp.nan, 32 * x).astype(dtype)
        for x in (case.k_pages, case.v_pages)
    ]
    args = (case.q.astype(jnp.bfloat16), *pages, case.kv_lens, case.page_indices)
    attend = ft.partial(eqx_paged.paged_attention, **scales)
    out = quick_jit(
        ft.partial(
            attend, implementation="pallas_gpu", interpret=True, config=config(**SMALL)
        )
    )(*args)
    exact = attend(args[0].astype(jnp.float32), *args[1:], implementation="xla")
    # What differs is the rounding of queries, probabilities and the result to bfloat16.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=1e-2)


@slow
def test_a_batch_of_calls(getkey):
    import eqx_paged

    cases = [paged_case(getkey(), kv_lens=lens) for lens in ((1, 20, 9), (20, 9, 1))]
    args = jax.tree.map(lambda *x: jnp.stack(x), *(case.decode_args for case in cases))
    attend = ft.partial(
        eqx_paged.paged_attention,
        implementation="pallas_gpu",
        interpret=True,
        config=config(**SMALL),
    )
    out = quick_jit(jax.vmap(attend))(*args)
    for actual, case in zip(out, cases):
        assert_close(actual, expected_paged(case)[0])


# --- The plan


PLANNED = (0, 1, 63, 64, 65, 5000, 0, 700)


@pytest.mark.parametrize("sliding_window", (None, 600))
@pytest.mark.parametrize("num_splits", (0, 1, 7, 40))
def test_the_parts_of_a_row_are_its_blocks_once(num_splits, sliding_window):
    from eqx_paged.kernels._gpu import splits_of

    kv_lens = jnp.asarray(PLANNED, jnp.int32)
    plan = ft.partial(
        splits_of,
        block_size=64,
        num_splits=num_splits,
        min_part=128,
        sliding_window=sliding_window,
    )
    splits = quick_jit(plan)(kv_lens)
    assert len(splits.rows) == num_splits + len(PLANNED)
    assert int(splits.counts.sum()) <= len(splits.rows)
    for row, kv_len in enumerate(PLANNED):
        first, count = int(splits.first_parts[row]), int(splits.counts[row])
        assert splits.rows.tolist()[first : first + count] == [row] * count
        starts, ends = (x.tolist()[first : first + count] for x in splits[1:3])
        seen_from = 0 if sliding_window is None else max(0, kv_len - sliding_window)
        assert starts[0] == seen_from // 64 * 64 and ends[-1] == kv_len
        assert starts[1:] == ends[:-1] and all(start % 64 == 0 for start in starts)
        if count > 1:
            blocks = [-(-(end - start) // 64) for start, end in zip(starts, ends)]
            assert max(blocks) - min(blocks) <= 1
    assert (
        int((splits.rows == len(PLANNED)).sum()) == len(splits.rows) - splits.counts.sum()
    )


def test_a_long_row_has_more_parts_whatever_its_table_has_room_for():
    from eqx_paged.kernels._gpu import splits_of

    plan = quick_jit(
        ft.partial(
            splits_of, block_size=64, num_splits=64, min_part=256, sliding_window=None
        )
    )
    alone = plan(jnp.asarray([32768], jnp.int32))
    assert alone.counts.tolist() == [64]
    mixed = plan(jnp.asarray([32768, 256, 1, 0], jnp.int32))
    assert 56 <= int(mixed.counts[0]) <= 64 and mixed.counts.tolist()[1:] == [1, 1, 1]


def test_layers_share_one_plan(getkey, fresh_traces, monkeypatch):
    import eqx_paged
    from eqx_paged.kernels.paged_attention import pallas_triton

    def launch(kernel, out_shape, **options):
        # All that a kernel reads, so that nothing of the plan is left out.
        def run(*args):
            read = sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(args))
            return [jnp.full(x.shape, read, x.dtype) for x in out_shape]

        return run

    monkeypatch.setattr(pallas_triton.pl, "pallas_call", launch)
    case = paged_case(getkey(), kv_lens=(3, 20, 9))
    attend = ft.partial(
        eqx_paged.paged_attention, implementation="pallas_gpu", interpret=True
    )

    def plans_in(num_layers):
        def model(q, *rest):
            for _ in range(num_layers):
                q = attend(q, *rest)
            return q

        compiled = jax.jit(model).lower(*case.decode_args).compile().as_text()
        return len(re.findall(r"= .* (?:reduce-window|divide|remainder)\(", compiled))

    assert plans_in(1) == plans_in(3) > 0


def test_changing_lengths_and_pages_compiles_nothing(getkey):
    import eqx_paged

    attend = quick_jit(
        ft.partial(
            eqx_paged.paged_attention,
            implementation="pallas_gpu",
            interpret=True,
            config=config(**SMALL),
        )
    )
    cases = [
        paged_case(key, kv_lens=lens)
        for key, lens in ((getkey(), (1, 90, 0)), (getkey(), (90, 0, 1)))
    ]
    assert_close(attend(*cases[0].decode_args), expected_paged(cases[0])[0])
    with count_compilations() as compilations:
        out = attend(*cases[1].decode_args)
    assert not compilations
    assert_close(out, expected_paged(cases[1])[0])


# --- Lowered, without a GPU


def decode_shapes(num_pages, *, dtype="bfloat16", head_dim=128, page_size=64):
    pages = jax.ShapeDtypeStruct((num_pages, 8, page_size, head_dim), jnp.dtype(dtype))
    return (
        jax.ShapeDtypeStruct((4, 32, head_dim), jnp.bfloat16),
        *(pages, pages),
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((4, 16), jnp.int32),
    )


def attend_on_gpu(*args, **options):
    import eqx_paged

    return eqx_paged.paged_attention(*args, implementation="pallas_gpu", **options)


def test_an_nvidia_gpu_gets_the_triton_kernels_and_others_xla():
    import eqx_paged

    args = decode_shapes(8)
    for kind, platform, expected in (
        ("NVIDIA H100 80GB HBM3", "cuda", True),
        ("NVIDIA A100-SXM4-80GB", "cuda", True),
        ("Tesla T4", "cuda", False),
        ("NVIDIA L40S", "cuda", False),  # which JAX does not know either
        ("AMD Instinct MI300X", "rocm", False),
    ):
        with lowered_for(kind):
            lowered = lower(eqx_paged.paged_attention, *args, platform=platform)
        assert ("xla.gpu.triton" in lowered) == expected, kind


def test_without_the_backend_the_choice_is_xla_and_a_wish_refused(
    fresh_traces, monkeypatch
):
    import eqx_paged
    from eqx_paged.kernels import _triton

    monkeypatch.setattr(_triton, "plgpu", None)
    args = decode_shapes(8)
    with lowered_for("NVIDIA H100"):
        assert "triton" not in lower(eqx_paged.paged_attention, *args)
        with pytest.raises(NotImplementedError, match="no Triton backend"):
            lower(attend_on_gpu, *args)


@pytest.mark.parametrize(
    "kind, options, reason",
    (
        ("Tesla T4", {}, "8.0.*Tesla T4.*7.5"),
        ("NVIDIA A100", dict(dtype="float8_e4m3fn"), "float8_e4m3fn.*A100"),
        ("NVIDIA H100", dict(head_dim=512), "256.*512"),
        # A pool of 1 KiB less than 4 GiB.
        (
            "NVIDIA H100",
            dict(dtype="int8", num_pages=2**16 - 1),
            f"{(2**16 - 1) * 2**16}.*{2**31}",
        ),
    ),
)
def test_what_cannot_run_is_refused_with_the_reason(kind, options, reason):
    with lowered_for(kind), pytest.raises(NotImplementedError, match=f"{reason}.*'xla'"):
        lower(attend_on_gpu, *decode_shapes(options.pop("num_pages", 8), **options))


@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_offsets_in_large_pools_have_64_bits(dtype):
    bits = {}
    limit = 2**32 // 2**16 // jnp.dtype(dtype).itemsize  # pages in 4 GiB
    for num_pages in (limit // 2, limit + 1):
        with lowered_for("NVIDIA H100"):
            decode, _ = triton_programs(
                attend_on_gpu, *decode_shapes(num_pages, dtype=dtype)
            )
        of_pages = {"bfloat16": "bf16", "int8": "i8"}[dtype]
        found = re.findall(
            rf"tt.addptr .*tensor<64x128x!tt.ptr<{of_pages}>>, tensor<64x128x(i\d+)>",
            decode,
        )
        assert len(found) == 2  # keys and values
        (bits[num_pages],) = set(found)
    assert [*bits.values()] == ["i32", "i64"]


@pytest.mark.parametrize("x64", (False, True))
def test_it_is_the_same_program_where_64_bits_are_enabled(x64):
    with lowered_for("NVIDIA H100"), jax.enable_x64(x64):
        decode, merge = triton_programs(attend_on_gpu, *decode_shapes(8))
    for program in (decode, merge):
        assert "xi64>" not in program and "xf64>" not in program


def test_loads_overlap_over_several_stages():
    with lowered_for("NVIDIA H100"):
        lowered = lower(attend_on_gpu, *decode_shapes(8))
        asked = lower(
            ft.partial(attend_on_gpu, config=config(num_stages=7)), *decode_shapes(8)
        )
    assert re.findall(r"num_stages = (\d+)", lowered)[0] == "5"
    assert re.findall(r"num_stages = (\d+)", asked)[0] == "7"


def test_the_config_of_another_kernel_is_refused(getkey, no_type_hook):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(3, 20))
    for implementation, wrong, words in (
        ("pallas_gpu", eqx_paged.TPUConfig(), "pallas_gpu.*TritonConfig.*TPUConfig"),
        ("pallas_tpu", config(), "pallas_tpu.*TPUConfig.*TritonConfig"),
        ("xla", config(), "xla.*no config.*TritonConfig"),
        (None, "junk", "None.*TPUConfig or a TritonConfig.*junk"),
    ):
        how = dict(config=wrong, interpret=implementation in ("pallas_gpu", "pallas_tpu"))
        with pytest.raises(ValueError, match=words):
            run("paged_attention", implementation, case.decode_args, **how)
    with lowered_for("NVIDIA H100"), pytest.raises(ValueError, match="TritonConfig.*TPU"):
        attend = ft.partial(eqx_paged.paged_attention, config=eqx_paged.TPUConfig())
        lower(attend, *shapes_of(*case.decode_args))


@pytest.mark.parametrize(
    "options",
    (
        dict(block_size=24),
        dict(block_size=8),
        dict(num_queries_per_block=48),
        dict(num_splits=-1),
        dict(num_warps=3),
        dict(num_stages=0),
        dict(num_warps=64),
        dict(block_size=2**11),
        dict(num_splits=2**31),
    ),
)
def test_what_is_no_config_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        config(**options)
