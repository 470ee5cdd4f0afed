"""The plan that moves nobody: every demand brought to its number by the online rule, the rest left where it is.

On a large fleet that runs, this is nearly always as cheap as the proven bound asks for, and no plan disturbs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from placement.planner.online import adjust
from placement.planner.seats import Seating
from placement.planner.shapes import in_the_way
from placement.planner.staying import Standing, standing
from placement.planner.types import FleetGpu, Instance, Problem
from placement.planner.wants import Want


def adjusted(problem: Problem, wants: Sequence[Want]) -> Standing | None:
    """The fleet with each demand adjusted by itself, the most important first; None if a constraint stands against it."""
    if any(w.reservation is not None and w.floor for w in wants):
        return None
    names = {w.name for w in wants}
    gpus: Sequence[FleetGpu] = [_without_leavers(g, names) for g in problem.gpus]
    headroom = problem.constraints.headroom_ratio
    order = sorted(problem.demands, key=lambda d: (-d.priority, d.name))
    for demand in order:
        gpus = adjust(gpus, demand, headroom_ratio=headroom, add=False).gpus
    for demand in order:
        gpus = adjust(gpus, demand, headroom_ratio=headroom).gpus
    found = standing(replace(problem, gpus=tuple(gpus)), wants)
    if found is None:
        return None
    before = {(g.id, i.placement): i.replica for g in problem.gpus for i in g.instances}
    after = {(g.id, i.placement): i.replica for g in gpus for i in g.instances if i.replica is not None}
    kept = {seat for seat, replica in after.items() if before.get(seat) == replica}
    seating = Seating({g.id: g for g in problem.gpus}, found.seating.used, found.seating.seats, kept)
    return replace(found, seating=seating)


def disturbance(problem: Problem, wants: Sequence[Want], seating: Seating) -> tuple[int, int]:
    """Replicas that lose their place, and instances created and destroyed."""
    names = {w.name for w in wants}
    lost = changes = 0
    for gpu in problem.gpus:
        there = {i.placement for i in gpu.instances}
        used = seating.used[gpu.id]
        lost += sum(i.demand in names and (gpu.id, i.placement) not in seating.kept for i in gpu.instances)
        if created := sum(p not in there for p in used):
            changes += created + len(in_the_way(gpu, used))
    return lost, changes


def _without_leavers(gpu: FleetGpu, names: set[str]) -> FleetGpu:
    """The GPU without replicas that cannot stay: nobody asks for them, or the GPU is draining."""
    leaving = [i for i in gpu.instances if i.replica is not None and (gpu.draining or i.demand not in names)]
    if not leaving:
        return gpu
    return replace(gpu, instances=tuple(Instance(i.placement) if i in leaving else i for i in gpu.instances))
