"""What a compiled GPU kernel takes of a streaming multiprocessor, and how it waits."""

import dataclasses
import pathlib
import re
import subprocess


@dataclasses.dataclass(frozen=True)
class GPUKernel:
    """A kernel of a compiled program.

    - `registers`: of a thread.
    - `shared_bytes`: of a block, of shared memory.
    - `spill_stores`, `spill_loads`: bytes of registers that are put into memory and taken
        back, for want of registers.
    - `ptx`: the code.
    """

    name: str
    registers: int
    shared_bytes: int
    spill_stores: int
    spill_loads: int
    ptx: str

    @property
    def spill_bytes(self) -> int:
        return self.spill_stores + self.spill_loads

    @property
    def copies_in_flight(self) -> int | None:
        """How many groups of asynchronous copies to shared memory may be under way where a
        loop waits for others: the fewest of all loops that read the GPU's memory, and 0
        where one waits for what it has just asked for. None: there is no such loop, or
        copies are of whole tiles (TMA)."""
        found = []
        for loop in self._loops:
            if waits := re.findall(r"cp\.async\.wait_group\s+(\d+)", loop):
                found.append(min(map(int, waits)))
            elif "ld.global" in loop and "cp.async.bulk.tensor" not in loop:
                found.append(0)
        return min(found, default=None)

    @property
    def fetches_apart(self) -> bool:
        """Whether some loops copy tiles to shared memory and others multiply them, none
        both, so that neither waits for the other's to be done."""
        copies = r"cp\.async\.bulk\.tensor\S*\.shared::cluster"
        fetching = {loop for loop in self._loops if re.search(copies, loop)}
        multiplying = {loop for loop in self._loops if "wgmma.mma_async" in loop}
        return bool(fetching and multiplying) and fetching.isdisjoint(multiplying)

    @property
    def uses_wgmma(self) -> bool:
        """Whether a warpgroup's matrix products are asynchronous, as Hopper has them."""
        return "wgmma.mma_async" in self.ptx

    @property
    def _loops(self) -> list[str]:
        """The code of its innermost loops."""
        lines, labels, spans = self.ptx.splitlines(), {}, []
        for i, line in enumerate(lines):
            if label := re.match(r"(\$\w+):", line):
                labels[label[1]] = i
            branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
            if branch and branch[1] in labels:
                spans.append(range(labels[branch[1]], i))
        # One that jumps back to what comes before other loops need not be a loop at all.
        inner = [
            x for x in spans if not any(y[0] in x and y[-1] in x for y in spans if y != x)
        ]
        return ["\n".join(lines[x.start : x.stop]) for x in inner]


def kernels_in(
    folder: pathlib.Path, ptxas: pathlib.Path, architecture: str
) -> tuple[GPUKernel, ...]:
    """The kernels of the program whose compilation was dumped to `folder`."""
    shared = _shared_bytes(folder)
    kernels = []
    for path in sorted(folder.glob("*.ptx")):
        for name, said in _reports(path, ptxas, architecture):
            stores, loads, registers = (
                int(_found(pattern, said))
                for pattern in (
                    r"(\d+) bytes spill stores",
                    r"(\d+) bytes spill loads",
                    r"Used (\d+) registers",
                )
            )
            kernels.append(
                GPUKernel(name, registers, shared[name], stores, loads, path.read_text())
            )
    return tuple(kernels)


def _reports(
    path: pathlib.Path, ptxas: pathlib.Path, architecture: str
) -> list[tuple[str, str]]:
    """The names of the kernels in a file, and what ptxas says about each."""
    command = [ptxas, "-v", f"-arch={architecture}", path, "-o", path.with_suffix(".cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = (done.stdout + done.stderr).split("Compiling entry function '")[1:]
    return [(part.split("'")[0], part) for part in parts]


def _shared_bytes(folder: pathlib.Path) -> dict[str, int]:
    """The shared memory that each kernel is launched with."""
    found = {}
    # XLA's list of launches, of its own kernels and of Triton's.
    for path in folder.glob("*.thunk_sequence.txt"):
        launches = re.findall(r"(\S+) grid: .*shared_memory: (\d+)", path.read_text())
        found |= {name: int(size) for name, size in launches}
    # Mosaic's module, which launches its kernel itself.
    for path in folder.glob("*.before_layout_inference.txt"):
        text = path.read_text()
        name = _found(r"func\.func @(\w+)\(", text) + "_kernel"
        constant = _found(r"dynamic_shared_memory_size %(\w+)", text)
        found[name] = int(_found(rf"%{constant} = arith\.constant (\d+)", text))
    return found


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"a dump has no {pattern!r}"
    return match[1]
