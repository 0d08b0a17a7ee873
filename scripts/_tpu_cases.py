"""The calls whose schedules are counted: a kernel, its shapes, and what a count is of."""

import dataclasses
from collections.abc import Callable, Mapping

import eqx_paged
import jax
import jax.numpy as jnp

from ._tpu_chips import CHIPS


NUM_SEQS = 64
HEAD_DIM = 128
BFLOAT16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call with one kernel.

    - `kernel`: what the kernel is named in the compiler's dumps.
    - `function`, `args`, `donate`: the call, and which arguments it may overwrite.
    - `token_bytes`: what the memory moves for a token of all heads.
    - `by_head`: whether the cores that a program has share the heads, not the rows.
    - `copy_tokens`: whose keys, or values, one copy of the steady block moves.
    - `copies_out`: whether these are the copies to HBM.
    - `row_tokens`: tokens of the rows that are worked on together, from one turn of the
        loop over rows to the next.
    - `around_tokens`: tokens of a turn of the loop around the steady block, by generation,
        if that is more than the steady block's.
    - `single`: whether the steady block is not the largest that there is, a loop over
        several, but the next largest.
    - `turns`: how often each inner loop of the steady block is run, in order; by
        generation, since the size of a block may be.
    """

    kernel: str
    function: Callable
    args: tuple[jax.ShapeDtypeStruct, ...]
    token_bytes: int
    copy_tokens: int
    row_tokens: int
    donate: tuple[int, ...] = ()
    copies_out: bool = False
    by_head: bool = False
    single: bool = False
    around_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    turns: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def _shape(*shape: int, dtype=BFLOAT16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _shape(*shape, dtype=jnp.dtype(jnp.int32))


def _decode(
    page_size: int,
    num_tokens: int = 4096,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = HEAD_DIM,
    dtype=BFLOAT16,
    rows: int = 2,
) -> Case:
    """`NUM_SEQS` rows of as many tokens, of which `rows` are worked on together."""
    pages_per_seq = num_tokens // page_size
    page_rows = page_size * head_dim // HEAD_DIM
    pool = _shape(
        NUM_SEQS * pages_per_seq, num_kv_heads, page_rows, HEAD_DIM, dtype=jnp.dtype(dtype)
    )
    return Case(
        kernel="paged_attention",
        function=eqx_paged.paged_attention,
        args=(
            _shape(NUM_SEQS, num_heads, head_dim),
            pool,
            pool,
            _ints(NUM_SEQS),
            _ints(NUM_SEQS, pages_per_seq),
        ),
        token_bytes=2 * num_kv_heads * head_dim * pool.dtype.itemsize,
        copy_tokens=page_size,
        row_tokens=rows * num_tokens,
        # All blocks of a row are steady, and worked off in pairs, if there are two.
        around_tokens=dict.fromkeys(CHIPS, rows * num_tokens),
        single=num_tokens == 512,
    )


def _prefill(
    num_tokens: int = 2048,
    num_cached: int = 8192,
    page_size: int = 16,
    num_heads: int = 32,
    num_kv_heads: int = 8,
) -> Case:
    """A chunk of one long prompt, in tiles of 128 queries (64 on v4)."""
    pages_per_seq = (num_cached + num_tokens) // page_size
    pool = _shape(pages_per_seq, num_kv_heads, page_size, HEAD_DIM)
    return Case(
        kernel="ragged_paged_attention",
        function=eqx_paged.ragged_paged_attention,
        args=(
            _shape(num_tokens, num_heads, HEAD_DIM),
            pool,
            pool,
            _ints(1),
            _ints(1, pages_per_seq),
            _ints(2),
            _ints(),
        ),
        token_bytes=2 * num_kv_heads * HEAD_DIM * BFLOAT16.itemsize,
        by_head=True,
        copy_tokens=page_size,
        # The steady block is a turn of the loop over heads, which the loop over blocks is
        # around.
        around_tokens={name: 512 if name == "v4" else 1024 for name in CHIPS},
        row_tokens=num_cached + num_tokens // 2,
    )


def _write(num_tokens: int = 1024, page_size: int = 16, num_kv_heads: int = 8) -> Case:
    """A prompt's tokens, in whole tiles of 8."""
    pool = _shape(NUM_SEQS * 4096 // page_size, num_kv_heads, page_size, HEAD_DIM)
    new = _shape(num_tokens, num_kv_heads, HEAD_DIM)
    # Batches of 16 tiles are read 4 a turn, filled 2 a turn and written 4 a turn; after
    # each of these loops is one for what is left over.
    turns = (4, 0, 8, 0, 4, 0)
    return Case(
        kernel="write_kv",
        function=eqx_paged.write_kv,
        args=(pool, pool, new, new, _ints(num_tokens)),
        donate=(0, 1),
        # Read from the new ones, and written.
        token_bytes=2 * 2 * num_kv_heads * HEAD_DIM * BFLOAT16.itemsize,
        copy_tokens=8,
        copies_out=True,
        row_tokens=num_tokens,
        turns=dict.fromkeys(CHIPS, turns),
    )


def _ragged(num_heads: int = 32, num_kv_heads: int = 8, max_len: int = 4096) -> Case:
    kv = _shape(NUM_SEQS, max_len, num_kv_heads, HEAD_DIM)
    return Case(
        kernel="ragged_attention",
        function=eqx_paged.ragged_gqa,
        args=(
            _shape(NUM_SEQS, num_heads, HEAD_DIM),
            kv,
            kv,
            _ints(NUM_SEQS),
            _ints(NUM_SEQS),
        ),
        token_bytes=2 * num_kv_heads * HEAD_DIM * BFLOAT16.itemsize,
        copy_tokens=256,
        row_tokens=max_len,
        # A block's copies are started in one loop and waited for in another.
        turns={name: (2, 2) if name == "v4" else (4, 4) for name in CHIPS},
    )


# A kernel more is an entry more.
CASES = {
    "decode-page-16": _decode(16),
    "decode-page-32": _decode(32),
    "decode-page-128": _decode(128),
    "decode-512-tokens": _decode(16, num_tokens=512),
    "decode-head-dim-64": _decode(16, head_dim=64),
    "decode-int8": _decode(32, dtype=jnp.int8),
    "decode-one-kv-head": _decode(32, num_heads=4, num_kv_heads=1, rows=4),
    "prefill": _prefill(),
    "write-kv": _write(),
    "ragged-gqa": _ragged(),
}
