import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import check_paged, head_values, OPTIONS, paged_case, quick_jit
from ..triton import lower, lowered_for, triton_programs


slow = pytest.mark.slow

# Tiles and blocks so small that rows have several of them.
SMALL = dict(block_size=16, num_queries_per_block=32, num_splits=3)


def check(case, *, blocks=SMALL, **options):
    import eqx_paged

    how = dict(interpret=True, config=blocks and eqx_paged.TritonConfig(**blocks))
    check_paged("ragged_paged_attention", case, "pallas_gpu", how=how, **options)


# Prompts, chunks, drafted tokens and rows of one token, around the edges of pages, blocks
# and tiles; rows without queries, rows that do not exist, and padding.
MIXED = dict(
    kv_lens=(1, 30, 8, 0, 9, 90, 40, 64, 33, 700),
    q_lens=(1, 30, 0, 0, 2, 1, 20, 33, 33, 1),
    num_tokens=130,
    capacity=12,
)


@pytest.mark.parametrize(
    "page_size, storage, group",
    (
        (8, "u16-rows", 4),
        pytest.param(128, "f32-padded", 16, marks=slow),
        pytest.param(16, "f32", 1, marks=slow),
        pytest.param(16, "bf16-rows", 3, marks=slow),
        pytest.param(32, "f32-rows", 7, marks=slow),
        pytest.param(64, "u16", 8, marks=slow),
    ),
)
def test_mixed_batches(getkey, page_size, storage, group):
    case = paged_case(
        getkey(),
        **MIXED,
        num_heads=2 * group,
        head_dim=80 if storage.endswith("padded") else 64,
        page_size=page_size,
        storage=storage,
    )
    check(case, return_residuals=True)


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim, storage",
    (
        pytest.param(4, 2, 96, "bf16", marks=slow),
        pytest.param(4, 2, 80, "f32", marks=slow),
        pytest.param(2, 2, 256, "u16", marks=slow),
        pytest.param(4, 2, 128, "bf16", marks=slow),
        # More heads a kv head than rows of a tile.
        pytest.param(40, 1, 64, "f32", marks=slow),
    ),
)
def test_shapes_of_heads(getkey, num_heads, num_kv_heads, head_dim, storage):
    case = paged_case(
        getkey(),
        **MIXED,
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
        **MIXED,
        num_heads=6,
        page_size=8,
        storage="f32-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, **options)


# So long that tiles have blocks that all of their tokens see, between others.
@pytest.mark.parametrize("sliding_window", (100, pytest.param(64, marks=slow)))
def test_windows_of_several_blocks(getkey, sliding_window):
    case = paged_case(
        getkey(),
        kv_lens=(300, 170, 64, 90),
        q_lens=(70, 170, 64, 1),
        num_tokens=310,
        num_heads=2,
        sliding_window=sliding_window,
    )
    check(case, sliding_window=sliding_window)


@slow
def test_what_is_chosen_without_a_config(getkey):
    case = paged_case(
        getkey(),
        kv_lens=(300, 1, 700, 150),
        q_lens=(300, 1, 1, 40),
        num_tokens=350,
        storage="bf16",
        head_dim=128,
    )
    check(case, blocks=None)


@slow
@pytest.mark.parametrize("num_tokens", (1, 2))
def test_hardly_any_tokens(getkey, num_tokens):
    check(paged_case(getkey(), kv_lens=(5, 0), q_lens=(1, 0), num_tokens=num_tokens))


@slow
def test_all_rows_empty(getkey):
    check(paged_case(getkey(), kv_lens=(3, 0), q_lens=(0, 0), num_tokens=9))


@slow
@pytest.mark.parametrize("dtype", ("int8", "float8_e4m3fn"))
def test_eight_bits_a_number(getkey, dtype):
    import eqx_paged

    case = paged_case(
        getkey(), kv_lens=(40, 1, 130), q_lens=(40, 1, 9), num_tokens=60, page_size=32
    )
    scales = dict(k_scale=jnp.asarray(head_values(2)) / 32, v_scale=1 / 32)
    pages = [
        jnp.where(jnp.isnan(x), 99 if dtype == "int8" else jnp.nan, 32 * x).astype(dtype)
        for x in (case.k_pages, case.v_pages)
    ]
    q, _, _, *rest = case.mixed_args
    attend = ft.partial(eqx_paged.ragged_paged_attention, **scales)
    small = eqx_paged.TritonConfig(**SMALL)
    out = quick_jit(
        ft.partial(attend, implementation="pallas_gpu", interpret=True, config=small)
    )(q.astype(jnp.bfloat16), *pages, *rest)
    exact = attend(
        q.astype(jnp.bfloat16).astype(jnp.float32), *pages, *rest, implementation="xla"
    )
    # What differs is the rounding of queries, probabilities and the result to bfloat16.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=1e-2)


# --- Lowered, without a GPU


def mixed_shapes(*, num_pages=8, num_tokens=1024, group=4, head_dim=128):
    pages = jax.ShapeDtypeStruct((num_pages, 8, 64, head_dim), jnp.bfloat16)
    ints = ft.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return (
        jax.ShapeDtypeStruct((num_tokens, 8 * group, head_dim), jnp.bfloat16),
        *(pages, pages, ints((5,)), ints((5, 16)), ints((6,)), ints(())),
    )


def test_an_nvidia_gpu_gets_the_triton_kernels_and_others_xla():
    import eqx_paged

    for kind, platform, expected in (
        ("NVIDIA H100 80GB HBM3", "cuda", True),
        ("Tesla T4", "cuda", False),
        ("AMD Instinct MI300X", "rocm", False),
    ):
        with lowered_for(kind):
            lowered = lower(
                eqx_paged.ragged_paged_attention, *mixed_shapes(), platform=platform
            )
        assert ("xla.gpu.triton" in lowered) == expected, kind


def test_offsets_in_large_pools_have_64_bits():
    import eqx_paged

    attend = ft.partial(eqx_paged.ragged_paged_attention, implementation="pallas_gpu")
    for num_pages, bits in ((2**15, "i32"), (2**15 + 1, "i64")):
        with lowered_for("NVIDIA H100"):
            programs = triton_programs(attend, *mixed_shapes(num_pages=num_pages))
        (prefill,) = (x for x in programs if "ragged_paged_attention" in x)
        found = re.findall(
            r"tt.addptr .*tensor<64x128x!tt.ptr<bf16>>, tensor<64x128x(i\d+)>", prefill
        )
        assert len(found) == 4 and set(found) == {bits}  # in blocks with and without masks


@pytest.mark.parametrize("group", (1, 3, 4, 7, 8, 16, 71))
def test_a_tile_is_full_of_queries(group):
    from eqx_paged.kernels._gpu import TritonConfig
    from eqx_paged.kernels._triton import tile_of
    from eqx_paged.kernels.ragged_paged_attention import pallas_triton

    q, k_pages = (
        jnp.zeros(x.shape, x.dtype) for x in mixed_shapes(group=group, num_tokens=64)[:2]
    )
    rows = pallas_triton.max_rows_of(q, 8)
    tile = tile_of(q, k_pages, TritonConfig(), max_rows=rows, one_token=False)
    assert tile.tokens * tile.heads > tile.rows - tile.heads
    assert tile.groups * tile.heads >= 8 * group
