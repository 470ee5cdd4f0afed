"""A configuration's models and tenants as the planner's demands: what is wanted of each, and which slices can serve it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model_registry.errors import SlicewayError
from model_registry.schema import ModelConfig
from placement.assign import stem
from placement.planner.types import Alternative, ModelDemand
from placement.workload.alternatives import alternatives
from placement.workload.cards import Card
from placement.workload.measured import Measured
from placement.workload.options import Candidate, Subject, candidates, trusted

SHARED = None
"""The tenant of a demand that all others share."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends requests, as planning sees them. `models` None: all. `rates` are its parts of models' demands."""

    name: str
    models: tuple[str, ...] | None = None
    dedicated: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)

    def may_use(self, model: str) -> bool:
        """Whether its requests may name `model`."""
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class ModelChoices:
    """One model: where it could run, and what would open further places. `subject` None: an engine that nobody can size."""

    config: ModelConfig
    subject: Subject | None
    candidates: tuple[Candidate, ...]
    alternatives: tuple[Alternative, ...] = ()

    @property
    def blocked(self) -> str | None:
        """Why it can run nowhere, told of the place that comes nearest; None if it can."""
        if any(c.option for c in self.candidates) or not self.candidates:
            return None
        order = {"speed": 4, "memory": 3, "unknown": 2, "mode": 1, "accepted": 0}
        nearest = max(
            self.candidates, key=lambda c: (order[c.breaks or "mode"], c.place.memory_bytes or 0, c.place.product)
        )
        return f"on {nearest.place.profile} of {nearest.place.product}: {nearest.reason}"


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that is asked of a fleet. `unreadable` are models whose files cannot be had: nothing is planned for them.

    `resting` are demands of no replica at all (`min: 0`): one comes with the first request, on a slice that is free then.
    """

    demands: tuple[ModelDemand, ...]
    models: Mapping[str, ModelChoices]
    shares: Mapping[str, Mapping[str, float]]
    unreadable: Mapping[str, SlicewayError] = field(default_factory=dict)
    resting: tuple[ModelDemand, ...] = ()

    def demand(self, name: str) -> ModelDemand | None:
        """The demand of that name."""
        return next((d for d in self.demands if d.name == name), None)


def workload(
    subjects: Mapping[str, Subject | ModelConfig],
    cards: Sequence[Card],
    *,
    tenants: Sequence[Tenant] = (),
    desired: Mapping[str, int] | None = None,
    measured: Measured | None = None,
    unreadable: Mapping[str, SlicewayError] | None = None,
) -> Workload:
    """The demands of `subjects` (by model) on `cards`. A bare ModelConfig stands for a model of an engine that is not vLLM
    (`engine.command`) whose files nobody can read: it is taken to fit wherever it is accepted.

    `desired` are numbers of replicas by demand that something else has decided on (autoscaling); they count within the
    configured bounds instead of what the configuration's demand takes. Pinned models have no demand here: the plan does
    not move them.
    """
    models: dict[str, ModelChoices] = {}
    for name, subject in sorted(subjects.items()):
        if isinstance(subject, ModelConfig):
            models[name] = ModelChoices(subject, None, trusted(subject, cards))
            continue
        found = candidates(subject, cards, measured)
        models[name] = ModelChoices(subject.config, subject, found, alternatives(subject, cards, found, measured))
    shares = {name: tenant_shares(choice.config, tenants) for name, choice in models.items()}
    demands = [
        _demand(choice, tenant, share, desired or {})
        for name, choice in models.items()
        if not choice.config.slices
        for tenant, share in _parts(shares[name], tenants).items()
    ]
    wanted, resting = (tuple(d for d in demands if (d.ceiling == 0) == rests) for rests in (False, True))
    return Workload(wanted, models, shares, unreadable or {}, resting)


def tenant_shares(model: ModelConfig, tenants: Sequence[Tenant]) -> dict[str, float]:
    """Which part of a model's demand each tenant is, summing to 1; empty where nobody may use it.

    What tenants name counts; the rest is divided equally among those that name nothing, or in proportion among those
    that do where all of them do.
    """
    users = [t for t in tenants if t.may_use(model.name)]
    if not users:
        return {}
    total = model.demand.requests_per_second if model.demand else 0.0
    named = {t.name: t.rates[model.name] / total for t in users if model.name in t.rates and total}
    silent = [t.name for t in users if t.name not in named]
    rest = max(0.0, 1.0 - sum(named.values()))
    if silent:
        return named | {name: rest / len(silent) for name in silent}
    scale = sum(named.values())
    return {name: share / scale for name, share in named.items()}


def _parts(shares: Mapping[str, float], tenants: Sequence[Tenant]) -> dict[str | None, float]:
    """Who gets replicas of their own: every dedicated tenant, and all others together. A part of 0 or none is left out."""
    dedicated = {t.name for t in tenants if t.dedicated}
    parts: dict[str | None, float] = {name: share for name, share in sorted(shares.items()) if name in dedicated}
    others = [share for name, share in shares.items() if name not in dedicated]
    if others or not shares:
        parts[SHARED] = sum(others) if shares else 1.0
    return parts


def demand_name(model: str, tenant: str | None) -> str:
    """The stem of replicas' names: the model's, or `model@tenant` for those of a dedicated tenant.

    The gateway reads from it whose a replica is.
    """
    return stem(model, tenant)


def _demand(choice: ModelChoices, tenant: str | None, share: float, desired: Mapping[str, int]) -> ModelDemand:
    model = choice.config
    name = demand_name(model.name, tenant)
    least, most = model.least_replicas, model.most_replicas
    number: int | None = None
    rate: float | None = None
    if name in desired:
        number = max(least, desired[name] if most is None else min(most, desired[name]))
    elif model.demand is None:
        number = least
    else:
        rate = model.demand.requests_per_second * share
        least = max(1, least)
    return ModelDemand(
        name=name,
        model=model.name,
        options=tuple(c.option for c in choice.candidates if c.option),
        replicas=number,
        rate=rate,
        min_replicas=0 if number is not None else least,
        max_replicas=None if number is not None else most,
        tenant=tenant,
        priority=model.priority,
        max_per_gpu=None if model.spread == "none" else 1,
        max_per_node=1 if model.spread == "nodes" else None,
        alternatives=choice.alternatives,
    )
