import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .. import oracle
from ..helpers import (
    assert_close,
    count_compilations,
    default_mask_value,
    every_implementation,
    head_values,
    ints,
    OPTIONS,
    ragged_case,
    rng_of,
    run,
)


def expected(case, mask_value=None, **options):
    if mask_value is None:
        mask_value = default_mask_value("ragged_gqa")
    parts = []
    for i, (start, length) in enumerate(zip(case.starts, case.lengths)):
        k, v = case.k[i, :length], case.v[i, :length]
        options_i = dict(options, start=int(start), mask_value=mask_value)
        parts.append(oracle.attention(case.q[i : i + 1], k, v, **options_i))
    return tuple(np.concatenate(x) for x in zip(*parts))


def check(
    case, implementation, *, name="ragged_gqa", args=None, block_size=None, **options
):
    sizes = {}
    if block_size is not None and implementation != "reference":  # which has no blocks
        sizes = dict(block_size=block_size)
    args = case.args if args is None else args
    actual = run(name, implementation, args, **sizes, **options)
    out, m, l = actual
    assert out.dtype == jnp.dtype(case.dtype)
    assert m.dtype == l.dtype == jnp.float32
    for x, wanted in zip(actual, expected(case, **options)):
        assert_close(x, wanted, case.dtype)


# (start, length): empty rows, whole rows, one position, windows at block edges.
WINDOWS = (
    *((0, 0), (5, 5), (9, 3), (0, 1), (6, 7), (0, 300), (299, 300), (0, 64)),
    *((63, 65), (64, 128), (65, 300), (1, 63), (255, 257), (256, 300)),
)


@every_implementation
@pytest.mark.parametrize("block_size", (None, 8, 64, 1000))
def test_windows_at_the_edges_of_a_block(getkey, implementation, block_size):
    case = ragged_case(getkey(), windows=WINDOWS, size=300)
    check(case, implementation, block_size=block_size)


@every_implementation
def test_starts_below_zero_are_the_buffers_beginning(getkey, implementation):
    case = ragged_case(getkey(), windows=((0, 20), (0, 0), (0, 9), (0, 1)), size=20)
    args = (*case.args[:-1], ints((-1, -(2**31), -300, -7)))
    for x, wanted in zip(run("ragged_gqa", implementation, args), expected(case)):
        assert_close(x, wanted)


@every_implementation
@pytest.mark.parametrize("size", (1, 7, 257, 3000))
def test_buffer_sizes(getkey, implementation, size):
    windows = ((0, size), (size // 2, size), (0, size // 2), (0, 0), (size - 1, size))
    case = ragged_case(getkey(), windows=windows, size=size, num_heads=2)
    check(case, implementation)


def test_many_rows_and_heads_are_read_a_few_positions_at_a_time(getkey):
    # So many numbers a position that XLA's blocks are the smallest, of 16 positions.
    edges = (0, 1, 16, 17, 33, 50)
    windows = [(start, end) for start in edges for end in edges if start <= end]
    case = ragged_case(
        getkey(), windows=windows, size=50, num_heads=8, num_kv_heads=4, head_dim=256
    )
    assert 16 * len(windows) * 4 * 256 > 2**18
    check(case, "xla")


@every_implementation
@pytest.mark.parametrize("group, num_kv_heads", ((1, 3), (3, 2), (4, 1), (7, 2), (8, 2)))
def test_head_ratios(getkey, implementation, group, num_kv_heads):
    case = ragged_case(
        getkey(),
        windows=((0, 17), (3, 3), (2, 40)),
        size=40,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
    )
    check(case, implementation, block_size=16)


@every_implementation
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
def test_head_sizes(getkey, implementation, head_dim, dtype):
    case = ragged_case(
        getkey(),
        windows=((0, 17), (3, 3), (2, 40)),
        size=40,
        head_dim=head_dim,
        dtype=dtype,
    )
    check(case, implementation, block_size=16)


@every_implementation
@pytest.mark.parametrize("options", [n for n in OPTIONS if not n.startswith("residuals")])
def test_options(getkey, implementation, options):
    options = OPTIONS[options](6, 2)
    case = ragged_case(
        getkey(),
        windows=((0, 0), (0, 1), (3, 11), (0, 11), (0, 12), (35, 40), (20, 40), (0, 40)),
        size=40,
        num_heads=6,
        sliding_window=options.get("sliding_window"),
    )
    check(case, implementation, block_size=8, **options)


@every_implementation
@pytest.mark.parametrize("sliding_window", (1, 8, 9, 1000))
def test_window_boundaries(getkey, implementation, sliding_window):
    windows = (*((0, n) for n in range(20)), *((n, 20) for n in range(20)))
    case = ragged_case(
        getkey(), windows=windows, size=24, num_heads=2, sliding_window=sliding_window
    )
    check(case, implementation, block_size=8, sliding_window=sliding_window)


@every_implementation
def test_mha_is_gqa_with_as_many_kv_heads_as_heads(getkey, implementation):
    case = ragged_case(getkey(), windows=WINDOWS, size=300, num_kv_heads=4)
    check(case, implementation, name="ragged_mha")
    check(case, implementation, name="ragged_mha", soft_cap=2.0, sinks=head_values(4))


@every_implementation
def test_mqa_is_gqa_with_one_kv_head(getkey, implementation):
    case = ragged_case(getkey(), windows=WINDOWS, size=300, num_kv_heads=1)
    args = (case.q, case.k[:, :, 0], case.v[:, :, 0], case.lengths, case.starts)
    check(case, implementation, name="ragged_mqa", args=args)
    check(case, implementation, name="ragged_mqa", args=args, k_scale=0.5, soft_cap=2.0)


@every_implementation
def test_merged_halves_equal_the_whole(getkey, implementation):
    import eqx_paged

    case = ragged_case(getkey(), windows=((0, 90), (3, 40), (50, 90), (7, 7)), size=90)
    cut = 45
    q, k, v, lengths, starts = case.args
    parts = [
        run("ragged_gqa", implementation, (q, k, v, jnp.minimum(lengths, cut), starts)),
        run("ragged_gqa", implementation, (q, k, v, lengths, jnp.maximum(starts, cut))),
    ]
    merged = eqx_paged.merge_residuals(*zip(*parts))
    for actual, wanted in zip(merged, expected(case)):
        assert_close(actual, wanted)


def test_changing_windows_compiles_nothing(getkey):
    import eqx_paged

    a = ragged_case(getkey(), windows=((0, 3), (5, 40)), size=40)
    b = ragged_case(getkey(), windows=((9, 33), (0, 0)), size=40)
    jax.block_until_ready(eqx_paged.ragged_gqa(*a.args))
    with count_compilations() as compilations:
        jax.block_until_ready(eqx_paged.ragged_gqa(*b.args))
    assert not compilations


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_options_on_random_shapes(getkey, seed):
    del seed  # in the test's id, and so in its key
    rng = rng_of(getkey())
    group, num_kv_heads = int(rng.choice((1, 3, 4))), int(rng.choice((1, 2, 5)))
    size = int(rng.integers(1, 200))
    names = [n for n in OPTIONS if not n.startswith("residuals")]
    options = OPTIONS[rng.choice(names)](group * num_kv_heads, num_kv_heads)
    if "sliding_window" in options:
        options["sliding_window"] = int(rng.integers(1, size + 3))
    windows = rng.integers(0, size + 1, (6, 2)).tolist()
    case = ragged_case(
        getkey(),
        windows=windows,
        size=size,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        dtype=str(rng.choice(("float32", "bfloat16"))),
        sliding_window=options.get("sliding_window"),
    )
    check(case, "xla", block_size=int(rng.choice((8, 32, 256))), **options)
