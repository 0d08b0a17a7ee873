"""Where the tokens of one step are."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int32


class RaggedBatch(eqx.Module):
    """The addresses of one step, computed once and shared by all layers.

    Of kind `"decode"`: one token a row, token `i` of row `i`. Of kind `"mixed"`: any number
    of tokens a row, packed row after row. A row without tokens in this step is idle. What
    is past the last token is padding: position 0, and a slot past the end, which drops it.

    - `page_indices`: the pages of each row.
    - `kv_lens`: tokens a row holds, this step's included; 0 for an idle row.
    - `starts`: the first position of each row that is attended to; 0 for a paged cache.
    - `cu_q_lens`: where each row's tokens begin, and at the end their number. In a decode
        step it counts idle rows as well.
    - `num_seqs`: how many rows there are.
    - `positions`: each token's position in its sequence.
    - `slots`: where each token's key and value are stored, as `page * page_size + offset`.
    - `last_tokens`: which token is the last of each row; 0 for an idle row.
    - `page_size`, `num_pages`: of the cache that it is about; the `max_len` and `num_seqs`
        of a contiguous one.
    """

    page_indices: Int32[Array, "num_seqs pages_per_seq"]
    kv_lens: Int32[Array, " num_seqs"]
    starts: Int32[Array, " num_seqs"]
    cu_q_lens: Int32[Array, " num_seqs_plus_one"]
    num_seqs: Int32[Array, ""]
    positions: Int32[Array, " num_tokens"]
    slots: Int32[Array, " num_tokens"]
    last_tokens: Int32[Array, " num_seqs"]
    kind: Literal["decode", "mixed"] = eqx.field(static=True)
    page_size: int = eqx.field(static=True)
    num_pages: int = eqx.field(static=True)

    @classmethod
    def of_step(
        cls,
        page_indices: Int32[Array, "num_seqs pages_per_seq"],
        kv_lens: Int32[Array, " num_seqs"],
        q_lens: Int32[Array, " num_seqs"],
        starts: Int32[Array, " num_seqs"],
        *,
        page_size: int,
        num_pages: int,
        num_tokens: int | None,
    ) -> "RaggedBatch":
        """The addresses of the last `q_lens` tokens of rows that hold `kv_lens` tokens.

        **Arguments:**

        - `page_indices`, `kv_lens`: the table, this step's tokens included.
        - `q_lens`: this step's tokens a row; at most one each if `num_tokens` is None.
        - `starts`: the first position of each row that is attended to.
        - `page_size`, `num_pages`: of the pool.
        - `num_tokens`: the padded number of tokens of a mixed step; None for a decode step.
        """
        num_seqs = kv_lens.shape[0]
        rows = jnp.arange(num_seqs, dtype=jnp.int32)
        active = q_lens > 0
        if num_tokens is None:
            cu_q_lens = jnp.arange(num_seqs + 1, dtype=jnp.int32)
            row, exists = rows, active
            positions = kv_lens - 1
            last_tokens = rows
        else:
            ends = jnp.cumsum(q_lens, dtype=jnp.int32)
            cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
            token = jnp.arange(num_tokens, dtype=jnp.int32)
            row, exists = row_of_token(cu_q_lens, num_tokens)
            positions = kv_lens[row] - ends[row] + token
            last_tokens = ends - 1
        positions = jnp.where(exists, positions, 0)
        page = page_indices[row, positions // page_size]
        slots = page * page_size + positions % page_size
        return cls(
            page_indices=page_indices,
            kv_lens=jnp.where(active, kv_lens, 0),
            starts=starts,
            cu_q_lens=cu_q_lens,
            num_seqs=jnp.array(num_seqs, jnp.int32),
            positions=positions,
            slots=jnp.where(exists, slots, num_pages * page_size),
            last_tokens=jnp.where(active, last_tokens, 0),
            kind="decode" if num_tokens is None else "mixed",
            page_size=page_size,
            num_pages=num_pages,
        )


def row_of_token(cu_q_lens, num_tokens):
    """The row of each of `num_tokens` packed tokens, and whether it is one or padding."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right").astype(jnp.int32)
    last_row = cu_q_lens.shape[0] - 2
    return jnp.minimum(row, last_row), token < cu_q_lens[-1]
