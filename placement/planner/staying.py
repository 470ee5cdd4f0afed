"""The plan that changes nothing: is it as good as any?

A fleet that already meets its demands at the least price is left alone, and carrying out a plan leaves nothing to plan.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.planner.seats import Seating
from placement.planner.types import FleetGpu, Instance, Problem
from placement.planner.wants import Want, spread_together


@dataclass(frozen=True, slots=True)
class Standing:
    """What the fleet does as it is: what is missing by want, and what the GPUs in use cost."""

    missing: Mapping[str, float]
    price_per_hour: float
    seating: Seating

    def missing_by_priority(self, wants: Sequence[Want]) -> tuple[float, ...]:
        """What is missing, from the highest priority down."""
        return by_priority(self.missing, wants)


def by_priority(missing: Mapping[str, float], wants: Sequence[Want]) -> tuple[float, ...]:
    """Sums of what is missing, from the highest priority down."""
    sums: dict[int, float] = defaultdict(float)
    for want in wants:
        sums[want.priority] += missing.get(want.name, 0.0)
    return tuple(sums[priority] for priority in sorted(sums, reverse=True))


def standing(problem: Problem, wants: Sequence[Want]) -> Standing | None:
    """The fleet as it is; None if something there must not stay as it is."""
    by_name = {w.name: w for w in wants}
    running = [(g, i) for g in problem.gpus for i in g.instances if i.replica is not None]
    if any(g.draining or not _suits(by_name.get(str(i.demand)), g, i) for g, i in running):
        return None
    placed: dict[str, list[tuple[FleetGpu, Instance]]] = defaultdict(list)
    for gpu, instance in running:
        placed[str(instance.demand)].append((gpu, instance))
    if not all(_within(want, placed[want.name]) for want in wants):
        return None
    if not all(_apart(mine[0], [at for want in mine for at in placed[want.name]]) for mine in spread_together(wants)):
        return None
    missing = {w.name: m for w in wants if (m := w.missing(len(placed[w.name]), _served(w, placed[w.name]))) > 1e-9}
    price = sum(g.price_per_hour for g in problem.gpus if any(not i.idle for i in g.instances))
    seats = {(g.id, i.placement): str(i.demand) for g, i in running}
    used = {g.id: tuple(i.placement for i in g.instances if i.replica) for g in problem.gpus}
    return Standing(missing, price, Seating({g.id: g for g in problem.gpus}, used, seats, set(seats)))


def _suits(want: Want | None, gpu: FleetGpu, instance: Instance) -> bool:
    return want is not None and want.option(gpu.product, instance.profile) is not None


def _served(want: Want, placed: Sequence[tuple[FleetGpu, Instance]]) -> float:
    options = (want.option(g.product, i.profile) for g, i in placed)
    return sum(o.capacity for o in options if o is not None)


def _within(want: Want, placed: Sequence[tuple[FleetGpu, Instance]]) -> bool:
    """No more replicas than are wanted."""
    if want.ceiling is not None and len(placed) > want.ceiling:
        return False
    return want.rate is None or _served(want, placed) <= want.most + 1e-9


def _apart(limits: Want, placed: Sequence[tuple[FleetGpu, Instance]]) -> bool:
    """None beyond the limits per GPU and node. `placed` are all replicas of one model."""
    crowd_gpu = Counter(g.id for g, _ in placed)
    crowd_node = Counter(g.node for g, _ in placed)
    return max(crowd_gpu.values(), default=0) <= (limits.max_per_gpu or len(placed)) and max(
        crowd_node.values(), default=0
    ) <= (limits.max_per_node or len(placed))
