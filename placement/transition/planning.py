"""From a fleet plan to steps in an order that keeps every demand at what it is guaranteed. Pure.

The fleet is carried along in mind: at each point every step that is possible is known, and one that gives is taken before
one that takes. Engines are started wherever there is a place, then instances made, then idle ones destroyed; only then is
an engine drained, and only if its demand can spare it. If none can be spared, nothing is forced: the transition is refused
with the models that would suffer, or, where a dip is allowed, the smallest one is taken and told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout, Placement
from placement.errors import TransitionBlocked
from placement.planner.crowds import Crowds
from placement.planner.types import WHOLE, FleetGpu, FleetPlan, ModelDemand, PlannedSlice, fingerprint
from placement.planner.wants import want_of
from placement.transition.steps import Dip, Kind, Place, Step, Transition

_CLOSE = 1e-9


def plan_transition(plan: FleetPlan, demands: Iterable[ModelDemand], *, allow_dip: bool = False) -> Transition:
    """The steps that carry `plan` out.

    A demand is guaranteed what it asks for (its rate without head-room, or its number of replicas), as far as it has that
    now and will have it then; what it loses for good because its replicas run too close together counts as if it had it then. A
    replica that moves gets a name of its own in its new place (see `with_own_names`).
    Raises TransitionBlocked, naming every model that would fall below, unless `allow_dip`.
    """
    asked = {d.name: d for d in demands}
    crowded_out = Crowds(plan.gpus, (want_of(d, 1.0) for d in asked.values())).crowded_out()
    plan = with_own_names(plan)
    walk = _Walk(plan, asked, crowded_out)
    while walk.advance():
        pass
    while walk.pending:
        if not allow_dip:
            raise _blocked(walk)
        walk.sacrifice()
        while walk.advance():
            pass
    return Transition(
        steps=_with_dependencies(walk.steps),
        fingerprint=plan.fingerprint,
        target=fingerprint(plan.after()),
        seats={s.replica: str(Place(g.gpu.id, s.placement)) for g in plan.gpus for s in g.slices if s.replica},
        before=dict(sorted(walk.before.items())),
        guaranteed=dict(sorted(walk.guaranteed.items())),
        dips=tuple(
            Dip(d, walk.guaranteed[d], low)
            for d, low in sorted(walk.lowest.items())
            if low < walk.guaranteed[d] - _CLOSE
        ),
    )


def with_own_names(plan: FleetPlan) -> FleetPlan:
    """`plan` with a fresh name for every replica that goes on elsewhere, so that the old engine and the new one, which run
    side by side for a while, are two replicas to everyone who knows replicas by name.
    """
    running = {i.replica: (g.gpu.id, i.placement) for g in plan.gpus for i in g.gpu.instances if i.replica}
    used = {*running, *(s.replica for g in plan.gpus for s in g.slices if s.replica)}

    def named(gpu: str, there: PlannedSlice) -> PlannedSlice:
        if there.replica not in running or running[there.replica] == (gpu, there.placement):
            return there
        fresh = next(n for n in (f"{there.demand}-{i}" for i in count()) if n not in used)
        used.add(fresh)
        return replace(there, replica=fresh)

    gpus = tuple(replace(g, slices=tuple(named(g.gpu.id, s) for s in g.slices)) for g in plan.gpus)
    return replace(plan, gpus=gpus)


def capacity_of(demand: ModelDemand | None, product: str, placement: Placement) -> float:
    """What one replica serves in such a place: by its option; like its weakest where it has none there, 1 without any."""
    if demand is None or not demand.options:
        return 1.0
    by_key = {o.key: o.capacity for o in demand.options}
    return by_key.get((product, placement.profile), min(by_key.values()))


def without_engines(transition: Transition) -> Transition:
    """The same where no controller runs: there is nothing to drain, to wait for or to check, only seats to write down for
    the controller that starts next. Waits go through what is left out.
    """
    kinds: dict[Kind, Kind] = {"start": "seat", "stop": "unseat"}
    numbers: dict[int, int] = {}
    waits: dict[int, frozenset[int]] = {}
    told: list[Step] = []
    for step in transition.steps:
        after = frozenset(n for w in step.after for n in ({numbers[w]} if w in numbers else waits[w]))
        if step.kind in ("drain", "check"):
            waits[step.number] = after
            continue
        numbers[step.number] = len(told)
        kind = kinds.get(step.kind, step.kind)
        told.append(replace(step, number=len(told), kind=kind, after=tuple(sorted(after))))
    return replace(transition, steps=tuple(told))


@dataclass(slots=True)
class _Engine:
    """One engine in one place."""

    replica: str
    demand: str
    place: Place
    capacity: float


@dataclass(slots=True)
class _Walk:
    """The fleet on its way. `pending` says whether something is left to do. `crowded_out` are replicas that have no successor since
    too many of their model would run where it says.
    """

    plan: FleetPlan
    demands: Mapping[str, ModelDemand]
    crowded_out: Mapping[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    held: dict[str, set[Placement]] = field(default_factory=dict)
    engines: dict[Place, _Engine] = field(default_factory=dict)
    serving: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    guaranteed: dict[str, float] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    to_start: list[_Engine] = field(default_factory=list)
    to_create: list[tuple[Place, str | None]] = field(default_factory=list)
    to_destroy: list[Place] = field(default_factory=list)
    to_stop: list[_Engine] = field(default_factory=list)
    gpus: dict[str, FleetGpu] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted: dict[Place, _Engine] = {}
        for planned in self.plan.gpus:
            gpu = planned.gpu
            self.gpus[gpu.id] = gpu
            self.held[gpu.id] = {i.placement for i in gpu.instances}
            for instance in gpu.instances:
                if instance.replica is not None and instance.demand is not None:
                    engine = self._engine(gpu, instance.placement, instance.replica, instance.demand)
                    self.engines[engine.place] = engine
            for there in planned.slices:
                place = Place(gpu.id, there.placement)
                if there.placement not in self.held[gpu.id]:
                    self.to_create.append((place, there.reserved))
                if there.replica is not None and there.demand is not None:
                    wanted[place] = self._engine(gpu, there.placement, there.replica, there.demand)
            self.to_destroy += [Place(gpu.id, p) for p in planned.destroyed if p in self.held[gpu.id]]
        same = {p for p, e in wanted.items() if p in self.engines and self.engines[p].replica == e.replica}
        self.to_start = [e for p, e in sorted(wanted.items()) if p not in same]
        self.to_stop = [e for p, e in sorted(self.engines.items()) if p not in same]
        self._promise(wanted.values())

    def _engine(self, gpu: FleetGpu, placement: Placement, replica: str, demand: str) -> _Engine:
        capacity = capacity_of(self.demands.get(demand), gpu.product, placement)
        return _Engine(replica, demand, Place(gpu.id, placement), capacity)

    def _promise(self, wanted: Iterable[_Engine]) -> None:
        then: dict[str, float] = {}
        for engine in self.engines.values():
            self.before[engine.demand] = self.before.get(engine.demand, 0.0) + engine.capacity
        for engine in wanted:
            then[engine.demand] = then.get(engine.demand, 0.0) + engine.capacity
        # What `spread` alone takes away is a dip that stays: like any other it never comes unasked.
        for engine in (e for e in self.engines.values() if e.replica in self.crowded_out):
            then[engine.demand] = then.get(engine.demand, 0.0) + engine.capacity
        for name in {*self.before, *then}:
            demand = self.demands.get(name)
            counted = sorted((e.capacity for e in self.engines.values() if e.demand == name), reverse=True)
            promised = 0.0
            if demand is not None:
                promised = demand.rate if demand.rate is not None else sum(counted[: demand.replicas])
            self.guaranteed[name] = min(promised, self.before.get(name, 0.0), then.get(name, 0.0))
        self.serving = dict(self.before)
        self.lowest = {name: self.before.get(name, 0.0) for name in self.guaranteed}

    @property
    def pending(self) -> bool:
        return bool(self.to_start or self.to_create or self.to_destroy or self.to_stop)

    def advance(self) -> bool:
        """Take one step that costs nobody anything that is promised. Whether there was one."""
        return self._start() or self._create() or self._destroy() or self._release()

    def _start(self) -> bool:
        for engine in self.to_start:
            if engine.place in self.engines or engine.place.placement not in self.held[engine.place.gpu]:
                continue
            self.to_start.remove(engine)
            self.engines[engine.place] = engine
            self.serving[engine.demand] = self.serving.get(engine.demand, 0.0) + engine.capacity
            self._step("start", engine.place, engine)
            self._step("check", engine.place, engine)
            return True
        return False

    def _create(self) -> bool:
        for entry in self.to_create:
            place, reserved = entry
            if self._fits(self.gpus[place.gpu], {*self.held[place.gpu], place.placement}):
                self.to_create.remove(entry)
                self.held[place.gpu].add(place.placement)
                self.steps.append(Step(len(self.steps), "create", place, reserved=reserved))
                return True
        return False

    def _fits(self, gpu: FleetGpu, placements: set[Placement]) -> bool:
        if WHOLE in placements:
            return len(placements) == 1
        try:
            Layout(gpu.geometry, tuple(placements)) if gpu.geometry else None
        except IllegalLayout:
            return False
        return gpu.geometry is not None

    def _destroy(self) -> bool:
        for place in self.to_destroy:
            if place not in self.engines:
                self.to_destroy.remove(place)
                self.held[place.gpu].discard(place.placement)
                self.steps.append(Step(len(self.steps), "destroy", place))
                return True
        return False

    def _release(self) -> bool:
        """Drain the engine that its demand can spare and whose going opens most; none that would break a promise."""
        spare = [e for e in self.to_stop if self._left(e) >= self.guaranteed[e.demand] - _CLOSE]
        if not spare:
            return False
        self._leave(max(spare, key=lambda e: (self._opens(e), -e.capacity, e.place)))
        return True

    def sacrifice(self) -> None:
        """Drain the engine whose going costs the smallest part of what its demand is guaranteed.

        Something always waits for an engine to go: what is left else needs nothing but room.
        """
        if not self.to_stop:
            raise TransitionBlocked(
                "the plan asks for instances that do not fit beside what stays",
                remedy="Plan again: sliceway plan CONFIG.",
            )
        useful = [e for e in self.to_stop if self._opens(e)] or self.to_stop
        self._leave(min(useful, key=lambda e: (self._loss(e), e.place)))

    def losses(self) -> dict[str, float]:
        """What each demand would fall to if its least engine that is in the way went."""
        found: dict[str, float] = {}
        for engine in self.to_stop:
            found[engine.demand] = max(found.get(engine.demand, 0.0), self._left(engine))
        return found

    def _leave(self, engine: _Engine) -> None:
        self.to_stop.remove(engine)
        del self.engines[engine.place]
        self.serving[engine.demand] = self._left(engine)
        self.lowest[engine.demand] = min(self.lowest[engine.demand], self.serving[engine.demand])
        self._step("drain", engine.place, engine)
        self._step("stop", engine.place, engine)

    def _left(self, engine: _Engine) -> float:
        return max(0.0, self.serving[engine.demand] - engine.capacity)

    def _loss(self, engine: _Engine) -> float:
        promised = self.guaranteed[engine.demand]
        return (promised - self._left(engine)) / promised if promised else 0.0

    def _opens(self, engine: _Engine) -> int:
        """Starts and instances that only wait for this engine's place."""
        place = engine.place
        starts = sum(e.place == place for e in self.to_start)
        if place not in self.to_destroy:
            return starts
        without = self.held[place.gpu] - {place.placement}
        gpu = self.gpus[place.gpu]
        return starts + sum(p.gpu == place.gpu and self._fits(gpu, {*without, p.placement}) for p, _ in self.to_create)

    def _step(self, kind: Kind, place: Place, engine: _Engine) -> None:
        self.steps.append(Step(len(self.steps), kind, place, engine.replica, engine.demand))


def _with_dependencies(steps: Sequence[Step]) -> tuple[Step, ...]:
    """What each step has to wait for, so that any order that respects it keeps what the order of `steps` keeps.

    Instances of one GPU change in order, and its engines start one at a time. An engine that leaves waits for every engine
    of its demand that came before it in the order: whoever has left by then is among those the order had counted.
    """
    last: dict[tuple[str, object], int] = {}
    checks: dict[str, list[int]] = {}
    told: list[Step] = []
    for step in steps:
        after: set[int] = set()

        def wait(*keys: tuple[str, object], after: set[int] = after) -> None:
            after.update(last[key] for key in keys if key in last)

        gpu, place = step.place.gpu, step.place
        match step.kind:
            case "create" | "destroy":
                wait(("layout", gpu), ("place", place))
                last["layout", gpu] = last["place", place] = step.number
            case "start":
                wait(("place", place), ("start", gpu))
                last["place", place] = step.number
            case "check":
                wait(("place", place))
                last["place", place] = last["start", gpu] = step.number
                checks.setdefault(step.demand or "", []).append(step.number)
            case "drain":
                wait(("place", place))
                after.update(checks.get(step.demand or "", ()))
                last["place", place] = step.number
            case "stop":
                wait(("place", place))
                last["place", place] = step.number
        told.append(Step(step.number, step.kind, place, step.replica, step.demand, step.reserved, tuple(sorted(after))))
    return _whole_cards_wait(told)


def _whole_cards_wait(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Changing MIG mode empties a card: it waits for everything that was on it, and everything after waits for it."""
    told: list[Step] = []
    for step in steps:
        after = set(step.after)
        same = [s for s in told if s.place.gpu == step.place.gpu]
        if step.place.placement == WHOLE and step.kind in ("create", "destroy"):
            after.update(s.number for s in same)
        after.update(s.number for s in same if s.place.placement == WHOLE and s.kind in ("create", "destroy"))
        told.append(
            Step(step.number, step.kind, step.place, step.replica, step.demand, step.reserved, tuple(sorted(after)))
        )
    return tuple(told)


def _blocked(walk: _Walk) -> TransitionBlocked:
    crowded = {e.demand: walk.crowded_out[e.replica] for e in walk.to_stop if e.replica in walk.crowded_out}
    parts = [
        f"{name} would serve {left:g} of the {walk.guaranteed[name]:g} it is guaranteed{_too_many(walk, name, crowded)}"
        for name, left in sorted(walk.losses().items())
        if left < walk.guaranteed[name] - _CLOSE
    ]
    return TransitionBlocked(
        f"there is no order in which every model keeps what it is guaranteed: {'; '.join(parts) or 'instances do not fit beside what stays'}",
        remedy=f"{_instead(walk, crowded)}, or allow the dip: --allow-dip.",
    )


def _too_many(walk: _Walk, name: str, crowded: Mapping[str, str]) -> str:
    """That `spread` is why, where it is."""
    return (
        f", since too many replicas of {walk.demands[name].model} would be on {crowded[name]}"
        if name in crowded
        else ""
    )


def _instead(walk: _Walk, crowded: Mapping[str, str]) -> str:
    """What would help but for leave to dip."""
    waiting = sorted({str(e.place.placement.profile) for e in walk.to_start})
    ways = [f"leave room to start the new before the old stops (one free {' or '.join(waiting)})"] if waiting else []
    if crowded:
        models = sorted({walk.demands[name].model for name in crowded})
        ways.append(f"loosen `spread` for {', '.join(models)}, or do what `sliceway plan` names for what is not met")
    if waiting or not crowded:
        ways.append("lower the demand for the time of the change")
    text = ", ".join(ways)
    return text[0].upper() + text[1:]
