"""A fleet in memory that carries steps out, watches the laws of MIG, and can be killed at any point."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout
from placement.errors import PlacementError
from placement.planner.types import WHOLE, FleetGpu, Instance, ModelDemand, fingerprint
from placement.transition.execute import EngineState, Observed
from placement.transition.planning import capacity_of
from placement.transition.steps import Place, Step


class Killed(Exception):
    """The process that carried the transition out is no more."""


class LawBroken(AssertionError):
    """A step did what must never happen."""


async def nothing(_: Step) -> None:
    """A step that nothing happens to."""


@dataclass(slots=True)
class FakeFleet:
    """GPUs in memory. `before` and `after` are awaited around every step: what they raise is what happens to it.

    `lowest` is the least capacity that each demand had at any moment, counting engines that take requests.
    """

    gpus: dict[str, FleetGpu]
    demands: Mapping[str, ModelDemand] = field(default_factory=dict)
    before: Callable[[Step], Awaitable[None]] = nothing
    after: Callable[[Step], Awaitable[None]] = nothing
    engines: dict[Place, tuple[str, str, EngineState]] = field(default_factory=dict)
    routed: set[Place] = field(default_factory=set)
    lowest: dict[str, float] = field(default_factory=dict)
    starting: dict[str, Place] = field(default_factory=dict)
    taken: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, gpus: Iterable[FleetGpu], demands: Iterable[ModelDemand] = ()) -> FakeFleet:
        """A fleet whose replicas all serve."""
        fleet = cls({g.id: g for g in gpus}, {d.name: d for d in demands})
        for gpu in fleet.gpus.values():
            for instance in gpu.instances:
                if instance.replica is not None and instance.demand is not None:
                    place = Place(gpu.id, instance.placement)
                    fleet.engines[place] = instance.replica, instance.demand, "serving"
                    fleet.routed.add(place)
        fleet.lowest = fleet.capacity()
        return fleet

    def capacity(self) -> dict[str, float]:
        """What each demand's routed engines serve together."""
        found: dict[str, float] = {}
        for place in self.routed:
            _, demand, _ = self.engines[place]
            product = self.gpus[place.gpu].product
            found[demand] = found.get(demand, 0.0) + capacity_of(self.demands.get(demand), product, place.placement)
        return found

    def state(self) -> tuple[FleetGpu, ...]:
        """The fleet as the planner would see it."""
        return tuple(replace(g, instances=tuple(self._instances(g))) for g in self.gpus.values())

    async def observe(self) -> Observed:
        """What there is."""
        places = frozenset(Place(g.id, i.placement) for g in self.gpus.values() for i in g.instances)
        engines = {place: (replica, state) for place, (replica, _, state) in self.engines.items()}
        return Observed(fingerprint(self.state()), frozenset(self.gpus), places, engines)

    async def drain(self, step: Step) -> None:
        """The engine takes no requests any more."""
        async with self._around(step):
            if step.place in self.engines:
                replica, demand, _ = self.engines[step.place]
                self.engines[step.place] = replica, demand, "draining"
                self.routed.discard(step.place)
                self._note()

    async def stop(self, step: Step) -> None:
        """The engine is gone; one that still takes requests must not go."""
        async with self._around(step):
            if step.place in self.routed:
                raise LawBroken(f"{step} without a drain")
            self.engines.pop(step.place, None)

    async def destroy(self, step: Step) -> None:
        """The instance is gone; one with an engine must not go."""
        async with self._around(step):
            if step.place in self.engines:
                raise LawBroken(f"{step}: an engine runs there")
            self._hold(step.place, there=False, reserved=None)

    async def create(self, step: Step) -> None:
        """The instance is there; it must not overlap another."""
        async with self._around(step):
            self._hold(step.place, there=True, reserved=step.reserved)

    async def start(self, step: Step) -> None:
        """The engine serves; one at a time starts on a GPU."""
        if self.starting.get(step.place.gpu, step.place) != step.place:
            raise LawBroken(f"{step}: another engine starts on that GPU")
        self.starting[step.place.gpu] = step.place
        try:
            async with self._around(step):
                if not any(i.placement == step.place.placement for i in self.gpus[step.place.gpu].instances):
                    raise LawBroken(f"{step}: no such instance")
                if self.engines.get(step.place, (step.replica,))[0] != step.replica:
                    raise LawBroken(f"{step}: another engine is there")
                self.engines[step.place] = str(step.replica), str(step.demand), "serving"
        finally:
            self.starting.pop(step.place.gpu, None)

    async def check(self, step: Step) -> None:
        """Route to the engine."""
        async with self._around(step):
            if self.engines.get(step.place, ("", "", "failed"))[2] != "serving":
                raise PlacementError(f"{step.replica} does not serve", where=str(step.place))
            self.routed.add(step.place)
            self._note()

    def _around(self, step: Step) -> _Around:
        return _Around(self, step)

    def _instances(self, gpu: FleetGpu) -> Iterable[Instance]:
        for instance in gpu.instances:
            there = self.engines.get(Place(gpu.id, instance.placement))
            if instance.reserved is not None:
                yield instance
            else:
                yield Instance(instance.placement, *(there[:2] if there else (None, None)))

    def _hold(self, place: Place, *, there: bool, reserved: str | None) -> None:
        gpu = self.gpus[place.gpu]
        rest = tuple(i for i in gpu.instances if i.placement != place.placement)
        held = (*rest, Instance(place.placement, reserved=reserved)) if there else rest
        try:
            if WHOLE not in {i.placement for i in held} and gpu.geometry is not None:
                Layout(gpu.geometry, tuple(i.placement for i in held))
            self.gpus[place.gpu] = replace(gpu, instances=held)
        except (IllegalLayout, ValueError) as error:
            raise LawBroken(f"{place}: {error}") from error

    def _note(self) -> None:
        now = self.capacity()
        for demand in {*self.lowest, *now}:
            self.lowest[demand] = min(self.lowest.get(demand, 0.0), now.get(demand, 0.0))


@dataclass(slots=True)
class _Around:
    """What happens before and after a step."""

    fleet: FakeFleet
    step: Step

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)
        await self.fleet.before(self.step)

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.fleet.taken.append(self.step)
            await self.fleet.after(self.step)
