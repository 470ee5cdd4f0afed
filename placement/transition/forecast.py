"""How long a transition takes, and what each model serves meanwhile. Pure; an estimate from measured or usual durations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from placement.planner.types import FleetPlan, ModelDemand
from placement.transition.planning import capacity_of
from placement.transition.steps import Step, Transition


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds per kind of step. `start_seconds` is by model where starts were measured; `usual_start_seconds` else.

    Draining takes as long as its deadline at most; nobody knows before how soon the running requests end.
    """

    drain_seconds: float = 30.0
    stop_seconds: float = 5.0
    instance_seconds: float = 2.0
    mode_seconds: float = 15.0
    usual_start_seconds: float = 90.0
    check_seconds: float = 1.0
    start_seconds: Mapping[str, float] = field(default_factory=dict)

    def of(self, step: Step) -> float:
        """How long `step` takes."""
        match step.kind:
            case "drain":
                return self.drain_seconds
            case "stop":
                return self.stop_seconds
            case "start":
                model = (step.demand or "").partition("@")[0]
                return self.start_seconds.get(model, self.usual_start_seconds)
            case "check":
                return self.check_seconds
            case _:
                return self.mode_seconds if step.place.slice_id == step.place.gpu else self.instance_seconds


@dataclass(frozen=True, slots=True)
class Outlook:
    """One demand during the transition, in the unit of its capacity. `dip_seconds` is how long it is below what it had."""

    demand: str
    before: float
    lowest: float
    then: float
    guaranteed: float
    dip_seconds: float

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "model": self.demand,
            "before": self.before,
            "lowest": self.lowest,
            "then": self.then,
            "guaranteed": self.guaranteed,
            "dip_seconds": self.dip_seconds,
        }


@dataclass(frozen=True, slots=True)
class Forecast:
    """`ends_seconds` is when each step is done, by number. `models` are those whose capacity changes, by name."""

    seconds: float
    models: tuple[Outlook, ...]
    ends_seconds: tuple[float, ...] = ()


def forecast(
    transition: Transition, plan: FleetPlan, demands: Mapping[str, ModelDemand], timings: Timings | None = None
) -> Forecast:
    """Every step as early as what it waits for allows."""
    timings = timings or Timings()
    ends: list[float] = []
    for step in transition.steps:
        ends.append(max((ends[n] for n in step.after), default=0.0) + timings.of(step))
    products = {g.gpu.id: g.gpu.product for g in plan.gpus}
    changes: dict[str, list[tuple[float, float]]] = {}
    for step, end in zip(transition.steps, ends, strict=True):
        if step.demand is None or step.kind not in ("drain", "check"):
            continue
        capacity = capacity_of(demands.get(step.demand), products[step.place.gpu], step.place.placement)
        # An engine stops taking requests when its drain begins, and takes them once it was checked.
        change = (end, capacity) if step.kind == "check" else (end - timings.of(step), -capacity)
        changes.setdefault(step.demand, []).append(change)
    models = tuple(_outlook(name, changes[name], transition) for name in sorted(changes))
    return Forecast(max(ends, default=0.0), models, tuple(ends))


def _outlook(demand: str, changes: list[tuple[float, float]], transition: Transition) -> Outlook:
    before = transition.before.get(demand, 0.0)
    then = max(0.0, before + sum(change for _, change in changes))
    # What it has in the end is no dip, if it is less than before.
    level, had, lowest, dip, since = before, min(before, then), before, 0.0, 0.0
    for at, change in sorted(changes):
        if level < had - 1e-9:
            dip += at - since
        level, since = level + change, at
        lowest = min(lowest, level)
    return Outlook(demand, before, max(0.0, lowest), then, transition.guaranteed.get(demand, 0.0), dip)
