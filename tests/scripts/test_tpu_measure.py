import dataclasses

import pytest

from .test_tpu_schedule import LISTING


ALLOCATIONS = """\
  #allocation2 [shape = 'bf16[64,8,16,128]', space=vmem, size = 0x200, offset = 0, scoped]
    #allocation7_spill [shape = 'u32[8,128]', space=vmem, size = 0x1000, offset = 0x200]
  #allocation8 [shape = 'u32[1]{0}', space=smem, size = 0x4, offset = 0x10600, scoped]
"""
SLOTS = """\
== CAPACTIY:
MXU, XLU, SALU
    2     2    2
== UTILIZATION:
"""


def test_it_counts_what_the_compiler_dumps(tmp_path, monkeypatch):
    from scripts import _tpu_measure as measure

    case = measure.CASES["write-kv"]
    case = dataclasses.replace(case, turns={"7x": (4,)}, copies_out=False, row_tokens=96)
    monkeypatch.setitem(measure.CASES, "write-kv", case)

    def compile_apart(case_name, generation, folder):
        dumps = {
            measure.SCHEDULE: LISTING,
            measure.FINAL: LISTING,
            measure.MEMORY: ALLOCATIONS,
            # Of the steady block, all slots of two bundles.
            measure.SLOTS: SLOTS + "0 1 1\n" * 6 + "2 1 1\n" * 2 + "0 1 1\n" * 13,
        }
        for number, (name, text) in enumerate(dumps.items()):
            (folder / f"17-write_kv.1-{number:02}-{name}.txt").write_text(text)
        about = (
            '{"compile_seconds": 1.5, "alias_bytes": 2, "temp_bytes": 3, "large_copies": 0}'
        )
        (folder / measure.ABOUT_FILE).write_text(about)

    monkeypatch.setattr(measure, "_compile_apart", compile_apart)
    report = measure.measure("write-kv", "7x")
    # Six copies of 8 tokens' keys or values in 14 cycles, 21 with the loop around them; one
    # turn in four of 4 cycles more.
    assert report.steady_tokens == 24
    assert report.body_cycles == pytest.approx(14 / 24 * 1024)
    assert report.loop_cycles == pytest.approx(21 / 24 * 1024)
    assert report.row_cycles == pytest.approx(22 / 24 * 1024)
    assert report.matrix_use == pytest.approx(2 / 14)
    assert report.vmem_bytes == 0x1200
    assert (report.spill_stores, report.steady_spill_stores) == (1, 4)
    # 8 MiB at the peak of one core.
    assert report.floor_cycles == pytest.approx(8 * 2**20 / (3690 / 2.2))


@pytest.mark.parametrize(
    "stderr, says",
    (
        ("Traceback\n  File\njax.errors.JaxRuntimeError: no room\nsee\n", "no room"),
        ("KeyError: 'a'\nValueError: too large\n--------\nnote\n", "ValueError: too large"),
        ("starting\nUnknown flag\n", "Unknown flag"),
    ),
)
def test_a_refusal_is_told_in_one_line(monkeypatch, stderr, says):
    import subprocess

    from scripts import _tpu_measure as measure

    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(measure.subprocess, "run", run)
    with pytest.raises(measure.CompileError) as error:
        measure.measure("write-kv", "7x")
    assert str(error.value).endswith(says) and "\n" not in str(error.value)
