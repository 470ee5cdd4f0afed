"""What becomes of engines that run by earlier settings, told before it happens: where each is replaced, and what is missing meanwhile.

The rules are those that a controller goes by (`placement.rolling`, `placement.renewals`, `placement.transition.room`), gone through in
mind, one turn after the other. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from placement.assign import stem_of
from placement.goals import Goals
from placement.planner.types import WHOLE, FleetGpu, Instance, ModelDemand
from placement.renewals import as_planned, fresh_name, not_on, place_beside
from placement.replicas.parts import Goal
from placement.rolling import Standing, next_turn
from placement.slices import Slice, SliceKind
from placement.transition.forecast import Outlook, StartSource, Timings, outlook
from placement.transition.planning import capacity_of
from placement.transition.room import room_for
from placement.transition.steps import Place

How = Literal["beside", "in_place"]

_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine that runs: by which specification, and whether it takes requests."""

    spec_hash: str
    serves: bool = True


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What decides how an engine is replaced, besides goals.

    `held` says of replicas why they stay where they are. `barred` are slices that no successor gets. `fleet` are the GPUs on which
    a slice may be made for a while. `start` tells how many seconds an engine of a model takes to start on a slice, and whence
    that is known. `demands` and `timings` are those of the plan.
    """

    start: Callable[[str, Slice], tuple[float, StartSource]]
    timings: Timings = field(default_factory=Timings)
    held: Mapping[str, str] = field(default_factory=dict)
    barred: Collection[str] = ()
    fleet: Sequence[FleetGpu] = ()
    demands: Mapping[str, ModelDemand] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replacement:
    """One replica whose engine is replaced.

    `beside`: a successor starts on `slice_id`, which is made for the time of the change where `makes_slice`, and the old engine goes
    when it serves. Where it is there `for_a_while`, beyond the plan, it comes back in the same way afterwards. `in_place`: the old one ends first, for the `reason` given, so `missing` of the `serving` replicas of its demand
    do not serve for `dip_seconds`. `begins_seconds` counts from the first one, `seconds` until the new engine serves.
    """

    replica: str
    demand: str
    how: How
    slice_id: str
    makes_slice: bool
    for_a_while: bool
    reason: str
    serving: int
    missing: int
    begins_seconds: float
    seconds: float
    dip_seconds: float
    start_seconds: float
    start_source: StartSource

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "replica": self.replica,
            "model": self.demand,
            "how": self.how,
            "slice": self.slice_id,
            "makes_slice": self.makes_slice,
            "for_a_while": self.for_a_while,
            "reason": self.reason or None,
            "serving": self.serving,
            "missing": self.missing,
            "begins_seconds": self.begins_seconds,
            "seconds": self.seconds,
            "dip_seconds": self.dip_seconds,
            "start_seconds": self.start_seconds,
            "start_source": self.start_source,
        }


@dataclass(frozen=True, slots=True)
class Changeover:
    """Every replacement in the order of turns, and each demand meanwhile in the unit of its capacity, by name. `seconds` is until all
    new engines serve where the plan has them.
    """

    replacements: tuple[Replacement, ...] = ()
    models: tuple[Outlook, ...] = ()
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.replacements)

    @property
    def undercut(self) -> tuple[Outlook, ...]:
        """Demands that are below what they are guaranteed for a while."""
        return tuple(m for m in self.models if m.lowest < m.guaranteed - _CLOSE)

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape: `engines` in `sliceway plan --json`."""
        return {
            "replacements": [r.as_public() for r in self.replacements],
            "seconds": self.seconds,
            "models": [m.as_public() | {"guarantee_kept": m not in self.undercut} for m in self.models],
        }


def changeover(goals: Goals, running: Mapping[str, RunningEngine], about: Circumstances) -> Changeover:
    """What a controller does once it goes by `goals`, where engines run as `running` tells, by replica.

    Starts of engines that do not run yet are not waited for. An engine that serves nobody is ended and started anew at once.
    """
    walk = _Walk(goals, about, dict(running))
    while walk.advance():
        pass
    return Changeover(tuple(walk.done), tuple(walk.outlooks()), walk.home_again())


@dataclass(slots=True)
class _Walk:
    """The replicas on their way, `clock` seconds from the beginning. `free_at` is when slices that were left can be used,
    `away` what a start takes of those that are somewhere for a while, by slice.
    """

    goals: Goals
    about: Circumstances
    running: dict[str, RunningEngine]
    done: list[Replacement] = field(default_factory=list)
    free_at: dict[str, float] = field(default_factory=dict)
    away: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0
    in_turn: str | None = None
    first: Goals = field(init=False)
    known: Mapping[str, RunningEngine] = field(init=False)
    fleet: dict[str, FleetGpu] = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.known = self.goals, dict(self.running)
        self.fleet = {g.id: g for g in self.about.fleet}

    def advance(self) -> bool:
        """Replace the one whose turn it is; False if it is nobody's."""
        self.in_turn = name = next_turn(self._standings(), self.in_turn)
        if name is None or not self._outdated(name):
            return False
        reason = self._why_in_place(name)
        target, makes = (None, False) if reason else self._target(name)
        if target is not None:
            self._beside(name, target, makes)
        else:
            self._in_place(name, reason or "no slice like its own is free, and there is no room to make one")
        return True

    def _outdated(self, name: str) -> bool:
        goal, runs = self.goals.replicas.get(name), self.running.get(name)
        return goal is not None and runs is not None and goal.spec_hash not in (None, runs.spec_hash)

    def _standings(self) -> list[Standing]:
        return [
            Standing(name, g.model, self._outdated(name), serves=self.running[name].serves)
            for name, g in self.goals.replicas.items()
            if name in self.running
        ]

    def _why_in_place(self, name: str) -> str:
        if not self.running[name].serves:
            return "it serves nobody at the moment"
        return self.about.held.get(name, "")

    # ---- beside

    def _target(self, name: str) -> tuple[Slice | None, bool]:
        """The slice for a successor, and whether it is made."""
        target = place_beside(self.goals, name, self.about.barred, away=self.away)
        if target is not None:
            return target, False
        room = self._room(name)
        if room is not None:
            return room, True
        return place_beside(self.goals, name, self.about.barred, away=self.away, beyond=True), False

    def _room(self, name: str) -> Slice | None:
        """A slice like its own that could be made."""
        goal, goals = self.goals.replicas[name], self.goals
        if goals.config.seats is None or goal.slice.kind is not SliceKind.MIG or goal.slice.gpu is None:
            return None
        fleet = tuple(self.fleet.values())
        place = room_for(fleet, Place.parse(goal.slice.id), not_on=not_on(goals, name), beyond=True)
        card = next((g for g in goals.inventory.gpus if place is not None and g.uuid == place.gpu), None)
        if place is None or card is None:
            return None
        return replace(goal.slice, id=place.slice_id, gpu=replace(goal.slice.gpu, uuid=card.uuid, index=card.index))

    def _beside(self, name: str, target: Slice, makes: bool) -> None:
        goal = self.goals.replicas[name]
        start, source = self.about.start(goal.model, target)
        begins = max(self.clock, self.free_at.get(target.id, 0.0))
        seconds = start + self.about.timings.check_seconds + (self.about.timings.instance_seconds if makes else 0.0)
        stays = as_planned(self.goals, name, target, self.about.barred, away=self.away)
        self._tell(name, target, makes, "", begins, seconds, (start, source), for_a_while=not stays)
        if not stays:
            self.away[target.id] = start
        self.clock = begins + seconds
        self.free_at[goal.slice.id] = self.clock + self._leaving_seconds
        self._hand_over(name, target, makes)

    @property
    def _leaving_seconds(self) -> float:
        return self.about.timings.drain_seconds + self.about.timings.stop_seconds

    def home_again(self) -> float:
        """When everything is done: those that are away come back one after the other, when the last slice is left."""
        if not self.away:
            return self.clock
        back = sum(start + self.about.timings.check_seconds for start in self.away.values())
        return max(self.clock, *self.free_at.values()) + back

    def _hand_over(self, name: str, target: Slice, makes: bool) -> None:
        goals, goal = self.goals, self.goals.replicas[name]
        seats = goals.config.seats
        successor = fresh_name(name, {*goals.replicas, *self.running, *(seats or ())})
        if seats is not None:
            seats = {n: s for n, s in seats.items() if n != name} | {successor: target.id}
        inventory, fits = goals.inventory, goals.fits
        if makes:
            inventory = replace(inventory, slices=(*inventory.slices, target))
            fits = {**fits, (goal.model, target.id): fits[goal.model, goal.slice.id]}
        others = {n: g for n, g in goals.replicas.items() if n != name}
        self.goals = replace(
            goals,
            config=goals.config.model_copy(update={"seats": seats}),
            inventory=inventory,
            fits=fits,
            replicas=others | {successor: replace(goal, replica=successor, slice=target)},
        )
        self.running[successor] = RunningEngine(goal.spec_hash or "")
        del self.running[name]
        self._hold(target, successor)
        self._hold(goal.slice, None)

    def _hold(self, there: Slice, replica: str | None) -> None:
        """That slice has this replica, or none, where slices are made."""
        gpu = self.fleet.get(there.gpu.uuid) if there.gpu else None
        if gpu is None or there.kind is not SliceKind.MIG:
            return
        placement = Place.parse(there.id).placement
        others = tuple(i for i in gpu.instances if i.placement != placement)
        instance = Instance(placement, replica, stem_of(replica) if replica else None)
        self.fleet[gpu.id] = replace(gpu, instances=(*others, instance))

    # ---- in its place

    def _in_place(self, name: str, reason: str) -> None:
        goal, serves, takes = self.goals.replicas[name], self.running[name].serves, self.about.timings
        start, source = self.about.start(goal.model, goal.slice)
        seconds = (takes.drain_seconds if serves else 0.0) + takes.stop_seconds + start + takes.check_seconds
        self._tell(name, goal.slice, False, reason, self.clock, seconds, (start, source))
        self.clock += seconds
        self.running[name] = RunningEngine(goal.spec_hash or "")

    # ---- telling

    def _tell(
        self,
        name: str,
        there: Slice,
        makes: bool,
        reason: str,
        begins: float,
        seconds: float,
        start: tuple[float, StartSource],
        *,
        for_a_while: bool = False,
    ) -> None:
        demand, missing = stem_of(name), bool(reason) and self.running[name].serves
        told = Replacement(
            replica=name,
            demand=demand,
            how="in_place" if reason else "beside",
            slice_id=there.id,
            makes_slice=makes,
            for_a_while=for_a_while,
            reason=reason,
            serving=sum(r.serves for n, r in self.running.items() if stem_of(n) == demand),
            missing=int(missing),
            begins_seconds=begins,
            seconds=seconds,
            dip_seconds=seconds if missing else 0.0,
            start_seconds=start[0],
            start_source=start[1],
        )
        self.done.append(told)

    def outlooks(self) -> Iterator[Outlook]:
        """Each demand of which something is replaced."""
        for name in sorted({r.demand for r in self.done}):
            engines = {n: g for n, g in self.first.replicas.items() if stem_of(n) == name and n in self.known}
            serving = sorted((self._capacity(g) for n, g in engines.items() if self.known[n].serves), reverse=True)
            demand = self.about.demands.get(name)
            promised = sum(serving)
            if demand is not None:
                promised = demand.rate if demand.rate is not None else sum(serving[: demand.replicas])
            mine = [r for r in self.done if r.demand == name]
            changes = [c for r in mine if r.dip_seconds for c in self._dip(r)]
            starts = [(r.start_seconds, r.start_source) for r in mine]
            yield outlook(name, changes, starts, before=sum(serving), guaranteed=min(promised, sum(serving)))

    def _dip(self, told: Replacement) -> tuple[tuple[float, float], tuple[float, float]]:
        capacity = self._capacity(self.first.replicas[told.replica])
        return (told.begins_seconds, -capacity), (told.begins_seconds + told.seconds, capacity)

    def _capacity(self, goal: Goal) -> float:
        here = goal.slice
        if here.gpu is None:
            return 1.0
        placement = Place.parse(here.id).placement if here.kind is SliceKind.MIG else WHOLE
        return capacity_of(self.about.demands.get(stem_of(goal.replica)), here.gpu.product, placement)
