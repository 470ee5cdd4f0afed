"""What a plan costs, and whose cost it is. Pure.

A card costs the same however much of it is used, so its whole price is borne by those who are on it, in proportion to
their memory slices: what is left over costs somebody too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from placement.planner.types import WHOLE, FleetGpu, FleetPlan, ModelDemand, PlannedSlice
from placement.workload.demands import Tenant

Costs = dict[str, float]
"""Per hour, in the currency of the prices."""

EVERYONE = "everyone"
"""Who bears the cost of a model where no tenant is named."""


def costs_of_demands(plan: FleetPlan) -> Costs:
    """Per demand, and per reservation by its note. They sum up to what the plan costs."""
    costs: Costs = {}
    for planned in plan.gpus:
        if not planned.used:
            continue
        users = [s for s in planned.slices if s.replica or s.reserved]
        weights = [_memory_slices(planned.gpu, s) for s in users]
        for user, weight in zip(users, weights, strict=True):
            name = user.demand or user.reserved or ""
            costs[name] = costs.get(name, 0.0) + planned.gpu.price_per_hour * weight / sum(weights)
    return dict(sorted(costs.items()))


def costs_of_tenants(
    costs: Mapping[str, float],
    demands: Iterable[ModelDemand],
    shares: Mapping[str, Mapping[str, float]],
    tenants: Sequence[Tenant],
) -> Costs:
    """Per tenant: its own replicas, and its part of those it shares, by what it sends. Reservations stand beside by note.

    `shares` are the parts of each model's demand by tenant (`tenant_shares`).
    """
    dedicated = {t.name for t in tenants if t.dedicated}
    by_name = {d.name: d for d in demands}
    found: Costs = {}
    for name, cost in costs.items():
        demand = by_name.get(name)
        if demand is None:
            parts = {f"reserved: {name}": 1.0}
        elif demand.tenant is not None:
            parts = {demand.tenant: 1.0}
        else:
            users = {t: s for t, s in shares.get(demand.model, {}).items() if t not in dedicated}
            parts = _scaled(users) or {EVERYONE: 1.0}
        for who, share in parts.items():
            found[who] = found.get(who, 0.0) + cost * share
    return dict(sorted(found.items()))


def _scaled(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    if total <= 0:
        return {who: 1 / len(shares) for who in shares}
    return {who: share / total for who, share in shares.items()}


def _memory_slices(gpu: FleetGpu, user: PlannedSlice) -> float:
    if user.placement == WHOLE or gpu.geometry is None:
        return 1.0
    return float(gpu.geometry.profile(user.placement.profile).memory_slices or 1)
