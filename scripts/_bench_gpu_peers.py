"""What others have on a GPU and JAX can call: its own Pallas kernels, and cuDNN.

Each gets its arguments as it likes them best: laid out beforehand, queries scaled.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._bench_gpu_candidates import Candidate, NotHere
from ._bench_gpu_cases import BenchCase
from ._bench_gpu_data import Data
from ._bench_gpu_timer import Prepared


def peers(
    case: BenchCase, data: Callable[[], Data], *, on_gpu: bool
) -> Iterator[Candidate]:
    """Each as it comes."""
    if case.is_decode:
        prepare = functools.partial(_jax_paged, case, data, {}, on_gpu)
        yield Candidate("jax-paged", "", prepare)
    yield Candidate("cudnn-paged", "", functools.partial(_cudnn_paged, case, data, on_gpu))
    yield Candidate(
        "cudnn-contiguous", "", functools.partial(_cudnn_contiguous, case, data, on_gpu)
    )
    if not case.is_decode:
        prepare = functools.partial(_jax_contiguous, case, data, on_gpu)
        yield Candidate("jax-contiguous", "float16", prepare)


def swept_peers(
    case: BenchCase, data: Callable[[], Data], *, on_gpu: bool
) -> Iterator[Candidate]:
    """JAX's own paged attention with each of a few configs."""
    if not case.is_decode:
        return
    for tokens, k_splits, num_stages in itertools.product(
        (64, 128), (1, 4, 8, 16), (2, 5, 7)
    ):
        pages = max(tokens // case.page_size, 1)
        chosen = dict(
            pages_per_compute_block=pages, k_splits=k_splits, num_stages=num_stages
        )
        text = ", ".join(f"{name} {value}" for name, value in chosen.items())
        prepare = functools.partial(_jax_paged, case, data, chosen, on_gpu)
        yield Candidate("jax-paged", text, prepare)


# --- JAX's Pallas kernels


def _jax_paged(
    case: BenchCase, data: Callable[[], Data], options: dict[str, Any], on_gpu: bool
) -> Prepared:
    with warnings.catch_warnings():
        # It is deprecated, and may be gone.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
        except ImportError as error:
            raise NotHere(f"this JAX has none: {error}") from error
    if case.dtype != "bfloat16":
        raise NotHere(f"it has no scale for pages of {case.dtype}")
    k_splits = options.get("k_splits", 16)
    if case.pages_per_seq % k_splits != 0:
        raise NotHere(f"k_splits {k_splits} does not divide {case.pages_per_seq} pages")

    def step(q, pool, addresses):
        table, lens = addresses.page_indices, addresses.kv_lens
        return paged_attention(q, *pool, table, lens, interpret=not on_gpu, **options)

    by_head = jax.jit(lambda pool: tuple(x.swapaxes(0, 1) for x in pool))
    pools = tuple(by_head(pool) for pool in data().pools)
    return Prepared(step, _scaled(data().q, case), pools, data().addresses)


def _jax_contiguous(case: BenchCase, data: Callable[[], Data], on_gpu: bool) -> Prepared:
    _check_prompts(case)
    _check_gpu(on_gpu)
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # In float16, since the kernel of JAX 0.11 does not compile in bfloat16.
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )

    def step(q, pool, _):
        return attention_mgpu.attention(q, *pool, config)

    pools = tuple(_contiguous(case, data, pool, jnp.float16) for pool in data().pools)
    q = _batched(case, _scaled(data().q, case)).astype(jnp.float16)
    return Prepared(step, q, pools)


# --- cuDNN


def _check_cudnn(case: BenchCase, on_gpu: bool, reads: str) -> None:
    _check_gpu(on_gpu)
    if not case.is_decode:
        _check_prompts(case)
    if case.dtype != "bfloat16":
        raise NotHere(f"it reads no {reads} of {case.dtype}")


def _cudnn_paged(case: BenchCase, data: Callable[[], Data], on_gpu: bool) -> Prepared:
    _check_cudnn(case, on_gpu, "pages")
    # Private, and the only way to it.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    mask = cudnn.MaskType.PADDING if case.is_decode else cudnn.MaskType.PADDING_CAUSAL
    q_lens = jnp.asarray(case.q_lens, jnp.int32)

    def step(q, pool, addresses):
        table = addresses.page_indices[:, None, :, None]
        k, v = pool
        return cudnn.paged_attention(
            q,
            k,
            v,
            q_lens,
            addresses.kv_lens,
            table,
            table,
            scale=case.head_dim**-0.5,
            mask_type=mask,
            qkv_layout="BNTH",
        )

    q = _batched(case, data().q).swapaxes(1, 2)
    unpacked = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    return Prepared(step, q, data().pools, data().addresses, unpacked)


def _cudnn_contiguous(case: BenchCase, data: Callable[[], Data], on_gpu: bool) -> Prepared:
    _check_cudnn(case, on_gpu, "keys")

    def step(q, pool, kv_lens):
        return jax.nn.dot_product_attention(
            q,
            *pool,
            is_causal=not case.is_decode,
            key_value_seq_lengths=kv_lens,
            implementation="cudnn",
        )

    pools = tuple(_contiguous(case, data, pool, jnp.bfloat16) for pool in data().pools)
    # Told no lengths where all are alike: they would only cost.
    lens = None if case.is_rectangular else data().addresses.kv_lens
    return Prepared(step, _batched(case, data().q), pools, lens)


# --- What they take


def _check_gpu(on_gpu: bool) -> None:
    if not on_gpu:
        raise NotHere("it runs on a GPU only")


def _check_prompts(case: BenchCase) -> None:
    if not (case.is_rectangular and case.is_prompt):
        raise NotHere("its causal mask is for rows of one length, from their beginning")


def _scaled(q: Float[Array, "..."], case: BenchCase) -> Float[Array, "..."]:
    return (q * np.float32(case.head_dim**-0.5)).astype(q.dtype)


def _batched(case: BenchCase, q: Array) -> Array:
    """`[num_seqs, q_len, num_heads, head_dim]`."""
    return q.reshape(len(case.q_lens), -1, case.num_heads, case.head_dim)


def _contiguous(
    case: BenchCase, data: Callable[[], Data], pool: tuple, dtype: Any
) -> tuple[Array, ...]:
    """A pool's keys and values, `[num_seqs, max_len, num_kv_heads, head_dim]`."""
    max_len = max(case.kv_lens)

    @jax.jit
    def gather(pages, page_indices):
        rows = pages[page_indices].swapaxes(2, 3)
        rows = rows.reshape(len(case.kv_lens), -1, case.num_kv_heads, case.head_dim)
        return rows[:, :max_len].astype(dtype)

    k, v = (gather(pages, data().addresses.page_indices) for pages in pool)
    return k, v
