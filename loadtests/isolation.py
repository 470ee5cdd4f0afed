"""What a neighbour does to a tenant: the same victim measured alone, beside a flood on another slice, and under one on its own.

The settings are interleaved and their order is mirrored from round to round (A B C, C B A, ...), so that a machine that grows
slower or faster meanwhile treats all of them alike. Figures pool the samples of all rounds; each round's medians are kept
beside them, because their spread is what a reader needs to believe a ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.box import SIMPLE
from rich.table import Table

from loadtests.reports import COUNTS_AND_METRICS, by_tenant_and_slice, caption, counts, milliseconds, pair, warnings
from loadtests.run_result import Run
from loadtests.samples import METRICS, Summary, percentile, summarize
from loadtests.scenario import Scenario, ScenarioError, TenantLoad, faults

Setting = Literal["alone", "neighbour_on_other_slice", "neighbour_on_same_slice"]
LABELS: Mapping[Setting, str] = {
    "alone": "alone",
    "neighbour_on_other_slice": "neighbour floods the other slice",
    "neighbour_on_same_slice": "neighbour floods the same slice",
}
DRIFT_WARNING_RATIO = 1.15


class Plan(BaseModel):
    """Who is measured against whom. The victim is `base`'s only tenant.

    `neighbour` floods another slice, `contrast` the victim's own; either is None where there is no such thing to measure.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Scenario
    neighbour: TenantLoad | None = None
    contrast: TenantLoad | None = None
    rounds: int = Field(default=3, ge=1, le=1000)

    @property
    def victim(self) -> TenantLoad:
        """The tenant whose latency is the question."""
        return self.base.tenants[0]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What is measured, in the order of the report."""
        found: list[Setting] = ["alone"]
        if self.neighbour is not None:
            found.append("neighbour_on_other_slice")
        if self.contrast is not None:
            found.append("neighbour_on_same_slice")
        return tuple(found)

    @property
    def planned_seconds(self) -> float:
        """How long all rounds take, answers that come late left out."""
        return self.rounds * len(self.settings) * (self.base.warmup_seconds + self.base.duration_seconds)


def parse_plan(data: object) -> Plan:
    """A Plan from plain data. Raises ScenarioError that lists every fault with its field."""
    try:
        plan = Plan.model_validate(data)
    except ValidationError as error:
        raise ScenarioError(faults(error, "plan")) from error
    if plan.neighbour is None and plan.contrast is None:
        raise ScenarioError("plan: there is no neighbour to flood anything; give `neighbour`, `contrast` or both")
    if len(plan.base.tenants) != 1:
        raise ScenarioError("plan: base.tenants: one tenant is measured, the victim")
    return plan


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of load: a setting in a round."""

    round: int
    setting: Setting
    scenario: Scenario


def phases(plan: Plan) -> Iterator[Phase]:
    """Every phase, in the order in which they are to run."""
    flood: dict[Setting, TenantLoad | None] = {
        "alone": None,
        "neighbour_on_other_slice": plan.neighbour,
        "neighbour_on_same_slice": plan.contrast,
    }
    for number in range(plan.rounds):
        ordered = plan.settings if number % 2 == 0 else tuple(reversed(plan.settings))
        for setting in ordered:
            beside = flood[setting]
            tenants = (
                (plan.victim,) if beside is None else (plan.victim, beside.model_copy(update={"background": True}))
            )
            # The victim asks the same questions in every setting of a round, and others in the next round.
            yield Phase(
                number, setting, plan.base.model_copy(update={"tenants": tenants, "seed": plan.base.seed + number})
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting over all rounds."""

    setting: Setting
    victim: Summary
    others: dict[tuple[str, ...], Summary]
    round_p50: dict[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class Isolation:
    """The whole measurement."""

    plan: Plan
    outcomes: tuple[Outcome, ...]
    victim_slice: str | None
    warnings: tuple[str, ...]

    def ratio(self, outcome: Outcome, metric: str, quantile: str) -> float | None:
        """A figure of the victim, divided by the same one when it was alone; None where either was not measured."""
        alone = getattr(getattr(self.outcomes[0].victim, metric), quantile)
        value = getattr(getattr(outcome.victim, metric), quantile)
        return value / alone if alone and value is not None else None

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape: `settings` by name, each with the victim's figures, their ratios to `alone`, and the neighbour's."""
        return {
            "victim": _described(self.plan.victim) | {"slice": self.victim_slice},
            "neighbour": _described(self.plan.neighbour) if self.plan.neighbour else None,
            "rounds": self.plan.rounds,
            "duration_seconds": self.plan.base.duration_seconds,
            "warmup_seconds": self.plan.base.warmup_seconds,
            "seed": self.plan.base.seed,
            "settings": {outcome.setting: self._outcome(outcome) for outcome in self.outcomes},
            "warnings": list(self.warnings),
        }

    def _outcome(self, outcome: Outcome) -> dict[str, Any]:
        ratios = {m: {q: self.ratio(outcome, m, q) for q in ("p50", "p99")} for m in METRICS}
        others = [
            {"tenant": tenant, "model": model, "slice": None if where == "?" else where} | summary.as_dict()
            for (tenant, model, where), summary in outcome.others.items()
        ]
        return {
            "victim": outcome.victim.as_dict(),
            "ratio_to_alone": ratios,
            "round_p50": outcome.round_p50,
            "neighbours": others,
        }


def evaluate(plan: Plan, runs: Sequence[tuple[Phase, Run]]) -> Isolation:
    """Pool the rounds of each setting and compare.

    Raises ScenarioError if not one of the victim's requests succeeded while it was alone: there is nothing to compare with.
    """
    outcomes = tuple(_outcome(plan, setting, runs) for setting in plan.settings)
    if outcomes[0].victim.succeeded == 0:
        words = "; ".join(warnings(run for _, run in runs)) or "no request was due in the time given"
        raise ScenarioError(f"the victim {plan.victim.name!r} got no answer even alone: {words}")
    slices = {s.slice for _, run in runs for s in run.samples if s.tenant == plan.victim.name and s.slice}
    return Isolation(
        plan=plan,
        outcomes=outcomes,
        victim_slice=slices.pop() if len(slices) == 1 else None,
        warnings=(*warnings(run for _, run in runs), *_drift(outcomes[0]), *_few(outcomes)),
    )


def _outcome(plan: Plan, setting: Setting, runs: Sequence[tuple[Phase, Run]]) -> Outcome:
    mine = [run for phase, run in runs if phase.setting == setting]
    pooled = [sample for run in mine for sample in run.samples]
    per_round = [summarize(s for s in run.samples if s.tenant == plan.victim.name) for run in mine]
    return Outcome(
        setting=setting,
        victim=summarize(s for s in pooled if s.tenant == plan.victim.name),
        others=by_tenant_and_slice(s for s in pooled if s.tenant != plan.victim.name),
        round_p50={m: tuple(getattr(summary, m).p50 for summary in per_round) for m in METRICS},
    )


def _drift(alone: Outcome) -> list[str]:
    medians = sorted(p50 for p50 in alone.round_p50["e2e_seconds"] if p50)
    if len(medians) > 1 and medians[-1] > DRIFT_WARNING_RATIO * medians[0]:
        return [
            f"alone, the victim's median E2E went from {milliseconds(medians[0])} to {milliseconds(medians[-1])} ms between rounds "
            f"(middle: {milliseconds(percentile(medians, 0.5))}): something else used this machine; ratios closer to 1 than that mean nothing"
        ]
    return []


def _few(outcomes: Sequence[Outcome]) -> list[str]:
    fewest = min(outcome.victim.succeeded for outcome in outcomes)
    if fewest >= 100:
        return []
    return [
        f"the victim has {fewest} answers in the thinnest setting; a p99 takes 100 or more: raise --duration about {100 / max(fewest, 1):.1f} times"
    ]


def _described(tenant: TenantLoad) -> dict[str, Any]:
    return tenant.model_dump(mode="json", exclude={"api_key", "api_key_env", "background"})


def table(result: Isolation) -> Table:
    """The victim's p50/p99 per setting, with the ratios to `alone` under each."""
    victim = result.plan.victim
    where = f" on {result.victim_slice}" if result.victim_slice else ""
    shown = Table(
        title=f"{victim.name} ({victim.model}{where})",
        title_justify="left",
        caption=caption(o.victim for o in result.outcomes) + "; x: ratio to alone",
        caption_justify="left",
        box=SIMPLE,
    )
    shown.add_column("setting")
    for heading in COUNTS_AND_METRICS:
        shown.add_column(heading, justify="right")
    for outcome in result.outcomes:
        cells = [_cell(result, outcome, metric) for metric in METRICS]
        shown.add_row(LABELS[outcome.setting], *counts(outcome.victim), *cells)
    return shown


def _cell(result: Isolation, outcome: Outcome, metric: str) -> str:
    figures = pair(getattr(outcome.victim, metric))
    ratios = [result.ratio(outcome, metric, quantile) for quantile in ("p50", "p99")]
    if outcome.setting == "alone" or None in ratios:
        return figures
    return figures + "\n" + " / ".join(f"{ratio:.2f}x" for ratio in ratios)
