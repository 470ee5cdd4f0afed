"""What people get: one file that needs nothing else, the same numbers in every form, and two reports against each other."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtests.__main__ import main
from loadtests.lab.compare import compare, share_interval
from loadtests.lab.merge import merge
from loadtests.lab.report import Report, read_report
from loadtests.lab.scenario import read_isolation
from loadtests.problems import ScenarioError
from loadtests.report import html, markdown, svg
from loadtests.report.files import write_reports
from loadtests.report.words import outcome_rows
from loadtests.yamlfile import load
from tests.unit.loadtests.made_reports import report_of

ROOT = Path(__file__).parents[3]


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, and collects what is linked to and shown."""

    VOID = frozenset({"meta", "br", "line", "circle", "path", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for name, v in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_else_and_begins_with_the_verdict() -> None:
    text = html.render(report_of())
    page = Balanced()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert 'name="viewport"' in text
    assert "@media print" in text
    assert "A &lt;b&gt; &amp; c" in text
    order = [text.index(mark) for mark in ("<h1>", "✗ FAIL</b>", "<table", "What is not isolated", "To repeat it")]
    assert order == sorted(order)
    assert text.count("<svg") == 6


def test_series_differ_by_more_than_colour() -> None:
    text = html.render(report_of())
    assert "stroke-dasharray" in text
    assert "<circle" in text
    assert svg.BLUE in text
    assert svg.VERMILION in text
    assert set(re.findall(r'aria-label="([^"]+)"', text)) >= {"TTFT over time", "verdict"}


def test_every_form_has_the_same_numbers(tmp_path: Path) -> None:
    report = report_of()
    write_reports(report, tmp_path / "deep" / "r")
    data = json.loads((tmp_path / "deep" / "r" / "report.json").read_text(encoding="utf-8"))
    texts = [(tmp_path / "deep" / "r" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]
    setting = data["settings"]["prefill_flood_on_other_slice"]
    p99 = f"{setting['victim']['ttft_seconds']['p99'] * 1000:.0f}"
    ratio = f"{setting['ratio_to_alone']['ttft_seconds']['p99']:.2f}x"
    for text in texts:
        assert p99 in text
        assert ratio in text
        assert "vllm 0.32.0" in text
        assert "last-level cache" in text
        assert data["verdict"]["sentence"].split(":")[0] in text
    assert read_report(tmp_path / "deep" / "r" / "report.json") == report


def test_the_scenario_in_a_report_can_be_run_again(tmp_path: Path) -> None:
    report = report_of()
    path = tmp_path / "scenario.yaml"
    path.write_text(markdown.render(report).partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    again = read_isolation(load(path))
    assert again.model_dump(mode="json", exclude_none=True).items() >= report.scenario.items()
    assert "kind: &quot;isolation&quot;" in html.render(report)


def test_markdown_tables_have_one_width_each() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", markdown.render(report_of()), re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_schema_in_the_documentation_is_the_reports() -> None:
    written = json.loads((ROOT / "docs" / "isolation-report.schema.json").read_text(encoding="utf-8"))
    assert written == Report.model_json_schema(by_alias=True), (
        "write it again: python -m loadtests schema > docs/isolation-report.schema.json"
    )


def test_several_deployments_become_one_report_with_their_own_baselines() -> None:
    good, bad = report_of(1.0, deployment="mig"), report_of(1.5, deployment="mps")
    both = merge([good, bad])
    assert set(both.settings) == {f"{d}: {k}" for d in ("mig", "mps") for k in good.settings}
    assert both.settings["mps: prefill_flood_on_other_slice"].baseline == "mps: alone"
    assert both.verdict.status == "fail"
    assert "mps: prefill_flood_on_other_slice" in both.verdict.sentence
    assert "mig: prefill_flood on the other slice" in html.render(both)
    assert merge([good]) is good
    for wrong in ([], [good, good]):
        with pytest.raises(ScenarioError):
            merge(wrong)


def test_every_form_says_what_the_budget_makes_of_each_setting() -> None:
    report = report_of(1.5)
    (status, told), *_ = outcome_rows(report)
    assert status == "fail"
    assert told.startswith("prefill_flood on the other slice: fails the budget (not isolated): TTFT p99 ratio is ")
    assert f"<li>✗ FAIL {told}</li>" in html.render(report)
    assert f"- **✗ FAIL** {told}\n" in markdown.render(report)


def test_a_report_of_before_is_judged_by_setting_from_its_own_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(1.5)
    data = report.as_dict()
    del data["verdict"]["settings"]
    for setting in data["settings"].values():
        del setting["unfinished"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data), encoding="utf-8")
    assert read_report(old).verdict.settings == {}
    assert main(["render", str(old), "--report", str(tmp_path / "new")]) == 1
    again = read_report(tmp_path / "new" / "report.json")
    assert again.verdict == report.verdict
    assert again.settings["alone"].unfinished is None, "a figure that nobody took"
    assert "fails the budget" in " ".join(capsys.readouterr().out.split())


def test_the_certificate_in_the_documentation_is_its_figures() -> None:
    folder = ROOT / "docs" / "certificate"
    report = read_report(folder / "report.json")
    again = merge([report.model_copy(update={"verdict": report.verdict.model_copy(update={"settings": {}})})])
    assert again == report
    for ending, render in (("html", html.render), ("md", markdown.render)):
        assert (folder / f"report.{ending}").read_text(encoding="utf-8") == render(report), (
            "write it again: sliceway bench report docs/certificate/report.json --report docs/certificate"
        )
    together = report.verdict.settings["neighbour_on_same_slice"]
    assert (together.status, together.decides) == ("fail", False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"failures": {"timeout": 1_000_000}}, "succeeded and 1000000 failed, of"),
        ({"requests": 0}, "succeeded and 0 failed, of 0"),
        ({"failures": {"timeout": -1}}, "a count of requests is below 0"),
    ],
)
def test_counts_that_do_not_go_together_are_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], said: str
) -> None:
    """A report that somebody has edited."""
    data = report_of().as_dict()
    data["settings"]["alone"]["victim"] |= changed
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ScenarioError, match=f"settings.alone.victim: .*{said}"):
        read_report(edited)
    assert main(["compare", str(edited), str(edited)]) != 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_before_and_after() -> None:
    same = compare(report_of(1.5), report_of(1.5))
    assert same.worse == ()
    slower = compare(report_of(1.5), report_of(2.0))
    assert {(line.setting, line.metric, line.change) for line in slower.worse} == {
        ("prefill_flood_on_other_slice", m, "worse") for m in ("ttft_seconds", "itl_seconds", "e2e_seconds")
    }
    faster = compare(report_of(2.0), report_of(1.5))
    assert faster.worse == ()
    assert any(line.change == "better" for line in faster.lines)
    assert compare(report_of(1.5), report_of(2.0), tolerance_ratio=1.5).worse == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [("v1: [", "isolation/v1: Invalid JSON"), ('{"version": "v1"}', "isolation/v1: name: Field required")],
)
def test_what_is_no_report_is_told_with_the_place_where_there_is_one(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ScenarioError, match=said):
        read_report(path)


def test_the_exit_code_says_whether_something_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, beside in (("before", 1.5), ("after", 2.0)):
        write_reports(report_of(beside), tmp_path, name)
    before, after = (str(tmp_path / f"{name}.json") for name in ("before", "after"))
    assert main(["compare", before, after]) == 1
    assert "worse" in capsys.readouterr().out
    assert main(["compare", before, after, "--tolerance", "1.5"]) == 0
    assert main(["compare", after, before, "--json"]) == 0
    for tolerance in ("0.5", "nan", "inf"):
        assert main(["compare", before, after, "--tolerance", tolerance]) == 2
    assert main(["compare", before, str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def failing(report: Report, failed: int) -> Report:
    """The same figures, with so many more requests that failed beside the aggressor."""
    key = "prefill_flood_on_other_slice"
    setting = report.settings[key]
    row = setting.victim.model_copy(
        update={"requests": setting.victim.requests + failed, "failures": {"http_503": failed}}
    )
    changed = setting.model_copy(update={"victim": row})
    return report.model_copy(update={"settings": dict(report.settings) | {key: changed}})


def test_requests_that_fail_more_often_are_worse_though_no_latency_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, few = report_of(1.5), failing(report_of(1.5), 60), failing(report_of(1.5), 1)
    found = compare(before, after)
    assert found.worse == ()
    assert [(one.setting, one.before, one.after) for one in found.fails_more] == [
        ("prefill_flood_on_other_slice", (0, 240), (60, 300))
    ]
    assert (compare(after, before).is_worse, compare(before, few).is_worse) == (False, False)
    write_reports(before, tmp_path, "before")
    write_reports(after, tmp_path, "after")
    paths = [str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    assert main(["compare", *paths]) == 1
    assert "60 of 300" in capsys.readouterr().out
    assert main(["compare", *paths, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["worse"] == 1


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)],
)
def test_shares_have_wilsons_interval(count: int, of: int, low: float, high: float) -> None:
    assert share_interval(count, of) == pytest.approx((low, high), abs=1e-4)


def test_settings_of_one_report_only_are_told() -> None:
    both, key = report_of(), "prefill_flood_on_other_slice"
    alone = both.model_copy(update={"settings": {k: s for k, s in both.settings.items() if k != key}})
    assert compare(both, alone).notes == (f"measured before only: {key}",)
    assert compare(alone, both).notes == (f"measured after only: {key}",)


def test_an_aggressor_that_did_something_else_is_told() -> None:
    both, key = report_of(), "prefill_flood_on_other_slice"
    changed = both.settings[key].model_copy(update={"load": {"users": 99}})
    other = both.model_copy(update={"settings": dict(both.settings) | {key: changed}})
    assert compare(both, other).notes == (f"{key}: the aggressor did not do the same",)


def test_reports_of_different_questions_are_not_compared() -> None:
    with pytest.raises(ScenarioError, match="model is 'chat-a' in one and 'chat-z'"):
        compare(report_of(), report_of(model="chat-z"))
    with pytest.raises(ScenarioError, match="no setting in common"):
        compare(report_of(), merge([report_of(deployment="a"), report_of(deployment="b")]))


@pytest.mark.parametrize(
    ("text", "said"), [("{}", "no isolation report"), ("[", "no isolation report"), (None, "cannot be read")]
)
def test_files_that_are_no_report(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ScenarioError, match=said):
        read_report(path)


@pytest.mark.parametrize(("low", "high"), [(0.001, 100.0), (0.05, 0.06), (0.2, 0.9), (1.0, 1.0)])
def test_plots_have_a_few_ticks_whatever_the_range(low: float, high: float) -> None:
    points: list[tuple[float, float]] = [(low, 0.1), (high, 1.0)]
    drawn = svg.ecdf([svg.Series("a", points, svg.BLUE)], "t")
    assert 3 <= drawn.count('class="grid"') - 5 <= 15
    assert not re.search(r"nan|inf", drawn)


def test_nothing_measured_draws_nothing() -> None:
    empty: Any = [svg.Series("a", [], svg.BLUE)]
    assert svg.ecdf(empty, "t") == svg.timeline(empty, "t") == ""
