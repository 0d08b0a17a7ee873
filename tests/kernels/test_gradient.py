"""Gradients of the XLA path against finite differences of the float64 oracle."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .. import oracle
from ..helpers import (
    array_function,
    head_values,
    paged_case,
    quick_jit,
    ragged_case,
    rng_of,
    row_tokens,
    unstore,
)


# Central differences in float64 with a step of 1e-5 are exact to about 1e-9; what is left
# is the float32 of the gradient itself, a sum of some ten products.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
STEP = 1e-5


def finite_differences(function, arrays):
    """The derivative of a scalar function in each entry of each array."""
    gradients = []
    for array in arrays:
        gradient = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + STEP
            above = function()
            array[index] = value - STEP
            gradient[index] = (above - function()) / (2 * STEP)
            array[index] = value
        gradients.append(gradient)
    return gradients


OPTIONS = {
    "plain": {},
    "window, soft cap": dict(sliding_window=5, soft_cap=1.5),
    "sinks, scales": dict(sinks=head_values(2), k_scale=0.5, v_scale=head_values(1)),
}


def as_arrays(options):
    return {
        n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()
    }


def check_paged(name, case, weights, **options):
    args = case.decode_args if name == "paged_attention" else case.mixed_args

    @quick_jit
    @ft.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(q, k_pages, v_pages):
        function = array_function(name, "xla")
        out = function(q, k_pages, v_pages, *args[3:], **as_arrays(options))
        return jnp.sum(out * weights)

    dq, dk_pages, dv_pages = gradient(*args[:3])

    qs, ks, vs = ([x.astype(np.float64) for x in xs] for xs in (case.qs, case.ks, case.vs))
    total = sum(len(q) for q in qs)

    def oracle_loss():
        out, _, _ = oracle.attention_rows(qs, ks, vs, **options)
        return np.sum(out * np.asarray(weights[:total], np.float64))

    wanted = finite_differences(oracle_loss, [*qs, *ks, *vs])
    n = len(qs)
    np.testing.assert_allclose(dq[:total], np.concatenate(wanted[:n]), **TOLERANCE)
    np.testing.assert_array_equal(dq[total:], 0.0)

    head_dim = case.q.shape[2]
    for pages, gradients in ((dk_pages, wanted[n : 2 * n]), (dv_pages, wanted[2 * n :])):
        pool = unstore(pages, head_dim)
        for i, gradient in enumerate(gradients):
            actual = row_tokens(pool, case.page_indices[i], len(gradient))
            np.testing.assert_allclose(actual, gradient, **TOLERANCE)
        # What no row holds has no influence, and no NaN may come from it.
        held = sum(np.abs(gradient).sum() for gradient in gradients)
        np.testing.assert_allclose(np.abs(pool).sum(), held, rtol=1e-3)


@pytest.mark.parametrize("storage", ("f32", "f32-rows"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_decode(getkey, options, storage):
    case = paged_case(
        getkey(),
        kv_lens=(0, 1, 8, 11),
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        page_size=8,
        storage=storage,
        sliding_window=options.get("sliding_window"),
        padding=0.5,
    )
    weights = jax.random.normal(getkey(), case.q.shape)
    check_paged("paged_attention", case, weights, **options)


@pytest.mark.parametrize("storage", ("f32", "f32-rows"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_mixed(getkey, options, storage):
    case = paged_case(
        getkey(),
        kv_lens=(0, 9, 8, 11),
        q_lens=(0, 3, 1, 2),
        num_tokens=9,
        capacity=5,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        page_size=8,
        storage=storage,
        sliding_window=options.get("sliding_window"),
        padding=0.5,
    )
    weights = jax.random.normal(getkey(), case.q.shape)
    check_paged("ragged_paged_attention", case, weights, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_contiguous(getkey, options):
    windows = ((0, 0), (0, 1), (2, 11), (5, 5))
    case = ragged_case(
        getkey(),
        windows=windows,
        size=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        sliding_window=options.get("sliding_window"),
    )
    weights = jax.random.normal(getkey(), case.q.shape)

    @quick_jit
    @ft.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(q, k, v):
        function = array_function("ragged_gqa", "xla")
        out, _, _ = function(q, k, v, *case.args[3:], **as_arrays(options))
        return jnp.sum(out * weights)

    actual = gradient(*case.args[:3])
    q, k, v = (np.nan_to_num(np.asarray(x, np.float64)) for x in case.args[:3])

    def oracle_loss():
        total = 0.0
        for i, (start, length) in enumerate(windows):
            row = oracle.attention(
                q[i : i + 1], k[i, :length], v[i, :length], start=start, **options
            )
            total += np.sum(row[0] * np.asarray(weights[i], np.float64))
        return total

    for x, wanted in zip(actual, finite_differences(oracle_loss, [q, k, v])):
        np.testing.assert_allclose(x, wanted, **TOLERANCE)


@pytest.mark.parametrize("name", ("paged_attention", "ragged_paged_attention"))
def test_queries_have_a_gradient_where_pages_are_bits(name):
    rows = dict(kv_lens=(9, 20, 3), q_lens=(1, 1, 1), padding=0.0)
    weights = jnp.arange(64, dtype=jnp.float32) / 64

    def loss(q, *args):
        return jnp.sum(array_function(name, "xla")(q, *args) * weights[None, None])

    gradients = []
    for storage in ("bf16", "u16"):
        case = paged_case(jax.random.key(3), **rows, storage=storage, q_dtype="float32")
        args = case.decode_args if name == "paged_attention" else case.mixed_args
        gradients.append(quick_jit(jax.grad(loss))(*args))
    assert jnp.all(jnp.isfinite(gradients[0])) and jnp.any(gradients[0] != 0)
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_residuals_have_gradients(getkey):
    # Through a merge of two halves, whose weights come from m and l.
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(90, 40), head_dim=16, padding=0.0)
    cut = 2
    lens_a = jnp.minimum(case.kv_lens, cut * 16)

    def halves(q, k_pages, v_pages):
        parts = [
            eqx_paged.paged_attention(
                q, k_pages, v_pages, lens, indices, return_residuals=True
            )
            for lens, indices in (
                (lens_a, case.page_indices[:, :cut]),
                (case.kv_lens - lens_a, case.page_indices[:, cut:]),
            )
        ]
        return eqx_paged.merge_residuals(*zip(*parts))[0]

    def whole(q, k_pages, v_pages):
        return eqx_paged.paged_attention(q, k_pages, v_pages, *case.decode_args[3:])

    weights = jax.random.normal(getkey(), case.q.shape)

    def gradients(attend):
        loss = quick_jit(
            jax.grad(lambda *args: jnp.sum(attend(*args) * weights), argnums=(0, 1, 2))
        )
        return loss(*case.decode_args[:3])

    for a, b in zip(gradients(halves), gradients(whole)):
        np.testing.assert_allclose(a, b, **TOLERANCE)


def test_jitted_gradient_equals_eager(getkey):
    import eqx_paged

    case = paged_case(getkey(), kv_lens=(9, 0, 20), head_dim=16, padding=0.0)

    def loss(q):
        return jnp.sum(eqx_paged.paged_attention(q, *case.decode_args[1:]) ** 2)

    a, b = jax.grad(loss)(case.q), jax.jit(jax.grad(loss))(case.q)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_written_tokens_have_gradients(getkey):
    # A training step may write and attend in one program.
    import eqx_paged

    rng = rng_of(getkey())
    case = paged_case(getkey(), kv_lens=(20,), head_dim=16, num_heads=2, padding=0.0)
    new = jnp.asarray(rng.standard_normal((1, 2, 16)), jnp.float32)
    slot = case.page_indices[0, 1] * 16 + 3  # position 19

    def loss(k, v):
        k_pages, v_pages = eqx_paged.write_kv(case.k_pages, case.v_pages, k, v, slot[None])
        args = (case.q, k_pages, v_pages, *case.decode_args[3:])
        return jnp.sum(eqx_paged.paged_attention(*args) ** 2)

    actual = quick_jit(jax.grad(loss, argnums=(0, 1)))(new, new)
    k, v = (np.asarray(x[0], np.float64) for x in (case.ks, case.vs))
    k[19] = v[19] = new[0]

    def oracle_loss():
        return np.sum(oracle.attention(case.qs[0], k, v)[0] ** 2)

    dk, dv = finite_differences(oracle_loss, [k, v])
    np.testing.assert_allclose(actual[0][0], dk[19], **TOLERANCE)
    np.testing.assert_allclose(actual[1][0], dv[19], **TOLERANCE)
