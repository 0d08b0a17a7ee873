"""Compiles a case for a GPU and tells what its kernels take."""

import dataclasses

from ._gpu_cases import CASES, KERNELS
from ._gpu_compile import compile_for


@dataclasses.dataclass(frozen=True)
class GPUReport:
    """A compiled case.

    - `registers`, `shared_bytes`: the most that one of its own kernels takes: of a thread,
        and of a block.
    - `spill_bytes`: of all kernels of the program, those that XLA adds included.
    - `copies_in_flight`: of the kernel that reads the cache, as
        [`scripts._gpu_kernels.GPUKernel`][] has it.
    - `uses_wgmma`: of the same kernel.
    """

    case: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    copies_in_flight: int | None
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
        uses_wgmma=reader.uses_wgmma,
    )
