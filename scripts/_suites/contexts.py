"""The shapes of the suite `attention`, and their numbers. Needs NumPy alone: a process with
PyTorch and without JAX reads it too."""

import dataclasses
from typing import NamedTuple

import numpy as np


# A prime, so that no two pages or rows of an array that repeats so many numbers are alike.
_PERIOD = 1_000_003


class Data(NamedTuple):
    """Queries, keys and values of a `Context`, in float32.

    `k`, `v` are `[num_seqs, num_kv_heads, context, head_dim]`; page `j` of row `i` is
    `table[i, j]`.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    lens: np.ndarray
    table: np.ndarray
    page_size: int

    def pools(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values in pages, `[num_pages, num_kv_heads, page_size, head_dim]`."""
        return self._pool(self.k), self._pool(self.v)

    def _pool(self, x: np.ndarray) -> np.ndarray:
        num_seqs, num_kv_heads, context, head_dim = x.shape
        num = context // self.page_size
        x = x.reshape(num_seqs, num_kv_heads, num, self.page_size, head_dim)
        pool = np.empty((num_seqs * num, num_kv_heads, *x.shape[3:]), np.float32)
        pool[self.table[:, :num]] = x.swapaxes(1, 2)
        return pool

    def buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as a contiguous cache has them, with room for all that the table
        has room for: `[num_seqs, max_len, num_kv_heads, head_dim]`."""
        return self._buffer(self.k), self._buffer(self.v)

    def _buffer(self, x: np.ndarray) -> np.ndarray:
        num_seqs, num_kv_heads, context, head_dim = x.shape
        max_len = self.table.shape[1] * self.page_size
        buffer = np.zeros((num_seqs, max_len, num_kv_heads, head_dim), np.float32)
        buffer[:, :context] = x.swapaxes(1, 2)
        return buffer


@dataclasses.dataclass(frozen=True)
class Context:
    """Sequences to attend to.

    - `context`: tokens of each, or of the longest if `ragged`.
    - `room`: how many times as long a row of the table is.
    """

    num_seqs: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    page_size: int = 64
    ragged: bool = False
    room: int = 2

    @property
    def name(self) -> str:
        ragged = " ragged" if self.ragged else ""
        shape = f"{self.num_seqs} x {self.context}{ragged}"
        heads = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        return f"{shape}, {heads}, {self.dtype}"

    @property
    def lens(self) -> np.ndarray:
        """Tokens of each sequence; a long tail of short ones if `ragged`."""
        if not self.ragged:
            return np.full(self.num_seqs, self.context, np.int32)
        lens = self.context * np.linspace(1, 0.1, self.num_seqs) ** 2
        return np.maximum(1, lens).astype(np.int32)

    @property
    def pages_used(self) -> int:
        """Of the longest sequence."""
        return -(-self.context // self.page_size)

    @property
    def num_pages(self) -> int:
        return self.num_seqs * self.pages_used

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that must be read."""
        numbers = 2 * int(self.lens.sum()) * self.num_kv_heads * self.head_dim
        return numbers * {"float32": 4, "bfloat16": 2}[self.dtype]

    def data(self) -> Data:
        rng = np.random.default_rng(0)
        shape = (self.num_seqs, self.num_kv_heads, self.context, self.head_dim)
        q_shape = (self.num_seqs, self.num_heads, self.head_dim)
        # Repeated, since normal numbers by the hundred millions take long to draw.
        k, v = (np.resize(rng.standard_normal(_PERIOD, np.float32), shape) for _ in "kv")
        table = np.zeros((self.num_seqs, self.room * self.pages_used), np.int32)
        table[:, : self.pages_used] = rng.permutation(self.num_pages).reshape(
            self.num_seqs, -1
        )
        q = rng.standard_normal(q_shape, np.float32)
        return Data(q, k, v, self.lens, table, self.page_size)


# Heads of queries, heads of keys, and their size.
_SMALL = (9, 3, 64)
_LARGE = (32, 8, 128)
_MAIN = tuple(
    Context(num_seqs, 4096, *heads, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for heads in (_SMALL, _LARGE)
    for num_seqs in (8, 32)
)
# What else the plots of speed against context and batch need.
_CONTEXTS = tuple(Context(8, context, *_SMALL) for context in (256, 1024, 16384))
_BATCHES = tuple(Context(num_seqs, 4096, *_SMALL) for num_seqs in (1, 2, 4, 16))
_RAGGED = (Context(32, 4096, *_SMALL, ragged=True),)
CASES = _MAIN + _CONTEXTS + _BATCHES + _RAGGED
QUICK = tuple(x for x in _MAIN if x.num_seqs == 8) + _RAGGED
REHEARSAL = (
    Context(2, 32, 4, 2, 16, page_size=8),
    Context(2, 32, 4, 2, 16, "bfloat16", page_size=8, ragged=True),
)
