"""Times a decode step on caches of 64 MiB and 1 GiB: `python -m scripts.bench_step`.

A step is what a model does with its cache for one token of each row: make room, and in
each layer store a key and a value and attend. The tokens stored are as many in the small
cache as in the large one, so both must take the same time: a step that copied its cache
would take sixteen times as long on the large one.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from eqx_paged import PagedAttention, PagedKVCache, RESULTS
from jaxtyping import Array, Float

from ._command_line import make_directory, Parser, whole


MIB = 2**20
CACHE_MIB = (64, 1024)
PAGE_SIZES = (16, 64, 128)
DTYPES = ("float32", "bfloat16")
NUM_SEQS = 8
NUM_LAYERS = 2
NUM_HEADS = 32
NUM_KV_HEADS = 8
HEAD_DIM = 128
# Of the small cache: most of it, as where paging pays.
SHARE_STORED = 0.75
WARM_UP = 3
# In float32 the rest of the small cache holds 128 tokens more a row.
MAX_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Case:
    """One cache to time a step on."""

    cache_mib: int
    page_size: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Bytes of all keys and values of a token."""
        numbers = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM
        return numbers * jnp.dtype(self.dtype).itemsize

    @property
    def tokens_per_row(self) -> int:
        stored = SHARE_STORED * CACHE_MIB[0] * MIB / self.token_bytes
        return int(stored / NUM_SEQS)


def filled_cache(case: Case) -> PagedKVCache:
    """A cache of the case's size, its tokens stored and its pages in a mixed order."""
    num_pages = case.cache_mib * MIB // (case.token_bytes * case.page_size)
    cache = PagedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_pages=num_pages,
        page_size=case.page_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_seqs=NUM_SEQS,
        max_len=2 * case.tokens_per_row,
        dtype=jnp.dtype(case.dtype),
    )
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    cache = eqx.tree_at(lambda c: c.table.free_pages, cache, jnp.asarray(order))
    q_lens = jnp.full(NUM_SEQS, case.tokens_per_row, jnp.int32)
    cache, _, result = cache.append(q_lens, NUM_SEQS * case.tokens_per_row)
    assert result == RESULTS.successful, "the small cache has room"
    return cache


@eqx.filter_jit(donate="all-except-first")
def decode_step(
    qkv: tuple[Float[Array, "num_seqs num_heads head_dim"], Array, Array],
    cache: PagedKVCache,
) -> tuple[Array, PagedKVCache]:
    """One token a row through all layers, each with the output of the last as queries."""
    q, k, v = qkv
    cache, batch, _ = cache.append(jnp.ones(NUM_SEQS, jnp.int32))
    layers = []
    for pages in cache.layers:
        q, pages = PagedAttention()(q, k, v, pages, batch)
        layers.append(pages)
    return q, dataclasses.replace(cache, layers=tuple(layers))


def queries_keys_values(
    dtype: str,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_kv_heads head_dim"],
    Float[Array, "num_seqs num_kv_heads head_dim"],
]:
    """One random token a row."""
    q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
    kv_shape = NUM_SEQS, NUM_KV_HEADS, HEAD_DIM
    return (
        jax.random.normal(q_key, (NUM_SEQS, NUM_HEADS, HEAD_DIM), jnp.dtype(dtype)),
        jax.random.normal(k_key, kv_shape, jnp.dtype(dtype)),
        jax.random.normal(v_key, kv_shape, jnp.dtype(dtype)),
    )


def time_cases(cases: list[Case], num_steps: int) -> list[dict[str, Any]]:
    """Times `num_steps` steps of each of some cases of one dtype; in turn, so that what
    else the machine does disturbs all alike."""
    qkv = jax.block_until_ready(queries_keys_values(cases[0].dtype))
    caches = [filled_cache(case) for case in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(WARM_UP + num_steps):
        for i in range(len(cases)):
            start = time.perf_counter()
            _, caches[i] = jax.block_until_ready(decode_step(qkv, caches[i]))
            seconds[i].append(time.perf_counter() - start)
    for case, cache in zip(cases, caches, strict=True):
        last_len = case.tokens_per_row + WARM_UP + num_steps
        assert (cache.kv_lens == last_len).all(), "each step had room for its tokens"
    return [
        _report(case, times[WARM_UP:]) for case, times in zip(cases, seconds, strict=True)
    ]


def _report(case: Case, seconds: list[float]) -> dict[str, Any]:
    tokens_stored = NUM_SEQS * case.tokens_per_row
    median = statistics.median(seconds)
    return {
        **dataclasses.asdict(case),
        "tokens_stored": tokens_stored,
        "step_ms": 1e3 * median,
        "fastest_ms": 1e3 * min(seconds),
        "attention_gb_per_s": tokens_stored * case.token_bytes / median / 1e9,
    }


def describe() -> dict[str, Any]:
    """On what the times were taken."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "num_seqs": NUM_SEQS,
        "num_layers": NUM_LAYERS,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def format_row(row: dict[str, Any]) -> str:
    """A case's times as a line of the table that `HEADER` begins."""
    return (
        f"| {row['dtype']} | {row['page_size']} | {row['cache_mib']} |"
        f" {row['step_ms']:.2f} | {row['fastest_ms']:.2f} |"
        f" {row['attention_gb_per_s']:.1f} |"
    )


HEADER = """\
| dtype | page size | cache MiB | step ms (median) | fastest ms | GB/s |
|---|---|---|---|---|---|"""


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the median step time of each case, a pair of bars for the two caches."""
    # Chosen before pyplot is imported: no window is needed to write a file.
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DTYPES), figsize=(8, 3.2), sharey=True)
    places = np.arange(len(PAGE_SIZES))
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for shift, cache_mib in ((-0.2, CACHE_MIB[0]), (0.2, CACHE_MIB[1])):
            times = [
                row["step_ms"]
                for row in rows
                if (row["dtype"], row["cache_mib"]) == (dtype, cache_mib)
            ]
            axis.bar(places + shift, times, 0.38, label=f"cache of {cache_mib} MiB")
        axis.set_title(f"{dtype}, {CACHE_MIB[0] * SHARE_STORED:.0f} MiB stored")
        axis.set_xticks(places, [str(size) for size in PAGE_SIZES])
        axis.set_xlabel("page size")
    axes[0].set_ylabel("ms a decode step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Times all cases; prints a table, and writes `step.json` and `step.png`."""
    parser = Parser("bench_step", "Times a decode step on a small and on a large cache.")
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole(1, MAX_STEPS),
        default=50,
        help=f"how many to time, up to {MAX_STEPS} (default: 50)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        default=pathlib.Path("build/bench"),
        help="where the files go (default: build/bench)",
    )
    given = parser.parse_args(arguments)
    make_directory("bench_step", given.out)
    about = describe()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(HEADER)
    rows = []
    for dtype, page_size in itertools.product(DTYPES, PAGE_SIZES):
        cases = [Case(cache_mib, page_size, dtype) for cache_mib in CACHE_MIB]
        rows += time_cases(cases, given.steps)
        print(*map(format_row, rows[-len(cases) :]), sep="\n", flush=True)
    content = json.dumps({"about": about, "cases": rows}, indent=2)
    (given.out / "step.json").write_text(content + "\n")
    draw(rows, given.out / "step.png")
    print(f"written: {given.out / 'step.json'}, {given.out / 'step.png'}")


if __name__ == "__main__":
    main()
