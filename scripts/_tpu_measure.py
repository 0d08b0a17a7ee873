"""Compiles a case in a process of its own, and counts what the compiler's dumps say.

`python -m scripts._tpu_measure CASE GENERATION FOLDER` is that process. It leaves the
dumps in the folder, and beside them what the executable tells. libtpu reads the flags that
ask for dumps once, when it is loaded.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from ._tpu_cases import Case, CASES
from ._tpu_chips import CHIPS
from ._tpu_compile import compile_for, large_copies
from ._tpu_schedule import operations_of, read_schedule, Steady, steady_of, whole


ROOT = pathlib.Path(__file__).resolve().parents[1]
ABOUT_FILE = "executable.json"
# What is dumped: the schedule, what is encoded of it, the memory that it uses, and how full
# its slots are.
PASSES = (SCHEDULE, FINAL, MEMORY, SLOTS) = (
    "packed-bundles-post-ra",
    "final_bundles",
    "post-delay-converter",
    "pre-delay_hlo-static-per-bundle-utilization",
)


class CompileError(RuntimeError):
    """The compiler's refusal, in one line."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled case. Cycles are those of 1,024 tokens of all heads, counted in the
    schedule, not measured."""

    case: str
    generation: str
    compile_seconds: float  # the writing of the dumps included
    vmem_bytes: int
    final_bundles: int
    spill_stores: int  # of vector registers, in all of the kernel
    spill_loads: int
    steady_spill_stores: int  # that a steady block runs
    steady_spill_loads: int
    steady_tokens: int  # of a steady block
    body_cycles: float  # the steady block alone
    loop_cycles: float  # with the loop around it
    row_cycles: float  # of whole rows: with the loop over rows as well
    floor_cycles: float  # of the memory at its peak
    matrix_use: float  # of the slots of the matrix units, in the steady block
    alias_bytes: int
    temp_bytes: int
    large_copies: int

    @property
    def slack(self) -> float:
        """How often the instructions of whole rows fit the time of the memory."""
        return self.floor_cycles / self.row_cycles


def measure(case_name: str, generation: str) -> Report:
    """Compiles and counts. Raises `CompileError`."""
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as name:
        folder = pathlib.Path(name)
        _compile_apart(case_name, generation, folder)
        return _report(case_name, generation, folder)


def _compile_apart(case_name: str, generation: str, folder: pathlib.Path) -> None:
    flags = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        f" --xla_jf_dump_llo_pass_label_regex={'|'.join(PASSES)}"
    )
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    done = subprocess.run(
        [sys.executable, "-m", "scripts._tpu_measure", case_name, generation, str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": f"{given} {flags}"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise CompileError(_refusal(done.stderr))


def _refusal(stderr: str) -> str:
    """The first line of the last error, or the last line of all."""
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]+Error: ", line)]
    return [*lines[-1:], *errors][-1]


def _report(case_name: str, generation: str, folder: pathlib.Path) -> Report:
    case = CASES[case_name]
    schedule = read_schedule(_dump(folder, case, SCHEDULE))
    steady = steady_of(schedule, case.turns.get(generation, ()), single=case.single)
    did = steady.operations
    num_copies = did.copies_out if case.copies_out else did.copies_in
    tokens = num_copies // 2 * case.copy_tokens  # as many of keys as of values
    around_tokens = case.around_tokens.get(generation, tokens)
    body, loop = steady.body, steady.body + steady.around * tokens / around_tokens
    cores = CHIPS[generation].num_cores if case.by_head else 1
    row = loop + steady.outer * tokens / case.row_tokens
    final = _dump(folder, case, FINAL)
    everywhere = operations_of(schedule, whole(schedule))
    return Report(
        case=case_name,
        generation=generation,
        vmem_bytes=_vmem_bytes(_dump(folder, case, MEMORY)),
        final_bundles=len(read_schedule(final).bundles),
        spill_stores=everywhere.spill_stores,
        spill_loads=everywhere.spill_loads,
        steady_spill_stores=did.spill_stores,
        steady_spill_loads=did.spill_loads,
        steady_tokens=tokens,
        body_cycles=body * 1024 / tokens,
        loop_cycles=loop * 1024 / tokens,
        row_cycles=row * 1024 / tokens,
        floor_cycles=CHIPS[generation].floor_cycles(1024 * case.token_bytes // cores),
        matrix_use=_matrix_use(_dump(folder, case, SLOTS), steady),
        **json.loads((folder / ABOUT_FILE).read_text()),
    )


def _dump(folder: pathlib.Path, case: Case, what: str) -> str:
    """The text of the kernel's dump of a pass, which is numbered in its name."""
    (path,) = folder.glob(f"*-{case.kernel}.*-[0-9][0-9]-{what}.txt")
    return path.read_text(errors="replace")


def _vmem_bytes(listing: str) -> int:
    """Where the last allocation ends."""
    pattern = r"space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)"
    ends = [int(size, 0) + int(at, 0) for size, at in re.findall(pattern, listing)]
    return max(ends, default=0)


def _matrix_use(listing: str, steady: Steady) -> float:
    """The share of the matrix units' slots that the steady block fills. The dump has the
    slots' names and numbers in its second and third line, and from the fifth on a bundle a
    line."""
    lines = listing.splitlines()
    column = [name.strip() for name in lines[1].split(",")].index("MXU")
    rows = lines[4:][steady.region.first : steady.region.end]
    used = sum(int(row.split()[column]) for row in rows)
    return used / int(lines[2].split()[column]) / steady.body


def main() -> None:
    """Compiles one case, where the dumps are asked for."""
    case_name, generation, folder = sys.argv[1:]
    case = CASES[case_name]
    start = time.perf_counter()
    compiled = compile_for(generation, case.function, case.args, case.donate)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "libtpu tells what memory is needed"
    about = {
        "compile_seconds": seconds,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        # As large as a pool, the largest argument.
        "large_copies": len(large_copies(compiled, max(x.size for x in case.args))),
    }
    (pathlib.Path(folder) / ABOUT_FILE).write_text(json.dumps(about))


if __name__ == "__main__":
    main()
