"""The calls that are compiled for GPUs, each kernel with each form of cache it takes, and
what their kernels take."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import eqx_paged
import jax
import jax.numpy as jnp

from ._gpu_compile import compile_for
from ._gpu_targets import TARGETS


NUM_SEQS = 64
NUM_KV_HEADS = 8
MAX_LEN = 4096
NUM_TOKENS = 2048  # of a mixed step, padding included
LANES = 128
# What is named in the program of each operation, kernels of XLA's own apart.
KERNELS = {
    "decode": ("paged_attention", "merge_parts"),
    "mixed": ("ragged_paged_attention", "paged_attention", "merge_parts"),
}
FUNCTIONS = {
    "decode": eqx_paged.paged_attention,
    "mixed": eqx_paged.ragged_paged_attention,
}
DTYPES = {
    "bf16": jnp.bfloat16,
    "f32": jnp.float32,
    "int8": jnp.int8,
    "fp8": jnp.float8_e4m3fn,
}


@dataclasses.dataclass(frozen=True)
class GPUCase:
    """A call with one kernel, of which there is one for each backend.

    - `group`: how many query heads share a kv head.
    - `dtype`: of the pages, one of `DTYPES`; queries are float32 if these are, else
        bfloat16.
    """

    backend: str
    operation: str
    head_dim: int
    page_size: int
    group: int
    dtype: str

    @property
    def name(self) -> str:
        sizes = f"d{self.head_dim}-p{self.page_size}-g{self.group}"
        return f"{self.backend}-{self.operation}-{sizes}-{self.dtype}"

    @property
    def is_usual(self) -> bool:
        """Whether at most one of its sizes is not the usual one."""
        usual = (self.head_dim == 128, self.page_size == 16, self.group == 4)
        return sum(usual) >= 2

    @property
    def architectures(self) -> tuple[str, ...]:
        """Those that have the instructions: only the later converts float8. For the earlier
        one group and page size, of decode two, stand for all."""
        sizes = (16, 64) if self.operation == "decode" else (16,)
        stands = self.page_size in sizes and self.group == 4
        if self.backend == "triton" and self.dtype != "fp8" and stands:
            return tuple(TARGETS)
        return ("sm_90a",)

    @property
    def function(self) -> Callable:
        return functools.partial(
            FUNCTIONS[self.operation], implementation="pallas_gpu", **BACKENDS[self.backend]
        )

    @property
    def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Those that both functions take, and those of a mixed step."""
        decode = self.operation == "decode"
        dtype = jnp.dtype(DTYPES[self.dtype])
        q_dtype = dtype if self.dtype == "f32" else jnp.dtype(jnp.bfloat16)
        pages_per_seq = MAX_LEN // self.page_size
        # As a cache stores it: a small head_dim in rows of 128.
        lanes = max(self.head_dim, LANES)
        pages = jax.ShapeDtypeStruct(
            (
                NUM_SEQS * pages_per_seq,
                NUM_KV_HEADS,
                self.page_size * self.head_dim // lanes,
                lanes,
            ),
            dtype,
        )
        heads = NUM_KV_HEADS * self.group
        num_queries = NUM_SEQS if decode else NUM_TOKENS
        q = jax.ShapeDtypeStruct((num_queries, heads, self.head_dim), q_dtype)
        args = (q, pages, pages, _ints(NUM_SEQS), _ints(NUM_SEQS, pages_per_seq))
        return args if decode else (*args, _ints(NUM_SEQS + 1), _ints())


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.int32))


# The options that choose each backend.
BACKENDS: dict[str, dict[str, Any]] = {
    "triton": {},
    "mosaic": dict(config=eqx_paged.MosaicGPUConfig()),
}
SIZES = (64, 128, 256), (16, 64, 128), (1, 4, 8)  # head_dim, page_size, group
CASES = {
    case.name: case
    for case in itertools.starmap(
        GPUCase, itertools.product(BACKENDS, FUNCTIONS, *SIZES, DTYPES)
    )
    # Queries and pages of the Mosaic kernels are of one dtype, of 16 bits.
    if case.backend == "triton" or case.dtype == "bf16"
}


@dataclasses.dataclass(frozen=True)
class GPUReport:
    """A compiled case.

    - `registers`, `shared_bytes`: the most that one of its own kernels takes: of a thread,
        and of a block.
    - `spill_bytes`: of all kernels of the program, those that XLA adds included.
    - `copies_in_flight`: of the kernel that reads the cache, as
        [`scripts._gpu_kernels.GPUKernel`][] has it.
    - `fetches_apart`, `uses_wgmma`: of the same kernel.
    """

    case: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    copies_in_flight: int | None
    fetches_apart: bool
    uses_wgmma: bool


def measure(case_name: str, architecture: str) -> GPUReport:
    """Compiles a case of `CASES` for one of its architectures."""
    case = CASES[case_name]
    kernels = compile_for(architecture, case.function, case.args).kernels
    names = KERNELS[case.operation]
    own = [kernel for kernel in kernels if kernel.name.startswith(names)]
    assert own, f"{case_name} has none of {names}, but {[x.name for x in kernels]}"
    reader = next(kernel for kernel in own if kernel.name.startswith(names[0]))
    return GPUReport(
        case=case_name,
        architecture=architecture,
        registers=max(kernel.registers for kernel in own),
        shared_bytes=max(kernel.shared_bytes for kernel in own),
        spill_bytes=sum(kernel.spill_bytes for kernel in kernels),
        copies_in_flight=reader.copies_in_flight,
        fetches_apart=reader.fetches_apart,
        uses_wgmma=reader.uses_wgmma,
    )
