"""Stored budgets of registers and shared memory: a change that needs more is seen."""

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from ._gpu_cases import GPUReport
from ._gpu_compile import versions


PATH = pathlib.Path(__file__).resolve().parents[1] / "tests" / "gpu" / "budgets.json"
# Threads are given registers in so many at a time, so that fewer make no difference.
REGISTERS_AT_A_TIME = 8
# A budget that is above what is needed by more than so many is to be lowered.
SPARE_REGISTERS = 16


class Budget(NamedTuple):
    """The most that a kernel of a case may take."""

    registers: int
    shared_bytes: int


class Budgets(NamedTuple):
    """Of each case and architecture, as some versions compile them."""

    versions: dict[str, str]
    cases: dict[str, dict[str, Budget]]


def read_budgets(path: pathlib.Path = PATH) -> Budgets:
    stored = json.loads(path.read_text())
    cases = {
        case: {name: Budget(*numbers) for name, numbers in budgets.items()}
        for case, budgets in stored["cases"].items()
    }
    return Budgets(stored["versions"], cases)


def complaint(report: GPUReport, budget: Budget) -> str | None:
    """What is wrong with what a case takes, or with its budget."""
    where = f"{report.case} for {report.architecture} takes"
    for what, number, most in (
        ("registers", report.registers, budget.registers),
        ("bytes of shared memory", report.shared_bytes, budget.shared_bytes),
    ):
        if number > most:
            return f"{where} {number} {what}, more than its budget of {most}"
    if report.registers < budget.registers - SPARE_REGISTERS:
        return (
            f"{where} {report.registers} registers, far below its budget of"
            f" {budget.registers}; lower it: python -m scripts.gpu_report --update"
            f" --cases {report.case}"
        )
    return None


def write_budgets(reports: Iterable[GPUReport], path: pathlib.Path = PATH) -> None:
    """Stores what was found as budgets. Those of other cases stay, if they are by the same
    versions."""
    stored, now = read_budgets(path), versions()
    cases = stored.cases if stored.versions == now else {}
    for x in reports:
        registers = -(-x.registers // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
        budget = Budget(registers, x.shared_bytes)
        cases.setdefault(x.case, {})[x.architecture] = budget
    # A line a case.
    lines = [f"    {json.dumps(name)}: {json.dumps(cases[name])}" for name in cases]
    body = ",\n".join(lines)
    path.write_text(
        f'{{\n  "versions": {json.dumps(now)},\n  "cases": {{\n{body}\n  }}\n}}\n'
    )
