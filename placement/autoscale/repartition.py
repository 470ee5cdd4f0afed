"""More replicas: first on slices that are free, then by cutting GPUs anew where that gains more than it disturbs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.errors import TransitionBlocked
from placement.planner.plan import plan
from placement.planner.types import FleetPlan, ModelDemand, Problem
from placement.policy import AutoscalePolicy
from placement.transition.forecast import Forecast, Timings, forecast
from placement.transition.planning import plan_transition
from placement.transition.steps import Transition


@dataclass(frozen=True, slots=True)
class Repartition:
    """A layout that would serve more. `gained` and `disturbed` are requests, over the policy's horizon.

    `worthwhile` compares them by `repartition_gain`; `automatic` is whether the configuration lets it be done unasked.
    """

    plan: FleetPlan
    transition: Transition
    outlook: Forecast
    gained: float
    disturbed: float
    worthwhile: bool
    automatic: bool
    reason: str

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape, of `sliceway plan --json`."""
        return {
            "gained_requests": self.gained,
            "disturbed_requests": self.disturbed,
            "worthwhile": self.worthwhile,
            "automatic": self.automatic,
            "reason": self.reason,
            "seconds": self.outlook.seconds,
            "steps": [s.as_public() for s in self.transition.steps],
            "plan": self.plan.as_public(),
        }


@dataclass(frozen=True, slots=True)
class Rescale:
    """What to do for new numbers of replicas: `plan` uses slices that are there; `proposal` what cutting anew would add."""

    plan: FleetPlan
    proposal: Repartition | None = None


def rescale(
    fixed: Problem,
    recut: Problem,
    policy: AutoscalePolicy,
    timings: Timings | None = None,
    *,
    rates: Mapping[str, float] | None = None,
) -> Rescale:
    """Plan `fixed` (no GPU is cut), and, if that leaves something unmet, `recut` (GPUs may be) as a proposal.

    `rates` are the requests per second that arrive for demands whose number of replicas follows them: that is what
    replicas of these serve, in equal parts.
    """
    weigh = _Weigh({d.name: d for d in recut.demands}, policy, timings, rates or {})
    here = plan(fixed)
    if not here.unmet:
        return Rescale(here)
    then = plan(recut)
    try:
        transition = plan_transition(then, recut.demands)
    except TransitionBlocked:
        return Rescale(here, _blocked(then, here, weigh))
    return Rescale(here, _weighed(then, here, transition, weigh))


@dataclass(frozen=True, slots=True)
class _Weigh:
    """What gain and disturbance are weighed by."""

    demands: Mapping[str, ModelDemand]
    policy: AutoscalePolicy
    timings: Timings | None
    rates: Mapping[str, float]


def _blocked(then: FleetPlan, here: FleetPlan, weigh: _Weigh) -> Repartition | None:
    """What can only be had by breaking a promise for a while is shown, and never done unasked."""
    transition = plan_transition(then, weigh.demands.values(), allow_dip=True)
    weighed = _weighed(then, here, transition, weigh)
    if weighed is None:
        return None
    names = ", ".join(d.demand for d in transition.dips)
    reason = f"{weighed.reason}; {names} would fall below what is guaranteed for a while"
    return replace(weighed, automatic=False, reason=reason)


def _weighed(then: FleetPlan, here: FleetPlan, transition: Transition, weigh: _Weigh) -> Repartition | None:
    """None where cutting anew serves nobody better."""
    policy = weigh.policy
    more = _served(then, weigh) - _served(here, weigh)
    if more <= 1e-9 or not transition.steps:
        return None
    outlook = forecast(transition, then, weigh.demands, weigh.timings)
    lost = sum((m.before - m.lowest) * m.dip_seconds for m in outlook.models)
    drained = _running_requests(then, transition)
    gained = more * max(0.0, policy.repartition_horizon - outlook.seconds)
    disturbed = lost + drained
    worthwhile = gained > policy.repartition_gain * disturbed
    reason = (
        f"{more:.2f} requests/s more in {outlook.seconds:.0f} s: {gained:.0f} requests within "
        f"{policy.repartition_horizon:.0f} s, {disturbed:.0f} disturbed"
    )
    if losers := _losers(then, here, weigh):
        reason = f"{reason}; {', '.join(losers)} would serve less"
    automatic = worthwhile and not losers and policy.repartition == "automatic"
    return Repartition(then, transition, outlook, gained, disturbed, worthwhile, automatic, reason)


def _losers(then: FleetPlan, here: FleetPlan, weigh: _Weigh) -> list[str]:
    """Demands from which something is taken that they have and ask for: what others gain by that is not done unasked."""
    return [name for name, demand in sorted(weigh.demands.items()) if _gets(then, demand) < _gets(here, demand) - 1e-9]


def _gets(plan: FleetPlan, demand: ModelDemand) -> float:
    keys = [(g.gpu.product, s.placement.profile) for g in plan.gpus for s in g.slices if s.demand == demand.name]
    return len(keys) if demand.rate is None else min(demand.rate, demand.served_by(keys))


def _served(plan: FleetPlan, weigh: _Weigh) -> float:
    """Requests per second that count: what each demand gets, up to what it asks for."""
    total = 0.0
    for name, demand in weigh.demands.items():
        keys = [(g.gpu.product, s.placement.profile) for g in plan.gpus for s in g.slices if s.demand == name]
        if name in weigh.rates and demand.replicas:
            total += weigh.rates[name] * min(1.0, len(keys) / demand.replicas)
            continue
        served = demand.served_by(keys)
        asked = demand.rate if demand.rate is not None else served
        total += min(served, asked)
    return total


def _running_requests(plan: FleetPlan, transition: Transition) -> int:
    running = {(g.gpu.id, i.placement): i.requests for g in plan.gpus for i in g.gpu.instances if i.replica is not None}
    drained = [s for s in transition.steps if s.kind == "drain"]
    return sum(running.get((s.place.gpu, s.place.placement), 0) for s in drained)
