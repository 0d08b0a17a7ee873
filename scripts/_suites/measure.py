"""Times sides in turn, and sums up what was timed."""

import concurrent.futures
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np


class Lost(Exception):
    """A side that cannot be timed any more; says why."""


def in_turn(
    sides: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    seconds: float = 60.0,
    lost: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Runs every side once a round, so that what else the machine does disturbs all alike.
    Each round has an order of its own, so that none always follows the same one; the
    orders are the same every time.

    **Arguments:**

    - `sides`: by name, what does its work once and gives the seconds that it took.
    - `rounds`: so many at most.
    - `seconds`: after which no other round begins; three take place in any case.
    - `lost`: takes the reasons of sides that raise a `Lost`, which are left out from then
        on. Without it the first one ends all.

    **Returns:**

    The seconds of each round, by side.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.monotonic()
    orders = random.Random(0)
    for i in range(rounds):
        if i >= 3 and time.monotonic() - start > seconds:
            break
        for name in orders.sample(names, len(names)):
            try:
                times[name].append(sides[name]())
            except Lost as error:
                if lost is None:
                    raise
                lost[name] = str(error)
        names = [name for name in names if not lost or name not in lost]
    return {name: times[name] for name in names}


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


def read_ceiling(num_bytes: int = 128 * 2**20, *, seconds: float = 2.0) -> float:
    """Bytes a second at which all cores together read memory: the upper bound of whatever
    reads each byte once, as decoding does with weights, keys and values.

    Each core takes the maximum of its part of an array that no cache holds; NumPy does
    that in vectors, and without Python's lock. The fastest of all readings within some
    seconds counts: what else the machine does can only slow one down.
    """
    array = np.ones(num_bytes // 4, np.float32)
    parts = np.array_split(array, num_cores())
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        times: list[float] = []
        while sum(times) < seconds:
            times.append(timed(lambda: list(pool.map(np.max, parts))))
    return array.nbytes / min(times)
