import json

import pytest


def test_it_times_both_caches_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    from scripts import bench_step

    monkeypatch.setattr(bench_step, "CACHE_MIB", (2, 4))
    monkeypatch.setattr(bench_step, "PAGE_SIZES", (16,))
    bench_step.main(["--steps", "2", "--out", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new" / "step.json").read_text())
    assert written["about"]["device"] == "cpu"
    cases = written["cases"]
    assert [case["cache_mib"] for case in cases] == [2, 4, 2, 4]
    shown = capsys.readouterr().out
    for case in cases:
        assert 0 < case["fastest_ms"] <= case["step_ms"]
        # Three quarters of the small cache are stored, in the large one as much.
        read = case["attention_gb_per_s"] * 1e9 * case["step_ms"] / 1e3
        assert read == pytest.approx(1.5 * 2**20)
        assert f"| {case['step_ms']:.2f} | {case['fastest_ms']:.2f} |" in shown
    assert (tmp_path / "new" / "step.png").read_bytes()[1:4] == b"PNG"


def test_no_steps_are_refused(capsys):
    from scripts import bench_step

    with pytest.raises(SystemExit) as error:
        bench_step.main(["--steps", "0"])
    assert error.value.code == 2
    assert "must be at least 1, not 0" in capsys.readouterr().err
