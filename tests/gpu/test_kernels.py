"""Every GPU kernel compiles for the GPUs it is for, and keeps within their registers."""

import pytest
from scripts._gpu_budgets import complaint, read_budgets
from scripts._gpu_cases import CASES
from scripts._gpu_compile import versions
from scripts._gpu_targets import TARGETS


pytestmark = [
    pytest.mark.gpu_aot,
    # JAX has deprecated what the kernels are written in, since 0.11.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
BUDGETS = read_budgets()

every_case = pytest.mark.parametrize(
    "case, architecture",
    [(name, x) for name, case in CASES.items() for x in case.architectures],
)


@every_case
def test_a_kernel_spills_nothing_and_keeps_within_its_budget(case, architecture, measured):
    report = measured(case, architecture)
    budget = BUDGETS.cases.get(case, {}).get(architecture)
    assert report.spill_bytes == 0
    assert report.shared_bytes <= TARGETS[architecture].shared_bytes_per_block
    # Other versions may compile it to something else.
    if budget is not None and versions() == BUDGETS.versions:
        said = complaint(report, budget)
        assert said is None, said
    if case.startswith("triton"):
        # Wherever it waits for a block, the next must be under way.
        assert report.copies_in_flight is not None and report.copies_in_flight > 0
    if case.startswith("mosaic"):
        assert report.uses_wgmma
        assert report.fetches_apart
