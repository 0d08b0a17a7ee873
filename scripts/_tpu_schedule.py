"""Reads the schedule of a kernel as the TPU's compiler dumps it.

A **bundle** is what a core issues in one cycle. Read here is the listing made after the
allocation of registers, where a wait for a unit's answer is an empty bundle. The final
listing leaves such waits to the hardware, so that its length is not a time.

The **steady block** is what a kernel does again and again when it is under way: the
guarded region or loop with the most matrix operations, and among those the one that starts
the most copies from HBM in a straight line (a kernel that computes while the next block
arrives). Of several as good, one for each slot, the longest counts. In a kernel without
matrix operations it is the longest loop.

Counted   all its bundles, those of guarded regions in it included; an inner loop as often
          as the caller says.
          Around it, what a turn of the loop runs through on the way to it and back.
Not       other regions and loops beside it (blocks that are masked, the first fetch, the
          last wait); what a unit or the memory takes longer than the compiler assumes.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple


_BUNDLE = re.compile(
    r"^ *(?P<number>0x[0-9a-f]+|0) +(?:(?P<label>LH|LB|LE|PB|PF|CT):|:) *>* *\{", re.M
)
_BRANCH = re.compile(r"= sbr\.rel \([^)]*\) target bundleno = (\d+)")


def _operation(name: str) -> re.Pattern:
    """Finds an operation of a bundle, but not its name in a remark."""
    return re.compile(rf"(?:\{{|;;) +(?:%\S+ = )?{name}")


_MATRIX = _operation(r"vmat(?:mul|push|res)")
_COPY_IN = _operation(r"dma\.hbm_to_vmem")
_COPY_OUT = _operation(r"dma\.vmem_to_hbm")
_STORE_SPILL = _operation(r"vst \[vmem:\[#allocation\d+_spill")
_LOAD_SPILL = _operation(r"vld \[vmem:\[#allocation\d+_spill")


class Bundle(NamedTuple):
    """What is issued in one cycle. A label says where control arrives."""

    label: str | None
    text: str


class Region(NamedTuple):
    """The bundles from `first` to before `end`, which run in a loop or under a guard."""

    kind: Literal["loop", "guarded"]
    first: int
    end: int

    @property
    def cycles(self) -> int:
        return self.end - self.first

    def holds(self, other: "Region") -> bool:
        """Whether another one lies within and is smaller."""
        within = self.first <= other.first and other.end <= self.end
        return within and other.cycles < self.cycles


class Operations(NamedTuple):
    """How many of them some bundles hold."""

    matrix: int
    copies_in: int  # starts of copies from HBM to VMEM
    copies_out: int
    spill_stores: int  # of vector registers
    spill_loads: int


class Schedule(NamedTuple):
    """The bundles of a kernel and the regions among them, in order."""

    bundles: list[Bundle]
    regions: list[Region]

    @property
    def loops(self) -> list[Region]:
        return [region for region in self.regions if region.kind == "loop"]


class Steady(NamedTuple):
    """The steady block: what it runs, and cycles."""

    region: Region
    operations: Operations
    body: int  # of the block
    around: int  # that a turn of the loop around it takes besides
    outer: int  # that a turn of the loop around that takes besides


def read_schedule(listing: str) -> Schedule:
    """The schedule in the text of a dump."""
    found = list(_BUNDLE.finditer(listing))
    numbers = [int(match["number"], 16) for match in found]
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError("the listing's bundles are not numbered from 0 on")
    ends = [match.start() for match in found[1:]] + [len(listing)]
    bundles = [
        Bundle(match["label"], listing[match.start() : end])
        for match, end in zip(found, ends, strict=True)
    ]
    return Schedule(bundles, _regions_of(bundles))


def _regions_of(bundles: list[Bundle]) -> list[Region]:
    branches = [
        (at, int(match[1]))
        for at, bundle in enumerate(bundles)
        for match in _BRANCH.finditer(bundle.text)
    ]
    # The last branch back to a bundle closes the loop that begins there.
    back = {target: at for at, target in branches if target <= at}
    slots = _delay_slots(bundles, back.values())
    loops = [Region("loop", first, at + 1 + slots) for first, at in back.items()]
    guarded = [
        Region("guarded", at + 1 + slots, target)
        for at, target in branches
        if target > at + 1 + slots
    ]
    return sorted(loops + guarded, key=lambda region: (region.first, -region.end))


def _delay_slots(bundles: list[Bundle], loop_ends: Iterable[int]) -> int:
    """How many bundles after a branch still run before it is taken: after that of a loop,
    those up to the label where its exit arrives."""
    exits = [at for at, bundle in enumerate(bundles) if bundle.label in ("PF", "LE")]
    gaps = [at - end - 1 for end in loop_ends for at in exits if at > end]
    return min(gaps, default=0)


def operations_of(schedule: Schedule, region: Region) -> Operations:
    """The operations in a region, each once."""
    text = "".join(bundle.text for bundle in schedule.bundles[region.first : region.end])
    patterns = (_MATRIX, _COPY_IN, _COPY_OUT, _STORE_SPILL, _LOAD_SPILL)
    return Operations(*(len(pattern.findall(text)) for pattern in patterns))


def whole(schedule: Schedule) -> Region:
    """All bundles."""
    return Region("guarded", 0, len(schedule.bundles))


def steady_of(
    schedule: Schedule, turns: tuple[int, ...] = (), single: bool = False
) -> Steady:
    """The steady block of a kernel. `turns` says how often each of the loops in it is run,
    in order; `single` asks for the next largest, where the largest is several in a loop."""
    region = _steady_region(schedule, single)
    inner = [loop for loop in schedule.loops if region.holds(loop)]
    if len(inner) != len(turns):
        raise ValueError(
            f"the steady block has {len(inner)} inner loops, but turns are given for"
            f" {len(turns)}"
        )
    body, operations = region.cycles, operations_of(schedule, region)
    for loop, count in zip(inner, turns, strict=True):
        body += (count - 1) * loop.cycles
        once = operations_of(schedule, loop)
        operations = Operations(
            *(all_ + (count - 1) * x for all_, x in zip(operations, once, strict=True))
        )
    chain = [loop for loop in schedule.loops if loop.holds(region)]
    chain = [region, *sorted(chain, key=lambda loop: loop.cycles)]
    own = [_own(schedule, outer, inner) for inner, outer in itertools.pairwise(chain)]
    around, outer = [*own, 0, 0][:2]
    return Steady(region, operations, body, around, outer)


def _steady_region(schedule: Schedule, single: bool) -> Region:
    matrix = {region: operations_of(schedule, region).matrix for region in schedule.regions}
    smallest = [
        region
        for region, count in matrix.items()
        if count and not any(matrix[x] and region.holds(x) for x in matrix)
    ]
    if not smallest:
        return max(schedule.loops, key=lambda loop: loop.cycles)

    if single:
        most = max(matrix[region] for region in smallest)
        smallest = [region for region in smallest if matrix[region] < most]
    return max(
        smallest,
        key=lambda x: (matrix[x], _straight_copies(schedule, x), x.cycles),
    )


def _straight_copies(schedule: Schedule, region: Region) -> int:
    """Starts of copies from HBM that are in no loop of the region."""
    inner = [loop for loop in schedule.loops if region.holds(loop)]
    in_loops = sum(operations_of(schedule, loop).copies_in for loop in inner)
    return operations_of(schedule, region).copies_in - in_loops


def _own(schedule: Schedule, outer: Region, inner: Region) -> int:
    """Cycles of `outer` on the way to `inner` and back."""
    beside = [
        region
        for region in schedule.regions
        if outer.holds(region) and not region.holds(inner)
    ]
    skipped: set[int] = set()
    for region in (inner, *beside):
        skipped.update(range(region.first, region.end))
    return outer.cycles - len(skipped)
