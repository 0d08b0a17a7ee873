"""Times repeats of some calls, and tells when a part of the benchmark must end."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    """Of one call, in microseconds: over the repeats."""

    median_us: float
    fastest_us: float
    slowest_us: float


class Clock:
    """When a part of the benchmark must end."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is timed.

    - `num_calls`: of one compiled program, at least.
    - `repeats`: so often is timed, after a run to warm up where `seconds` is not 0.
    - `seconds`: the program is run so often each time that it takes as long.
    - `num_pools`: read in turn, at least.
    - `cache_bytes`: all pools together hold as much, so that none is still in the L2 cache
        when its turn comes again: three times the 50 MB of an H100.
    """

    num_calls: int = 21
    repeats: int = 5
    seconds: float = 5e-3
    num_pools: int = 3
    cache_bytes: int = 150_000_000

    def pools_for(self, num_bytes: int) -> int:
        """How many, of so many bytes each."""
        return max(self.num_pools, -(-self.cache_bytes // num_bytes))


REHEARSAL = Effort(num_calls=1, repeats=1, seconds=0.0, num_pools=1, cache_bytes=0)


def timed(run: Callable[[int], None], num_calls: int, effort: Effort) -> Timing:
    """Of one of the `num_calls` calls that `run` makes as often as it is told, before it
    waits for all."""
    num_runs = 1
    if effort.seconds > 0:  # a rehearsal, whose calls may take a minute, is not warmed up
        run(1)
        start = time.perf_counter()
        run(1)
        num_runs = max(1, math.ceil(effort.seconds / (time.perf_counter() - start)))
    num_calls *= num_runs
    times = []
    for _ in range(effort.repeats):
        start = time.perf_counter()
        run(num_runs)
        times.append(1e6 * (time.perf_counter() - start) / num_calls)
    return Timing(statistics.median(times), min(times), max(times))
