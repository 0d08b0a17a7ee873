"""The suite `startup`: from the start of a process to its first token, and what that time
goes to."""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .process import Broken, keeping, ours, Process
from .record import Row
from .shapes import checkpoint, CONFIGS
from .workloads import Workload


COLD, WARM = ", nothing compiled", ", all compiled before"
OURS = (f"paged{COLD}", f"paged{WARM}")
# Of the peers, those whose programs JAX can keep as well.
IN_JAX = ("eqx-zoo", "levanter")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the suite does.

    - `models`, `peers`, `absent`, `cache`, `out`, `about`: as in `generate.Plan`.
    - `rounds`: starts of each side, in turn.
    """

    models: tuple[tuple[str, str], ...]
    rounds: int
    peers: dict[str, list[str]]
    absent: dict[str, str]
    cache: pathlib.Path
    out: pathlib.Path
    about: dict[str, Any]


def run(plan: Plan) -> Iterator[Row]:
    for model, dtype in plan.models:
        with tempfile.TemporaryDirectory() as folder:
            yield from _start_all(plan, model, dtype, pathlib.Path(folder))


def _start_all(plan: Plan, model: str, dtype: str, folder: pathlib.Path) -> list[Row]:
    root = checkpoint(model, plan.cache)
    length = 128 if model != "tiny" else 8
    workload = Workload(f"first of {length}", (length,), max_new_tokens=1)
    (prompt,) = workload.tokens(CONFIGS[model].vocab_size)[1]
    log = plan.out / f"startup_{model}_{dtype}.log"
    starts = _both("paged", folder / "paged", lambda kept: ours("paged", log, kept))
    for name, command in plan.peers.items():
        start = functools.partial(Process, name, command, log)
        if name in IN_JAX:
            starts |= _both(name, folder / name, lambda kept, f=start: f(keeping(kept)))
        else:
            starts[name] = start
    case = f"{model} {dtype}, prompt of {length}"
    shape = {"model": model, "dtype": dtype, **workload.shape()}
    rows = {name: Row(case, shape, name) for name in starts}
    for _ in range(plan.rounds):
        for name, start in starts.items():
            if rows[name].reason:
                continue
            try:
                began = time.perf_counter()
                with contextlib.closing(start()) as process:
                    parts = _start(process, str(root), dtype, prompt, began)
                    if name in OURS:
                        process.ask("second")
                        parts["to the second"] = time.perf_counter() - began
                    else:
                        plan.about.update(process.ask("versions"))
            except Broken as error:
                if name in OURS:
                    raise
                rows[name] = Row(case, shape, name, reason=str(error))
                continue
            for part, seconds in parts.items():
                rows[name].seconds.setdefault(part, []).append(seconds)
    for row in rows.values():
        if not row.reason:
            row.figures["first_token_s"] = row.median("total")
    absent = [Row(case, shape, x, reason=why) for x, why in plan.absent.items()]
    return [*rows.values(), *absent]


def _both(
    name: str, kept: pathlib.Path, start: Callable[[pathlib.Path], Process]
) -> dict[str, Callable[[], Process]]:
    """A side before and after its programs are kept. In this order: what the first one
    compiles is there for the second one."""

    def cold() -> Process:
        shutil.rmtree(kept, ignore_errors=True)
        return start(kept)

    return {f"{name}{COLD}": cold, f"{name}{WARM}": lambda: start(kept)}


def _start(
    process: Process, root: str, dtype: str, prompt: list[int], began: float
) -> dict[str, float]:
    """The seconds of each part, since `began`."""
    process.ready()
    imported = time.perf_counter()
    process.ask("load", checkpoint=root, dtype=dtype)
    loaded = time.perf_counter()
    answer = process.ask("first", prompt=prompt)
    ended = time.perf_counter()
    return {
        "import": imported - began,
        "load": loaded - imported,
        "first call": ended - loaded,
        **answer,
        "total": ended - began,
    }
