import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import (
    array_function,
    every_implementation,
    normal,
    rng_of,
    run,
    store,
    unstore,
    value_dtype,
)


def pools(rng, *, num_pages=7, num_kv_heads=2, page_size=16, head_dim=64):
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    return normal(rng, shape), normal(rng, shape)


def expected(pool, values, slots):
    pool = np.array(pool)
    num_pages, _, page_size, _ = pool.shape
    for value, slot in zip(np.asarray(values, np.float32), slots):
        if slot < num_pages * page_size:
            pool[slot // page_size, :, slot % page_size] = value
    return pool


def identical(a, b):
    np.testing.assert_array_equal(a, b)


@every_implementation
@pytest.mark.parametrize(
    "storage, head_dim",
    [
        *(("f32", 64), ("f32", 80), ("f32", 128), ("f32", 256), ("f32-rows", 64)),
        *(("bf16", 64), ("bf16-rows", 64), ("u16", 80), ("u16-rows", 64), ("u16", 128)),
        *(("f32-rows", 16), ("u16-rows", 8)),
    ],
)
def test_tokens_land_in_their_slots_and_nothing_else_changes(
    getkey, implementation, storage, head_dim
):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng, head_dim=head_dim)
    dtype = value_dtype(storage)
    k, v = (normal(rng, (30, 2, head_dim), dtype) for _ in range(2))
    # First and last slot of the pool, both sides of a page's edge, and others at random.
    slots = np.array([0, 7 * 16 - 1, 15, 16, *rng.permutation(np.arange(17, 111))[:26]])
    args = (store(k_pool, storage), store(v_pool, storage), jnp.asarray(k), jnp.asarray(v))
    new_k, new_v = run("write_kv", implementation, (*args, jnp.asarray(slots, jnp.int32)))
    assert new_k.shape == args[0].shape and new_k.dtype == args[0].dtype
    for new, pool, values in ((new_k, k_pool, k), (new_v, v_pool, v)):
        before = unstore(store(pool, storage), head_dim)
        identical(unstore(new, head_dim), expected(before, values, slots))


@every_implementation
@pytest.mark.parametrize("storage", ("f32", "f32-rows", "u16", "u16-rows"))
def test_slots_past_the_end_are_dropped(getkey, implementation, storage):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng)
    end = 7 * 16
    slots = np.array([end, 5, end + 1, 2**31 - 1, end * 64, end - 1, end])
    k = np.full((7, 2, 64), np.nan, np.float32)
    k[[1, 5]] = normal(rng, (2, 2, 64), value_dtype(storage)).astype(np.float32)
    new = jnp.asarray(k.astype(jnp.dtype(value_dtype(storage))))
    args = (store(k_pool, storage), store(v_pool, storage), new, new)
    new_k, new_v = run("write_kv", implementation, (*args, jnp.asarray(slots, jnp.int32)))
    for stored, pool in ((new_k, k_pool), (new_v, v_pool)):
        before = unstore(store(pool, storage), 64)
        identical(unstore(stored, 64), expected(before, k, slots))


@every_implementation
def test_only_padding_changes_nothing(getkey, implementation):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng)
    k = jnp.full((3, 2, 64), jnp.nan)
    slots = jnp.full((3,), 7 * 16, jnp.int32)
    args = (store(k_pool, "f32"), store(v_pool, "f32"), k, k, slots)
    new_k, new_v = run("write_kv", implementation, args)
    identical(new_k, k_pool)
    identical(new_v, v_pool)


@every_implementation
def test_special_values_are_stored_bit_for_bit(getkey, implementation):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng)
    bits = jnp.array([0x7FC0, 0x7F80, 0xFF80, 0x8000, 0x0001], jnp.uint16)
    # Repeated as bits: XLA repeats bfloat16 through float32, and there some CPUs take a
    # subnormal value for zero.
    repeated = jnp.broadcast_to(bits[:, None, None], (5, 2, 64))
    k = jax.lax.bitcast_convert_type(repeated, jnp.bfloat16)
    slots = jnp.arange(5, dtype=jnp.int32)
    args = (store(k_pool, "u16"), store(v_pool, "u16"), k, k, slots)
    new_k, _ = run("write_kv", implementation, args)
    identical(new_k[0, 1, :5, 3], bits)


@every_implementation
def test_float32_tokens_are_rounded_to_the_pages_dtype(getkey, implementation):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng)
    k = normal(rng, (4, 2, 64))
    slots = np.array([3, 50, 20, 111])
    args = (store(k_pool, "u16"), store(v_pool, "u16"), jnp.asarray(k), jnp.asarray(k))
    new_k, _ = run("write_kv", implementation, (*args, jnp.asarray(slots, jnp.int32)))
    before = unstore(store(k_pool, "u16"), 64)
    rounded = k.astype(jnp.dtype("bfloat16"))
    identical(unstore(new_k, 64), expected(before, rounded, slots))


def test_keys_and_values_may_differ_in_dtype(getkey):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng)
    k = jnp.asarray(normal(rng, (1, 2, 64)))
    args = (store(k_pool, "f32"), store(v_pool, "bf16"), k, k.astype(jnp.bfloat16))
    new_k, new_v = run("write_kv", "xla", (*args, jnp.array([17], jnp.int32)))
    assert new_k.dtype == jnp.float32 and new_v.dtype == jnp.bfloat16
    identical(new_k[1, :, 1], k[0])
    identical(new_v[1, :, 1], k[0].astype(jnp.bfloat16))


def test_the_caller_keeps_the_old_pages(getkey):
    rng = rng_of(getkey())
    k_pool, v_pool = pools(rng)
    k_pages, v_pages = store(k_pool, "f32"), store(v_pool, "f32")
    k = jnp.zeros((1, 2, 64))
    array_function("write_kv", "xla")(k_pages, v_pages, k, k, jnp.array([3], jnp.int32))
    identical(k_pages, k_pool)
    identical(v_pages, v_pool)
