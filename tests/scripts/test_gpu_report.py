import json

import pytest


def a_report(**other):
    from scripts._gpu_cases import GPUReport

    figures = dict(
        case="triton-decode-d128-p16-g4-bf16",
        architecture="sm_90a",
        registers=100,
        shared_bytes=3 * 2**10,
        spill_bytes=0,
        copies_in_flight=3,
        fetches_apart=False,
        uses_wgmma=False,
    )
    return GPUReport(**{**figures, **other})


@pytest.fixture
def report(monkeypatch, tmp_path):
    """`scripts.gpu_report` on a machine with the compilers, which refuse head_dim 256."""
    from scripts import _gpu_budgets as budgets, gpu_report

    def measure(case, architecture):
        if "-d256-" in case:
            raise NotImplementedError("too large\nfor a block")
        return a_report(case=case, architecture=architecture)

    path = tmp_path / "budgets.json"
    path.write_text('{"versions": {}, "cases": {}}')
    monkeypatch.setattr(gpu_report, "missing", lambda: None)
    monkeypatch.setattr(gpu_report, "measure", measure)
    monkeypatch.setattr(gpu_report, "read_budgets", lambda: budgets.read_budgets(path))
    monkeypatch.setattr(
        gpu_report, "write_budgets", lambda found: budgets.write_budgets(found, path)
    )
    for module in (gpu_report, budgets):
        monkeypatch.setattr(module, "versions", lambda: {"ptxas": "9.9"})
    return gpu_report, path


CASE = "triton-decode-d128-p16-g4-bf16"


def test_it_prints_a_row_for_each_case_and_architecture(report, tmp_path, capsys):
    path = tmp_path / "report.json"
    report[0].main(["--cases", CASE, "--json", str(path)])
    shown = capsys.readouterr().out
    cells = [[x.strip() for x in line.split("|")] for line in shown.splitlines()]
    for architecture in ("sm_90a", "sm_80"):
        assert ["", CASE, architecture, "100", "3.0", "0", "3", "", ""] in cells
    assert "Compiled, not run. ptxas 9.9" in shown
    written = json.loads(path.read_text())
    assert written["about"] == {"ptxas": "9.9"}
    assert [x["architecture"] for x in written["compiled"]] == ["sm_90a", "sm_80"]


def test_what_does_not_compile_is_told_and_fails(report, capsys):
    asked = ["--cases", "decode-d256-p16-g1-f32", "decode-d128-p16-g1-f32"]
    with pytest.raises(SystemExit) as error:
        report[0].main(asked)
    assert error.value.code == 1
    shown = capsys.readouterr()
    name = "triton-decode-d256-p16-g1-f32"
    assert f"gpu_report: {name} for sm_90a does not compile: too large\n" in shown.err
    assert "triton-decode-d128-p16-g1-f32" in shown.out


def test_an_update_of_some_keeps_the_others_of_the_same_versions(report):
    module, path = report
    path.write_text('{"versions": {"ptxas": "9.9"}, "cases": {"spam": {"sm_80": [8, 1]}}}')
    module.main(["--update", "--cases", CASE])
    stored = json.loads(path.read_text())
    # Registers are given out by eight.
    assert stored["cases"] == {
        "spam": {"sm_80": [8, 1]},
        CASE: {"sm_90a": [104, 3072], "sm_80": [104, 3072]},
    }


@pytest.mark.parametrize(
    "other, says",
    (
        ({}, None),
        (dict(registers=104), None),
        (dict(registers=105), "105 registers, more than its budget of 104"),
        (dict(registers=88), None),
        (dict(registers=87), "--update"),
        (dict(shared_bytes=3073), "3073 bytes of shared memory, more than its budget"),
    ),
)
def test_a_kernel_must_keep_within_its_budget_and_near_it(other, says):
    from scripts._gpu_budgets import Budget, complaint

    said = complaint(a_report(**other), Budget(104, 3072))
    assert said is None if says is None else says in said


def a_kernel(*lines):
    from scripts._gpu_kernels import GPUKernel

    return GPUKernel("spam", 8, 0, 0, 0, "\n".join(lines))


def a_loop(name, *lines):
    return f"${name}:", *lines, f"@%p1 bra \t${name};"


WAITS = "cp.async.wait_group \t3;"
WAITS_FOR_ALL = "cp.async.wait_group \t0;"
COPIES = "cp.async.bulk.tensor.2d.shared::cluster.global"
MULTIPLIES = "wgmma.mma_async.sync.aligned"


@pytest.mark.parametrize(
    "lines, in_flight",
    (
        (["ret;"], None),
        # Once a loop is done it waits for all that it began.
        ([*a_loop("A", WAITS, "mma.sync;"), WAITS_FOR_ALL], 3),
        ([*a_loop("A", WAITS), *a_loop("B", WAITS_FOR_ALL)], 0),
        ([*a_loop("A", WAITS, "ld.global.b32")], 3),
        # What is loaded into registers and used at once.
        ([*a_loop("A", WAITS), *a_loop("B", "ld.global.v4.b32", "mma.sync;")], 0),
        # Of a page number in a loop of tiles' copies it says nothing.
        ([*a_loop("A", "ld.global.b32", COPIES)], None),
        (["bra $B;", "ld.global.b32", "$B:", "ret;"], None),
    ),
)
def test_ptx_tells_how_many_copies_are_under_way_in_a_loop(lines, in_flight):
    assert a_kernel(*lines).copies_in_flight == in_flight


def test_ptx_tells_whether_what_copies_tiles_is_not_what_multiplies_them():
    fetch, multiply = a_loop("A", COPIES), a_loop("B", MULTIPLIES)
    assert a_kernel(*fetch, *multiply).fetches_apart
    assert not a_kernel(*fetch, *multiply, *a_loop("C", COPIES, MULTIPLIES)).fetches_apart
    assert not a_kernel(*fetch, MULTIPLIES).fetches_apart
    assert not a_kernel(COPIES, *multiply).fetches_apart
    assert a_kernel(MULTIPLIES).uses_wgmma and not a_kernel(*fetch).uses_wgmma


@pytest.mark.parametrize(
    "arguments, says",
    (
        (("--architectures", "sm_70"), "'sm_70'"),
        (("--cases", "spam"), "--cases spam: there is no such case"),
        (("--spam",), "--spam"),
        (("--json", "/dev"), "--json /dev: Is a directory"),
        (("--update", "--cases", CASE), "--update of some: "),
    ),
)
def test_nonsense_is_refused_in_one_line(report, capsys, arguments, says):
    with pytest.raises(SystemExit) as error:
        report[0].main([*arguments])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("gpu_report: ") and says in shown.err


def test_without_the_compilers_it_says_what_is_missing(monkeypatch, capsys):
    from scripts import gpu_report

    monkeypatch.setattr(gpu_report, "missing", lambda: "the extra gpu-aot has it")
    with pytest.raises(SystemExit) as error:
        gpu_report.main([])
    assert error.value.code == 2
    assert "the extra gpu-aot has it" in capsys.readouterr().err
