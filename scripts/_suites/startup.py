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

from .process import Broken, ours, Process
from .record import Row
from .shapes import checkpoint, CONFIGS
from .workloads import Workload


OURS = ("paged, nothing compiled", "paged, all compiled before")


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
    kept = folder / "jax"

    def cold() -> Process:
        shutil.rmtree(kept, ignore_errors=True)
        return ours("paged", log, kept)

    starts: dict[str, Callable[[], Process]] = {
        # In this order: what the first one compiles is there for the second one.
        OURS[0]: cold,
        OURS[1]: functools.partial(ours, "paged", log, kept),
    }
    for name, command in plan.peers.items():
        starts[name] = functools.partial(Process, name, command, log)
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
