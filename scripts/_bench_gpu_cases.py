"""What `scripts.bench_gpu` times: shapes and lengths, in plain Python.

The process that times PyTorch reads this too, and has no JAX.
"""

import dataclasses
import random


ITEM_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1}


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """A step over a paged cache.

    - `kv_lens`: tokens a row holds, those of this step included.
    - `q_lens`: tokens of this step.
    - `dtype`: of the stored keys and values; queries are bfloat16.
    """

    name: str
    part: str
    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"

    @property
    def is_decode(self) -> bool:
        return set(self.q_lens) == {1}

    @property
    def is_prompt(self) -> bool:
        """Whether every row is a prompt from its beginning."""
        return self.q_lens == self.kv_lens

    @property
    def is_rectangular(self) -> bool:
        """Whether all rows are alike, as a contiguous batch needs."""
        return len(set(self.kv_lens)) == 1 and len(set(self.q_lens)) == 1

    @property
    def pages_per_seq(self) -> int:
        return -(-max(self.kv_lens) // self.page_size)

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values that the rows hold, each read once."""
        token_bytes = 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]
        return sum(self.kv_lens) * token_bytes

    @property
    def flops(self) -> int:
        """Of both products, for the keys that each query sees."""
        seen = sum(
            q * (kv - q) + q * (q + 1) // 2
            for q, kv in zip(self.q_lens, self.kv_lens, strict=True)
        )
        return 4 * self.num_heads * self.head_dim * seen

    def shrunk(self) -> "BenchCase":
        """The same, small enough to be interpreted on a CPU."""
        group = min(self.num_heads // self.num_kv_heads, 4)
        return dataclasses.replace(
            self,
            kv_lens=tuple(max(n // 128, 1) for n in self.kv_lens[:3]),
            q_lens=tuple(max(n // 128, 1) for n in self.q_lens[:3]),
            num_heads=2 * group,
            num_kv_heads=2,
            page_size=16,
        )


def _decode(name: str, kv_lens: tuple[int, ...], heads: int, kv_heads: int, **other):
    ones = (1,) * len(kv_lens)
    return BenchCase(name, "decode", kv_lens, ones, heads, kv_heads, **other)


def _prompts(name: str, num: int, length: int, heads: int, kv_heads: int, **other):
    lengths = (length,) * num
    return BenchCase(name, "prefill", lengths, lengths, heads, kv_heads, **other)


def _mixed(name: str, chunks: int, decodes: int):
    return BenchCase(
        name=name,
        part="mixed",
        kv_lens=(8192,) * chunks + (4096,) * decodes,
        q_lens=(2048,) * chunks + (1,) * decodes,
        num_heads=32,
        num_kv_heads=8,
    )


_random = random.Random(0)
_RAGGED = tuple(_random.randint(128, 4096) for _ in range(128))
CASES = (
    _decode("D1", (2048,) * 64, 32, 8),
    _decode("D1p", (2048,) * 64, 32, 8, page_size=16),
    _decode("D2", (8192,) * 16, 32, 8),
    _decode("D3", (32768,), 32, 8),
    _decode("D4", _RAGGED, 32, 8, page_size=16),
    _decode("D5", (4096,) * 16, 32, 32),
    _decode("D6", (8192,) * 32, 32, 2),
    _decode("D7", (2048,) * 64, 32, 8, dtype="float8_e4m3fn"),
    _decode("D8", (512,) * 8, 32, 8),
    _prompts("P1", 4, 4096, 16, 16),
    _prompts("P2", 2, 8192, 16, 16),
    _prompts("P2p", 2, 8192, 16, 16, page_size=16),
    _prompts("P3", 8, 4096, 32, 8),
    BenchCase("P4", "prefill", (10240,), (2048,), 32, 8, page_size=16),
    _mixed("M1", chunks=1, decodes=63),
    # Its two halves alone, whose times together it is set against.
    _mixed("M1-chunk", chunks=1, decodes=0),
    _mixed("M1-decodes", chunks=0, decodes=63),
)


def cases_of(part: str, *, dry_run: bool) -> list[BenchCase]:
    cases = [case for case in CASES if case.part == part]
    return [case.shrunk() for case in cases] if dry_run else cases
