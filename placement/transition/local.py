"""The fleet that a transition is carried out on: this machine's driver and controller, or its driver alone.

The controller is told through files and SIGHUP and answers in its status, as everywhere. Without one there are no engines
to wait for: seats are written down, and the controller that starts next finds them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Protocol

from placement.clock import Clock
from placement.errors import ModeChangeNeeded, NotCarriedOut, PartitionError
from placement.foreman import Foreman, notify
from placement.gpus import GpuInstance, GpuState
from placement.locks import holder
from placement.orders import read_orders, write_orders
from placement.partition import Driver
from placement.planned_seats import PlannedSeats
from placement.planner.types import WHOLE, FleetGpu, fingerprint
from placement.replicas.journal import Journal
from placement.reservations import Reservations
from placement.schema import EngineConfig
from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, read_status
from placement.table import ReplicaState
from placement.transition.execute import EngineState, Observed
from placement.transition.steps import Place, Step

_POLL_SECONDS = 0.1
_SLACK_SECONDS = 30.0
_RESTART_SECONDS = 60.0
_STATES: dict[ReplicaState, EngineState] = {
    ReplicaState.READY: "serving",
    ReplicaState.DRAINING: "draining",
    ReplicaState.FAILED: "failed",
}


class Engines(Protocol):
    """Who runs engines, one per replica that has a seat."""

    async def states(self) -> dict[str, EngineState] | None:
        """What each replica's engine does; None where nobody runs engines, so that seats alone count."""

    async def drain(self, replica: str) -> None:
        """No new requests; return when none runs, or the deadline has passed."""

    async def gone(self, replica: str) -> None:
        """Return when the replica, whose seat was taken away, has ended."""

    async def vacated(self, slice_id: str) -> None:
        """Return when no engine is on the slice, which is about to go: those that have no seat give way."""

    async def ready(self, replica: str, slice_id: str) -> None:
        """Return when the replica, which was given a seat, serves there."""

    async def check(self, replica: str) -> None:
        """Raise PlacementError unless it serves, and is proven to where that can be."""

    async def resume(self, replica: str) -> None:
        """Requests again for a replica that was drained and stays after all."""


class LocalFleet:
    """A `Fleet` of this machine. `planned` turns what the driver shows into the planner's view, as the plan was made from."""

    def __init__(
        self,
        driver: Driver,
        planned: Callable[[Sequence[GpuState]], Sequence[FleetGpu]],
        engines: Engines,
        seats: PlannedSeats,
        reservations: Reservations,
        *,
        allow_mode_change: bool = False,
    ) -> None:
        self._driver = driver
        self._planned = planned
        self._engines = engines
        self._seats = seats
        self._reservations = reservations
        self._allow_mode_change = allow_mode_change
        self._driving = asyncio.Lock()

    async def observe(self) -> Observed:
        """Instances from the driver, engines from seats and the controller's status."""
        gpus = await self._look()
        places = frozenset(p for gpu in gpus for p in _places(gpu))
        states = await self._engines.states()
        engines: dict[Place, tuple[str, EngineState]] = {}
        for replica, slice_id in (self._seats.read() or {}).items():
            state: EngineState = "serving" if states is None else states.get(replica, "starting")
            engines[Place.parse(slice_id)] = replica, state
        return Observed(fingerprint(self._planned(gpus)), frozenset(g.uuid for g in gpus), places, engines)

    async def drain(self, step: Step) -> None:
        """By order of the controller."""
        await self._engines.drain(str(step.replica))

    async def stop(self, step: Step) -> None:
        """Take the seat away and wait until the engine has ended."""
        self._seats.remove(str(step.replica), step.place.slice_id)
        await self._engines.gone(str(step.replica))

    async def start(self, step: Step) -> None:
        """Give the seat and wait until the engine serves."""
        await self.complete(step.place)
        self._seats.put(str(step.replica), step.place.slice_id)
        await self._engines.ready(str(step.replica), step.place.slice_id)

    async def check(self, step: Step) -> None:
        """As the controller has proven it."""
        await self._engines.check(str(step.replica))

    async def create(self, step: Step) -> None:
        """Make the instance; a reservation is remembered with it."""
        place = step.place
        await self._mode(place.gpu, on=place.placement != WHOLE)
        if place.placement != WHOLE:
            await self._drive(self._driver.create, place.gpu, place.placement)
        if step.reserved is not None:
            self._reservations.add(place.slice_id, step.reserved)

    async def destroy(self, step: Step) -> None:
        """Take the instance away, once whoever was put there for demand has left."""
        await self._engines.vacated(step.place.slice_id)
        if step.place.placement == WHOLE:
            await self._mode(step.place.gpu, on=True)
            return
        instance = await self._instance(step.place)
        if instance is not None:
            await self._drive(self._driver.destroy, step.place.gpu, instance.id)

    async def complete(self, place: Place) -> None:
        """Make the instance usable, where the driver has made it and then failed to."""
        instance = await self._instance(place)
        if instance is not None and not instance.complete:
            await self._drive(self._driver.complete, place.gpu, instance.id)

    async def abandon(self, steps: Iterable[Step]) -> None:
        """Take back what `steps`, which are not done and will not be, have begun: seats of engines that never came up,
        and drains of engines that stay. Then a plan from what there is means what it says.
        """
        for step in steps:
            if step.kind in ("start", "seat"):
                await self.stop(step)
            elif step.kind == "stop" and (self._seats.read() or {}).get(str(step.replica)) == step.place.slice_id:
                await self._engines.resume(str(step.replica))

    async def _look(self) -> tuple[GpuState, ...]:
        async with self._driving:
            return await asyncio.to_thread(self._driver.observe)

    async def _drive(self, action: Callable[..., object], *arguments: object) -> object:
        """One call to the driver at a time; it may take a second."""
        async with self._driving:
            return await asyncio.to_thread(action, *arguments)

    async def _gpu(self, uuid: str) -> GpuState:
        gpu = next((g for g in await self._look() if g.uuid == uuid), None)
        if gpu is None:
            raise PartitionError("it does not answer any more", where=uuid, remedy="See `dmesg` for its XID.")
        return gpu

    async def _instance(self, place: Place) -> GpuInstance | None:
        gpu = await self._gpu(place.gpu)
        return next((i for i in gpu.instances if i.placement == place.placement), None)

    async def _mode(self, uuid: str, *, on: bool) -> None:
        """Switch MIG if it is not as it has to be. Raises ModeChangeNeeded where that is not allowed, or needs a reset."""
        gpu = await self._gpu(uuid)
        if gpu.mig == on:
            return
        turn = f"MIG has to be switched {'on' if on else 'off'}"
        if not self._allow_mode_change:
            raise ModeChangeNeeded(turn, where=gpu.label, remedy="Allow it with --allow-mode-change.")
        change = await self._drive(self._driver.set_mode, uuid, on)
        if change != "done":
            raise ModeChangeNeeded(
                f"{turn}, and the driver answers {change}",
                where=gpu.label,
                remedy=f"Stop what uses it, reset it (nvidia-smi --gpu-reset -i {gpu.index}), and apply again.",
            )


class NoEngines:
    """Nobody runs engines: seats are for the controller that starts next."""

    async def states(self) -> dict[str, EngineState] | None:
        """Nobody knows."""
        return None

    async def drain(self, replica: str) -> None:
        """Nothing runs."""

    async def gone(self, replica: str) -> None:
        """Nothing runs."""

    async def vacated(self, slice_id: str) -> None:
        """Nothing runs."""

    async def ready(self, replica: str, slice_id: str) -> None:
        """It will be started there."""

    async def check(self, replica: str) -> None:
        """Nothing runs."""

    async def resume(self, replica: str) -> None:
        """Nothing runs."""


class ControlledEngines:
    """The engines of the controller of one state directory.

    A controller that ends is waited for: who supervises it starts it again, and the next one finds engines, seats and orders
    as they are. Every verb raises NotCarriedOut if none comes.
    """

    def __init__(self, paths: StatePaths, engine: EngineConfig, clock: Clock) -> None:
        self._paths = paths
        self._engine = engine
        self._clock = clock
        self._foreman = Foreman(paths, engine)
        self._ordering = asyncio.Lock()

    async def states(self) -> dict[str, EngineState] | None:
        """From the controller's status."""
        status = await self._controller()
        return {r.replica: _STATES.get(r.state, "starting") for r in status.replicas}

    async def drain(self, replica: str) -> None:
        """Raises NotCarriedOut if the controller does not take the order over."""
        while await self._row(replica) is not None:
            async with self._ordering:
                if await self._carried_out(lambda: self._foreman.drain([replica]), unless_gone=replica):
                    return

    async def gone(self, replica: str) -> None:
        """Raises NotCarriedOut if it does not end in the time that engines are given."""
        patience = self._engine.drain_timeout_seconds + self._engine.stop_timeout_seconds

        async def ended() -> bool:
            return await self._row(replica) is None

        await self._until(ended, f"{replica} has not ended", patience)
        await self.resume(replica)

    async def vacated(self, slice_id: str) -> None:
        """Raises NotCarriedOut if it does not leave in the time that engines are given."""

        names: list[str] = []

        async def left() -> bool:
            names[:] = [r.replica for r in (await self._controller()).replicas if r.slice.id == slice_id]
            return not names

        if not await left():
            patience = self._engine.drain_timeout_seconds + self._engine.stop_timeout_seconds
            await self._until(left, f"{', '.join(names)} does not leave {slice_id}", patience)

    async def ready(self, replica: str, slice_id: str) -> None:
        """Raises NotCarriedOut with the reason where it fails, has no place, or the configuration is refused."""
        asked = self._clock.now()

        async def there() -> bool:
            status = await self._controller()
            row = _row_of(status, replica)
            self._refuse(replica, asked, status, row)
            return row is not None and row.state is ReplicaState.READY and row.slice.id == slice_id

        await self._until(there, f"{replica} does not serve on {slice_id}", self._engine.start_timeout_seconds)

    async def check(self, replica: str) -> None:
        """As the controller tells."""
        while not await self._carried_out(lambda: self._foreman.check(replica)):
            pass

    async def _carried_out(self, order: Callable[[], object], *, unless_gone: str | None = None) -> bool:
        """Whether the foreman's order was carried out; False if it is to be given again, because the controller was another
        one by its end, or the replica is not there any more.
        """
        before = await self._controller()
        try:
            await asyncio.to_thread(order)
        except NotCarriedOut:
            after = await self._controller()
            if after.pid == before.pid and (unless_gone is None or _row_of(after, unless_gone) is not None):
                raise
            return False
        return True

    def _refuse(self, replica: str, asked: datetime, status: ControllerStatus, row: ReplicaStatus | None) -> None:
        if row is not None and row.state is ReplicaState.FAILED:
            raise NotCarriedOut(f"{replica} failed: {row.reason}", where=row.log, remedy=row.remedy)
        error = status.unplaced.get(replica)
        if status.refused is not None and status.refused.at >= asked:
            error = status.refused.error
        if error is not None:
            raise NotCarriedOut(f"{replica} is not started: {error.message}", where=error.where, remedy=error.remedy)

    async def resume(self, replica: str) -> None:
        """Take back what was ordered of it; of one that is gone, too: another of its name would not run."""
        async with self._ordering:
            orders = read_orders(self._paths)
            if replica in orders.drained | orders.stopped:
                now = self._clock.now()
                write_orders(self._paths, orders.start([replica]), verb="forget", replicas=[replica], at=now)
                self._signal()

    async def _until(self, done: Callable[[], Awaitable[bool]], otherwise: str, patience_seconds: float) -> None:
        """Tell the controller to look, and again whenever it is another one, until it is `done`."""
        deadline = self._clock.monotonic() + patience_seconds + _SLACK_SECONDS
        told: int | None = None
        while True:
            controller = (await self._controller()).pid
            if controller != told:
                told = controller
                self._signal()
            if await done():
                return
            if self._clock.monotonic() > deadline:
                raise NotCarriedOut(otherwise, remedy="`sliceway status` shows what it does, and where its log is.")
            await self._clock.sleep(_POLL_SECONDS)

    async def _controller(self) -> ControllerStatus:
        """What the controller tells; one that has ended has a while to be started again."""
        deadline = self._clock.monotonic() + _RESTART_SECONDS
        while (status := told_by_controller(self._paths)) is None:
            if self._clock.monotonic() > deadline:
                raise NotCarriedOut(
                    f"the controller has ended, and none came back within {_RESTART_SECONDS:g} s",
                    where=str(self._paths.root),
                    remedy="Start it: sliceway up CONFIG; then apply again: it goes on from here.",
                )
            await self._clock.sleep(_POLL_SECONDS)
        return status

    async def _row(self, replica: str) -> ReplicaStatus | None:
        return _row_of(await self._controller(), replica)

    def _signal(self) -> None:
        notify(self._paths)


def told_by_controller(paths: StatePaths) -> ControllerStatus | None:
    """What the controller tells that runs at this moment; None if none does, or it has said nothing yet."""
    pid, status = holder(paths.controller_lock), read_status(paths.controller_status)
    return status if status is not None and status.pid == pid else None


def _row_of(status: ControllerStatus, replica: str) -> ReplicaStatus | None:
    return next((r for r in status.replicas if r.replica == replica), None)


def engines_of(paths: StatePaths, engine: EngineConfig, clock: Clock) -> Engines:
    """The controller's engines; nobody's where none runs, nobody is about to start one, and no engine is left of an earlier one."""
    supervisor = holder(paths.up_lock)
    expected = holder(paths.controller_lock) is not None or supervisor not in (None, os.getpid())
    return ControlledEngines(paths, engine, clock) if expected or left_running(paths) else NoEngines()


def left_running(paths: StatePaths) -> bool:
    """Whether an engine runs, with or without a controller that looks after it."""
    return any(entry.shim.alive for entry in Journal(paths).entries())


def _places(gpu: GpuState) -> list[Place]:
    if not gpu.mig:
        return [Place(gpu.uuid, WHOLE)]
    return [Place(gpu.uuid, p) for p in gpu.placements]
