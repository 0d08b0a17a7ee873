import itertools
import json

import pytest


def test_it_times_both_caches_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    from scripts import bench_step

    monkeypatch.setattr(bench_step, "CACHE_MIB", (4, 8))
    monkeypatch.setattr(bench_step, "PAGE_SIZES", (16,))
    bench_step.main(["--steps", "2", "--out", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new" / "step.json").read_text())
    assert written["about"]["device"] == "cpu"
    cases = written["cases"]
    assert [case["cache_mib"] for case in cases] == [4, 8, 4, 8]
    shown = capsys.readouterr().out
    for case in cases:
        assert 0 < case["fastest_ms"] <= case["step_ms"]
        # Three quarters of the small cache are stored, in the large one as much.
        read = case["attention_gb_per_s"] * 1e9 * case["step_ms"] / 1e3
        assert read == pytest.approx(3 * 2**20)
        assert f"| {case['step_ms']:.2f} | {case['fastest_ms']:.2f} |" in shown
    assert (tmp_path / "new" / "step.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    "arguments, says",
    (
        (("--steps", "0"), "'0' is no whole number from 1 to 100"),
        # The small cache has no room for more.
        (("--steps", "101"), "'101' is no whole number from 1 to 100"),
        (("--steps", "abc"), "'abc' is no whole number from 1 to 100"),
        (("--spam",), "--spam"),
        (("--out", "/proc/x"), "--out /proc/x: "),
        (("--out", "/dev/null"), "--out /dev/null: is a file"),
    ),
)
def test_nonsense_is_refused_in_one_line_before_anything_is_timed(capsys, arguments, says):
    from scripts import bench_step

    with pytest.raises(SystemExit) as error:
        bench_step.main([*arguments])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("bench_step: ") and says in shown.err


def test_the_small_cache_has_room_for_the_most_steps():
    from scripts import bench_step as bench

    for dtype, page_size in itertools.product(bench.DTYPES, bench.PAGE_SIZES):
        case = bench.Case(bench.CACHE_MIB[0], page_size, dtype)
        longest = case.tokens_per_row + bench.WARM_UP + bench.MAX_STEPS
        pages = bench.NUM_SEQS * -(-longest // page_size)
        assert pages * page_size * case.token_bytes <= case.cache_mib * bench.MIB
