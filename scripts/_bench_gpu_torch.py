"""PyTorch's side of the GPU benchmark: `python -m scripts._bench_gpu_torch PART`.

A process of its own, so that two frameworks do not share the GPU's memory, and perhaps with
another Python: no JAX is imported. Prints what it is,
and a row of JSON as soon as it is found.
"""

# pyright: reportMissingImports=false
# PyTorch is not among what is installed for development.

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ._bench_gpu_cases import BenchCase, cases_of
from ._bench_gpu_clock import Clock, Effort, REHEARSAL, timed
from ._bench_gpu_record import Row, row_of


# Those that a GPU has, and what a CPU has.
GPU_BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
CPU_BACKENDS = ("FLASH_ATTENTION",)
# What PyTorch says where a backend does not take a case. Anything else ends the process,
# since it may have left the device unusable; the parent goes on with another.
REFUSAL = "No available kernel"

Step = Callable[..., torch.Tensor]


def time_steps(step: Step, q: torch.Tensor, pools: list, effort: Effort, row: Row) -> Row:
    """Calls fed by the one before, on pools in turn.

    On a GPU they are replayed from a graph, so that launching costs nothing, or launched
    one by one where that is faster.
    """
    turns = -(-effort.num_calls // len(pools))
    num_calls = turns * len(pools)

    def calls() -> torch.Tensor:
        out = q
        for _ in range(turns):
            for pool in pools:
                out = step(out, *pool)
        return out

    wait = torch.cuda.synchronize if q.is_cuda else lambda: None
    runs = {"launched": calls}
    if q.is_cuda:
        calls()
        with contextlib.suppress(RuntimeError):  # what cannot be captured
            runs["graph"] = _captured(calls)

    def waited(run: Callable) -> Callable[[int], None]:
        def runs(num_runs: int) -> None:
            for _ in range(num_runs):
                run()
            wait()

        return runs

    timings = {how: timed(waited(run), num_calls, effort) for how, run in runs.items()}
    how = min(timings, key=lambda how: timings[how].median_us)
    config = f"{row.config}, {how}" if row.config else how
    return dataclasses.replace(row, config=config).timed(*timings[how])


def _captured(calls: Callable) -> Callable:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def numbers(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


# --- Attention


def sdpa(case: BenchCase, device: str, effort: Effort, row: Row) -> Row:
    """Over contiguous keys and values."""
    if not case.is_rectangular:
        reason = "contiguous rows of different lengths need a mask, which would slow it"
        return dataclasses.replace(row, status="absent", reason=reason)
    batch, q_len, kv_len = len(case.kv_lens), case.q_lens[0], case.kv_lens[0]
    q = numbers(batch, case.num_heads, q_len, case.head_dim, device=device)
    shape = (batch, case.num_kv_heads, kv_len, case.head_dim)
    pools = [
        (numbers(*shape, device=device), numbers(*shape, device=device))
        for _ in range(effort.pools_for(case.kv_bytes))
    ]
    options: dict[str, Any] = dict(enable_gqa=case.num_heads != case.num_kv_heads)
    if case.is_prompt:
        options["is_causal"] = True
    elif not case.is_decode:
        options["attn_mask"] = causal_lower_right(q_len, kv_len)
    step = functools.partial(functional.scaled_dot_product_attention, **options)
    with sdpa_kernel(SDPBackend.__members__[row.config]):
        return time_steps(step, q, pools, effort, row)


def flex(case: BenchCase, device: str, effort: Effort, row: Row) -> Row:
    """FlexAttention over pages, compiled."""
    if len(set(case.q_lens)) != 1:
        reason = "queries of different lengths do not fit its batch"
        return dataclasses.replace(row, status="absent", reason=reason)
    batch, q_len = len(case.kv_lens), case.q_lens[0]
    num_pages = batch * case.pages_per_seq
    lens = torch.tensor(case.kv_lens, device=device)

    def keep(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx + lens[b] - q_len

    table = _page_table(case, device)
    block, kernel_options = flex_blocks(case)
    logical = create_block_mask(
        keep, batch, None, q_len, case.pages_per_seq * case.page_size, device, block
    )
    mask = table.convert_logical_block_mask(logical, kv_len=lens)
    q = numbers(batch, case.num_heads, q_len, case.head_dim, device=device)
    shape = (1, case.num_kv_heads, num_pages * case.page_size, case.head_dim)
    pools = [
        (numbers(*shape, device=device), numbers(*shape, device=device))
        for _ in range(effort.pools_for(case.kv_bytes))
    ]
    gqa = case.num_heads != case.num_kv_heads
    torch.compiler.reset()  # or sizes that changed would be compiled as if they varied
    attend = torch.compile(functools.partial(flex_attention, enable_gqa=gqa), dynamic=False)
    step = functools.partial(attend, block_mask=mask, kernel_options=kernel_options)
    return time_steps(step, q, pools, effort, row)


def flex_blocks(case: BenchCase) -> tuple[tuple[int, int], dict[str, Any]]:
    """The blocks of its mask, and what its kernels are told of them.

    A block is of 128 queries also where there is one: the kernel for few queries pads them
    to 16 or more, and takes blocks that this divides. That kernel cuts its blocks of keys
    to a page by itself, the one for many does not.
    """
    options = {} if case.is_decode else dict(BLOCK_N=min(64, case.page_size))
    return (128, case.page_size), options


def _page_table(case: BenchCase, device: str) -> PagedAttention:
    """The pages of each row in random places."""
    batch, pages = len(case.kv_lens), case.pages_per_seq
    table = PagedAttention(batch * pages, case.page_size, batch, device=device)
    order = torch.randperm(batch * pages, device=device).reshape(batch, pages)
    table.page_table[:, :pages] = order
    logical = torch.arange(pages, device=device).expand(batch, pages)
    table.physical_to_logical.scatter_(1, order, logical)
    return table


def attention_rows(cases: list[BenchCase], device: str) -> Iterator[tuple]:
    """What is to be timed, in order: a function, its case and the row to be filled."""
    backends = GPU_BACKENDS if device == "cuda" else CPU_BACKENDS
    cases = [case for case in cases if case.dtype == "bfloat16"]
    for case, backend in itertools.product(cases, backends):
        yield sdpa, case, row_of(case, "torch-sdpa-contiguous", backend)
    for case in cases:  # last, since each takes long to compile
        yield flex, case, row_of(case, "torch-flex-paged")


# --- Ceilings


def ceiling_rows(device: str, effort: Effort, *, dry_run: bool) -> Iterator[Row]:
    """The bandwidth of a copy, and the speed of a matrix product."""
    size = 2**20 if dry_run else 2**31
    source, target = numbers(size, device=device), numbers(size, device=device)
    row = Row("ceilings", "copy", "torch", "", "skipped")
    row = time_steps(lambda out, x: target.copy_(x), source, [(source,)], effort, row)
    yield row.moving(2 * 2 * size, 0)
    del source, target
    n = 256 if dry_run else 8192
    # So scaled that the numbers stay of one size.
    a, b = numbers(n, n, device=device), numbers(n, n, device=device) / n**0.5
    row = Row("ceilings", "matmul", "torch", "", "skipped")
    yield time_steps(torch.matmul, a, [(b,)], effort, row).moving(0, 2 * n**3)


def rows_of(arguments: argparse.Namespace) -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    effort = REHEARSAL if arguments.dry_run else Effort()
    clock = Clock(arguments.seconds / 60)
    if arguments.part == "ceilings":
        yield from ceiling_rows(device, effort, dry_run=arguments.dry_run)
        return
    cases = cases_of(arguments.part, dry_run=arguments.dry_run)
    if arguments.cases:
        cases = [case for case in cases if case.name in arguments.cases]
    for i, (function, case, row) in enumerate(attention_rows(cases, device)):
        if i < arguments.first:
            continue
        if clock.seconds_left < 0:
            yield dataclasses.replace(row, reason="the time was up")
            continue
        print(json.dumps({"begun": i, "row": dataclasses.asdict(row)}), flush=True)
        try:
            yield function(case, device, effort, row).moving(case.kv_bytes, case.flops)
        except RuntimeError as error:
            if REFUSAL not in str(error):
                raise
            said = " ".join(str(error).split())[:200]
            yield dataclasses.replace(row, status="absent", reason=said)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--first", type=int, default=0)
    torch.manual_seed(0)
    about = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    print(json.dumps({"about": about}), flush=True)
    for row in rows_of(parser.parse_args()):
        print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    main()
