"""How long a transition takes, and what each model serves meanwhile. Pure; an estimate from measured or usual durations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from placement.planner.types import FleetPlan, ModelDemand
from placement.transition.planning import capacity_of
from placement.transition.steps import Step, Transition

StartSource = Literal["measured", "measured elsewhere", "usual", "simulated"]
"""Whence a start's seconds are: the model's last start on such a slice, on another one, or what real or simulated engines
usually take.
"""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds per kind of step. `starts` are the last ones that were seen, by model, product and profile; without any of a model
    `usual_start_seconds` counts, which is that of `usual` engines.

    Draining takes as long as its deadline at most; nobody knows before how soon the running requests end.
    """

    drain_seconds: float = 30.0
    stop_seconds: float = 5.0
    instance_seconds: float = 2.0
    mode_seconds: float = 15.0
    usual_start_seconds: float = 90.0
    check_seconds: float = 1.0
    starts: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    usual: Literal["usual", "simulated"] = "usual"

    def start(self, demand: str, product: str, profile: str) -> tuple[float, StartSource]:
        """How long an engine of `demand` takes to start in such a place, and whence that is known."""
        model = demand.partition("@")[0]
        if (model, product, profile) in self.starts:
            return self.starts[model, product, profile], "measured"
        elsewhere = [seconds for (name, _, _), seconds in self.starts.items() if name == model]
        return (max(elsewhere), "measured elsewhere") if elsewhere else (self.usual_start_seconds, self.usual)

    def of(self, step: Step, product: str) -> float:
        """How long `step` takes, on a GPU of this product."""
        match step.kind:
            case "drain":
                return self.drain_seconds
            case "stop":
                return self.stop_seconds
            case "start":
                return self.start(step.demand or "", product, step.place.placement.profile)[0]
            case "check":
                return self.check_seconds
            case _:
                return self.mode_seconds if step.place.slice_id == step.place.gpu else self.instance_seconds


SIMULATED = Timings(
    drain_seconds=2.0,
    stop_seconds=1.0,
    instance_seconds=1.0,
    mode_seconds=1.0,
    usual_start_seconds=3.0,
    usual="simulated",
)
"""What simulated engines and GPUs take: a process that loads nothing, and requests of seconds."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """One demand during the transition, in the unit of its capacity. `dip_seconds` is how long it is below what it had.

    `start_seconds` is what its slowest start is counted with, and `start_source` whence that is; None where nothing of it starts.
    """

    demand: str
    before: float
    lowest: float
    then: float
    guaranteed: float
    dip_seconds: float
    start_seconds: float | None = None
    start_source: StartSource | None = None

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "model": self.demand,
            "before": self.before,
            "lowest": self.lowest,
            "then": self.then,
            "guaranteed": self.guaranteed,
            "dip_seconds": self.dip_seconds,
            "start_seconds": self.start_seconds,
            "start_source": self.start_source,
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
    products = {g.gpu.id: g.gpu.product for g in plan.gpus}
    takes = [timings.of(step, products[step.place.gpu]) for step in transition.steps]
    ends: list[float] = []
    for step, seconds in zip(transition.steps, takes, strict=True):
        ends.append(max((ends[n] for n in step.after), default=0.0) + seconds)
    starts: dict[str, list[tuple[float, StartSource]]] = {}
    for step in transition.steps:
        if step.kind == "start" and step.demand is not None:
            told = timings.start(step.demand, products[step.place.gpu], step.place.placement.profile)
            starts.setdefault(step.demand, []).append(told)
    changes: dict[str, list[tuple[float, float]]] = {}
    for step, end, seconds in zip(transition.steps, ends, takes, strict=True):
        if step.demand is None or step.kind not in ("drain", "check"):
            continue
        capacity = capacity_of(demands.get(step.demand), products[step.place.gpu], step.place.placement)
        # An engine stops taking requests when its drain begins, and takes them once it was checked.
        change = (end, capacity) if step.kind == "check" else (end - seconds, -capacity)
        changes.setdefault(step.demand, []).append(change)
    models = tuple(
        outlook(
            name,
            changes[name],
            starts.get(name, []),
            before=transition.before.get(name, 0.0),
            guaranteed=transition.guaranteed.get(name, 0.0),
        )
        for name in sorted(changes)
    )
    return Forecast(max(ends, default=0.0), models, tuple(ends))


def outlook(
    demand: str,
    changes: Sequence[tuple[float, float]],
    starts: Sequence[tuple[float, StartSource]],
    *,
    before: float,
    guaranteed: float,
) -> Outlook:
    """One demand that serves `before` at first: `changes` are seconds from the beginning and what is more or less from then on,
    in any order, `starts` seconds and their source.
    """
    then = max(0.0, before + sum(change for _, change in changes))
    # What it has in the end is no dip, if it is less than before.
    level, had, lowest, dip, since = before, min(before, then), before, 0.0, 0.0
    for at, change in sorted(changes, key=lambda c: (c[0], -c[1])):  # who takes over serves before the other one goes
        if level < had - 1e-9:
            dip += at - since
        level, since = level + change, at
        lowest = min(lowest, level)
    slowest, source = max(starts, default=(None, None))
    return Outlook(demand, before, max(0.0, lowest), then, guaranteed, dip, slowest, source)
