"""Times sides in turn, and sums up what was timed."""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np


def in_turn(
    sides: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float = 60.0
) -> dict[str, list[float]]:
    """Runs every side once a round, so that what else the machine does disturbs all alike.

    **Arguments:**

    - `sides`: by name, what does its work once and gives the seconds that it took.
    - `rounds`: so many at most.
    - `seconds`: after which no other round begins; three take place in any case.

    **Returns:**

    The seconds of each round, by side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    start = time.monotonic()
    for i in range(rounds):
        if i >= 3 and time.monotonic() - start > seconds:
            break
        for name, run in sides.items():
            times[name].append(run())
    return times


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes, which must wait for its own result."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """The median in the middle."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def read_ceiling(num_bytes: int = 128 * 2**20, *, rounds: int = 15) -> float:
    """Bytes a second at which all cores together read memory: the upper bound of whatever
    reads each byte once, as decoding does with weights, keys and values.

    Each core takes the maximum of its part of an array that no cache holds; NumPy does
    that in vectors, and without Python's lock.
    """
    array = np.ones(num_bytes // 4, np.float32)
    parts = np.array_split(array, num_cores())
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        times = [timed(lambda: list(pool.map(np.max, parts))) for _ in range(rounds)]
    return array.nbytes / min(times)
