"""The capacity search against a made-up engine: what it tries, what it finds, what it says."""

from __future__ import annotations

from typing import Any

import pytest

from loadtests.arrivals import Open
from loadtests.capacity.measure import search
from loadtests.capacity.scenario import CapacityScenario, read_capacity
from loadtests.problems import LoadTestError, ScenarioError
from loadtests.run_result import Run
from loadtests.samples import Sample, quantiles
from loadtests.scenario import Scenario
from loadtests.yamlfile import Source

LOAD = {"name": "acme", "model": "chat", "slo": {"ttft": "500ms"}}


def scenario_of(**fields: Any) -> CapacityScenario:
    return read_capacity(Source({"kind": "capacity", "load": LOAD} | fields, "c.yaml"))


class Engine:
    """Answers within 0.2 s up to `limit` requests a second, and in 2 s beyond."""

    def __init__(self, limit: float, *, fails: bool = False) -> None:
        self._limit, self._fails = limit, fails
        self.rates: list[float] = []
        self.seconds: list[float] = []

    def __call__(self, scenario: Scenario) -> Run:
        arrival = scenario.tenants[0].arrival
        rate = arrival.requests_per_second if isinstance(arrival, Open) else 0.0
        self.rates.append(rate)
        self.seconds.append(scenario.duration_seconds)
        took = 0.2 if rate <= self._limit else 2.0
        count = round(rate * scenario.duration_seconds) or 5
        return Run(tuple(self._sample(took, i) for i in range(count)), quantiles([]), busy_ratio=0.95)

    def _sample(self, took: float, number: int) -> Sample:
        if self._fails:
            return Sample("acme", "chat", None, number, number, number, failure="http_503", message="no replica")
        return Sample(
            "acme", "chat", None, number, number, number + took,
            ttft_seconds=took, e2e_seconds=took, output_tokens=10, prompt_tokens=50,
        )  # fmt: skip


def test_the_bracket_holds_the_true_capacity_after_few_probes() -> None:
    engine = Engine(13.0)
    found = search(scenario_of(), "http://127.0.0.1:1", engine)
    assert found.bracket.fails is not None
    assert found.bracket.holds <= 13.0 < found.bracket.fails <= 1.1 * found.bracket.holds
    assert len(found.probes) <= 8
    assert engine.rates[:2] == [0.0, 5.0]
    assert found.at is not None
    assert found.at.output_tokens_per_second == pytest.approx(10 * found.bracket.holds, rel=0.02)
    assert (found.prompt_tokens, found.output_tokens) == (50, 10)
    assert "raise `processes`" in found.warnings[0]


def test_probes_are_long_enough_for_the_requests_they_need() -> None:
    engine = Engine(0.4)
    found = search(scenario_of(start_per_second=0.5, requests_per_probe=100), "http://127.0.0.1:1", engine)
    assert engine.seconds[1] == pytest.approx(200)
    assert max(engine.seconds) <= 300
    assert found.bracket.holds <= 0.4


def test_an_slo_that_nothing_meets_is_said() -> None:
    found = search(
        scenario_of(load=LOAD | {"slo": {"ttft": "100ms"}}, most_probes=4), "http://127.0.0.1:1", Engine(9.0)
    )
    assert found.bracket.holds == 0
    assert found.at is None
    assert any("no load meets ttft <= 100ms" in text for text in found.warnings)


def test_an_engine_that_answers_errors_is_no_capacity() -> None:
    with pytest.raises(LoadTestError, match="no replica"):
        search(scenario_of(), "http://127.0.0.1:1", Engine(9.0, fails=True))


def test_the_result_as_data_has_no_key() -> None:
    found = search(scenario_of(load=LOAD | {"api_key": "sk-secret"}), "http://127.0.0.1:1", Engine(3.0), slices=("s",))
    shown = found.as_dict()
    assert "sk-" not in str(shown)
    assert shown["slo"] == {"ttft_seconds": 0.5, "attainment": 0.99}
    assert shown["at_capacity"]["held"] is True


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"load": {"name": "a", "model": "m"}}, "Add load.slo"),
        ({"load": LOAD | {"slo": {"ttft": "0.5"}}}, "has no unit"),
        ({"load": LOAD | {"arrival": {"kind": "poisson", "requests_per_second": 3}}}, "search sets the arrivals"),
        ({"requests_per_probe": 50}, "Set requests_per_probe to 100"),
        ({"probe_second": 3}, "Did you mean 'probe_seconds'?"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario_of(**fields)
    assert said in str(caught.value)
