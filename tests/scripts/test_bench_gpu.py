import dataclasses
import json
import math
import os
import signal
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a dry run of one decode case and of the ceilings, of our kernels with
    XLA's alone, since those that are interpreted take long to compile."""
    from scripts import bench_gpu

    folder = tmp_path_factory.mktemp("bench")
    asked = ["--dry-run", "--parts", "decode,ceilings", "--cases", "D8"]
    only = ["--only", "xla", "cudnn-paged", "jax-paged"]
    bench_gpu.main([*asked, *only, "--out", str(folder)])
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_timed(row):
    assert row["status"] == "timed", row["reason"]
    assert 0 < row["fastest_us"] <= row["median_us"] <= row["slowest_us"]
    # XLA's is what others are compared with.
    assert row["implementation"] == "xla" or row["max_difference"] < 2e-2


def test_a_dry_run_times_ours_and_says_which_peers_are_absent_and_why(rehearsed):
    about, *rows = lines_of(rehearsed / "decode.jsonl")
    assert about["about"]["dry_run"] and about["about"]["device"] == "cpu"
    found = {row["implementation"]: row for row in rows}
    check_timed(found["xla"])
    assert found["cudnn-paged"]["reason"] == "it runs on a GPU only"
    assert all(row["reason"] for row in rows if row["status"] != "timed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, case", (("decode", "D7"), ("prefill", "P3"), ("mixed", "M1"))
)
def test_a_dry_run_times_the_gpu_kernels(tmp_path, part, case):
    from scripts import bench_gpu

    asked = ["--dry-run", "--parts", part, "--cases", case, "--out", str(tmp_path)]
    bench_gpu.main([*asked, "--only", "xla", "triton"])
    _, *rows = lines_of(tmp_path / f"{part}.jsonl")
    # With the defaults, and with one config of the sweep.
    timed = [row for row in rows if row["implementation"] == "triton"]
    assert len(timed) == 2
    for row in timed:
        check_timed(row)


def test_a_dry_run_measures_the_ceilings(rehearsed):
    _, copy, matmul, *_ = lines_of(rehearsed / "ceilings.jsonl")
    assert copy["gb_per_s"] > 0 and matmul["tflop_per_s"] > 0


def test_a_dry_run_draws_what_it_timed(rehearsed):
    assert "<svg" in (rehearsed / "decode.svg").read_text()


def test_what_was_measured_is_drawn_again_without_measuring(rehearsed, tmp_path, capsys):
    from scripts import bench_gpu

    rows = (rehearsed / "decode.jsonl").read_text()
    (tmp_path / "decode.jsonl").write_text(rows)
    bench_gpu.main(["--draw", "--out", str(tmp_path)])
    assert "<svg" in (tmp_path / "decode.svg").read_text()
    # Not beside what another device did.
    other = rows.replace('"device": "cpu"', '"device": "spam"')
    (tmp_path / "mixed.jsonl").write_text(other)
    capsys.readouterr()
    bench_gpu.main(["--draw", "--out", str(tmp_path)])
    assert "not drawn: rows of different devices: cpu, spam" in capsys.readouterr().out


def test_no_matplotlib_is_a_line(tmp_path, monkeypatch, capsys):
    from scripts import bench_gpu

    monkeypatch.setattr(bench_gpu, "_installed", lambda name: name != "matplotlib")
    bench_gpu.main(["--draw", "--out", str(tmp_path)])
    assert "there is no matplotlib here" in capsys.readouterr().out


def test_the_defaults_and_the_best_of_a_sweep_are_drawn_apart():
    from scripts._bench_gpu_plots import _best
    from scripts._bench_gpu_record import Row

    row = Row("decode", "D1", "triton", "", "skipped")
    times = {"": 2.0, "a": 3.0, "b": 1.0}
    rows = [dataclasses.replace(row, config=x).timed(t, t, t) for x, t in times.items()]
    found = {name: row.config for (_, name), row in _best(rows).items()}
    assert found == {"triton": "", "triton, swept": "b"}


@pytest.mark.slow
def test_a_dry_run_finds_the_kernels_correct(tmp_path):
    from scripts import bench_gpu

    bench_gpu.main(["--dry-run", "--parts", "correctness", "--out", str(tmp_path)])
    _, *rows = lines_of(tmp_path / "correctness.jsonl")
    # Mosaic's kernels take no small tiles, and no jax before 0.11.
    statuses = {row["status"] for row in rows if row["implementation"] != "mosaic"}
    assert statuses == {"right"}
    assert {row["status"] for row in rows} <= {"right", "absent"}


def test_what_is_wrong_is_told_and_not_timed(tmp_path, monkeypatch, capsys):
    from scripts import bench_gpu
    from scripts._bench_gpu_record import Row

    wrong = Row("correctness", "spam", "triton", "", "failed", "it is 3 off")
    parts = []

    def run_part(part, run, minutes, recorder):
        parts.append((part, run.wrong))
        if part == "correctness":
            recorder.add(wrong)

    monkeypatch.setattr(bench_gpu, "run_part", run_part)
    # Also where it was found by an earlier command.
    for asked in ("correctness,decode", "prefill"):
        with pytest.raises(SystemExit) as error:
            bench_gpu.main(["--dry-run", "--parts", asked, "--out", str(tmp_path)])
        assert error.value.code == 1
        assert "wrong are triton" in capsys.readouterr().err
    wanted = [("correctness", set()), ("decode", {"triton"}), ("prefill", {"triton"})]
    assert parts == wanted


# A process that is asked for three rows: the first is done, the second `breaks`.
CHILD = """
import dataclasses, json, os, sys, time
from scripts._bench_gpu_record import Row
first = int(sys.argv[sys.argv.index("--first") + 1])
print("a warning that is no JSON", 3, flush=True)
print(3, flush=True)
for i in range(first, 3):
    row = dataclasses.asdict(Row("decode", f"D{i}", "spam", "", "skipped"))
    print(json.dumps({"begun": i, "row": row}), flush=True)
    if i == 1:
        BREAKS
    print(json.dumps(row | {"status": "right"}), flush=True)
"""


def rows_of_child(breaks, seconds=60.0, silence=60.0):
    from scripts._bench_gpu_record import Row
    from scripts._bench_gpu_run import child_rows

    command = [sys.executable, "-c", CHILD.replace("BREAKS", breaks)]
    row = Row("decode", "all", "spam", "", "skipped")
    found = child_rows(command, row, seconds, silence)
    return [(row.case, row.status, row.reason) for row in found if isinstance(row, Row)]


@pytest.mark.parametrize(
    "breaks, reason",
    (
        ("raise RuntimeError('no eggs')", "RuntimeError: no eggs"),
        ("os.abort()", "exit status -6"),
    ),
)
def test_what_breaks_is_told_and_the_rest_goes_on_in_another_process(breaks, reason):
    assert rows_of_child(breaks) == [
        ("D0", "right", ""),
        ("D1", "broken", reason),
        ("D2", "right", ""),
    ]


@pytest.mark.parametrize(
    "hangs", ("time.sleep(600)", "while True: print(end='x', flush=True), time.sleep(0.1)")
)
def test_what_hangs_is_ended(hangs):
    found = rows_of_child(hangs, silence=10.0)
    assert found == [("D0", "right", ""), ("D1", "failed", "nothing came for 10 s")]


def test_where_the_benchmark_is_ended_so_is_a_process_that_hangs(tmp_path):
    class Ended(BaseException):  # as KeyboardInterrupt: no check of a type hides it
        pass

    def end(*_):
        raise Ended

    noted = tmp_path / "pid"
    # By the end of a second the parent waits for the next line.
    note = f"open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(1)"
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            rows_of_child(f"{note}; os.kill(os.getppid(), 15); time.sleep(600)")
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)


def test_a_process_that_begins_nothing_is_told_once():
    from scripts._bench_gpu_record import Row
    from scripts._bench_gpu_run import child_rows

    row = Row("decode", "all", "torch", "", "skipped")
    command = [sys.executable, "-c", "import no_such_module"]
    (found,) = child_rows(command, row, 60.0, 60.0)
    assert isinstance(found, Row)
    assert (found.status, found.case) == ("broken", "all")
    assert "no_such_module" in found.reason


def test_a_result_that_is_off_is_failed():
    from scripts._bench_gpu_record import Row

    row = Row("decode", "D1", "spam", "", "skipped")
    wanted = np.array([0.0, 100.0])
    near = row.compared(np.array([0.01, 101.0]), wanted, 2e-2)
    assert near.status == "skipped" and near.max_difference == pytest.approx(0.01)
    for off in (0.1, math.nan):
        assert row.compared(np.array([off, 100.0]), wanted, 2e-2).status == "failed"


def test_a_sweep_is_whole_on_the_first_case_of_a_page_size_and_its_best_on_the_rest():
    from scripts._bench_gpu_cases import cases_of
    from scripts._bench_gpu_record import Row
    from scripts._bench_gpu_run import best_configs, first_of_each_page_size

    decode = cases_of("decode", dry_run=False)
    assert first_of_each_page_size(decode) == ["D1", "D1p"]
    row = Row("decode", "D1", "triton", "", "skipped")
    times = {"a": 3.0, "b": 1.0, "c": 2.0, "": 0.5}
    rows = [dataclasses.replace(row, config=x).timed(t, t, t) for x, t in times.items()]
    assert best_configs(rows, "triton", ["D1", "D1p"]) == ["b", "c"]


def test_no_pool_stays_in_the_cache():
    from scripts._bench_gpu_cases import CASES
    from scripts._bench_gpu_clock import Effort

    for case in CASES:
        num_pools = Effort().pools_for(case.kv_bytes)
        assert num_pools >= 3 and num_pools * case.kv_bytes >= 3 * 50e6


def test_flex_attention_is_told_blocks_that_it_has_kernels_for():
    pytest.importorskip("torch", reason="PyTorch is not among what tests need")
    from scripts._bench_gpu_cases import CASES
    from scripts._bench_gpu_torch import flex_blocks

    for case in CASES:
        (q_block, kv_block), options = flex_blocks(case)
        group = case.num_heads // case.num_kv_heads
        # The kernel for few queries pads them to 16 at least, that for many takes 128.
        assert q_block % (max(16, group) if case.is_decode else 128) == 0
        assert kv_block == case.page_size
        if not case.is_decode:
            assert kv_block % options["BLOCK_N"] == 0


def test_the_cases_are_of_the_sizes_that_are_told():
    from scripts._bench_gpu_cases import CASES

    cases = {case.name: case for case in CASES}
    # 64 rows of 2,048 tokens, each of 8 heads of 128 keys and as many values of 2 bytes.
    assert cases["D1"].kv_bytes == 64 * 2048 * 8 * 128 * 2 * 2
    assert cases["D7"].kv_bytes == cases["D1"].kv_bytes // 2
    # Two products of 2 x 128 operations for each pair of a query and a key it sees.
    assert cases["P1"].flops == 4 * 16 * (4096 * 4097 // 2) * 2 * 2 * 128
    assert cases["P4"].flops == 32 * (2048 * 8192 + 2048 * 2049 // 2) * 2 * 2 * 128
    assert cases["M1"].flops == cases["M1-chunk"].flops + cases["M1-decodes"].flops
    assert len(set(cases["D4"].kv_lens)) > 100


@pytest.mark.parametrize(
    "arguments, says",
    (
        ((), "JAX finds no GPU here"),
        (("--parts", "spam"), "'spam' is none of correctness, ceilings"),
        (("--cases", "D9"), "'D9'"),
        (("--minutes", "0"), "'0' is no whole number from 1 to 60"),
        (("--torch", "no-python"), "--torch no-python: no such program"),
        (("--spam",), "--spam"),
        (("--out", "/dev/null"), "--out /dev/null: is a file"),
    ),
)
def test_nonsense_is_refused_in_one_line(capsys, tmp_path, monkeypatch, arguments, says):
    from scripts import bench_gpu

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        bench_gpu.main([*arguments])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("bench_gpu: ") and says in shown.err
