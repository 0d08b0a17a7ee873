"""Queries, pools of pages and page tables for a case of the GPU benchmark."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Real

from ._bench_gpu_cases import BenchCase


Pool = tuple[
    Real[Array, "num_pages num_kv_heads page_size head_dim"],
    Real[Array, "num_pages num_kv_heads page_size head_dim"],
]


class Addresses(NamedTuple):
    """Where everything is, as `ragged_paged_attention` takes it."""

    kv_lens: Int32[Array, " num_seqs"]
    page_indices: Int32[Array, "num_seqs pages_per_seq"]
    cu_q_lens: Int32[Array, " num_seqs+1"]
    num_seqs: Int32[Array, ""]


class Data(NamedTuple):
    """A case's arrays."""

    q: Float[Array, "num_tokens num_heads head_dim"]
    pools: tuple[Pool, ...]
    addresses: Addresses


@functools.lru_cache(maxsize=1)  # of one case at a time, which its candidates share
def data_of(case: BenchCase, num_pools: int) -> Data:
    """Random numbers, with the pages of each row in random places."""
    num_pages = len(case.kv_lens) * case.pages_per_seq
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    addresses = Addresses(
        kv_lens=jnp.asarray(case.kv_lens, jnp.int32),
        page_indices=jnp.asarray(order.reshape(len(case.kv_lens), case.pages_per_seq)),
        cu_q_lens=jnp.asarray(np.cumsum([0, *case.q_lens]), jnp.int32),
        num_seqs=jnp.asarray(len(case.kv_lens), jnp.int32),
    )
    shape = (num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    key, *keys = jax.random.split(jax.random.key(0), 1 + 2 * num_pools)
    pages = [random_numbers(key, shape, case.dtype) for key in keys]
    q_shape = (sum(case.q_lens), case.num_heads, case.head_dim)
    q = random_numbers(key, q_shape, "bfloat16")
    pools = tuple(zip(pages[::2], pages[1::2], strict=True))
    return Data(q, pools, addresses)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_numbers(key: Array, shape: tuple[int, ...], dtype: str) -> Real[Array, "..."]:
    return jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.dtype(dtype))
