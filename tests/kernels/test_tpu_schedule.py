import json
import pathlib
import re

import pytest

from ..tpu import needs_libtpu


CEILINGS = json.loads(pathlib.Path(__file__).with_name("tpu_schedules.json").read_text())
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "tpu.md"
IN_SHORT = (("write-kv", "v6e"), ("decode-page-128", "7x"))


def test_every_case_has_a_ceiling_on_every_generation():
    from scripts._tpu_cases import CASES
    from scripts._tpu_chips import CHIPS

    stored = {name: set(cycles) for name, cycles in CEILINGS["cycles"].items()}
    assert stored == {name: set(CHIPS) for name in CASES}


def test_the_documentation_shows_the_counts_that_the_ceilings_are_made_from():
    from scripts._tpu_ceilings import MARGIN

    # Cycles, and the slack in brackets.
    rows = re.findall(r"^\| `([\w-]+)` \|(.*\(.*)\|$", DOCS.read_text(), re.MULTILINE)
    assert dict(rows).keys() == CEILINGS["cycles"].keys()
    for name, cells in rows:
        shown = [int(x.split("(")[0].replace(",", "")) for x in cells.split("|")]
        ceilings = [*CEILINGS["cycles"][name].values()]
        assert [MARGIN * x for x in shown] == pytest.approx(ceilings, abs=2), name


@needs_libtpu
@pytest.mark.parametrize(
    "case, generation",
    [
        pytest.param(*x, marks=() if x in IN_SHORT else pytest.mark.slow)
        for case, cycles in CEILINGS["cycles"].items()
        for x in ((case, generation) for generation in cycles)
    ],
)
def test_a_schedule_keeps_to_its_ceiling_and_copies_no_pool(case, generation):
    from scripts._tpu_ceilings import complaint, libtpu_version
    from scripts._tpu_measure import measure

    if libtpu_version() != CEILINGS["libtpu"]:
        pytest.skip(f"the ceilings are of libtpu {CEILINGS['libtpu']}: schedules differ")
    report = measure(case, generation)
    said = complaint(report, CEILINGS["cycles"][case][generation])
    assert said is None, said
    assert report.large_copies == 0
