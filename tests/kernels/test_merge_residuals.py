import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from .. import oracle
from ..helpers import assert_close, default_mask_value, fails_naming, normal, rng_of


def parts_of(rng, cuts, *, num_heads=4, head_dim=16, scale=1.0):
    """One query's attention over consecutive sets of keys, and over all of them."""
    q = normal(rng, (1, num_heads, head_dim))
    k, v = (normal(rng, (cuts[-1], num_heads, head_dim)) for _ in range(2))
    options = dict(mask_value=default_mask_value("paged_attention"), sm_scale=scale)
    parts = [
        oracle.attention(q, k[a:b], v[a:b], **options)
        for a, b in itertools.pairwise((0, *cuts))
    ]
    outs, ms, ls = (
        [jnp.asarray(x, jnp.float32) for x in xs] for xs in zip(*parts, strict=True)
    )
    return (outs, ms, ls), oracle.attention(q, k, v, **options)


# Equal parts, empty parts at either end and in the middle, one part alone.
CUTS = ((5, 10), (0, 10), (10, 10), (3, 3, 9), (1, 2, 3, 40), (7,), (0, 0, 1))


@pytest.mark.parametrize("cuts", CUTS)
def test_merging_equals_attention_over_the_union(getkey, cuts):
    import eqx_paged

    parts, whole = parts_of(rng_of(getkey()), cuts)
    for actual, wanted in zip(eqx_paged.merge_residuals(*parts), whole):
        assert_close(actual, wanted)


def test_parts_may_be_stacked(getkey):
    import eqx_paged

    parts, whole = parts_of(rng_of(getkey()), (4, 9, 20))
    stacked = eqx_paged.merge_residuals(*(jnp.stack(x) for x in parts))
    for actual, wanted in zip(stacked, whole):
        assert_close(actual, wanted)


def test_the_order_of_parts_does_not_matter(getkey):
    import eqx_paged

    parts, whole = parts_of(rng_of(getkey()), (4, 9, 20))
    for order in itertools.permutations(range(3)):
        merged = eqx_paged.merge_residuals(*([x[i] for i in order] for x in parts))
        for actual, wanted in zip(merged, whole):
            assert_close(actual, wanted)


def test_a_merged_part_can_be_merged_again(getkey):
    import eqx_paged

    (outs, ms, ls), whole = parts_of(rng_of(getkey()), (4, 9, 20))
    first = eqx_paged.merge_residuals(outs[:2], ms[:2], ls[:2])
    again = eqx_paged.merge_residuals(*([a, b[2]] for a, b in zip(first, (outs, ms, ls))))
    for actual, wanted in zip(again, whole):
        assert_close(actual, wanted)


def test_parts_with_logits_far_apart_do_not_overflow(getkey):
    import eqx_paged

    # Logits of some hundred in one part and others far below them.
    parts, whole = parts_of(rng_of(getkey()), (1, 2, 3, 30), scale=40.0)
    for actual, wanted in zip(eqx_paged.merge_residuals(*parts), whole):
        assert_close(actual, wanted)


def test_nothing_attended_gives_zero(getkey):
    import eqx_paged

    mask_value = default_mask_value("paged_attention")
    parts, _ = parts_of(rng_of(getkey()), (0, 0))
    out, m, l = eqx_paged.merge_residuals(*parts)
    np.testing.assert_array_equal(out, np.zeros((1, 4, 16)))
    np.testing.assert_array_equal(m, np.full((1, 4), mask_value, np.float32))
    np.testing.assert_array_equal(l, np.zeros((1, 4)))


def test_output_keeps_its_dtype(getkey):
    import eqx_paged

    (outs, ms, ls), whole = parts_of(rng_of(getkey()), (4, 9))
    outs = [x.astype(jnp.bfloat16) for x in outs]
    out, m, l = eqx_paged.merge_residuals(outs, ms, ls)
    assert out.dtype == jnp.bfloat16 and m.dtype == l.dtype == jnp.float32
    assert_close(out, whole[0], "bfloat16")


def test_a_part_without_keys_changes_nothing_whatever_its_m(getkey):
    import eqx_paged

    out, m, l = (
        jnp.asarray(normal(rng_of(getkey()), s)) for s in ((3, 4, 16), (3, 4), (3, 4))
    )
    l = jnp.abs(l) + 1
    for empty in (-jnp.inf, -1e-3, 7.0):
        parts = (out, jnp.zeros_like(out)), (m, jnp.full_like(m, empty)), (l, 0 * l)
        for x, wanted in zip(eqx_paged.merge_residuals(*parts), (out, m, l)):
            np.testing.assert_allclose(x, wanted, rtol=1e-6)
    nothing = (0 * out,) * 2, (jnp.full_like(m, -jnp.inf),) * 2, (0 * l,) * 2
    assert not np.any(eqx_paged.merge_residuals(*nothing)[0])


def test_parts_of_different_shape_are_refused():
    import eqx_paged

    outs = [jnp.zeros((2, 4, 16)), jnp.zeros((3, 4, 16))]
    with fails_naming(("outs",)):
        eqx_paged.merge_residuals(
            outs, [x[..., 0] for x in outs], [x[..., 0] for x in outs]
        )
