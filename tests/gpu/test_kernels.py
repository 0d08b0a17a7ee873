"""Every GPU kernel compiles for the GPUs it is for, and keeps within their registers."""

import functools

import jax
import jax.numpy as jnp
import pytest
from scripts._gpu_budgets import complaint, read_budgets
from scripts._gpu_cases import CASES, GPUCase
from scripts._gpu_compile import compile_for, versions
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
def test_a_kernel_keeps_within_its_budget(case, architecture, measured):
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


def assert_nothing_is_spilled(case, *args, **options):
    function = functools.partial(case.function, **options)
    kernels = compile_for("sm_90a", function, args).kernels
    assert any(x.name.startswith("ragged_paged_attention") for x in kernels)
    assert [x.name for x in kernels if x.spill_bytes] == []


@pytest.mark.parametrize(
    "head_dim, page_size, group, sliding_window",
    (
        *((256, 8, 4, None), (256, 32, 4, None)),
        *((256, 8, 4, 999), (256, 16, 4, 999), (256, 16, 8, 999), (256, 32, 4, 999)),
        *((64, 16, 4, 999), (128, 16, 4, 999)),
    ),
)
def test_longer_rows_spill_nothing_on_other_pages_or_under_a_window(
    head_dim, page_size, group, sliding_window
):
    case = GPUCase("mosaic", "mixed", head_dim, page_size, group, "bf16")
    assert_nothing_is_spilled(case, *case.args, sliding_window=sliding_window)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_float32_queries_on_bfloat16_pages_spill_nothing(head_dim):
    case = GPUCase("triton", "mixed", head_dim, 16, 4, "bf16")
    q, *args = case.args
    q = jax.ShapeDtypeStruct(q.shape, jnp.dtype(jnp.float32))
    assert_nothing_is_spilled(case, q, *args)
