"""What every cache checks: sizes and arguments before any work, a step while it runs."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ._results import RESULTS
from .kernels._arguments import check_array


INT32_MAX = int(np.iinfo(np.int32).max)


def check_page_size(page_size: int) -> None:
    check_positive(page_size=page_size)
    if not 8 <= page_size <= 256 or page_size & (page_size - 1):
        raise ValueError(
            f"page_size must be a power of two from 8 to 256, but is {page_size}."
        )


def check_positive(**counts: int) -> None:
    check_int(least=1, **counts)


def check_int(*, least: int, greatest: int | None = None, **counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ValueError(f"{name} must be an int, but is {count!r}.")
        if count < least:
            raise ValueError(f"{name} must be at least {least}, but is {count}.")
        if greatest is not None and count > greatest:
            raise ValueError(f"{name} must be at most {greatest}, but is {count}.")


def check_cache(num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> None:
    check_positive(num_kv_heads=num_kv_heads, head_dim=head_dim)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype must be a floating-point one, but is {jnp.dtype(dtype).name}."
        )


def check_per_row(name: str, counts: Array, num_seqs: int) -> None:
    check_array(name, counts)
    if counts.shape != (num_seqs,) or counts.dtype != jnp.int32:
        raise ValueError(
            f"{name} must be int32 of shape {(num_seqs,)}, one count a row, but is "
            f"{counts.dtype} of shape {counts.shape}."
        )


def check_mask(name: str, mask: Array, shape: tuple[int, ...]) -> None:
    check_array(name, mask)
    if mask.shape != shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name} must be a mask, bool of shape {shape}, but is {mask.dtype} of shape "
            f"{mask.shape}."
        )


def faults_of_step(q_lens, kv_lens, max_len, max_q_len, num_tokens):
    """What can be wrong with a step's tokens in any cache, in the order it is told."""
    too_many = jnp.array(False)
    if max_q_len is not None:
        too_many |= jnp.any(q_lens > max_q_len)
    if num_tokens is not None:
        # Clipped, so that the sum of absurd counts cannot overflow into a small one.
        clipped = jnp.clip(q_lens, 0, num_tokens + 1)
        too_many |= jnp.sum(clipped, dtype=jnp.int32) > num_tokens
    return (
        (jnp.any(q_lens < 0), RESULTS.invalid_argument),
        (too_many, RESULTS.too_many_tokens),
        (jnp.any(q_lens > max_len - kv_lens), RESULTS.sequence_too_long),
    )


def first_of(*cases):
    result = RESULTS.successful
    for applies, reason in reversed(cases):
        result = RESULTS.where(applies, reason, result)
    return result
