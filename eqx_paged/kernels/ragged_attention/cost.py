"""What an attention call costs, for a compiler that schedules around it."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from .._arguments import check_heads


def mha_cost_estimate(
    *,
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_len: int,
    dtype: DTypeLike,
    q_len: int = 1,
) -> pl.CostEstimate:
    """The work of attention from `q_len` queries a row to `kv_len` keys a row.

    **Arguments:**

    - `num_seqs`: rows.
    - `num_heads`, `num_kv_heads`, `head_dim`: as in the call.
    - `kv_len`: keys a query sees, on average.
    - `dtype`: of queries, keys, values and output.
    - `q_len`: queries a row.

    **Returns:**

    Floating-point operations (two products, each a multiplication and an addition), one
    exponential a logit, and the bytes of queries, output, keys and values moved once.

    **Raises:**

    `ValueError` for a negative count, or a `num_heads` that `num_kv_heads` does not divide.
    """
    counts = dict(num_seqs=num_seqs, num_heads=num_heads, head_dim=head_dim, kv_len=kv_len)
    for name, count in {**counts, "q_len": q_len}.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0, but is {count}.")
    check_heads(num_heads, num_kv_heads)
    logits = num_seqs * num_heads * q_len * kv_len
    numbers = 2 * num_seqs * head_dim * (num_heads * q_len + num_kv_heads * kv_len)
    return pl.CostEstimate(
        flops=4 * logits * head_dim,
        transcendentals=logits,
        bytes_accessed=numbers * jnp.dtype(dtype).itemsize,
    )
