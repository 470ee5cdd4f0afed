"""Carrying out a capacity search against a running gateway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.arrivals import Closed, Open
from loadtests.capacity.scenario import CapacityScenario
from loadtests.capacity.search import Bracket, Search
from loadtests.lab import service
from loadtests.lab.scenario import Context
from loadtests.lab.verdict import BUSY_CLIENT_RATIO
from loadtests.problems import LoadTestError, Problem, ScenarioError
from loadtests.progress import steps
from loadtests.run_result import Run
from loadtests.samples import Sample, Summary, summarize
from loadtests.scenario import Scenario, environment
from loadtests.target import Target
from loadtests.workers import crew

FIRST_LOOK_REQUESTS_SECONDS = 3.0
OnRun = Callable[[Scenario], Run]


@dataclass(frozen=True, slots=True)
class Probe:
    """One load that was tried, and whether it held."""

    requests_per_second: float
    seconds: float
    requests: int
    attainment: float
    held: bool
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    ttft_p50_seconds: float | None
    ttft_p99_seconds: float | None
    itl_p99_seconds: float | None
    e2e_p99_seconds: float | None
    failures: dict[str, int]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The outcome. `at` is the probe at the highest load that held; None where not even the lowest did."""

    scenario: CapacityScenario
    bracket: Bracket
    at: Probe | None
    probes: tuple[Probe, ...]
    slices: tuple[str, ...]
    prompt_tokens: float
    output_tokens: float
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        load, slo = self.scenario.load, self.scenario.slo
        return {
            "schema": "sliceway.capacity/v1",
            "model": load.model,
            "tenant": load.name,
            "task": load.task,
            "slices": list(self.slices),
            "slo": {f"{name}_seconds": seconds for name, seconds in slo.limits.items()}
            | {"attainment": slo.attainment},
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "requests_per_second": self.bracket.holds,
            "fails_at_requests_per_second": self.bracket.fails,
            "at_capacity": asdict(self.at) if self.at else None,
            "probes": [asdict(probe) for probe in self.probes],
            "seed": self.scenario.seed,
            "load": load.described(),
            "warnings": list(self.warnings),
        }


def measure(scenario: CapacityScenario, context: Context) -> Capacity:
    """Search until the bracket is narrow, or the probes are used up.

    Raises LoadTestError where the model answers nothing at all.
    """
    base_url = context.base_url or scenario.base_url
    if base_url is None:
        raise ScenarioError(
            Problem("the scenario names no gateway", remedy="Set base_url; or run `sliceway bench capacity`.")
        )
    load = scenario.load
    keys = {load.name: context.keys.get(load.name) or load.key(environment())}
    target = Target(base_url, keys)
    lexicons, places = target.lexicons((load,), {}), target.places()
    slices = {row["slice"]["id"] for row in target.slices() if row.get("model") == load.model}
    with steps("capacity", scenario.most_probes + 1) as advance, crew(front=scenario.processes, back=0) as workers:

        def send(one: Scenario) -> Run:
            arrival = one.tenants[0].arrival
            label = f"{arrival.requests_per_second:.3g} requests/s" if isinstance(arrival, Open) else "one at a time"
            on_progress = advance(label)
            return workers.run(one, keys=keys, lexicons=lexicons, places=places, on_progress=on_progress)

        return search(scenario, base_url, send, slices=sorted(slices))


def search(scenario: CapacityScenario, base_url: str, send: OnRun, *, slices: Sequence[str] = ()) -> Capacity:
    """The search itself; `send` carries out one scenario."""
    first = _one_at_a_time(scenario, base_url, send)
    alone = summarize(first)
    seconds_each = alone.e2e_seconds.p50
    if seconds_each is None:
        words = next((s.message for s in first if s.message), "no request was due")
        raise LoadTestError(f"{scenario.load.model!r} answers nothing: {words}")
    found = Search(scenario.start_per_second or 1 / seconds_each, scenario.tolerance_ratio, scenario.most_probes)
    probes: list[Probe] = []
    warnings: list[str] = []
    while (rate := found.next()) is not None:
        probe, run = _probe(scenario, base_url, send, rate, len(probes) + 1)
        probes.append(probe)
        found.tell(rate, held=probe.held)
        if run.busy_ratio > BUSY_CLIENT_RATIO:
            warnings.append(f"at {rate:.3g}/s the client was busy {run.busy_ratio:.0%} of the time: raise `processes`")
    good = [s for s in first if s.failure is None]
    return Capacity(
        scenario=scenario,
        bracket=found.bracket,
        at=next((p for p in probes if p.held and p.requests_per_second == found.bracket.holds), None),
        probes=tuple(probes),
        slices=tuple(slices),
        prompt_tokens=round(sum(s.prompt_tokens for s in good) / len(good), 1),
        output_tokens=round(sum(s.output_tokens for s in good) / len(good), 1),
        warnings=(*warnings, *_unmet(scenario, alone, found.bracket)),
    )


def _one_at_a_time(scenario: CapacityScenario, base_url: str, send: OnRun) -> list[Sample]:
    """A first look: one user, so that the search begins near where a single request at a time would be."""
    look = _run_of(scenario, base_url, Closed(users=1), FIRST_LOOK_REQUESTS_SECONDS, 0)
    return list(send(look).samples)


def _probe(scenario: CapacityScenario, base_url: str, send: OnRun, rate: float, number: int) -> tuple[Probe, Run]:
    wanted = scenario.requests_per_probe / rate
    seconds = min(scenario.most_probe_seconds, max(scenario.probe_seconds, wanted))
    arrival = Open(requests_per_second=rate, max_in_flight=10_000)
    run = send(_run_of(scenario, base_url, arrival, seconds, number))
    samples = list(run.samples)
    share = service.attainment(samples, scenario.slo) or 0.0
    summary = summarize(samples)
    good = [s for s in samples if s.failure is None]
    return (
        Probe(
            requests_per_second=rate,
            seconds=seconds,
            requests=len(samples),
            attainment=share,
            held=share >= scenario.slo.attainment and run.unfinished == 0,
            output_tokens_per_second=sum(s.output_tokens for s in good) / seconds,
            prompt_tokens_per_second=sum(s.prompt_tokens for s in good) / seconds,
            ttft_p50_seconds=summary.ttft_seconds.p50,
            ttft_p99_seconds=summary.ttft_seconds.p99,
            itl_p99_seconds=summary.itl_seconds.p99,
            e2e_p99_seconds=summary.e2e_seconds.p99,
            failures=summary.failures,
        ),
        run,
    )


def _run_of(scenario: CapacityScenario, base_url: str, arrival: Open | Closed, seconds: float, number: int) -> Scenario:
    return Scenario(
        base_url=base_url,
        warmup_seconds=scenario.warmup_seconds,
        duration_seconds=seconds,
        timeout_seconds=scenario.timeout_seconds,
        seed=scenario.seed + number,
        tenants=(scenario.load.model_copy(update={"arrival": arrival}),),
    )


def _unmet(scenario: CapacityScenario, alone: Summary, bracket: Bracket) -> list[str]:
    if bracket.holds:
        return [] if bracket.fails else ["no load was too much within the probes allowed: raise most_probes"]
    p99 = alone.ttft_seconds.p99 or alone.e2e_seconds.p99 or 0.0
    return [f"no load meets {scenario.slo}; one request at a time takes {p99 * 1000:.0f} ms to its first answer"]
