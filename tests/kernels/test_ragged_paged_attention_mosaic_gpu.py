import jax
import jax.numpy as jnp
import pytest

from ..helpers import check_paged, OPTIONS, paged_case
from ..mosaic_gpu import how, kernels_in, mosaic_config, needs_interpreter
from ..triton import lowered_for


pytestmark = needs_interpreter
slow = pytest.mark.slow
# Each option at least once: a case takes seconds to interpret.
DISTINCT = ("plain", "everything", "window", "sinks", "residuals, window, soft cap, scales")


def check(case, *, blocks=(), **options):
    # Rows of one token in a part each.
    check_paged(
        "ragged_paged_attention",
        case,
        "pallas_gpu",
        how=how(num_splits=0, **dict(blocks)),
        **options,
    )


def test_rows_of_several_tokens_one_token_and_padding(getkey):
    # The longer row's tiles: a full one of 64 tokens, and one of 6.
    case = paged_case(
        getkey(),
        kv_lens=(80, 5),
        q_lens=(70, 1),
        num_tokens=75,
        capacity=3,
        num_heads=2,
        num_kv_heads=1,
        storage="bf16",
    )
    check(case, return_residuals=True)


def test_a_sink_that_counts_for_nothing_and_padding(getkey):
    case = paged_case(
        getkey(),
        kv_lens=(9,),
        q_lens=(9,),
        num_tokens=12,
        num_heads=2,
        num_kv_heads=1,
        storage="bf16",
    )
    check(case, sinks=jnp.asarray([-jnp.inf, 0], jnp.float32))


@slow
@pytest.mark.parametrize("page_size", (8, 128))
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", ((3, 3, 128), (3, 1, 256)))
def test_shapes(getkey, num_heads, num_kv_heads, head_dim, page_size):
    case = paged_case(
        getkey(),
        kv_lens=(150, 9),
        q_lens=(130, 9),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        storage="bf16",
    )
    check(case)


@slow
@pytest.mark.parametrize("group", (5, 8, 10))
def test_tiles_of_a_group(getkey, group):
    case = paged_case(
        getkey(),
        kv_lens=(40, 9),
        q_lens=(40, 9),
        num_heads=group,
        num_kv_heads=1,
        storage="bf16-rows",
    )
    check(case, return_residuals=True)


@slow
def test_fewer_tokens_than_a_tile(getkey):
    case = paged_case(getkey(), kv_lens=(4, 3), q_lens=(4, 3), storage="bf16")
    check(case, return_residuals=True)


@slow
@pytest.mark.parametrize("name", DISTINCT)
def test_options(getkey, name):
    options = OPTIONS[name](4, 2)
    case = paged_case(
        getkey(),
        kv_lens=(0, 50, 200, 1),
        q_lens=(0, 9, 40, 1),
        storage="bf16-rows",
        sliding_window=options.get("sliding_window"),
    )
    check(case, **options)


# Blocks that a window begins in, that all of a tile sees, and that it ends in.
@slow
def test_a_window_of_several_blocks(getkey):
    case = paged_case(
        getkey(),
        kv_lens=(700,),
        q_lens=(70,),
        num_heads=2,
        num_kv_heads=1,
        page_size=8,
        storage="bf16",
        sliding_window=300,
    )
    check(case, blocks=dict(block_size=64, num_stages=3), sliding_window=300)


def test_a_config_runs_it_and_the_decode_kernel_on_hopper():
    import eqx_paged

    pages = jax.ShapeDtypeStruct((8, 1, 64, 128), jnp.uint16)
    with lowered_for("NVIDIA H100"):
        kernels = kernels_in(
            lambda *args: eqx_paged.ragged_paged_attention(
                *args, implementation="pallas_gpu", config=mosaic_config()
            ),
            jax.ShapeDtypeStruct((40, 4, 128), jnp.bfloat16),
            *(pages, pages),
            jax.ShapeDtypeStruct((4,), jnp.int32),
            jax.ShapeDtypeStruct((4, 16), jnp.int32),
            jax.ShapeDtypeStruct((5,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
    assert len(kernels) == 2
