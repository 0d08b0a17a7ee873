"""The TPU kernel: interpreted, its copies checked for races, and compiled for every TPU."""

import functools as ft
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import large_moves, normal, quick_jit, rng_of
from ..tpu import both_dma_modes, compile_for, needs_libtpu, races_of, TOPOLOGIES


def stored_shape(form, *, num_pages, num_kv_heads, page_size, head_dim):
    lanes = {"plain": head_dim, "rows": 128, "padded": -(-head_dim // 128) * 128}[form]
    tokens = 128 // head_dim if form == "rows" else 1
    return num_pages, num_kv_heads, page_size // tokens, lanes


def poisoned_pool(rng, shape, dtype):
    """As it is stored; a third of the numbers are NaN."""
    pool = normal(rng, shape, "bfloat16" if dtype == "uint16" else dtype)
    pool[rng.random(shape) < 0.3] = np.nan
    return pool.view(np.uint16) if dtype == "uint16" else pool


def expected(pool, values, slots, page_size):
    num_pages, num_kv_heads, _, _ = pool.shape
    tokens = pool.reshape(num_pages, num_kv_heads, page_size, -1).copy()
    for value, slot in zip(values, slots):
        if slot < num_pages * page_size:
            token = np.zeros(tokens.shape[1::2], pool.dtype)
            token[:, : value.shape[1]] = value.view(pool.dtype)
            tokens[slot // page_size, :, slot % page_size] = token
    return tokens.reshape(pool.shape)


def write(**options):
    import eqx_paged

    return quick_jit(ft.partial(eqx_paged.write_kv, implementation="pallas_tpu", **options))


def check(
    rng, function, all_slots, *, form, dtype, num_pages, num_kv_heads, page_size, head_dim
):
    """A function against slots of one number, with new numbers each time."""
    shape = stored_shape(
        form,
        num_pages=num_pages,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        head_dim=head_dim,
    )
    for slots in all_slots:
        pools = [poisoned_pool(rng, shape, dtype) for _ in range(2)]
        shape_of_new = (len(slots), num_kv_heads, head_dim)
        value_dtype = "bfloat16" if dtype == "uint16" else dtype
        new = [normal(rng, shape_of_new, value_dtype) for _ in range(2)]
        results = function(*map(jnp.asarray, (*pools, *new, np.asarray(slots, np.int32))))
        for result, pool, values in zip(results, pools, new):
            wanted = expected(pool, values, slots, page_size)
            assert result.dtype == wanted.dtype and result.shape == wanted.shape
            assert np.asarray(result).tobytes() == wanted.tobytes()


def patterns(rng, *, num_tokens, num_pages, page_size):
    """Slots of every kind that a tile can meet, all of one number."""
    end = num_pages * page_size

    def filled(slots):
        padding = rng.choice([end, end + 1, 2**31 - 1], num_tokens)
        return np.concatenate([slots, padding])[:num_tokens].astype(np.int64)

    whole = np.arange(page_size, page_size + num_tokens)
    scattered = rng.permutation(end)[:num_tokens]
    last = np.arange(max(end - num_tokens, 0), end)
    return {
        "a decode step": filled(
            rng.permutation(num_pages) * page_size + rng.integers(page_size, size=num_pages)
        ),
        "whole tiles": filled(whole),
        "a run that begins and ends within a tile": filled(whole[:-1] + 3),
        "two runs, padding between them": np.where(
            np.arange(num_tokens) % 16 == 7, end, filled(last)
        ),
        "backwards": filled(last[::-1]),
        "every other token": filled(np.arange(0, end, 2)),
        "neighbours from apart": filled(whole).reshape(2, -1).T.reshape(-1),
        "scattered": filled(scattered),
        "scattered and padding": np.where(
            rng.random(num_tokens) < 0.5, filled(np.zeros(0)), filled(scattered)
        ),
        "only padding": filled(np.zeros(0)),
        "one token": filled(np.array([end - 1])),
    }


STORED = [
    ("rows", "bfloat16", 64, 2, 16),
    ("padded", "uint16", 80, 2, 16),
]
STORED_SLOW = [
    ("plain", "float32", 256, 1, 16),
    *(("plain", "float32", 128, 1, 16), ("plain", "bfloat16", 128, 2, 16)),
    *(("plain", "uint16", 128, 8, 128), ("plain", "bfloat16", 256, 2, 8)),
    *(("plain", "float32", 256, 2, 16), ("rows", "float32", 64, 1, 32)),
    *(("rows", "uint16", 16, 2, 64), ("padded", "float32", 48, 1, 8)),
    *(("padded", "bfloat16", 160, 3, 16), ("rows", "float32", 32, 8, 256)),
]


@pytest.mark.parametrize(
    "form, dtype, head_dim, num_kv_heads, page_size",
    [*STORED, *(pytest.param(*x, marks=pytest.mark.slow) for x in STORED_SLOW)],
)
def test_tokens_land_in_their_slots_and_nothing_else_changes(
    getkey, form, dtype, head_dim, num_kv_heads, page_size
):
    rng = rng_of(getkey())
    sizes = dict(num_pages=9, page_size=page_size)
    check(
        rng,
        write(interpret=True),
        patterns(rng, num_tokens=40, **sizes).values(),
        form=form,
        dtype=dtype,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **sizes,
    )


@pytest.mark.parametrize(
    "num_tokens",
    (1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 7, 8, 9, 15, 17, 33))),
)
def test_any_number_of_tokens(getkey, num_tokens):
    rng = rng_of(getkey())
    all_slots = [rng.permutation(np.arange(50))[:num_tokens] for _ in range(5)]
    check(
        rng,
        write(interpret=True),
        [*all_slots, np.arange(5, 5 + num_tokens)],
        form="plain",
        dtype="bfloat16",
        num_pages=3,
        num_kv_heads=1,
        page_size=16,
        head_dim=128,
    )


# A ring of two places, so that each is used again and again; and of all that is needed.
@pytest.mark.parametrize(
    "tiles_of_ring", (2, *(pytest.param(x, marks=pytest.mark.slow) for x in (6, None)))
)
@both_dma_modes
def test_no_copies_race(
    getkey, fresh_traces, monkeypatch, dma_execution_mode, tiles_of_ring
):
    rng = rng_of(getkey())
    sizes = dict(num_pages=5 + (tiles_of_ring or 0), page_size=8)
    if tiles_of_ring is not None:
        kernel = importlib.import_module("eqx_paged.kernels.write_kv.pallas_tpu")
        tile_bytes = 2 * 8 * 128 * 4
        monkeypatch.setattr(kernel, "RING_BYTES", tiles_of_ring * tile_bytes)

    def call(mode):
        check(
            rng,
            write(interpret=mode),
            patterns(rng, num_tokens=24, **sizes).values(),
            form="plain",
            dtype="float32",
            num_kv_heads=1,
            head_dim=128,
            **sizes,
        )

    assert not races_of(call, dma_execution_mode)[1]


def test_a_wait_that_is_left_out_is_found(getkey, fresh_traces, monkeypatch):
    rng = rng_of(getkey())
    kernel = importlib.import_module("eqx_paged.kernels.write_kv.pallas_tpu")
    monkeypatch.setattr(kernel, "wait_for", lambda *args: None)
    pages = [jnp.asarray(normal(rng, (2, 1, 8, 128))) for _ in range(2)]
    new = [jnp.asarray(normal(rng, (3, 1, 128))) for _ in range(2)]
    slots = jnp.asarray((0, 5, 9), jnp.int32)
    _, found = races_of(lambda mode: write(interpret=mode)(*pages, *new, slots), "eager")
    assert found


def test_more_tokens_than_the_scalar_memory_holds_are_written_in_parts(
    getkey, fresh_traces, monkeypatch
):
    rng = rng_of(getkey())
    kernel = importlib.import_module("eqx_paged.kernels.write_kv.pallas_tpu")
    monkeypatch.setattr(kernel, "SMEM_BYTES", 4 * kernel.WORK_BYTES * 16)
    sizes = dict(num_pages=4, page_size=16)
    check(
        rng,
        write(interpret=True),
        patterns(rng, num_tokens=24, **sizes).values(),
        form="plain",
        dtype="float32",
        num_kv_heads=1,
        head_dim=128,
        **sizes,
    )


def test_the_number_of_tiles_of_a_batch_can_be_chosen(getkey):
    from eqx_paged import TPUConfig

    rng = rng_of(getkey())
    sizes = dict(num_pages=4, page_size=16)
    config = TPUConfig(pages_per_compute_block=3)
    check(
        rng,
        write(interpret=True, config=config),
        patterns(rng, num_tokens=22, **sizes).values(),
        form="plain",
        dtype="float32",
        num_kv_heads=1,
        head_dim=128,
        **sizes,
    )
    config = TPUConfig(pages_per_compute_block=2**20)
    pages, k = jnp.zeros((4, 1, 16, 128)), jnp.zeros((1, 1, 128))
    with pytest.raises(ValueError, match=str(2**20)):
        write(interpret=True, config=config)(pages, pages, k, k, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize(
    "k_shape, head_dim, dtypes, words",
    [
        ((4, 1, 16, 64), 64, ("float32", "float32"), "64"),
        ((4, 1, 16, 128), 128, ("float32", "bfloat16"), "bfloat16"),
        ((4, 1, 16, 128), 128, ("float8_e4m3fn", "float8_e4m3fn"), "float8"),
        ((4, 1, 4, 128), 64, ("float32", "float32"), "4"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(k_shape, head_dim, dtypes, words):
    pools = [jnp.zeros(k_shape, dtype) for dtype in dtypes]
    k, slots = jnp.zeros((1, 1, head_dim)), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=f"(?s)(?=.*{words})(?=.*'xla')"):
        write(interpret=True)(*pools, k, k, slots)


def test_a_gradient_through_it_is_refused():
    pages, k = jnp.zeros((4, 1, 16, 128)), jnp.zeros((1, 1, 128))
    slots = jnp.zeros(1, jnp.int32)

    def loss(k):
        return jnp.sum(write(interpret=True)(pages, pages, k, k, slots)[0])

    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(loss)(k)


def compile_write(
    generation, *, form, dtype, head_dim, num_kv_heads, page_size, num_tokens
):
    import eqx_paged

    shape = stored_shape(
        form,
        num_pages=8192 // page_size,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        head_dim=head_dim,
    )
    pool = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    new = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, head_dim), jnp.dtype(dtype))
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    args = (pool, pool, new, new, slots)
    # Chosen by the platform, as a cache does it.
    return compile_for(generation, eqx_paged.write_kv, args, donate=(0, 1)), pool


@needs_libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize(
    "form, dtype, head_dim, num_kv_heads, page_size, num_tokens",
    [
        ("plain", "bfloat16", 128, 8, 16, 64),
        ("rows", "bfloat16", 64, 1, 16, 5),
        *(
            pytest.param(
                form, dtype, head_dim, num_kv_heads, page_size, 64, marks=pytest.mark.slow
            )
            for dtype in ("bfloat16", "float32")
            for form, head_dim in (("plain", 128), ("plain", 256), ("rows", 64))
            for num_kv_heads in (1, 2, 8)
            for page_size in (16, 128)
        ),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("padded", "bfloat16", 80, 8, 16, 64),
                ("padded", "float32", 96, 2, 16, 64),
                ("plain", "bfloat16", 128, 8, 16, 1),
                ("plain", "bfloat16", 128, 8, 8, 4096),
                ("plain", "float32", 256, 8, 128, 2500),
            )
        ),
    ],
)
def test_it_compiles_for_a_tpu_and_writes_in_place(
    generation, form, dtype, head_dim, num_kv_heads, page_size, num_tokens
):
    compiled, pool = compile_write(
        generation,
        form=form,
        dtype=dtype,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        num_tokens=num_tokens,
    )
    pool_bytes = pool.size * pool.dtype.itemsize
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * pool_bytes
    if num_tokens < 8192 // 2:  # so that new tokens are not taken for a pool
        assert not large_moves(compiled, pool_bytes)
