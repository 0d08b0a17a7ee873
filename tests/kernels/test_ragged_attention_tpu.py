"""The TPU kernel: its numbers and races as interpreted, and that it compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ..helpers import assert_close, head_values, large_moves, OPTIONS, ragged_case, run
from ..tpu import both_dma_modes, compile_for, copies_in, needs_libtpu, races_of, TOPOLOGIES
from .test_ragged_attention import expected, WINDOWS


def check(case, *, interpret=True, block_size=64, config=None, **options):
    from eqx_paged.kernels._tpu import TPUConfig

    actual = run(
        "ragged_gqa",
        "pallas_tpu",
        case.args,
        interpret=interpret,
        block_size=block_size,
        config=TPUConfig(**(config or {})),
        **options,
    )
    assert actual[0].dtype == jnp.dtype(case.dtype)
    for x, wanted in zip(actual, expected(case, **options)):
        assert_close(x, wanted, case.dtype)


# --- Numbers

# (heads, kv heads, head_dim): heads of a token side by side, a part of a tile of them,
# several tiles; and the tokens of a head side by side, with one and with several heads.
HEADS = ((8, 8, 128), (6, 3, 128), (4, 2, 256), (24, 24, 128), (3, 1, 128))


@pytest.mark.parametrize(
    "heads",
    (*HEADS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in HEADS[2:])),
)
def test_windows_at_the_edges_of_a_block(getkey, heads):
    num_heads, num_kv_heads, head_dim = heads
    case = ragged_case(
        getkey(),
        windows=WINDOWS,
        size=304,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    check(case)


@pytest.mark.parametrize(
    "size, block_size",
    (
        (7, 1000),
        (300, 8),
        *(pytest.param(300, n, marks=pytest.mark.slow) for n in (64, 100, 1000)),
    ),
)
def test_block_and_buffer_sizes(getkey, size, block_size):
    windows = ((0, size), (size // 2, size), (0, size // 2), (0, 0), (size - 1, size))
    case = ragged_case(getkey(), windows=windows, size=size, head_dim=128)
    check(case, block_size=block_size)


@pytest.mark.parametrize(
    "config",
    (
        dict(megacore_mode="batch", inline_seq_dim=False, pages_per_compute_block=2),
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (
                dict(pages_per_compute_block=1),
                dict(inline_seq_dim=False),
                dict(megacore_mode="batch"),
            )
        ),
    ),
    ids=str,
)
def test_every_division_of_the_work_is_the_same(getkey, config):
    windows = ((0, 0), (5, 300), (9, 3), (0, 70), (299, 300), (0, 0), (64, 128))
    case = ragged_case(getkey(), windows=windows, size=300, head_dim=128)
    check(case, config=config)


def test_no_row_sees_anything(getkey):
    case = ragged_case(getkey(), windows=((0, 0), (4, 3)), size=20, head_dim=128)
    check(case)


@pytest.mark.parametrize(
    "name",
    [
        n if n == "everything" else pytest.param(n, marks=slow)
        for slow in (pytest.mark.slow,)
        for n in OPTIONS
        if not n.startswith("residuals")
    ],
)
def test_options(getkey, name):
    options = OPTIONS[name](6, 2)
    case = ragged_case(
        getkey(),
        windows=((0, 0), (0, 1), (3, 11), (0, 11), (0, 12), (35, 40), (20, 40), (0, 130)),
        size=130,
        num_heads=6,
        head_dim=128,
        sliding_window=options.get("sliding_window"),
    )
    check(case, **options)


@pytest.mark.parametrize("num_kv_heads", (8, pytest.param(1, marks=pytest.mark.slow)))
def test_bfloat16(getkey, num_kv_heads):
    case = ragged_case(
        getkey(),
        windows=((0, 0), (0, 1), (3, 300), (250, 304)),
        size=304,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        dtype="bfloat16",
    )
    check(case)


@pytest.mark.parametrize(
    "num_kv_heads, dtype",
    (
        (3, "int8"),
        pytest.param(8, "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param(8, "int8", marks=pytest.mark.slow),
        pytest.param(1, "float8_e4m3fn", marks=pytest.mark.slow),
    ),
)
def test_eight_bits_a_number(getkey, num_kv_heads, dtype):
    case = ragged_case(
        getkey(),
        windows=((0, 0), (0, 1), (31, 200), (130, 320)),
        size=320,
        num_heads=2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        dtype="bfloat16",
    )
    # Stored as twentieths; what is outside the windows as some number.
    stored = [jnp.nan_to_num(20 * x, nan=99).astype(dtype) for x in (case.k, case.v)]
    scales = dict(k_scale=head_values(num_kv_heads) / 20, v_scale=jnp.float32(1 / 20))
    args = (case.q, *stored, case.lengths, case.starts)
    out = run("ragged_gqa", "pallas_tpu", args, interpret=True, **scales)
    assert out[0].dtype == jnp.bfloat16
    exact = dataclasses.replace(case, k=stored[0], v=stored[1])
    for x, wanted in zip(out, expected(exact, **scales)):
        assert_close(x, wanted, "bfloat16")


def test_bits_and_queries_of_another_dtype(getkey):
    windows = ((0, 130), (3, 40))
    case = ragged_case(getkey(), windows=windows, size=130, head_dim=128, dtype="bfloat16")
    q, k, v, *rows = case.args
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (k, v))
    out = run("ragged_gqa", "pallas_tpu", (q, *bits, *rows), interpret=True)
    for x, wanted in zip(out, expected(case)):
        assert_close(x, wanted, "bfloat16")
    args = (q.astype(jnp.float32), k, v, *rows)
    out = run("ragged_gqa", "pallas_tpu", args, interpret=True)
    for x, wanted in zip(out, expected(case)):
        assert_close(x, wanted, "float32")


def test_starts_below_zero_are_the_buffers_beginning(getkey):
    case = ragged_case(getkey(), windows=((0, 20), (0, 0), (0, 9)), size=20, head_dim=128)
    starts = jnp.asarray((-1, -(2**31), -300), jnp.int32)
    out = run("ragged_gqa", "pallas_tpu", (*case.args[:-1], starts), interpret=True)
    for x, wanted in zip(out, expected(case)):
        assert_close(x, wanted)


@pytest.mark.parametrize("name", ("ragged_mha", "ragged_mqa"))
def test_the_other_functions(getkey, name):
    num_kv_heads = 4 if name == "ragged_mha" else 1
    case = ragged_case(
        getkey(),
        windows=((0, 48), (7, 30)),
        size=48,
        num_kv_heads=num_kv_heads,
        head_dim=128,
    )
    args = list(case.args)
    if name == "ragged_mqa":
        args[1:3] = (x[:, :, 0] for x in args[1:3])
    options = dict(sinks=head_values(4), interpret=True)
    wanted = expected(case, sinks=head_values(4))
    for x, y in zip(run(name, "pallas_tpu", args, **options), wanted):
        assert_close(x, y)


# --- What it cannot do


@pytest.mark.parametrize(
    "shape, word",
    (
        (dict(head_dim=64, size=32), "head_dim"),
        (dict(head_dim=128, size=33, num_kv_heads=1), "max_len"),
        (dict(head_dim=128, size=32, dtype="float16"), "float16"),
    ),
    ids=str,
)
def test_what_cannot_run_is_refused_with_the_reason(getkey, shape, word):
    case = ragged_case(getkey(), windows=((0, 3),), **shape)
    with pytest.raises(NotImplementedError, match=word):
        run("ragged_gqa", "pallas_tpu", case.args, interpret=True)


def test_a_gradient_is_refused(getkey):
    case = ragged_case(getkey(), windows=((0, 3),), size=32, head_dim=128)

    def loss(q):
        out = run("ragged_gqa", "pallas_tpu", (q, *case.args[1:]), interpret=True)
        return jnp.sum(out[0])

    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        jax.grad(loss)(case.q)


# --- What it reads, and when


@both_dma_modes
@pytest.mark.parametrize(
    "num_kv_heads, inline_seq_dim",
    (
        (1, False),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((1, True), (2, True), (2, False))
        ),
    ),
)
def test_no_access_races(getkey, dma_execution_mode, num_kv_heads, inline_seq_dim):
    windows = ((0, 0), (3, 40), (0, 0), (0, 256), (140, 160), (5, 256))
    case = ragged_case(
        getkey(),
        windows=windows,
        size=256,
        num_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=128,
    )
    config = dict(inline_seq_dim=inline_seq_dim, pages_per_compute_block=1)
    _, found = races_of(
        lambda mode: check(case, interpret=mode, config=config), dma_execution_mode
    )
    assert not found


def test_a_wait_that_is_left_out_is_found(getkey, fresh_traces, monkeypatch):
    from jax._src.pallas.mosaic.primitives import AsyncCopyDescriptor

    monkeypatch.setattr(AsyncCopyDescriptor, "wait", lambda copy: None)
    case = ragged_case(
        getkey(), windows=((3, 40),), size=64, num_heads=2, num_kv_heads=1, head_dim=128
    )
    _, found = races_of(
        lambda mode: run("ragged_gqa", "pallas_tpu", case.args, interpret=mode), "eager"
    )
    assert found


def test_blocks_outside_the_windows_are_not_fetched(getkey, fresh_traces, monkeypatch):
    windows = ((0, 0), (300, 301), (64, 192), (9, 3), (0, 65))
    case = ragged_case(getkey(), windows=windows, size=512, head_dim=128)
    blocks = dict(pages_per_compute_block=2)
    found = copies_in(lambda mode: check(case, interpret=mode, config=blocks), monkeypatch)
    # Of 64 positions from a window's start: none, 1, 2, none, 2; each of K and V.
    assert found == 2 * (1 + 2 + 2)


# --- Ahead of time, for every TPU


def compiled_for(generation, num_heads, num_kv_heads, head_dim, dtype):
    import eqx_paged

    q_dtype = jnp.float32 if dtype == "float32" else jnp.bfloat16
    q = jax.ShapeDtypeStruct((4, num_heads, head_dim), q_dtype)
    kv = jax.ShapeDtypeStruct((4, 4096, num_kv_heads, head_dim), dtype)
    rows = jax.ShapeDtypeStruct((4,), jnp.int32)
    return compile_for(generation, eqx_paged.ragged_gqa, (q, kv, kv, rows, rows)), kv


ALL_HEADS = (
    *((32, 8, 128), (8, 4, 256), (9, 3, 128), (32, 32, 128), (4, 1, 128), (4, 2, 128)),
)


@needs_libtpu
@pytest.mark.parametrize(
    "name, heads, dtype",
    [
        (name, heads, dtype)
        if (name, heads, dtype) == ("v6e", (4, 1, 128), "bfloat16")
        else pytest.param(name, heads, dtype, marks=pytest.mark.slow)
        for name in TOPOLOGIES
        for heads in ALL_HEADS
        for dtype in ("bfloat16", "float32", "int8", "float8_e4m3fn")
    ],
)
def test_it_compiles_and_copies_nothing(name, heads, dtype):
    compiled, kv = compiled_for(name, *heads, dtype)
    assert "tpu_custom_call" in compiled.as_text()
    num_bytes = kv.size * kv.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < num_bytes // 4
    assert not large_moves(compiled, num_bytes // 4)


@needs_libtpu
def test_other_sizes_of_heads_are_left_to_xla():
    compiled, _ = compiled_for("v6e", 9, 3, 64, "bfloat16")
    assert "tpu_custom_call" not in compiled.as_text()
