import json

import pytest


def a_report(**other):
    from scripts._tpu_measure import Report

    figures = dict(
        case="write-kv",
        generation="v6e",
        compile_seconds=3.25,
        vmem_bytes=3 * 2**20,
        final_bundles=400,
        spill_stores=5,
        spill_loads=6,
        steady_spill_stores=1,
        steady_spill_loads=2,
        steady_tokens=128,
        body_cycles=1000.0,
        loop_cycles=1100.0,
        row_cycles=1250.0,
        floor_cycles=2500.0,
        matrix_use=0.25,
        alias_bytes=0,
        temp_bytes=0,
        large_copies=0,
    )
    return Report(**{**figures, **other})


@pytest.fixture
def report(monkeypatch):
    """`scripts.tpu_report` on a machine with libtpu, which compiles nothing for v4."""
    from scripts import tpu_report

    def measure(case, generation):
        if generation == "v4":
            raise tpu_report.CompileError("too large")
        return a_report(case=case, generation=generation)

    monkeypatch.setattr(tpu_report, "libtpu_version", lambda: "9.9")
    monkeypatch.setattr(tpu_report, "measure", measure)
    return tpu_report


def test_it_prints_a_row_for_each_case_and_generation(report, tmp_path, capsys):
    path = tmp_path / "report.json"
    asked = ["--cases", "write-kv", "--generations", "v6e", "7x", "--json", str(path)]
    report.main(asked)
    shown = capsys.readouterr().out
    cells = [[x.strip() for x in line.split("|")] for line in shown.splitlines()]
    figures = "3.2 3.0 1,000 1,100 1,250 2,500 2.00 25% 1/2 5/6".split()
    for name in ("v6e", "7x"):
        assert ["", "write-kv", name, *figures, ""] in cells
    assert "counted, not measured" in shown and "libtpu 9.9" in shown
    written = json.loads(path.read_text())
    assert written["about"]["libtpu"] == "9.9"
    assert [x["generation"] for x in written["static_counts"]] == ["v6e", "7x"]
    assert written["static_counts"][0]["slack"] == 2


def test_what_does_not_compile_is_told_and_fails(report, capsys):
    with pytest.raises(SystemExit) as error:
        report.main(["--cases", "write-kv", "--generations", "v4", "v6e"])
    assert error.value.code == 1
    shown = capsys.readouterr()
    assert "tpu_report: write-kv on v4 does not compile: too large\n" in shown.err
    assert "| v6e" in shown.out


@pytest.mark.parametrize(
    "arguments, says",
    (
        (("--generations", "v3"), "'v3'"),
        (("--cases", "spam"), "'spam'"),
        (("--cases",), "--cases"),
        (("--spam",), "--spam"),
        (("--json", "/proc/x/report.json"), "--json /proc/x/report.json: "),
        (("--json", "/dev"), "--json /dev: Is a directory"),
        (("--update", "--cases", "write-kv"), "--update of some: "),
    ),
)
def test_nonsense_is_refused_in_one_line(report, capsys, arguments, says):
    with pytest.raises(SystemExit) as error:
        report.main([*arguments])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("tpu_report: ") and says in shown.err


def test_without_libtpu_it_says_what_to_install(report, monkeypatch, capsys):
    monkeypatch.setattr(report, "libtpu_version", lambda: None)
    with pytest.raises(SystemExit) as error:
        report.main([])
    assert error.value.code == 2
    assert 'pip install "eqx_paged[tpu]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "cycles, says",
    ((950.0, None), (1000.0, None), (1001.0, "more than its ceiling"), (949.0, "--update")),
)
def test_a_count_must_be_below_its_ceiling_and_near_it(cycles, says):
    from scripts._tpu_ceilings import complaint

    said = complaint(a_report(row_cycles=cycles), ceiling=1000)
    assert said is None if says is None else says in said


def test_an_update_keeps_other_ceilings_of_the_same_libtpu(monkeypatch, tmp_path):
    from scripts import _tpu_ceilings as ceilings

    path = tmp_path / "ceilings.json"
    path.write_text('{"libtpu": "0", "cycles": {"spam": {"v4": 1}}}')
    versions = iter(("1", "1", "2"))
    monkeypatch.setattr(ceilings, "libtpu_version", lambda: next(versions))
    for generation, cycles in (("v6e", 1000.0), ("7x", 2000.0)):
        ceilings.write_ceilings([a_report(generation=generation, row_cycles=cycles)], path)
    stored = ceilings.read_ceilings(path)
    assert stored == ("1", {"write-kv": {"v6e": 1020, "7x": 2040}})
    ceilings.write_ceilings([a_report(generation="v4", row_cycles=100.0)], path)
    assert ceilings.read_ceilings(path) == ("2", {"write-kv": {"v4": 102}})
