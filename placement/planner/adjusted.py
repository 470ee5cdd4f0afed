"""Plans that move nobody or only a few: every demand brought to its number by the online rule, the rest left where it is.

On a large fleet that runs this is nearly always as cheap as the proven bound asks for. Where it is not, GPUs with little
on them are emptied one after the other, as long as their replicas find room elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from placement.planner.online import adjust
from placement.planner.seats import Seating
from placement.planner.shapes import in_the_way
from placement.planner.staying import Standing, standing
from placement.planner.types import FleetGpu, Instance, ModelDemand, Problem
from placement.planner.wants import Want

_EMPTIED = 64
"""So many GPUs are tried to be emptied."""

_IN_VAIN = 16
"""After so many in a row whose replicas found no better room, those with more on them are not tried."""


def adjusted(problem: Problem, wants: Sequence[Want], allowed_per_hour: float) -> Standing | None:
    """The fleet with each demand adjusted by itself, the most important first; None if a constraint stands against it.

    While it costs more than `allowed_per_hour`, GPUs are emptied.
    """
    if any(w.reservation is not None and w.floor for w in wants):
        return None
    names = {w.name for w in wants}
    gpus: Sequence[FleetGpu] = [without_leavers(g, names) for g in problem.gpus]
    headroom = problem.constraints.headroom_ratio
    order = sorted(problem.demands, key=lambda d: (-d.priority, d.name))
    for demand in order:
        gpus = adjust(gpus, demand, headroom_ratio=headroom, add=False).gpus
    for demand in order:
        gpus = adjust(gpus, demand, headroom_ratio=headroom, siblings=siblings_of(demand, order)).gpus
    gpus = _emptied(gpus, {d.name: d for d in order}, headroom, allowed_per_hour)
    return standing_after(problem, gpus, wants)


def standing_after(problem: Problem, gpus: Sequence[FleetGpu], wants: Sequence[Want]) -> Standing | None:
    """The fleet as `gpus` will be, with who has kept the place it has in `problem`; None if something must not be so."""
    found = standing(replace(problem, gpus=tuple(gpus)), wants)
    if found is None:
        return None
    before = {(g.id, i.placement): i.replica for g in problem.gpus for i in g.instances}
    after = {(g.id, i.placement): i.replica for g in gpus for i in g.instances if i.replica is not None}
    kept = {seat for seat, replica in after.items() if before.get(seat) == replica}
    seating = Seating({g.id: g for g in problem.gpus}, found.seating.used, found.seating.seats, kept)
    return replace(found, seating=seating)


def _emptied(
    gpus: Sequence[FleetGpu], demands: Mapping[str, ModelDemand], headroom: float, allowed_per_hour: float
) -> Sequence[FleetGpu]:
    """The fleet with GPUs emptied until it costs no more than is allowed, those first that save the most per replica."""
    price = _price(gpus)
    light = [g for g in gpus if g.open and not any(i.reserved for i in g.instances) and _replicas(g)]
    light.sort(key=lambda g: (_replicas(g) / max(g.price_per_hour, 1e-9), g.id))
    in_vain = 0
    for candidate in light[:_EMPTIED]:
        if price <= allowed_per_hour + 1e-9 or in_vain == _IN_VAIN:
            break
        in_vain += 1
        fewer = _without(gpus, candidate.id, demands, headroom)
        if fewer is not None and (less := _price(fewer)) < price - 1e-9:
            gpus, price, in_vain = fewer, less, 0
    return gpus


def _without(
    gpus: Sequence[FleetGpu], empty: str, demands: Mapping[str, ModelDemand], headroom: float
) -> Sequence[FleetGpu] | None:
    """The fleet with one GPU emptied and its replicas elsewhere; None if one of them finds no room."""
    gone = next(g for g in gpus if g.id == empty)
    bare = replace(gone, instances=tuple(Instance(i.placement) for i in gone.instances), cordoned=True)
    found: Sequence[FleetGpu] = [bare if g is gone else g for g in gpus]
    for name in sorted({str(i.demand) for i in gone.instances if i.demand is not None}):
        siblings = siblings_of(demands[name], demands.values())
        done = adjust(found, demands[name], headroom_ratio=headroom, siblings=siblings)
        if done.missing > 1e-9:
            return None
        found = done.gpus
    return [replace(g, cordoned=False) if g.id == empty else g for g in found]


def siblings_of(demand: ModelDemand, demands: Iterable[ModelDemand]) -> frozenset[str]:
    """The other demands of the same model."""
    return frozenset(d.name for d in demands if d.model == demand.model) - {demand.name}


def _price(gpus: Sequence[FleetGpu]) -> float:
    return sum(g.price_per_hour for g in gpus if any(not i.idle for i in g.instances))


def _replicas(gpu: FleetGpu) -> int:
    return sum(i.replica is not None for i in gpu.instances)


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


def without_leavers(gpu: FleetGpu, names: set[str]) -> FleetGpu:
    """The GPU without replicas that cannot stay: nobody asks for them, or the GPU is draining."""
    leaving = [i for i in gpu.instances if i.replica is not None and (gpu.draining or i.demand not in names)]
    if not leaving:
        return gpu
    return replace(gpu, instances=tuple(Instance(i.placement) if i in leaving else i for i in gpu.instances))
