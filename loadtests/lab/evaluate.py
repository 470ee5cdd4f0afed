"""From what was measured to the report: pool the rounds of each setting, compare each with `alone`, judge. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.lab import bootstrap, service
from loadtests.lab.matrix import ALONE, Cell
from loadtests.lab.report import Client, Neighbour, Plots, Report, Row, Service, Setting, Slo
from loadtests.lab.scenario import Context, IsolationScenario
from loadtests.lab.verdict import drifted, judge, overloaded, unanswered
from loadtests.manners import INTENDED
from loadtests.problems import LoadTestError
from loadtests.reports import warnings
from loadtests.run_result import Run, merged
from loadtests.samples import (
    METRICS,
    PERCENTILES,
    Quantiles,
    Sample,
    Summary,
    grouped,
    percentile,
    samples_needed,
    summarize,
)
from loadtests.scenario import TenantLoad

POINTS = 300
SHARES = (*(n / 100 for n in range(1, 100)), 0.995, 0.999, 1.0)

NOT_ISOLATED: Mapping[str, str] = {
    "mig": "Of a MIG slice the SMs, the L2 banks and the memory bandwidth are its own. PCIe, the card's power and clocks, the copy engines' host side, host CPU and memory, and the gateway are shared.",
    "gpu": "Of a whole card everything on it is its own. PCIe switches, the host's CPU, memory and power, and the gateway are shared.",
    "mps": "Under MPS nothing on the card is kept apart but, where it is set, a share of threads and memory. SMs, caches, bandwidth, PCIe and power are shared.",
    "time-slice": "Time-slicing keeps nothing apart: the card works for one after the other, and caches, bandwidth, PCIe and power are shared.",
    "cpu": "Of a core set the cores are its own. The last-level cache, memory bandwidth, sibling hyper-threads, clocks and power, disk, and the gateway are shared.",
}

ON_UNKNOWN = "What keeps endpoints apart that something else runs is not known here: the GPU itself, PCIe, power, the host's CPU and memory, and the gateway may all be shared."


@dataclass(frozen=True, slots=True)
class Measured:
    """One phase's outcome. `began_seconds` counts from the start of the whole measurement."""

    round: int
    cell: Cell
    began_seconds: float
    run: Run


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a report says about how it was made."""

    made_at: str
    command: str
    machine: Mapping[str, Any]
    machine_use: Mapping[str, float | None]


def evaluate(
    scenario: IsolationScenario,
    cells: Sequence[Cell],
    measured: Sequence[Measured],
    *,
    context: Context,
    surroundings: Surroundings,
    replicates: int = bootstrap.REPLICATES,
) -> Report:
    """The report.

    Raises LoadTestError if not one of the victim's requests succeeded while it was alone: there is nothing to compare with.
    """
    victim = scenario.victim
    by_cell = {cell.key: [m for m in measured if m.cell.key == cell.key] for cell in cells}
    check_answered(victim, by_cell[ALONE])
    alone = [_victims(m.run, victim) for m in by_cell[ALONE]]
    pools = {metric: bootstrap.pool_of(alone, metric) for metric in METRICS}
    settings = {
        cell.key: _setting(scenario, cell, by_cell[cell.key], alone, pools, context, replicates) for cell in cells
    }
    client = _client(scenario, measured, surroundings.machine_use)
    verdict = judge(settings, scenario.budget, client)
    kinds = {s.kind for s in settings.values() if s.kind} or set(str(context.layout.get("kind") or "").split(", "))
    return Report(
        name=scenario.name or f"{victim.name} on {victim.model}",
        made_at=surroundings.made_at,
        simulated=context.simulated,
        command=surroundings.command,
        verdict=verdict,
        budget=scenario.budget.model_dump(mode="json", exclude_none=True) if scenario.budget else None,
        victim=victim.described() | {"slice": _slice_of(alone)},
        neighbour=next((cell.beside.described() for cell in cells if cell.beside), None),
        rounds=scenario.rounds,
        duration_seconds=scenario.duration_seconds,
        warmup_seconds=scenario.warmup_seconds,
        seed=scenario.seed,
        settings=settings,
        not_isolated=not_isolated(kinds, simulated=context.simulated),
        warnings=_warnings(measured, victim, settings, client, judged=scenario.budget is not None),
        client=client,
        machine=dict(surroundings.machine),
        software=context.software,
        layout=context.layout,
        scenario=_public(scenario),
    )


def check_answered(victim: TenantLoad, alone: Sequence[Measured]) -> None:
    """Raises LoadTestError if not one of the victim's requests in `alone` succeeded."""
    if any(s.failure is None for m in alone for s in _victims(m.run, victim)):
        return
    # What the server said comes first; that the client was late, too, is no reason for no answer at all.
    told = sorted(warnings(m.run for m in alone), key=lambda text: not text.startswith("failed requests"))
    words = "; ".join(told) or "no request was due in the time given"
    raise LoadTestError(
        f"the victim {victim.name!r} got no answer even alone: {words}",
        remedy=f"Ask {victim.model!r} for one by hand; check the model's name, the tenant's key, and duration_seconds.",
    )


def check_first(victim: TenantLoad, first: Measured) -> None:
    """Raises LoadTestError if every request of the victim in the `first` phase failed: the rest would not go better.

    Where none was due in it, as at rare rates, later rounds may have some.
    """
    if _victims(first.run, victim):
        check_answered(victim, [first])


def not_isolated(kinds: set[str], *, simulated: bool) -> list[str]:
    """What is shared, for each kind of slice in the report."""
    if simulated:
        return ["The engines are simulated: these figures are about the gateway, and say nothing about a GPU or a CPU."]
    known = [NOT_ISOLATED[kind] for kind in NOT_ISOLATED if kind in kinds]
    return known if kinds <= NOT_ISOLATED.keys() else [*known, ON_UNKNOWN]


def _setting(
    scenario: IsolationScenario,
    cell: Cell,
    phases: Sequence[Measured],
    alone: Sequence[Sequence[Sample]],
    pools: Mapping[str, bootstrap.Pool],
    context: Context,
    replicates: int,
) -> Setting:
    victim = scenario.victim
    rounds = [_victims(m.run, victim) for m in sorted(phases, key=lambda m: m.round)]
    pooled = [s for samples in rounds for s in samples]
    everyone = [s for m in phases for s in m.run.samples]
    summary = summarize(pooled)
    base = summarize(s for samples in alone for s in samples)
    compared = {
        metric: bootstrap.compare(
            pools[metric], bootstrap.pool_of(rounds, metric), seed=scenario.seed, replicates=replicates
        )
        for metric in METRICS
    }
    seconds = scenario.duration_seconds * len(phases)
    return Setting(
        label=cell.label,
        where=cell.where,
        aggressor=cell.aggressor,
        kind=cell.kind,
        deployment=context.deployment,
        baseline=ALONE,
        load=_load(cell),
        victim=_row(summary),
        prompt_tokens_mean=_mean_prompt(pooled),
        ratio_to_alone={m: _ratios(getattr(summary, m), getattr(base, m)) for m in METRICS},
        ratio_confidence={m: dict(compared[m].ratio) if cell.key != ALONE else {} for m in METRICS},
        confidence={m: dict(compared[m].beside) for m in METRICS},
        p99_over_p50={m: _spread(getattr(summary, m)) for m in METRICS},
        p99_over_p50_confidence={m: compared[m].p99_over_p50 for m in METRICS},
        round_p50={m: [getattr(summarize(r), m).p50 for r in rounds] for m in METRICS},
        unfinished=sum(m.run.unfinished for m in phases),
        slo=_slo(victim, pooled, seconds),
        service=_service(everyone, seconds),
        neighbours=_neighbours(everyone, scenario, seconds),
        plots=_plots(phases, victim, scenario.warmup_seconds),
    )


def _victims(run: Run, victim: TenantLoad) -> list[Sample]:
    return [s for s in run.samples if s.tenant == victim.name]


def _row(summary: Summary) -> Row:
    return Row.model_validate(summary.as_dict())


def _ratios(beside: Quantiles, alone: Quantiles) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in PERCENTILES:
        value, base = getattr(beside, name), getattr(alone, name)
        found[name] = value / base if base and value is not None else None
    return found


def _spread(values: Quantiles) -> float | None:
    return values.p99 / values.p50 if values.p50 and values.p99 is not None else None


def _mean_prompt(samples: Sequence[Sample]) -> float | None:
    counted = [s.prompt_tokens for s in samples if s.prompt_tokens]
    return round(sum(counted) / len(counted), 1) if counted else None


def _slo(tenant: TenantLoad, samples: Sequence[Sample], seconds: float) -> Slo | None:
    return Slo(**service.kept(samples, tenant.slo, seconds)) if tenant.slo else None


def _service(samples: Sequence[Sample], seconds: float) -> Service:
    names = list(dict.fromkeys(s.tenant for s in samples))
    rates = {n: service.tokens_per_second((s for s in samples if s.tenant == n), seconds) for n in names}
    return Service(tokens_per_second=rates, jain_index=service.jain_index(rates.values()))


def _neighbours(samples: Sequence[Sample], scenario: IsolationScenario, seconds: float) -> list[Neighbour]:
    """Everyone beside the victim by tenant, model and slice; those among `others` with how far their own SLO was kept."""
    promised = {other.name: other for other in scenario.others}
    beside = (s for s in samples if s.tenant != scenario.victim.name)
    groups = grouped(beside, lambda s: (s.tenant, s.model, s.slice or "?"))
    return [
        Neighbour(
            tenant=tenant,
            model=model,
            slice=None if place == "?" else place,
            slo=_slo(promised[tenant], rows, seconds) if tenant in promised else None,
            **_row(summarize(rows)).model_dump(),
        )
        for (tenant, model, place), rows in groups.items()
    ]


def _load(cell: Cell) -> dict[str, Any] | None:
    if cell.beside is not None:
        return cell.beside.described()
    if cell.hog is not None:
        return cell.hog.model_dump(mode="json", exclude_none=True) | {"cores": list(cell.cores or ())}
    return None


def _plots(phases: Sequence[Measured], victim: TenantLoad, warmup_seconds: float) -> Plots:
    ecdf: dict[str, list[tuple[float, float]]] = {}
    timeline: dict[str, list[tuple[float, float]]] = {}
    for metric in METRICS:
        rows = [(m, s) for m in phases for s in _victims(m.run, victim) if s.failure is None]
        values = sorted(v for _, s in rows for v in _all_of(s, metric))
        if values:
            ecdf[metric] = [(round(percentile(values, share), 6), share) for share in SHARES]
        points = [
            (round(m.began_seconds + s.due_seconds, 2), round(max(found), 6))
            for m, s in rows
            if (found := _all_of(s, metric))
        ]
        timeline[metric] = _thinned(sorted(points))
    return Plots(ecdf=ecdf, timeline=timeline)


def _all_of(sample: Sample, metric: str) -> list[float]:
    value = getattr(sample, metric)
    return list(value) if isinstance(value, tuple) else [] if value is None else [value]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS`: of every stretch its worst point, so that no peak is lost."""
    if len(points) <= POINTS:
        return points
    step = math.ceil(len(points) / POINTS)
    return [max(points[i : i + step], key=lambda p: p[1]) for i in range(0, len(points), step)]


def _client(
    scenario: IsolationScenario, measured: Sequence[Measured], machine_use: Mapping[str, float | None]
) -> Client:
    whole = merged([m.run for m in measured])
    return Client(
        processes=scenario.processes,
        lag_p50_seconds=whole.client_lag.p50,
        lag_p99_seconds=whole.client_lag.p99,
        busy_ratio=round(whole.busy_ratio, 3),
        machine_busy_ratio=machine_use.get("busy_ratio"),
        machine_steal_ratio=machine_use.get("steal_ratio"),
        unfinished=whole.unfinished,
    )


def _warnings(
    measured: Sequence[Measured],
    victim: TenantLoad,
    settings: Mapping[str, Setting],
    client: Client,
    *,
    judged: bool,
) -> list[str]:
    """What speaks against believing the figures, in words; a verdict's refusals are not said twice."""
    found = (
        []
        if judged
        else [*overloaded(settings, None, client), *unanswered(settings, settings, client), *drifted(settings, None)]
    )
    found += _failures(measured)
    fewest = min(setting.victim.succeeded for setting in settings.values())
    needed = samples_needed("p99")
    if fewest < needed:
        found.append(
            f"the victim has {fewest} answers in the thinnest setting; a p99 takes {needed} or more: "
            f"raise --duration about {needed / max(fewest, 1):.1f} times"
        )
    if (client.machine_steal_ratio or 0) > 0.02:
        found.append(f"a hypervisor took {client.machine_steal_ratio:.0%} of this machine's processor time")
    return found


def _failures(measured: Sequence[Measured]) -> list[str]:
    messages = {
        s.failure: s.message for m in measured for s in m.run.samples if s.failure and s.failure not in INTENDED
    }
    return [f"failed requests ({kind}), for instance: {message}" for kind, message in sorted(messages.items())]


def _slice_of(rounds: Sequence[Sequence[Sample]]) -> str | None:
    places = {s.slice for samples in rounds for s in samples if s.slice}
    return places.pop() if len(places) == 1 else None


def _public(scenario: IsolationScenario) -> dict[str, Any]:
    """The scenario without keys and without the paths of this machine."""
    hidden = {
        "victim": {"api_key"},
        "others": {"__all__": {"api_key"}},
        "config": True,
        "deployments": True,
        "tokenizers": True,
    }
    return scenario.model_dump(mode="json", exclude_none=True, exclude=hidden)  # type: ignore[arg-type]
