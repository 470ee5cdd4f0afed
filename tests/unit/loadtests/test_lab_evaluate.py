"""From samples to a verdict: pooling, ratios, intervals, refusals, and what gets into the report."""

from __future__ import annotations

import json
from io import StringIO
from random import Random
from typing import Any

import pytest
from rich.console import Console

from loadtests.lab import tables
from loadtests.lab.evaluate import Measured, Surroundings, check_first, evaluate, not_isolated
from loadtests.lab.matrix import Cell, cells_of, phases
from loadtests.lab.report import Report
from loadtests.lab.scenario import Budget, Context, IsolationScenario
from loadtests.lab.verdict import judge
from loadtests.problems import LoadTestError
from loadtests.report.words import tenant_rows
from loadtests.run_result import Run
from loadtests.samples import Sample, quantiles

VICTIM = {"name": "victim", "model": "chat-a", "slo": {"e2e": "2500ms"}}
ROWS = [
    {"model": "chat-a", "state": "ready", "slice": {"id": "cpu-0", "kind": "cpu", "gpu": None}},
    {"model": "chat-b", "state": "ready", "slice": {"id": "cpu-1", "kind": "cpu", "gpu": None}},
]
SURROUNDINGS = Surroundings("2026-01-01T00:00:00+00:00", "sliceway bench isolation x", {"cores": 2}, {})


def scenario_of(**fields: Any) -> IsolationScenario:
    data = {
        "victim": VICTIM,
        "aggressors": [{"kind": "flood", "name": "neighbour", "tenant": "noisy", "users": 8}],
        "settings": [{"where": "other_slice"}, {"where": "same_slice"}],
        "rounds": 2,
        "seed": 5,
        "duration_seconds": 10,
    }
    return IsolationScenario.model_validate(data | fields)


def cells(scenario: IsolationScenario) -> tuple[Cell, ...]:
    return cells_of(scenario, ROWS, lambda model, tenant: 2048, Context())


def run_of(
    cell: Cell,
    e2e_seconds: list[float],
    *,
    failed: int = 0,
    lag: float = 0.0005,
    busy: float = 0.1,
    unfinished: int = 0,
) -> Run:
    def row(tenant: str, seconds: float | None, number: int) -> Sample:
        return Sample(
            tenant=tenant,
            model="chat-a",
            slice="cpu-0" if tenant == "victim" else "cpu-1",
            due_seconds=3.0 + number,
            sent_seconds=3.0 + number,
            ended_seconds=4.0 + number,
            failure=None if seconds else "http_503",
            message=None if seconds else "busy",
            ttft_seconds=seconds and seconds / 10,
            e2e_seconds=seconds,
            output_tokens=10 if seconds else 0,
        )

    rows = [row("victim", seconds, i) for i, seconds in enumerate(e2e_seconds)]
    rows += [row("victim", None, i) for i in range(failed)]
    rows += [row("noisy", 9.0, i) for i in range(3 if cell.beside else 0)]
    return Run(tuple(rows), quantiles([lag]), unfinished, busy, (lag,))


def steady(middle: float, count: int = 150, spread: float = 0.02, seed: int = 1) -> list[float]:
    random = Random(seed)
    return [middle * (1 + random.uniform(-spread, spread)) for _ in range(count)]


def report_of(scenario: IsolationScenario, values: Any, **run: Any) -> Report:
    """`values(key, round)` are the victim's E2E times."""
    matrix = cells(scenario)
    measured = []
    for number, phase in enumerate(phases(scenario, matrix, "http://127.0.0.1:1")):
        options = {name: value(phase.cell.key) if callable(value) else value for name, value in run.items()}
        found = run_of(phase.cell, values(phase.cell.key, phase.round), **options)
        measured.append(Measured(phase.round, phase.cell, 10.0 * number, found))
    return evaluate(scenario, matrix, measured, context=Context(), surroundings=SURROUNDINGS, replicates=200)


BUDGET = {"p99_ratio": 1.10, "metrics": ["ttft", "e2e"]}


def test_rounds_are_pooled_before_percentiles_are_taken() -> None:
    scenario = scenario_of(settings=[{"where": "other_slice"}])
    values = {"alone": ([1.0, 1.0, 1.0], [3.0]), "neighbour_on_other_slice": ([2.0, 2.0, 2.0], [6.0])}
    report = report_of(scenario, lambda key, number: values[key][number])
    alone, beside = report.settings["alone"], report.settings["neighbour_on_other_slice"]
    assert (alone.victim.e2e_seconds.p50, alone.victim.e2e_seconds.p99) == (1.0, 3.0)
    assert alone.round_p50["e2e_seconds"] == [1.0, 3.0]
    assert beside.ratio_to_alone["e2e_seconds"]["p50"] == 2.0
    assert beside.ratio_to_alone["itl_seconds"]["p50"] is None
    assert report.victim["slice"] == "cpu-0"
    assert beside.neighbours[0].slice == "cpu-1"
    assert beside.neighbours[0].requests == 6


def test_within_the_budget_with_its_interval_is_a_pass() -> None:
    scenario = scenario_of(budget=BUDGET)
    report = report_of(scenario, lambda key, n: steady(2.0 if "same" in key else 1.0, seed=n))
    assert report.verdict.status == "pass"
    assert {check.setting for check in report.verdict.checks} == {"neighbour_on_other_slice"}


def test_every_setting_is_judged_and_those_that_are_to_be_apart_decide() -> None:
    report = report_of(scenario_of(budget=BUDGET), lambda key, n: steady(2.0 if "same" in key else 1.0, seed=n))
    assert report.verdict.status == "pass"
    apart, together = (report.verdict.settings[f"neighbour_on_{place}_slice"] for place in ("other", "same"))
    assert (apart.status, apart.decides, apart.checks) == ("pass", True, report.verdict.checks)
    assert apart.sentence == "holds the budget: 3 of 3 figures, with their intervals"
    assert (together.status, together.decides) == ("fail", False)
    assert together.sentence.startswith("fails the budget (not isolated, as expected): ")
    assert {check.setting for check in together.checks} == {"neighbour_on_same_slice"}
    assert list(report.verdict.settings) == ["neighbour_on_other_slice", "neighbour_on_same_slice"]


def test_a_failure_is_expected_only_where_nobody_asks_for_isolation() -> None:
    def outcomes(*settings: str) -> list[str]:
        scenario = scenario_of(budget=BUDGET | {"settings": settings})
        report = report_of(scenario, lambda key, n: steady(1.0 if key == "alone" else 1.4, seed=n))
        assert report.verdict.status == "fail"
        return [one.sentence.partition(":")[0] for one in report.verdict.settings.values()]

    plain, expected = "fails the budget (not isolated)", "fails the budget (not isolated, as expected)"
    assert outcomes("other_slice") == [plain, expected]
    assert outcomes("other_slice", "same_slice") == [plain, plain]
    assert outcomes("same_slice") == [plain, plain]


def test_beyond_the_budget_is_a_fail_and_says_where() -> None:
    report = report_of(scenario_of(budget=BUDGET), lambda key, n: steady(1.0 if key == "alone" else 1.4, seed=n))
    assert report.verdict.status == "fail"
    assert "neighbour_on_other_slice" in report.verdict.sentence
    worst = next(c for c in report.verdict.checks if c.metric == "E2E")
    assert worst.interval is not None
    assert worst.interval[0] > 1.3
    assert worst.outcome == "fail"


def test_an_interval_that_reaches_beyond_is_undecided() -> None:
    def values(key: str, number: int) -> list[float]:
        tail = [1.0, 1.6] if key != "alone" else [1.58, 1.59]
        return [*steady(1.0, 148, seed=number), *tail]

    report = report_of(scenario_of(budget=BUDGET), values)
    assert report.verdict.status == "undecided"
    assert "measure longer" in report.verdict.sentence


def test_p99_over_p50_and_failures_are_judged_too() -> None:
    budget = {"p99_over_p50": 1.3, "metrics": ["e2e"]}
    spread = report_of(scenario_of(budget=budget), lambda key, n: steady(1.0, spread=0.5, seed=n))
    assert spread.verdict.status == "fail"
    assert "p99 / p50" in spread.verdict.sentence
    failing = report_of(
        scenario_of(budget=BUDGET), lambda key, n: steady(1.0, seed=n), failed=lambda key: 0 if key == "alone" else 3
    )
    assert failing.verdict.status == "fail"
    assert any(c.figure == "failed ratio" and c.outcome == "fail" for c in failing.verdict.checks)


@pytest.mark.parametrize(
    ("values", "run", "said"),
    [
        (lambda key, n: steady(1.0 + n / 2, seed=n), {}, "something else used this machine"),
        (lambda key, n: steady(1.0, seed=n), {"lag": 0.03}, "short of CPU"),
        (lambda key, n: steady(1.0, seed=n), {"busy": 0.97}, "raise `processes`"),
        (lambda key, n: steady(1.0, seed=n), {"unfinished": 1}, "unanswered when the run was given up"),
        (lambda key, n: steady(1.0, 25, seed=n), {}, "measure 2.0 times as long"),
    ],
)
def test_a_ruler_that_is_not_sure_refuses(values: Any, run: dict[str, Any], said: str) -> None:
    report = report_of(scenario_of(budget=BUDGET), values, **run)
    assert report.verdict.status == "refused"
    assert said in " ".join(report.verdict.refusals)


def test_a_budget_on_what_was_not_measured_certifies_nothing() -> None:
    scenario = scenario_of(budget={"p99_ratio": 1.10, "metrics": ["itl"]})
    report = report_of(scenario, lambda key, number: steady(1.0))
    assert (report.verdict.status, report.verdict.refusals[0]) == (
        "refused",
        "of ITL nothing was measured in 'neighbour on the other slice': its answers have none",
    )
    only_failures = scenario_of(budget={"failed_ratio": 0.01, "metrics": ["itl"]})
    assert report_of(only_failures, lambda key, number: steady(1.0)).verdict.status == "pass"


def test_what_went_unanswered_beside_the_judged_settings_refuses_nothing_of_them() -> None:
    def values(key: str, number: int) -> list[float]:
        return steady(1.0, seed=number)

    def lost_in(place: str) -> Report:
        return report_of(scenario_of(budget=BUDGET), values, unfinished=lambda key: 3 if place in key else 0)

    elsewhere = lost_in("same_slice")
    assert elsewhere.verdict.status == "pass"
    assert [one.status for one in elsewhere.verdict.settings.values()] == ["pass", "refused"]
    assert elsewhere.settings["neighbour_on_same_slice"].unfinished == 6
    assert elsewhere.client.unfinished == 6
    for place in ("alone", "other_slice"):
        verdict = lost_in(place).verdict
        assert verdict.status == "refused"
        assert verdict.refusals == ["requests still unanswered when the run was given up: 6; they are in no figure"]


def test_unanswered_requests_that_no_setting_counts_refuse_the_verdict() -> None:
    report = report_of(scenario_of(budget=BUDGET), lambda key, n: steady(1.0, seed=n))
    client = report.client.model_copy(update={"unfinished": 2})
    assert judge(report.settings, Budget.model_validate(report.budget), client).status == "refused"


def test_without_a_budget_there_are_notes_and_no_verdict() -> None:
    report = report_of(scenario_of(), lambda key, n: [1.0 + n], lag=0.02)
    told = " / ".join(report.warnings)
    assert report.verdict.status == "none"
    assert report.verdict.settings == {}
    assert "late" in told
    assert "between rounds" in told
    assert "raise --duration about 50.0 times" in told


def test_failures_are_counted_apart_and_make_nothing_faster() -> None:
    report = report_of(scenario_of(rounds=1), lambda key, n: [1.0], failed=lambda key: 0 if key == "alone" else 3)
    beside = report.settings["neighbour_on_other_slice"]
    assert beside.victim.failures == {"http_503": 3}
    assert beside.ratio_to_alone["e2e_seconds"]["p99"] == 1.0
    assert beside.slo is not None
    assert beside.slo.attainment == 0.25
    assert any("busy" in text for text in report.warnings)


def test_a_victim_without_an_answer_is_no_measurement() -> None:
    with pytest.raises(LoadTestError, match=r"no answer even alone.*busy"):
        report_of(scenario_of(rounds=1), lambda key, n: [], failed=2)


def test_a_first_phase_without_a_due_request_is_gone_on_from_and_one_of_failures_is_not() -> None:
    scenario = scenario_of()
    alone, *_ = cells(scenario)
    victim = scenario.victim
    check_first(victim, Measured(0, alone, 0.0, run_of(alone, [])))
    check_first(victim, Measured(0, alone, 0.0, run_of(alone, [1.0], failed=5)))
    with pytest.raises(LoadTestError, match=r"no answer even alone.*busy"):
        check_first(victim, Measured(0, alone, 0.0, run_of(alone, [], failed=1)))
    report = report_of(scenario, lambda key, number: [1.0] * number)
    assert report.settings["alone"].victim.requests == 1
    with pytest.raises(LoadTestError, match="no request was due"):
        report_of(scenario, lambda key, number: [])


def test_goodput_tokens_and_fairness_are_told() -> None:
    report = report_of(scenario_of(), lambda key, n: [1.0, 2.0, 3.0])
    alone, beside = report.settings["alone"], report.settings["neighbour_on_same_slice"]
    assert alone.slo is not None
    assert alone.slo.attainment == pytest.approx(2 / 3)
    assert alone.slo.goodput_per_second == pytest.approx(4 / 20)
    assert alone.service.tokens_per_second == {"victim": pytest.approx(3.0)}
    assert alone.service.jain_index == 1.0
    assert beside.service.jain_index == pytest.approx(1.0)


def test_well_behaved_others_are_held_to_their_own_slo() -> None:
    other = {"name": "noisy", "model": "chat-b", "slo": {"e2e": "5s"}}
    scenario = scenario_of(
        others=[other], aggressors=[{"kind": "flood", "tenant": "loud"}], settings=[{"where": "other_slice"}], rounds=1
    )
    report = report_of(scenario, lambda key, n: [1.0])
    (row,) = report.settings["flood_on_other_slice"].neighbours
    assert row.slo is not None
    assert (row.slo.attainment, row.slo.met) == (0.0, False)  # all of its answers took 9 s
    shown = next(r for r in tenant_rows(report) if r[1] == "noisy")
    assert shown[-1] == "0.0%"


def test_what_is_shared_is_said_of_every_kind_and_of_what_is_not_known() -> None:
    assert "last-level cache" in not_isolated({"cpu"}, simulated=False)[0]
    assert len(not_isolated({"mig", "mps"}, simulated=False)) == 2
    for unknown in ({"endpoint"}, {""}):
        (told,) = not_isolated(unknown, simulated=False)
        for shared in ("PCIe", "power", "CPU", "gateway"):
            assert shared in told


def test_the_same_numbers_come_back_from_json() -> None:
    report = report_of(scenario_of(budget=BUDGET), lambda key, n: steady(1.0, seed=n))
    text = json.dumps(report.as_dict())
    assert Report.model_validate_json(text) == report
    assert json.loads(text)["schema"] == "sliceway.isolation/v1"


def test_the_table_shows_the_verdict_and_ratios_beside_the_figures() -> None:
    report = report_of(scenario_of(budget=BUDGET), lambda key, n: [1.0 if key == "alone" else 1.5] * 100)
    shown = StringIO()
    tables.show(report, Console(width=160, file=shown))
    text = shown.getvalue()
    assert text.startswith("Not isolated:")
    lines = " ".join(text.split())
    assert "✗ FAIL neighbour on the other slice: fails the budget (not isolated): " in lines
    assert "✗ FAIL neighbour on the same slice: fails the budget (not isolated, as expected): " in lines
    assert "victim (chat-a on cpu-0)" in text
    assert "1000 / 1000" in text
    assert "1.50x / 1.50x (1.50-1.50)" in text
    assert "*" not in text


def test_keys_are_in_no_report() -> None:
    scenario = scenario_of(victim=VICTIM | {"api_key": "sk-secret"}, rounds=1)
    assert "sk-" not in str(report_of(scenario, lambda key, n: [1.0]).as_dict())
