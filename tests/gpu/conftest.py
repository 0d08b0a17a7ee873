"""The tests of what is compiled for GPUs are collected only where it can be compiled: with
JAX's CUDA plugin and ptxas, which the extra gpu-aot has. No GPU is needed."""

import pytest
from scripts._gpu_compile import missing, versions


collect_ignore_glob = [] if missing() is None else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    """Prints what the compiled kernels take."""
    done = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    found = [
        value
        for report in done
        for name, value in report.user_properties
        if name == "gpu_report" and report.when == "call"
    ]
    if found:
        from scripts._gpu_cases import GPUReport
        from scripts._gpu_table import print_table

        print_table([GPUReport(**value) for value in found], versions())


@pytest.fixture
def measured(record_property):
    """Compiles a case, and has it in the table that is printed at the end."""
    import dataclasses

    from scripts._gpu_cases import measure

    def _measured(case, architecture):
        report = measure(case, architecture)
        record_property("gpu_report", dataclasses.asdict(report))
        return report

    return _measured
