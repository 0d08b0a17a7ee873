"""How much memory is left for a model."""

import os
import pathlib
import re
from collections.abc import Iterator

import jax


# Where each version of Linux's control groups has its folders, and what it calls a group's
# limit, what the group uses, and how much of that are files, which give way.
_VERSION_1 = (
    *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "total_inactive_file",
)
_VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def free_memory() -> int:
    """The bytes that the first device can still give, as far as it tells, else those of
    this machine."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory(pathlib.Path("/"))


def host_memory(root: pathlib.Path) -> int:
    """The bytes that this machine can still give to this process.

    **Arguments:**

    - `root`: of the file system, in which Linux tells it.

    **Returns:**

    What is free on the machine, or what the control groups of the process, such as a
    container's, leave it if that is less.
    """
    return max(0, min([_available(root), *_left_by_groups(root)]))


def _available(root: pathlib.Path) -> int:
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        found = _number("MemAvailable:", meminfo)
        if found is not None:
            return found * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_by_groups(root: pathlib.Path) -> Iterator[int]:
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, *names = _VERSION_1 if controllers else _VERSION_2
        # A container may see its own group as the topmost one, whatever the path says.
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for part in (group, *group.parents):
            yield from _left_by(root / mount / part, *names)


def _left_by(folder: pathlib.Path, limit: str, used: str, files: str) -> Iterator[int]:
    if not (folder / limit).is_file():
        return
    most = (folder / limit).read_text().strip()
    if most != "max":
        dropped = _number(files, folder / "memory.stat") or 0
        yield int(most) - int((folder / used).read_text()) + dropped


def _number(name: str, path: pathlib.Path) -> int | None:
    found = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)
    return None if found is None else int(found[1])
