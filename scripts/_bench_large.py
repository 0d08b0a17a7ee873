"""Whether a pool of more numbers than 32 bits can count is read at the right places."""

import dataclasses
import functools

import eqx_paged
import jax
import jax.numpy as jnp
import numpy as np

from ._bench_candidates import IMPLEMENTATIONS
from ._bench_correctness import TOLERANCE
from ._bench_data import random_numbers
from ._bench_record import Row


SHAPE = NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM = 8, 64, 128
NUM_HELD = 4  # the last pages, which a row of one token less than they have room for holds
# More than 2**31 numbers, so that an offset of 32 bits, with a sign, is not enough.
NUM_PAGES = 2**31 // (NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM) + NUM_HELD


def checked_large(row: Row) -> Row:
    """The same row in a small pool and in a large one gives the same: bit for bit of the
    kernels, about the same of XLA, which may sum in another order."""
    q_key, *keys = jax.random.split(jax.random.key(0), 3)
    q = random_numbers(q_key, (1, 32, HEAD_DIM), "bfloat16")
    small = [random_numbers(key, (NUM_HELD, *SHAPE), "bfloat16") for key in keys]
    large = [_at_the_end(pages) for pages in small]
    kv_lens = jnp.array([NUM_HELD * PAGE_SIZE - 1], jnp.int32)
    first = jnp.arange(NUM_HELD, dtype=jnp.int32)[None]
    options = IMPLEMENTATIONS[row.implementation]
    call = jax.jit(functools.partial(eqx_paged.paged_attention, **options))
    wanted = np.asarray(call(q, *small, kv_lens, first), np.float32)
    out = call(q, *large, kv_lens, first + NUM_PAGES - NUM_HELD)
    tolerance = TOLERANCE if row.implementation == "xla" else 0.0
    row = row.compared(np.asarray(out, np.float32), wanted, tolerance)
    return row if row.status == "failed" else dataclasses.replace(row, status="right")


@jax.jit
def _at_the_end(pages: jax.Array) -> jax.Array:
    pool = jnp.zeros((NUM_PAGES, *SHAPE), pages.dtype)
    return pool.at[-NUM_HELD:].set(pages)
