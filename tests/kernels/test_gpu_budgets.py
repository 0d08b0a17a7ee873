import pathlib
import re


DOCS = pathlib.Path(__file__).parents[2] / "docs" / "gpu.md"


def test_every_usual_case_has_a_budget_for_every_architecture():
    from scripts._gpu_budgets import read_budgets
    from scripts._gpu_cases import CASES

    stored = {name: [*budgets] for name, budgets in read_budgets().cases.items()}
    assert set(stored) <= set(CASES)
    for name, case in CASES.items():
        if case.is_usual or name in stored:
            assert stored.get(name) == [*case.architectures], name


def test_the_documentation_shows_the_budgets():
    from scripts._gpu_budgets import read_budgets

    cases = read_budgets().cases
    rows = re.findall(r"^\| `((?:triton|mosaic)-[\w-]+)` \|(.*)\|$", DOCS.read_text(), re.M)
    assert len(rows) == 30
    for name, cells in rows:
        start, dtype = name.rsplit("-", 1)
        wanted = []
        for budget in cases[f"{start}-p16-g4-{dtype}"].values():
            wanted += [str(budget.registers), f"{budget.shared_bytes / 2**10:.1f}"]
        wanted += [""] * (4 - len(wanted))
        assert [x.strip() for x in cells.split("|")] == wanted, name
