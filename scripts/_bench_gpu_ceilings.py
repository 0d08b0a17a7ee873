"""What the GPU reaches at best through JAX: the bandwidth of a copy, a matrix product."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from ._bench_gpu_clock import Effort
from ._bench_gpu_data import random_numbers
from ._bench_gpu_record import Row
from ._bench_gpu_timer import Prepared, time_calls


def ceilings(
    effort: Effort, *, dry_run: bool
) -> Iterator[tuple[Row, Callable[[Row], Row]]]:
    """Rows, and what fills them."""
    for name, measure in (("copy", _copy), ("matmul", _matmul)):
        row = Row("ceilings", name, "jax", "", "skipped")
        yield row, functools.partial(measure, effort, dry_run)


def _copy(effort: Effort, dry_run: bool, row: Row) -> Row:
    """Of 4 GiB onto themselves."""
    size = 2**20 if dry_run else 2**31
    source = random_numbers(jax.random.key(0), (size,), "bfloat16")
    # An addition, since a copy of what is not changed would be left out. One pool, since
    # two additions in a row would be made in one.
    pools = (jnp.ones((), jnp.bfloat16),)
    copy = Prepared(lambda x, one, _: x + one, source, pools, in_place=True)
    return row.timed(*time_calls(copy, effort)).moving(2 * 2 * size, 0)


def _matmul(effort: Effort, dry_run: bool, row: Row) -> Row:
    """Of 8,192 x 8,192 numbers."""
    n = 256 if dry_run else 8192
    a, b = (
        random_numbers(key, (n, n), "bfloat16")
        for key in jax.random.split(jax.random.key(1))
    )
    # So scaled that the numbers stay of one size.
    b = b / jnp.sqrt(n).astype(b.dtype)
    # Two products a turn, from one buffer to another and back, or each would be copied.
    matmul = Prepared(lambda a, b, _: a @ b, a, (b, b), in_place=True)
    return row.timed(*time_calls(matmul, effort)).moving(0, 2 * n**3)
