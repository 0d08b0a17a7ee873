"""The suite `serve`: more prompts than rows, with answers of many lengths, by ours and by
peers."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from .agree import Asked, Audit, auditor, check_greedy, compare, Tokens, Wrong
from .measure import in_turn
from .process import Broken, ours, Process
from .record import Row
from .shapes import checkpoint, CONFIGS
from .workloads import QUEUE, Queue, SHORT_QUEUE, SMALL_QUEUE


# By name, what each asks of one process of ours.
OURS = {"in turn": {"in_turn": True}, "batch after batch": {"in_turn": False}}
# Of the peers, what serves a queue by itself.
PEERS = ("transformers continuous",)
# Larger ones take too long: thousands of tokens a run.
MODELS = ("tiny", "embedded", "135m")
DTYPE = "float32"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the suite does; `peers`, `absent`, `cache`, `out`, `about` as in
    `generate.Plan`.

    - `models`: names of `CONFIGS`.
    """

    models: tuple[str, ...]
    quick: bool
    peers: dict[str, list[str]]
    absent: dict[str, str]
    cache: pathlib.Path
    out: pathlib.Path
    about: dict[str, Any]

    def queue(self, model: str) -> Queue:
        if model == "tiny":
            return SMALL_QUEUE
        return QUEUE if model == "embedded" and not self.quick else SHORT_QUEUE


def run(plan: Plan) -> Iterator[Row]:
    for model in plan.models:
        with contextlib.ExitStack() as stack:
            yield from _timed_together(plan, model, stack)


def _timed_together(plan: Plan, model: str, stack: contextlib.ExitStack) -> Iterator[Row]:
    queue = plan.queue(model)
    case = f"{model} {DTYPE} {queue.name}"
    prompts, limits = queue.prompts(CONFIGS[model].vocab_size)
    asked = {"prompts": prompts, "limits": limits, "num_rows": queue.num_rows}
    sides = {name: stack.enter_context(x) for name, x in _processes(plan, model).items()}
    runs = {name: _Run(x, {**asked, **OURS.get(name, {})}) for name, x in sides.items()}
    root = str(checkpoint(model, plan.cache))
    with auditor(root, DTYPE, plan.cache) as audit:
        notes, reasons = _compare(plan, case, root, runs, Asked(prompts, limits), audit)
    lost: dict[str, str] = {}
    times = in_turn(
        {name: runs[name].seconds for name in notes},
        rounds=3 if plan.quick else 5,
        lost=lost,
    )
    for name in set(lost) & set(OURS):
        raise Broken(f"{name}: {lost[name]}")
    shape = {"model": model, "dtype": DTYPE, **dataclasses.asdict(queue)}
    row = functools.partial(Row, case, shape)
    for name, seconds in times.items():
        found = row(name, seconds={"all": seconds}, note=notes[name])
        found.figures["tok_s"] = sum(limits) / found.median("all")
        yield found
    absent = {x: reason for x, reason in plan.absent.items() if x in PEERS}
    for name, reason in {**absent, **reasons, **lost}.items():
        yield row(name, reason=reason)


def _processes(plan: Plan, model: str) -> dict[str, Process]:
    def log(name: str) -> pathlib.Path:
        return plan.out / f"serve_{model}_{name}.log"

    kept = plan.cache / "jax"
    peers = [x for x in plan.peers if x in PEERS]
    return {
        **{name: ours("paged", log(name), kept) for name in OURS},
        **{x: Process(x, plan.peers[x], log(x)) for x in peers},
    }


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a process is asked to do."""

    process: Process
    asked: dict[str, Any]

    def tokens(self) -> list[list[int]]:
        return self.process.ask("serve", **self.asked)["tokens"]

    def seconds(self) -> float:
        return self.process.ask("serve", **self.asked)["seconds"]


def _compare(
    plan: Plan, case: str, root: str, runs: dict[str, _Run], asked: Asked, audit: Audit
) -> tuple[dict[str, str], dict[str, str]]:
    """What there is to note of the sides that make the right tokens, those of the first;
    and why the others are not timed."""
    notes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    reference: Tokens = []
    for name, run in runs.items():
        try:
            run.process.ready()
            if name not in OURS:
                plan.about.update(run.process.ask("versions"))
            run.process.ask("load", checkpoint=root, dtype=DTYPE)
            tokens = run.tokens()
        except Broken as error:
            if name in OURS:
                raise Broken(f"{name}, {case}: {error}") from None
            reasons[name] = str(error)
            continue
        if not reference:
            reference = tokens
            check_greedy(case, asked, tokens, audit, DTYPE)
        right, note = compare(tokens, reference, asked, audit, DTYPE)
        if right:
            notes[name] = note
        elif name in OURS:
            raise Wrong(f"{name}, {case}: {note}")
        else:
            reasons[name] = f"wrong: {note}"
    return notes, reasons
