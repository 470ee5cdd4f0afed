from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from loadtests import isolation
from loadtests.isolation import Phase, Plan, evaluate, parse_plan, phases
from loadtests.run_result import Run
from loadtests.samples import Sample, quantiles
from loadtests.scenario import ScenarioError

SETTINGS = ("alone", "neighbour_on_other_slice", "neighbour_on_same_slice")
VICTIM = {"name": "victim", "model": "chat-a"}
NOISY = {"name": "noisy", "model": "chat-b", "arrival": {"kind": "closed", "users": 8}}


def plan_of(**fields: Any) -> Plan:
    data = {
        "base": {"tenants": [VICTIM], "seed": 5},
        "neighbour": NOISY,
        "contrast": NOISY | {"model": "chat-a"},
        "rounds": 2,
    }
    return parse_plan(data | fields)


def run_of(phase: Phase, *e2e_seconds: float, failed: int = 0, lag: float = 0.0) -> Run:
    def row(tenant: str, seconds: float | None) -> Sample:
        return Sample(
            tenant=tenant,
            model="chat-a",
            slice="cpu-0" if tenant == "victim" else "cpu-1",
            due_seconds=3.0,
            sent_seconds=3.0,
            ended_seconds=4.0,
            failure=None if seconds else "http_503",
            message=None if seconds else "busy",
            ttft_seconds=seconds and seconds / 10,
            e2e_seconds=seconds,
        )

    rows = [row("victim", seconds) for seconds in e2e_seconds] + [row("victim", None)] * failed
    rows += [row("noisy", 9.0)] * (len(phase.scenario.tenants) - 1)
    return Run(tuple(rows), quantiles([lag]))


def test_rounds_are_mirrored_and_ask_the_same_in_every_setting() -> None:
    order = list(phases(plan_of()))
    names = [phase.setting for phase in order]
    assert names == [*SETTINGS, *reversed(SETTINGS)]
    assert [phase.scenario.seed for phase in order] == [5, 5, 5, 6, 6, 6]
    assert {phase.scenario.tenants[0] for phase in order} == {order[0].scenario.tenants[0]}


def test_the_neighbour_outlasts_the_victim() -> None:
    for phase in phases(plan_of()):
        victim, *beside = phase.scenario.tenants
        assert not victim.background
        assert all(tenant.background for tenant in beside)
        assert len(beside) == (phase.setting != "alone")


def test_settings_that_cannot_be_are_left_out() -> None:
    assert plan_of(neighbour=None).settings == ("alone", "neighbour_on_same_slice")
    assert plan_of(contrast=None).settings == ("alone", "neighbour_on_other_slice")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"neighbour": None, "contrast": None}, "no neighbour"),
        ({"rounds": 0}, "rounds"),
        ({"base": {"tenants": [VICTIM, NOISY]}}, "one tenant"),
        ({"neighbor": NOISY}, "neighbor"),
        ({"base": {"tenants": []}}, "base.tenants"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        plan_of(**fields)


def test_rounds_are_pooled_before_percentiles_are_taken() -> None:
    plan = plan_of(contrast=None)
    alone = [(1.0, 1.0, 1.0), (3.0,)]
    beside = [(2.0, 2.0, 2.0), (6.0,)]
    runs = []
    for phase in phases(plan):
        values = (alone if phase.setting == "alone" else beside)[phase.round]
        runs.append((phase, run_of(phase, *values)))
    result = evaluate(plan, runs)
    first, second = result.outcomes
    assert (first.victim.e2e_seconds.p50, first.victim.e2e_seconds.p99) == (1.0, 3.0)
    assert first.round_p50["e2e_seconds"] == (1.0, 3.0)
    assert result.ratio(second, "e2e_seconds", "p50") == 2.0
    assert result.ratio(second, "itl_seconds", "p50") is None
    assert result.victim_slice == "cpu-0"
    assert second.others[("noisy", "chat-a", "cpu-1")].requests == 2


def test_failures_of_the_victim_are_told_and_make_nothing_faster() -> None:
    plan = plan_of(contrast=None, rounds=1)
    runs = [(p, run_of(p, 1.0, failed=0 if p.setting == "alone" else 3)) for p in phases(plan)]
    result = evaluate(plan, runs)
    shown = result.as_dict()["settings"]["neighbour_on_other_slice"]
    assert shown["victim"]["failures"] == {"http_503": 3}
    assert shown["ratio_to_alone"]["e2e_seconds"] == {"p50": 1.0, "p99": 1.0}
    assert any("busy" in text for text in result.warnings)


def test_a_victim_without_an_answer_is_no_measurement() -> None:
    plan = plan_of(contrast=None, rounds=1)
    with pytest.raises(ScenarioError, match=r"no answer even alone.*busy"):
        evaluate(plan, [(p, run_of(p, failed=2)) for p in phases(plan)])


def test_doubt_is_said_out_loud() -> None:
    plan = plan_of(contrast=None)
    runs = [(p, run_of(p, 1.0 if p.round == 0 else 2.0, lag=0.02)) for p in phases(plan)]
    told = " / ".join(evaluate(plan, runs).warnings)
    assert "late" in told
    assert "between rounds" in told
    assert "raise --duration about 50.0 times" in told


def test_the_table_shows_ratios_beside_the_figures() -> None:
    plan = plan_of(contrast=None, rounds=1)
    runs = [(p, run_of(p, *([1.0] * 100 if p.setting == "alone" else [1.5] * 100))) for p in phases(plan)]
    shown = StringIO()
    Console(width=140, file=shown).print(isolation.table(evaluate(plan, runs)))
    text = shown.getvalue()
    assert "victim (chat-a on cpu-0)" in text
    assert "1000 / 1000" in text
    assert "1.50x / 1.50x" in text
    assert "1500 / 1500" in text
    assert "*" not in text


def test_keys_are_in_no_report() -> None:
    plan = plan_of(base={"tenants": [VICTIM | {"api_key": "sk-secret"}]}, contrast=None, rounds=1)
    result = evaluate(plan, [(p, run_of(p, 1.0)) for p in phases(plan)])
    assert "sk-" not in str(result.as_dict())
