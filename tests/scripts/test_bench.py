import json
import re

import pytest


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder and the output of a dry run of the suites that need no other process."""
    from scripts import bench

    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(bench, "show", printed.append)
        asked = ["attention", "update", "--dry-run", "--cache", str(folder / "cache")]
        bench.main([*asked, "--out", str(folder / "new")])
    return folder / "new", printed


def test_a_dry_run_writes_what_it_shows(rehearsed):
    from scripts._suites.record import Report

    folder, shown = rehearsed
    assert [report.suite for report in shown] == ["attention", "update"]
    for report in shown:
        assert Report.read(folder / f"{report.suite}.json") == report
        assert report.about["device"] == "cpu" and report.about["commit"]
        for row in report.rows:
            assert row.reason or all(min(times) > 0 for times in row.seconds.values())


def test_quartiles_are_written_beside_all_times(rehearsed):
    content = json.loads((rehearsed[0] / "update.json").read_text())
    for row in content["rows"]:
        low, middle, high = row["quartiles"]["step"]
        assert min(row["seconds"]["step"]) <= low <= middle <= high
        assert high <= max(row["seconds"]["step"])


def test_speeds_are_of_what_has_to_be_read(rehearsed):
    _, (attention, update) = rehearsed
    rows = [row for row in attention.rows if not row.reason]
    for row in rows:
        # Both sequences have 32 tokens in one case, 32 and 1 in the other.
        tokens, size = (64, 4) if row.shape["dtype"] == "float32" else (32 + 1, 2)
        num_bytes = row.figures["gb_per_s"] * 1e9 * row.median("call")
        assert num_bytes == pytest.approx(2 * tokens * 2 * 16 * size)
    for row in update.rows:
        if row.side == "store and attend":
            num_bytes = row.figures["gb_per_s"] * 1e9 * row.median("step")
            # Three quarters of the small cache are stored, in the large one as much.
            assert num_bytes == pytest.approx(3 * 2**20)


def test_a_side_that_is_not_there_is_listed_with_the_reason(rehearsed):
    _, (attention, _) = rehearsed
    (absent,) = [row for row in attention.rows if row.reason]
    assert absent.side == "torch" and absent.reason == "it was not asked for"


def test_ratios_are_of_paged_to_every_other_form(rehearsed):
    _, (attention, _) = rehearsed
    speed = {(row.case, row.side): row.figures["gb_per_s"] for row in attention.rows[:-1]}
    cases = {case for case, _ in speed}
    assert len(attention.ratios) == len(cases) * 3
    for ratio in attention.ratios:
        wanted = speed[ratio.case, "paged"] / speed[ratio.case, ratio.other]
        assert ratio.ratio == pytest.approx(wanted)


def test_what_was_measured_is_drawn_again_without_measuring(rehearsed, tmp_path, capsys):
    from scripts import bench

    (tmp_path / "update.json").write_text((rehearsed[0] / "update.json").read_text())
    bench.main(["--draw", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")])
    assert "<svg" in (tmp_path / "update_size.svg").read_text()
    first = (tmp_path / "update_size.svg").read_bytes()
    bench.main(["--draw", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")])
    assert (tmp_path / "update_size.svg").read_bytes() == first
    assert "written: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, text, says",
    (
        ("update", "", "update.json is not a report"),
        ("update", "[]", "update.json is not a report"),
        ("update", '{"rows": []}', "update.json is not a report"),
        ("attention", None, "attention.json is a report of update"),
        ("update", None, "--publish: update were measured in small"),
    ),
)
def test_only_whole_reports_are_published(rehearsed, tmp_path, capsys, file, text, says):
    from scripts import bench

    if text is None:
        text = (rehearsed[0] / "update.json").read_text()
    (tmp_path / f"{file}.json").write_text(text)
    with pytest.raises(SystemExit) as error:
        bench.main(["--draw", "--publish", "--out", str(tmp_path)])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and says in shown.err


def test_a_page_gets_the_tables_in_their_places(rehearsed, tmp_path):
    from scripts._suites import publish

    page = tmp_path / "page.md"
    _, (attention, update) = rehearsed
    for old in ("old\n", ""):
        page.write_text(f"a\n<!-- attention -->\n{old}<!-- end -->\nb\n<!-- end -->\n")
        for _ in range(2):
            publish.rewrite(page, [attention])
    text = page.read_text()
    assert text.startswith("a\n<!-- attention -->\n\nTaken on: date ")
    assert text.endswith("<!-- end -->\nb\n<!-- end -->\n") and "old" not in text
    for row in attention.rows:
        assert re.search(rf"^\| {row.case} \| {re.escape(row.side)} \|", text, re.MULTILINE)
    with pytest.raises(ValueError, match="<!-- update --> is there 0 times, not once"):
        publish.rewrite(page, [update])


def test_published_cases_stay_until_they_are_measured_again(tmp_path):
    from scripts._suites import publish
    from scripts._suites.record import Earlier, Ratio, Report, Row

    def of(run, *cases):
        rows = [Row(case, {}, "paged", {"all": [1.0]}) for case in cases]
        ratios = [Ratio(x, "tok_s", "paged", "peer", float(run)) for x in cases]
        return Report("generate", {"commit": f"c{run}"}, rows, ratios)

    published = of(1, "a", "b", "c")
    for new, wanted in (
        (of(2, "b"), [Earlier(["a", "c"], {"commit": "c1"})]),
        (
            of(3, "c", "d"),
            [Earlier(["a"], {"commit": "c1"}), Earlier(["b"], {"commit": "c2"})],
        ),
    ):
        published.write(tmp_path)
        published = publish.with_published(new, tmp_path)
        assert published.earlier == wanted
    assert {x.case: x.ratio for x in published.ratios} == {"a": 1, "b": 2, "c": 3, "d": 3}
    assert sorted(row.case for row in published.rows) == ["a", "b", "c", "d"]
    assert "Of another run are b: commit c2." in publish.content(published)
    again = publish.with_published(of(4, *"abcd"), tmp_path)
    assert again == of(4, *"abcd")


def test_the_page_of_the_documentation_has_a_place_for_every_suite():
    from scripts import bench
    from scripts._suites import publish

    text = publish.PAGE.read_text()
    for suite in bench.SUITES:
        assert text.count(f"<!-- {suite} -->\n") == 1
    assert text.count("<!-- end -->") == len(bench.SUITES)


def test_a_lost_case_is_told():
    from scripts._suites.publish import content
    from scripts._suites.record import Ratio, Report

    ratio = Ratio("spam", "tok_s", "paged", "eggs", 0.5)
    report = Report("generate", {}, [], [ratio])
    assert (
        "| spam | new tok/s in all | paged | eggs | 0.50 |"
        in (content(report).split("Where another side wins:")[1])
    )


@pytest.mark.parametrize(
    "arguments, says",
    (
        (("spam",), "'spam' is none of attention, update, generate, serve, startup"),
        (("--quick", "--dry-run"), "not allowed with argument"),
        (("--peers", "spam"), "'spam'"),
        (("--models", "3b"), "'3b'"),
        (("--spam",), "--spam"),
        (("--out", "/dev/null"), "--out /dev/null: is a file"),
        (("--cache", "/dev/null"), "--cache /dev/null: is a file"),
        (("--dry-run", "--publish"), "--publish: a dry run measures nothing"),
        (("--quick", "--publish"), "--publish: a quick run measures nothing"),
        (("--draw", "--out", "{empty}"), "nothing was measured there"),
    ),
)
def test_nonsense_is_refused_in_one_line_before_anything_is_timed(
    tmp_path, capsys, arguments, says
):
    from scripts import bench

    arguments = [x.format(empty=tmp_path) for x in arguments]
    with pytest.raises(SystemExit) as error:
        bench.main(["--cache", str(tmp_path / "cache"), *arguments])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("bench: ") and says in shown.err


def test_a_quick_run_leaves_out_only_what_was_not_asked_for():
    from scripts.bench import parse_options

    options = parse_options(["--quick"])
    assert (options.models, options.dtypes, options.peers) == (["135m"], ["float32"], [])
    options = parse_options(["--quick", "--models", "135m", "1b", "--peers", "eqx-zoo"])
    assert (options.models, options.peers) == (["135m", "1b"], ["eqx-zoo"])


@pytest.mark.slow
def test_a_dry_run_generates_with_both_of_our_caches_and_starts_up(tmp_path, monkeypatch):
    from scripts import bench

    printed = []
    monkeypatch.setattr(bench, "show", printed.append)
    asked = ["generate", "startup", "--dry-run", "--cache", str(tmp_path / "cache")]
    bench.main([*asked, "--peers", "levanter", "--out", str(tmp_path)])
    generate, startup = printed
    timed = [(row.case, row.side) for row in generate.rows if not row.reason]
    cases = ("1 x 8", "3 ragged", "2 of one prefix")
    assert timed == [
        (f"tiny float32 {case}", side) for case in cases for side in ("paged", "contiguous")
    ]
    cold, warm, absent = startup.rows
    assert warm.median("of it compiling") < cold.median("of it compiling")
    for row in (cold, warm):
        parts = [row.median(x) for x in ("import", "load", "first call")]
        assert sum(parts) == pytest.approx(row.median("total"))
        assert row.median("to the second") > row.median("total")
    assert absent.reason == "it is not installed; --install-peers does that"
