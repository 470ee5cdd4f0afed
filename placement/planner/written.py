"""A plan written out: what each GPU will hold, which replica goes where, and the reason for each decision."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count

from model_registry.geometry import Placement
from placement.planner.crowds import Crowds
from placement.planner.seats import Seating
from placement.planner.shapes import in_the_way
from placement.planner.types import Decision, FleetGpu, Instance, PlannedGpu, PlannedSlice, Problem
from placement.planner.wants import Want

Seat = tuple[str, Placement]


def planned_gpus(problem: Problem, wants: Sequence[Want], seating: Seating) -> tuple[PlannedGpu, ...]:
    """What every GPU will hold. Replicas that stay or move keep their names; new ones get the lowest free numbers."""
    names = _names(problem, wants, seating)
    came_from = _running(problem)
    by_name = {w.name: w for w in wants}
    by_gpu: dict[str, dict[Placement, str]] = defaultdict(dict)
    for (gpu, placement), name in seating.seats.items():
        by_gpu[gpu][placement] = name
    return tuple(_planned(gpu, by_gpu[gpu.id], by_name, names, came_from) for gpu in problem.gpus)


def _planned(
    gpu: FleetGpu,
    seated: Mapping[Placement, str],
    wants: Mapping[str, Want],
    names: Mapping[Seat, str],
    came_from: Mapping[str, Seat],
) -> PlannedGpu:
    reserved = tuple(
        PlannedSlice(i.placement, "keep", reserved=i.reserved) for i in gpu.instances if i.reserved is not None
    )
    taken = tuple(_slice(gpu, at, wants[name], names.get((gpu.id, at)), came_from) for at, name in seated.items())
    gone = in_the_way(gpu, seated)
    held = {s.placement for s in (*reserved, *taken)} | set(gone)
    idle = tuple(PlannedSlice(i.placement, "idle") for i in gpu.instances if i.placement not in held)
    return PlannedGpu(gpu, tuple(sorted((*reserved, *taken, *idle), key=lambda s: s.placement)), gone)


def _slice(
    gpu: FleetGpu, at: Placement, want: Want, replica: str | None, came_from: Mapping[str, Seat]
) -> PlannedSlice:
    there = next((i for i in gpu.instances if i.placement == at), None)
    if want.reservation is not None:
        return PlannedSlice(at, "reuse" if there else "create", reserved=want.reservation.note)
    if there is not None and there.replica == replica:
        return PlannedSlice(at, "keep", replica, want.name)
    origin = came_from.get(str(replica))
    was = f"{origin[0]}/{origin[1]}" if origin else None
    return PlannedSlice(at, "reuse" if there else "create", replica, want.name, was=was)


def _running(problem: Problem) -> dict[str, Seat]:
    return {i.replica: (g.id, i.placement) for g in problem.gpus for i in g.instances if i.replica is not None}


def _names(problem: Problem, wants: Sequence[Want], seating: Seating) -> dict[Seat, str]:
    """Replica names by seat: those that stay, then those that have to leave their place, then new ones."""
    there = {(g.id, i.placement): i for g in problem.gpus for i in g.instances if i.replica is not None}
    taken = {str(i.replica) for i in there.values()}
    names = {seat: str(there[seat].replica) for seat in seating.kept}
    seats: dict[str, list[Seat]] = defaultdict(list)
    for seat, name in sorted(seating.seats.items()):
        if seat not in names:
            seats[name].append(seat)
    for want in (w for w in wants if w.demand is not None):
        movers = sorted(
            (str(i.replica) for seat, i in there.items() if i.demand == want.name and seat not in seating.kept),
            key=natural,
        )
        for seat, name in zip(seats[want.name], chain(movers, unused_names(want.name, taken)), strict=False):
            names[seat] = name
    return names


def unused_names(stem: str, taken: Iterable[str]) -> Iterator[str]:
    """`chat-0`, `chat-1` and so on, those left out that are taken."""
    gone = frozenset(taken)
    return (name for number in count() if (name := f"{stem}-{number}") not in gone)


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts `chat-2` before `chat-10`."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|\D+", name))


def decisions(problem: Problem, wants: Sequence[Want], gpus: Sequence[PlannedGpu]) -> tuple[Decision, ...]:
    """One decision for each replica and each reservation, sorted by what they are about, each with its reason."""
    writer = _Writer(problem, wants, gpus)
    return tuple(sorted(writer.all(), key=lambda d: (d.demand or "", natural(d.subject), str(d.gpu), str(d.placement))))


class _Writer:
    """Reasons, from what was there before and what will be."""

    def __init__(self, problem: Problem, wants: Sequence[Want], gpus: Sequence[PlannedGpu]) -> None:
        self._gpus = gpus
        self._before = {g.id: g for g in problem.gpus}
        self._after = {g.gpu.id: g for g in gpus}
        self._wants = {w.name: w for w in wants}
        self._came_from = _running(problem)
        self._runs = {i.replica: i for g in problem.gpus for i in g.instances if i.replica is not None}
        crowds = Crowds(gpus, wants)
        self._short, self._crowded_out = crowds.short, crowds.crowded_out()

    def all(self) -> Iterator[Decision]:
        """Every decision, in the order of GPUs."""
        placed: set[str] = set()
        for planned in self._gpus:
            for at in planned.slices:
                if at.replica is not None:
                    placed.add(at.replica)
                    yield self._replica(planned, at)
                elif at.reserved is not None:
                    yield self._reserved(planned, at)
        for replica, was in sorted(self._came_from.items()):
            if replica not in placed:
                yield self._stopped(replica, was)

    def _replica(self, planned: PlannedGpu, at: PlannedSlice) -> Decision:
        replica, demand, gpu = str(at.replica), str(at.demand), planned.gpu
        was = self._came_from.get(replica)
        if at.change == "keep":
            return Decision("keep", replica, demand, "it runs there, and may stay", gpu.id, at.placement, was)
        if was is not None:
            reason = f"{self._why_leave(replica, was)}; {self._why_there(planned, at)}"
            return Decision("move", replica, demand, reason, gpu.id, at.placement, was)
        return Decision("add", replica, demand, self._why_there(planned, at), gpu.id, at.placement)

    def _reserved(self, planned: PlannedGpu, at: PlannedSlice) -> Decision:
        reason = (
            "reserved, and never touched" if at.change == "keep" else "made for other work, and never touched again"
        )
        action = "keep" if at.change == "keep" else "reserve"
        return Decision(
            "keep" if action == "keep" else "reserve", str(at.reserved), None, reason, planned.gpu.id, at.placement
        )

    def _stopped(self, replica: str, was: Seat) -> Decision:
        instance = self._runs[replica]
        want = self._wants.get(str(instance.demand))
        if want is None:
            reason = f"nobody asks for {instance.demand!r} any more"
        elif self._before[was[0]].draining:
            reason = f"GPU {was[0]} is draining, and no other slice is left for it"
        elif want.name not in self._short:
            reason = f"{self._wanted(want)}, and the others do that"
        else:
            reason = f"{self._why_end(replica, was)}, and no other slice is left for it"
        return Decision("stop", replica, instance.demand, reason, was=was)

    def _wanted(self, want: Want) -> str:
        if want.rate is None:
            return f"{want.floor} {'replica is' if want.floor == 1 else 'replicas are'} wanted"
        return f"{want.rate:g} requests/s are to be served"

    def _why_end(self, replica: str, was: Seat) -> str:
        if (where := self._crowded_out.get(replica)) is not None:
            return f"too many replicas of {self._wants[str(self._runs[replica].demand)].model} would be on {where}"
        return self._why_leave(replica, was)

    def _why_leave(self, replica: str, was: Seat) -> str:
        gpu, at = was
        instance, before, after = self._runs[replica], self._before[gpu], self._after[gpu]
        want = self._wants[str(instance.demand)]
        if before.draining:
            return f"GPU {gpu} is draining"
        if want.option(before.product, at.profile) is None:
            return f"{at.profile} does not hold it"
        if at in after.destroyed:
            return f"{at} on {gpu} makes room for {self._newcomers(after)}"
        there = next((s for s in after.slices if s.placement == at), None)
        if there is not None and (there.replica or there.reserved):
            return f"{there.replica or there.reserved} needs {at} on {gpu} more"
        if not after.used:
            return f"without it GPU {gpu} is not needed: {before.price_per_hour:g} an hour less"
        return f"too many replicas of {want.model} would be on GPU {gpu} or its node"

    def _newcomers(self, planned: PlannedGpu) -> str:
        names = [str(s.replica or s.reserved) for s in planned.slices if s.change == "create"]
        return ", ".join(names) or "a card that is used whole"

    def _why_there(self, planned: PlannedGpu, at: PlannedSlice) -> str:
        want, gpu = self._wants[str(at.demand)], planned.gpu
        option = want.option(gpu.product, at.placement.profile)
        assert option is not None, "a replica sits on one of its options"
        choice = (
            "the only slice that holds it" if len(want.options) == 1 else f"one of {len(want.options)} that hold it"
        )
        serves = f", serves {option.capacity:g} requests/s" if want.rate is not None else ""
        note = f" ({option.note})" if option.note else ""
        return f"{at.placement.profile} on {gpu.product} is {choice}{serves}{note}; {self._price(planned, at)}"

    def _price(self, planned: PlannedGpu, at: PlannedSlice) -> str:
        if _busy(self._before[planned.gpu.id].instances):
            return f"GPU {planned.gpu.id} is in use anyway"
        others = sum(1 for s in planned.slices if s.replica or s.reserved) - 1
        shared = f", shared with {others} more" if others else ""
        return f"GPU {planned.gpu.id} comes into use for {planned.gpu.price_per_hour:g} an hour{shared}"


def _busy(instances: Sequence[Instance]) -> bool:
    return any(not i.idle for i in instances)
