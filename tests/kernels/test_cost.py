import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from ..helpers import fails_naming


def test_cost_counts_products_exponentials_and_bytes():
    import eqx_paged

    shape = dict(num_seqs=3, num_heads=8, num_kv_heads=2, head_dim=64, kv_len=100)
    cost = eqx_paged.mha_cost_estimate(**shape, dtype="bfloat16")
    assert isinstance(cost, pl.CostEstimate)
    logits = 3 * 8 * 100
    assert cost.flops == 2 * 2 * logits * 64  # two products, each multiplies and adds
    assert cost.transcendentals == logits
    queries_and_out, keys_and_values = 2 * 3 * 8 * 64, 2 * 3 * 2 * 100 * 64
    assert cost.bytes_accessed == 2 * (queries_and_out + keys_and_values)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(num_seqs=-1), ("num_seqs", "-1")),
        (dict(kv_len=-2), ("kv_len", "-2")),
        (dict(num_kv_heads=3), ("32", "3")),
    ],
    ids=str,
)
def test_a_call_that_cannot_be_has_no_cost(changed, words):
    import eqx_paged

    sizes = dict(num_seqs=1, num_heads=32, num_kv_heads=8, head_dim=64, kv_len=9)
    with fails_naming(words):
        eqx_paged.mha_cost_estimate(**(sizes | changed), dtype=jnp.float32)


def test_cost_scales_with_its_arguments():
    import eqx_paged

    shape = dict(num_heads=8, num_kv_heads=8, head_dim=64, dtype="float32")
    one = eqx_paged.mha_cost_estimate(num_seqs=1, kv_len=100, **shape)
    two = eqx_paged.mha_cost_estimate(num_seqs=2, kv_len=100, **shape)
    assert (two.flops, two.bytes_accessed) == (2 * one.flops, 2 * one.bytes_accessed)
    many = eqx_paged.mha_cost_estimate(num_seqs=1, kv_len=100, q_len=10, **shape)
    assert many.flops == 10 * one.flops
    assert one.bytes_accessed < many.bytes_accessed < 10 * one.bytes_accessed
