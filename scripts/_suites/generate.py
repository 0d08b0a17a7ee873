"""The suite `generate`: greedy generation with random weights, by ours and by peers."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from .agree import Asked, auditor, check_greedy, compare, Wrong
from .measure import in_turn
from .process import Broken, ours, Process
from .record import memory_bytes, Row
from .shapes import checkpoint, CONFIGS, itemsize, num_weights
from .workloads import chosen_stops, QUICK, REHEARSAL, SHORT, Workload, WORKLOADS


OURS = ("paged", "contiguous")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the suite does.

    - `models`: a name of `CONFIGS` and a dtype each.
    - `quick`: without what takes long.
    - `peers`: by name, a command that serves each.
    - `absent`: by name, why a peer is not among them.
    - `cache`: the folder of checkpoints and compiled programs.
    - `out`: where the sides' stderr goes.
    - `about`: gives the ceiling, and takes the peers' versions.
    """

    models: tuple[tuple[str, str], ...]
    quick: bool
    peers: dict[str, list[str]]
    absent: dict[str, str]
    cache: pathlib.Path
    out: pathlib.Path
    about: dict[str, Any]

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 7

    def workloads(self, model: str, dtype: str) -> list[Workload]:
        if model == "tiny":
            return list(REHEARSAL)
        if self.quick:
            return list(QUICK)
        if model == "1b":  # whose steps take long
            return list(SHORT[:1])
        return list(WORKLOADS if dtype == "float32" else SHORT)


def run(plan: Plan) -> Iterator[Row]:
    for model, dtype in plan.models:
        groups = _groups(plan, model, dtype)
        for peers in groups:
            # Only what ran in turn is compared, and cases are compared by their names.
            group = f", beside {' and '.join(peers)}" if len(groups) > 1 else ""
            yield from _timed_together(plan, model, dtype, peers, group)
        shape = {"model": model, "dtype": dtype}
        for name, reason in plan.absent.items():
            yield Row(f"{model} {dtype}", shape, name, reason=reason)


def _groups(plan: Plan, model: str, dtype: str) -> list[list[str]]:
    """The peers that are timed together, as many as there is memory for: each side may
    hold its weights twice while it loads them."""
    each = 2.5 * num_weights(CONFIGS[model]) * itemsize(dtype)
    room = max(1, int(memory_bytes() / each) - len(OURS))
    names = [*plan.peers]
    return [names[i : i + room] for i in range(0, len(names), room)] or [[]]


def _timed_together(
    plan: Plan, model: str, dtype: str, peers: list[str], group: str
) -> Iterator[Row]:
    root = checkpoint(model, plan.cache)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Process] = {}
        broken: dict[str, str] = {}
        for name in (*OURS, *peers):
            log = plan.out / f"generate_{model}_{dtype}_{name}.log"
            process = (
                ours(name, log, plan.cache / "jax")
                if name in OURS
                else Process(name, plan.peers[name], log)
            )
            sides[name] = stack.enter_context(process)
            try:
                process.ready()
                if name in peers:
                    plan.about.update(process.ask("versions"))
                process.ask("load", checkpoint=str(root), dtype=dtype)
            except Broken as error:
                _lose(sides, broken, name, error)
        for workload in plan.workloads(model, dtype):
            yield from Contest(plan, model, dtype, workload, group).rows(sides, broken)


def _at_once(
    sides: dict[str, Process], request: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Broken]]:
    """What all sides answer to a request, which is not timed; and who breaks, and how."""
    failures: dict[str, Broken] = {}

    def ask(name: str) -> Any:
        try:
            return sides[name].ask("run", **request)
        except Broken as error:
            failures[name] = error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = dict(zip(sides, pool.map(ask, sides), strict=True))
    return {name: x for name, x in answers.items() if name not in failures}, failures


def _lose(
    sides: dict[str, Process], broken: dict[str, str], name: str, error: Broken
) -> None:
    if name in OURS:
        raise Broken(f"{name}: {error}")
    sides.pop(name).close()
    broken[name] = str(error)


@dataclasses.dataclass(frozen=True)
class Contest:
    """A workload, of which all sides make the same.

    - `group`: what the case's name ends with.
    """

    plan: Plan
    model: str
    dtype: str
    workload: Workload
    group: str

    def rows(self, sides: dict[str, Process], broken: dict[str, str]) -> Iterator[Row]:
        """Who breaks goes from `sides` to `broken`."""
        yield from (self._row(name, reason=reason) for name, reason in broken.items())
        prefix, prompts = self.workload.tokens(CONFIGS[self.model].vocab_size)
        asked = {"prefix": prefix, "prompts": prompts, "stops": []}
        asked["max_new_tokens"] = self.workload.max_new_tokens
        if self.workload.stops:
            try:
                endless = sides["paged"].ask("run", **asked)
            except Broken as error:
                raise Broken(f"paged, {self._case}: {error}") from None
            asked["stops"] = chosen_stops(endless["tokens"])
        answers, failures = _at_once(sides, asked)
        for name, error in failures.items():
            _lose(sides, broken, name, error)
            yield self._row(name, reason=str(error))
        made = answers["paged"]
        limits = [self.workload.max_new_tokens] * len(prompts)
        wanted = Asked([prefix + prompt for prompt in prompts], limits, asked["stops"])
        notes: dict[str, str] = {}
        root = str(checkpoint(self.model, self.plan.cache))
        with auditor(root, self.dtype, self.plan.cache) as audit:
            check_greedy(self._case, wanted, made["tokens"], audit, self.dtype)
            for name, answer in answers.items():
                right, note = compare(
                    answer["tokens"], made["tokens"], wanted, audit, self.dtype
                )
                if right:
                    notes[name] = note
                elif name in OURS:
                    raise Wrong(f"{name}, {self._case}: {note}")
                else:
                    yield self._row(name, reason=f"wrong: {note}")
        timed = {name: sides[name] for name in notes}
        num_new = {name: sum(map(len, answers[name]["tokens"])) for name in notes}
        for row in self._timed(timed, asked, num_new, made["cache_bytes"]):
            row = dataclasses.replace(row, note=notes[row.side])
            if row.reason:
                _lose(sides, broken, row.side, Broken(row.reason))
            yield row

    def _timed(
        self,
        sides: dict[str, Process],
        asked: dict[str, Any],
        num_new: dict[str, int],
        cache_bytes: int,
    ) -> Iterator[Row]:
        whats = {"all": asked}
        if self.workload.is_plain and self.workload.max_new_tokens > 1:
            whats["first"] = {**asked, "max_new_tokens": 1}
        lost: dict[str, str] = {}
        times: dict[str, dict[str, list[float]]] = {}
        # One after the other: a first token is quick, so that there is time for all rounds.
        for what, request in whats.items():
            if what == "first":  # which compiles, as the whole did before
                _, failures = _at_once(_without(sides, lost), request)
                lost.update({name: str(error) for name, error in failures.items()})
            runs = {
                name: functools.partial(_seconds, side, request)
                for name, side in _without(sides, lost).items()
            }
            times[what] = in_turn(runs, rounds=self.plan.rounds, lost=lost)
        for name, side in sides.items():
            if name in lost:
                yield self._row(name, reason=lost[name])
                continue
            row = self._row(name)
            row.seconds.update({what: times[what][name] for what in whats})
            row.figures.update(self._speeds(row, num_new[name]))
            try:
                row.figures.update(self._memory(side, cache_bytes))
            except Broken as error:
                row = self._row(name, reason=str(error))
            yield row

    def _speeds(self, row: Row, num_new: int) -> dict[str, float]:
        if not self.workload.is_plain:
            return {"tok_s": num_new / row.median("all")}
        steps = self.workload.max_new_tokens - 1
        if steps == 0:
            return {"prefill_tok_s": self.workload.num_prompt_tokens / row.median("all")}
        batch = len(self.workload.prompt_lens)
        decode = row.median("all") - row.median("first")
        figures = {
            "tok_s": num_new / row.median("all"),
            "prefill_tok_s": self.workload.num_prompt_tokens / row.median("first"),
        }
        if decode <= 0:  # the steps of a tiny model are lost in the noise
            return figures
        weights = num_weights(CONFIGS[self.model]) * itemsize(self.dtype)
        weight_gb_s = weights * steps / decode / 1e9
        return {
            **figures,
            "decode_tok_s": batch * steps / decode,
            "weight_gb_s": weight_gb_s,
            "of_roofline": weight_gb_s / self.plan.about["read_ceiling_gb_s"],
        }

    def _memory(self, side: Process, cache_bytes: int) -> dict[str, float]:
        peak = side.ask("peak_bytes")
        weights = num_weights(CONFIGS[self.model]) * itemsize(self.dtype)
        return {"peak_gib": peak / 2**30, "of_needed": peak / (weights + cache_bytes)}

    def _row(self, side: str, **others: Any) -> Row:
        shape = {"model": self.model, "dtype": self.dtype, **self.workload.shape()}
        return Row(self._case, shape, side, **others)

    @property
    def _case(self) -> str:
        return f"{self.model} {self.dtype} {self.workload.name}{self.group}"


def _without(sides: dict[str, Process], lost: dict[str, str]) -> dict[str, Process]:
    return {name: side for name, side in sides.items() if name not in lost}


def _seconds(side: Process, request: dict[str, Any]) -> float:
    return side.ask("run", **request)["seconds"]
