"""The report: what is in a results file comes out, what was not measured says so, and invented figures stay out."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import fake_benchmarks
import pytest

from benchmarks import report
from benchmarks.promises import PROMISES
from benchmarks.report import ReportError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run():
    return fake_benchmarks.fake_run()


def saved(run, path):
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def test_exponents_are_slopes_of_logarithms():
    assert report.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    assert report.exponent([1, 2], [1, 2]) is None
    assert report.exponent([5, 5, 5], [1, 2, 3]) is None


def test_ratios_are_paired_by_round(run):
    """A machine that is twice as slow in half of the rounds does not change a ratio."""
    group = run["groups"][0]
    for contender in group["contenders"]:
        contender["samples"] = [s * (1 + place % 2) for place, s in enumerate([1.0] * 8)]
    group["contenders"][1]["samples"] = [1.5 * s for s in group["contenders"][1]["samples"]]
    eager, limit = report.ratios(group)
    assert (eager.other, eager.median, eager.low, eager.high) == ("eager", 1.5, 1.5, 1.5)
    assert (limit.role, limit.median) == ("yardstick", 1.0)


def test_series_run_along_the_one_number_that_differs(run):
    (line,) = report.series(run)
    assert (line.family, line.x, [g["axes"]["tokens"] for g in line.groups]) == ("ffn", "tokens", [64, 256, 1024])
    lines = line.lines("median")
    assert report.exponent(*lines["ours"][1:]) == pytest.approx(1.0, abs=0.03)
    assert report.exponent(*lines["eager"][1:]) == pytest.approx(2.0, abs=0.03)
    assert report.exponent(*line.lines("peak_bytes")["eager"][1:]) == pytest.approx(2.0)


def test_every_promise_appears_measured_or_not(run):
    rows = {row.promise.key: row for row in report.judged([run])}
    assert list(rows) == [promise.key for promise in PROMISES]
    assert (rows["ffn"].met, rows["ffn"].measured) == (False, "1.11 ×")
    assert rows["import"].met is True
    assert rows["captions"].met is None
    text = report.markdown([run])
    page = report.page([run])
    for promise in PROMISES:
        assert promise.what in text
    for row in rows.values():
        assert {True: "met", False: "not met", None: "not measured"}[row.met] in page
    assert "| 1.11 × | **not met** |" in text
    assert "| – | **not measured** |" in text


def test_of_several_measurements_the_worst_stands(run):
    other = copy.deepcopy(run["groups"][0]["promises"][0]) | {"measured": 1.3}
    run["groups"][1]["promises"] = [other]
    run["groups"][2]["promises"] = [other | {"measured": 1.0, "met": True}]
    row = next(row for row in report.judged([run]) if row.promise.key == "ffn")
    assert (row.measured, row.met) == ("1.3 ×", False)
    assert "tokens 256" in row.where


def test_without_a_measurement_the_report_says_so():
    assert "not measured" in report.markdown([])
    assert "Nothing has been measured yet" in report.page([])
    on_a_cpu = [promise for promise in PROMISES if promise.device == "cpu"]
    assert report.markdown([]).count("| – | **not measured** |") == len(on_a_cpu)
    assert "benchmarks.svg" not in report.markdown([])


def test_losses_are_shown_like_wins(run):
    losses = report.slower(run)
    assert [(r.group["axes"]["tokens"], r.other) for r in losses] == [(64, "eager")]
    assert "Where it is **not** faster" in report.markdown([run])
    assert "Where ours is not faster" in report.page([run])


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_has_everything(run):
    parser = Page()
    parser.feed(report.page([run]))
    assert not {"script", "link", "img", "iframe", "b"} & set(parser.tags)
    assert not [v for n, v in parser.attributes if n in ("src", "href", "xlink:href") and not v.startswith("#")]
    assert parser.tags.count("svg") == 4  # ratios, roofline, time and memory against tokens
    text = " ".join(parser.text)
    assert not re.search(r"e\+\d", text)  # figures are written out
    for part in ("Invented CPU", "AVX9", "torch 2.13.0", "0000000000", "xformers <b>", "3.0e-07", "drift", "16 MiB"):
        assert part in text


def test_the_readme_changes_between_its_markers_alone(run, tmp_path):
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n", encoding="utf-8")
    report.write([run | {"synthetic": False}], tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nbelow\n")
    assert "old" not in text and "Invented CPU" in text
    assert (tmp_path / "docs" / "benchmarks.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "docs" / "benchmarks.svg").read_text(encoding="utf-8").startswith("<svg")
    before = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.*")}
    report.write([run | {"synthetic": False}], tmp_path)
    assert before == {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.*")}  # the same every time
    for broken in ("no markers", f"{report.END}\n{report.BEGIN}", f"{report.BEGIN}{report.END}" * 2):
        with pytest.raises(ReportError, match=r"README\.md: must hold"):
            report.between_markers(broken, "")


def test_table_rows_have_the_cells_of_their_head(run):
    for table in re.findall(r"(?:^\|.*\n)+", report.markdown([run]) + "\n", re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_invented_figures_stay_out(run, tmp_path, capsys):
    path = saved(run, tmp_path / "run.json")
    with pytest.raises(ReportError, match="invented"):
        report.load(path)
    assert report.load(path, synthetic=True)["groups"]
    with pytest.raises(ReportError, match="invented"):
        report.write([run], tmp_path)
    assert report.main([str(path)]) == 2
    assert "invented" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
    for committed in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert not report.load(committed).get("synthetic")
    for written in (ROOT / "README.md", ROOT / "docs" / "benchmarks.html"):
        if written.exists():
            assert "Invented CPU" not in written.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 99}'])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ReportError, match=r"run\.json: not"):
        report.load(path)


def test_the_newest_file_of_each_machine_counts(tmp_path):
    for name in ("a/2026-01-01-x.json", "a/2026-02-01-b.json", "b/2026-01-05-c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [path.name for path in report.newest(tmp_path)] == ["2026-02-01-b.json", "2026-01-05-c.json"]
    assert report.newest(tmp_path / "none") == []


def test_of_one_day_the_run_that_started_last_counts(tmp_path):
    (tmp_path / "a").mkdir()
    for name, hour in (("f", 7), ("1", 12), ("c", 11)):
        started = f"2026-01-01T{hour:02}:00:00+00:00"
        (tmp_path / "a" / f"2026-01-01-{name}.json").write_text(json.dumps({"schema": 1, "started": started}))
    assert [path.name for path in report.newest(tmp_path)] == ["2026-01-01-1.json"]


# --compare


def test_a_planted_slowdown_is_flagged_and_a_repetition_is_not(run, capsys):
    slow = fake_benchmarks.fake_run(slowdown=2.0, seed=7)
    worse = [change for change in report.compare(run, slow) if change.worse]
    assert {(change.of, change.contender) for change in worse} == {("time", "ours"), ("time", "import vlmo_fast")}
    assert all(change.factor == pytest.approx(2.0, rel=0.05) for change in worse)
    assert report.show_changes(run, slow) == 1
    assert "WORSE  time     2.0" in capsys.readouterr().out
    again = fake_benchmarks.fake_run(seed=99)  # other samples of the same speed
    assert report.show_changes(run, copy.deepcopy(run)) == 0
    assert report.show_changes(run, again) == 0
    assert "0 of" in capsys.readouterr().out


def test_noise_that_was_measured_is_allowed_for(run):
    """The same slowdown on a machine that swings by as much proves nothing."""
    slow = fake_benchmarks.fake_run(slowdown=1.3, seed=7)
    assert any(change.worse for change in report.compare(run, slow))
    for group in slow["groups"]:
        group["drift"] = 0.4
    assert not any(change.worse for change in report.compare(run, slow))


def test_memory_and_error_are_compared_too(run):
    worse = copy.deepcopy(run)
    ours = worse["groups"][2]["contenders"][0]
    ours["peak_bytes"] *= 10
    ours["error"] *= 3
    assert {change.of for change in report.compare(run, worse) if change.worse} == {"memory", "error"}


def test_what_is_gone_is_named(run, capsys):
    less = copy.deepcopy(run)
    less["groups"].pop()
    assert report.show_changes(run, less) == 0
    assert "absent from the new file: import: a fresh interpreter, {}: import vlmo_fast" in capsys.readouterr().out
    assert report.show_changes(run, run | {"groups": []}) == 2


def test_what_failed_is_a_regression(run, capsys):
    worse = copy.deepcopy(run)
    group = worse["groups"][0]
    del group["contenders"], group["promises"]
    group["failure"] = "AssertionError: ours computes something else"
    assert report.show_changes(run, worse) == 1
    assert "FAILED ffn: base, forward" in capsys.readouterr().out
    for text in (report.markdown([worse]), report.page([worse]), report.short_table(worse)):
        assert "ours computes something else" in text


def test_another_machine_is_told(run, capsys):
    other = copy.deepcopy(run)
    report.show_changes(run, other)
    assert "not the same machine" not in capsys.readouterr().out
    other["machine"]["cores"] = 64
    report.show_changes(run, other)
    assert "not the same machine or software" in capsys.readouterr().out


def test_only_limits_are_called_limits(run):
    """Ours may have no error, where there is nothing to compare."""
    run["groups"][3]["contenders"][0] |= {"error": None, "worst_row": None}
    (table,) = re.findall(r"<h3>a fresh interpreter</h3>.*?</table>", report.page([run]))
    assert ">limit<" not in table and ">–<" in table
    assert ">limit<" in report.page([run])
