"""The placement controller: keeps what runs equal to what the configuration asks for.

Goal, observed, difference: the goals come from configuration and inventory, what runs from the journal and from `/proc`,
and every change of either ends in replicas being started, left alone or stopped. The controller may be killed at any
moment: engines go on, the routing table stays, and the next controller finds both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from model_registry.errors import ConfigError, SlicewayError
from placement.accepted import AcceptedConfig
from placement.demand_slices import OpenToDemand, for_demand
from placement.errors import PlacementError, StateLocked
from placement.found import cannot_rest, keeps, kept_as_found, unchanged
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.locks import exclusive
from placement.memory_watch import MemoryWatch
from placement.orders import Orders, read_orders
from placement.renewals import Renewals, Rooms, Successor, fresh_name, not_on, place_beside, with_successors
from placement.repartitioning import Repartitioning
from placement.replicas.diagnose import diagnose
from placement.replicas.ending import end_process, first_of
from placement.replicas.journal import Journal, JournalEntry
from placement.replicas.parts import Goal
from placement.replicas.process import EngineProcess, LocalLauncher, kill_session
from placement.replicas.replica import Replica
from placement.resting import Rester, Resting, available_memory
from placement.scaling import Scaling
from placement.slices import SliceKind
from placement.sources import Sources, calibrated_registry
from placement.table import ReplicaState
from placement.telling import Teller
from placement.turns import Turns
from placement.withheld import withheld, without
from placement.workbench import Workbench

log = logging.getLogger(__name__)

_COALESCE_SECONDS = 0.1
# Until adopted engines have been asked whether they still serve, the last controller's table stays.
_ADOPTION_SECONDS = 10.0


class Controller:
    """One controller of one state directory. `run` returns after a signal asked it to stop and everything has ended."""

    def __init__(self, sources: Sources, workshop: Workshop) -> None:
        self._sources = sources
        self._workshop = workshop
        self._paths = workshop.paths
        self._journal = Journal(workshop.paths)
        self._launcher = LocalLauncher(workshop.paths, self._journal, workshop.environ, workshop.own_python)
        self._clock = sources.clock
        self._teller = Teller(workshop.paths, sources.clock, sources.name)
        self._goals: Goals | None = None
        self._replicas: dict[str, Replica] = {}
        self._state: Literal["starting", "running", "stopping"] = "starting"
        self._orders = Orders()
        self._carried_out = 0
        self._launching: dict[str, asyncio.Task[None]] = {}  # by replica: those that wait for their slice
        self._leaving: dict[str, asyncio.Task[None]] = {}  # by replica
        self._turns = Turns(self._replicas, self._leaving)
        self._renewals = Renewals(workshop.paths, sources.alone)
        self._deciding = (
            asyncio.Lock()
        )  # held while goals are worked out, and while a replica takes another one's place
        self._postponed = False  # whether a renewal waits for somebody else
        self._room: asyncio.Task[None] | None = None  # makes a slice for a renewal, or gives one back
        self._room_sought: set[tuple[str, str | None]] = set()  # replicas and specifications that room was sought for
        self._strays: dict[str, asyncio.Task[None]] = {}  # by slice
        self._changed = asyncio.Event()
        self._memory = MemoryWatch(self._replicas, sources.clock, self._changed.set)
        self._accepted = AcceptedConfig(workshop.paths.accepted_config)
        self._bench = Workbench(workshop, self._launcher, sources.clock, sources.jitter, self._changed.set)
        self._scaling = Scaling(
            workshop.paths, on=sources.scales, versions=self._bench.engine_version, now=sources.clock.now
        )
        self._repartitioning = Repartitioning(workshop.paths, sources.repartitioner, sources.clock, self._changed.set)
        self._resting = Resting(self._bench.wake_times, available_memory)
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._rescale = asyncio.Event()

    def reload(self) -> None:
        """Read the configuration again, as SIGHUP has it."""
        self._reload.set()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reads the configuration again.

        Raises StateLocked if another controller works here, and whatever keeps a first configuration from being used.
        """
        self._paths.prepare(self._workshop.environ)
        lock = exclusive(
            self._paths.controller_lock,
            what="controller",
            remedy="Stop it first: kill {pid}, or `sliceway down CONFIG`.",
        )
        with lock, self._signals():
            self._teller.begin()
            await self._begin()
            async with asyncio.TaskGroup() as tasks:
                chores = (self._publish_changes(), self._memory.run(), self._follow_demand())
                helpers = [tasks.create_task(chore) for chore in chores]
                await self._until_stopped()
                await self._end()
                for helper in helpers:
                    helper.cancel()
            self._publish()
            self._paths.controller_status.unlink(missing_ok=True)

    # ---- the first goals, and what already runs

    async def _begin(self) -> None:
        entries = self._journal.entries()
        alive = {entry.replica: entry.slice_id for entry in entries if entry.shim.alive}
        config = await asyncio.to_thread(self._first_config, anything_runs=bool(alive))
        self._orders = read_orders(self._paths)
        found = {*alive, *self._orders.stopped}
        config = await asyncio.to_thread(self._renewals.find, found, config)
        resters = [r for entry in entries if entry.replica in alive and (r := Rester.found(entry))]
        runs_by = {entry.replica: entry.spec_hash for entry in entries if entry.replica in alive}
        goals = await self._plan(config, alive, resters, runs_by)
        self._adopt(goals)
        self._accepted.remember(config)
        strays = [process for entry in entries if (process := self._take_over(entry, goals)) is not None]
        adopted = list(self._replicas.values())
        self._strays = {p.entry.slice_id: asyncio.create_task(self._end_stray(p)) for p in strays}
        for goal in goals.replicas.values():
            if goal.replica not in self._replicas:
                self._launch(goal, {self._strays.get(goal.slice.id)})
        self._state = "running"
        self._carried_out = self._orders.number
        await self._settle(adopted)

    def _adopt(self, goals: Goals) -> None:
        """These are the goals from here on."""
        self._goals = goals
        self._bench.engine = goals.config.engine
        self._scaling.adopt(goals.config, goals)
        self._renewals.give_up(goals)

    def _first_config(self, *, anything_runs: bool) -> PlacementConfig:
        """The configuration; the last accepted one if it is wrong and engines run that it would take down with it."""
        try:
            return self._sources.load()
        except SlicewayError as error:
            last = self._accepted.last() if anything_runs else None
            if last is None:
                raise
            self._teller.refuse(error)
            return last

    async def _plan(
        self,
        config: PlacementConfig,
        current: Mapping[str, str],
        resters: Iterable[Rester] | None = None,
        runs_by: Mapping[str, str] | None = None,
    ) -> Goals:
        """Blocking: reads models' files, may ask the hub."""
        demanded = self._scaling.numbers(config)
        if resters is None:
            resters = [r for replica in self._replicas.values() if (r := Rester.of(replica))]
        hashes = {n: h for n, r in self._replicas.items() if (h := r.running_hash)} if runs_by is None else runs_by
        successors, names = self._renewals.under_way, self._renewals.names
        resting = self._resting.choose(config.fleet.autoscale, demanded, resters, self._goals)

        def plan() -> Goals:
            inventory = without(self._sources.observe(config.fleet), withheld(self._paths))
            open_to_demand = for_demand(config, inventory, self._paths) if demanded or successors else OpenToDemand()
            registry = calibrated_registry(self._sources, self._workshop, config, inventory)
            self._bench.registry = registry
            goals = plan_goals(
                config,
                inventory,
                registry,
                self._workshop,
                current=current,
                orders=self._orders,
                demanded=demanded,
                barred=open_to_demand.barred | {one.slice_id for one in successors},
                closed=open_to_demand.closed,
                resting=resting,
                names=names,
            )
            return with_successors(goals, successors, hashes, open_to_demand.closed, self._workshop)

        return await asyncio.to_thread(plan)

    def _take_over(self, entry: JournalEntry, goals: Goals) -> EngineProcess | None:
        """Adopt the engine of `entry` if it is what its replica should be. Returns the process if it is to be ended."""
        process = self._launcher.adopt(entry)
        if process is None:
            self._note_dead(entry, goals)
            return None
        goal = goals.replicas.get(entry.replica) or kept_as_found(entry, goals)
        if goal is None or not keeps(goal, entry):
            log.info(
                "%s: its engine (pid %d) is not what is asked for any more; ending it", entry.replica, entry.engine_pid
            )
            return process
        log.info("%s: adopted (pid %d, on %s)", entry.replica, entry.engine_pid, entry.slice_id)
        self._add(goal).begin(process)
        return None

    def _note_dead(self, entry: JournalEntry, goals: Goals) -> None:
        """An engine that ended while nobody looked: make sure that all of it has, and say why in the log."""
        kill_session(entry.shim)
        why = diagnose(self._journal.exit_record(entry), self._bench.read_log(entry))
        log.warning("%s: its engine ended while no controller ran: %s", entry.replica, why.message)
        if entry.replica not in goals.replicas:
            self._launcher.discard(entry.replica)

    async def _end_stray(self, process: EngineProcess) -> None:
        """Nobody routes to it: it is in no table that this controller publishes."""
        entry = process.entry
        probe = self._bench.probe(process.endpoint, entry.model, entry.task)
        await end_process(process, probe, self._bench.engine, self._clock, serving=entry.ready_at is not None)
        if self._goals is None or entry.replica not in self._goals.replicas:
            self._launcher.discard(entry.replica)

    async def _settle(self, adopted: list[Replica]) -> None:
        deadline = self._clock.monotonic() + _ADOPTION_SECONDS
        unsure = (ReplicaState.PENDING, ReplicaState.STARTING)
        while any(r.view.state in unsure for r in adopted) and self._clock.monotonic() < deadline:
            await self._clock.sleep(0.05)
        self._changed.set()

    # ---- replicas

    def _add(self, goal: Goal) -> Replica:
        self._replicas[goal.replica] = Replica(goal, self._bench.engine, self._bench.hands())
        self._replicas[goal.replica].hold(goal.replica in self._orders.drained)
        return self._replicas[goal.replica]

    # ---- a new configuration

    async def _until_stopped(self) -> None:
        """Take over new configurations as they are announced. A stop does not wait for one that is being applied."""
        while not self._stop.is_set():
            await first_of(self._stop.wait(), self._reload.wait(), self._rescale.wait())
            if self._reload.is_set():
                self._reload.clear()
                self._rescale.clear()
                await first_of(self._stop.wait(), self._take_new_configuration())
            elif self._rescale.is_set():
                self._rescale.clear()
                await first_of(self._stop.wait(), self._take_new_numbers())

    async def _take_new_configuration(self) -> None:
        """Apply configuration and orders as they are on disk, or go on as before and say why not.

        Orders count also where the configuration is wrong: whoever gave them waits for them.
        """
        ordered = read_orders(self._paths)
        news, self._orders = ordered != self._orders, ordered
        async with self._deciding:
            try:
                config = await self._new_config(or_last=news)
                goals = await self._plan(config, self._seats())
                if not withheld(self._paths) and not ordered.any:  # else something has nowhere to go for a moment
                    goals.complete()
            except SlicewayError as error:
                log.warning("the new configuration is refused, everything goes on as before: %s", error)
                self._teller.refuse(error)
                self._changed.set()
                return
            log.info("taking over the new configuration%s", f" and orders {ordered.number}" if news else "")
            tasks = self._change(goals)
        await asyncio.gather(*tasks)
        self._carried_out = ordered.number
        self._changed.set()

    async def _new_config(self, *, or_last: bool) -> PlacementConfig:
        """The configuration on disk, remembered; the last one if it is wrong and `or_last`. Raises SlicewayError."""
        try:
            config = await asyncio.to_thread(self._sources.load)
        except SlicewayError as error:
            if not or_last or self._goals is None:
                raise
            self._teller.refuse(error)
            return self._goals.config
        self._teller.accept()
        self._accepted.remember(config)
        return config

    def _seats(self) -> dict[str, str]:
        """Where what runs runs, by replica."""
        return {r.goal.replica: r.goal.slice.id for r in self._replicas.values() if r.view.session is not None}

    def _change(self, goals: Goals) -> list[asyncio.Task[None]]:
        """Leave alone what is as it should be, stop what is not, start what is missing as soon as its slice is free.

        What serves by an earlier configuration, in the place that it is to have, goes on until its turn comes (`_renew`).
        What is under way for earlier goals is taken over or given up. Gives the tasks of all that is left to be done.
        """
        self._adopt(goals)
        while self._launching:
            self._launching.popitem()[1].cancel()
        for name, replica in self._replicas.items():
            replica.hold(name in self._orders.drained)
        for name, replica in self._replicas.items():
            if name in self._leaving:
                continue
            goal = goals.replicas.get(name)
            if goal is not None and unchanged(replica, goal):
                replica.reconfigure(goal, goals.config.engine)
            elif goal is None or not replica.may_stay_for(goal):
                self._leaving[name] = asyncio.create_task(self._retire(replica, gone=name not in goals.replicas))
        vacated = self._strays | {self._replicas[n].goal.slice.id: task for n, task in self._leaving.items()}
        for goal in goals.replicas.values():
            if goal.replica not in self._replicas or goal.replica in self._leaving:
                self._launch(goal, {vacated.get(goal.slice.id), self._leaving.get(goal.replica)})
        self._changed.set()
        return [*self._leaving.values(), *self._launching.values()]

    def _launch(self, goal: Goal, leaving: set[asyncio.Task[None] | None]) -> None:
        self._launching[goal.replica] = asyncio.create_task(self._launch_after(goal, leaving))

    async def _launch_after(self, goal: Goal, leaving: set[asyncio.Task[None] | None]) -> None:
        waits = [task for task in leaving if task is not None]
        if waits:
            await asyncio.wait(waits)
        self._launching.pop(goal.replica, None)
        self._add(goal).begin()

    async def _retire(self, replica: Replica, *, gone: bool) -> None:
        try:
            await replica.stop()
        finally:
            self._leaving.pop(replica.goal.replica, None)
        if self._replicas.get(replica.goal.replica) is replica:
            del self._replicas[replica.goal.replica]
        if gone:
            self._launcher.discard(replica.goal.replica)
        self._changed.set()

    # ---- an earlier configuration's replicas

    async def _renew(self) -> None:
        """Replace what runs by an earlier configuration, one replica after another. Not while a plan is carried out: what is
        where is the plan's then.
        """
        if self._goals is None or self._state != "running":
            return
        self._postponed = self._deciding.locked()
        if self._postponed:
            return
        async with self._deciding:
            for successor in self._renewals.under_way:
                await self._hand_over(successor)
            if self._turns.outdated(self._goals) and self._scaling.held:
                self._postponed = True
                return
            for name in self._turns.now(self._goals):
                self._replace(name, self._goals)
            self._tidy_up(self._goals)

    def _replace(self, name: str, goals: Goals) -> None:
        """Beside it where a slice is free, so that nothing is missing meanwhile; in its place else."""
        if any(goal.in_place_of == name for goal in goals.replicas.values()):
            return
        successor = self._successor(name, goals)
        if successor is not None:
            log.info("%s: %s starts beside it, to take its place", name, successor.replica)
            self._renewals.begin(Successor(successor.replica, name, successor.slice.id))
            self._goals = replace(goals, replicas={**goals.replicas, successor.replica: successor})
            self._launch(successor, set())
            return
        if self._room is not None or self._seek_room(name, goals):
            return
        log.info("%s: its turn to be replaced by what the configuration asks for", name)
        self._leaving[name] = asyncio.create_task(self._retire(self._replicas[name], gone=False))
        self._launch(goals.replicas[name], {self._leaving[name]})

    def _may_be_elsewhere(self, name: str, goals: Goals) -> bool:
        """Whether something that serves may be replaced beside itself: not by somebody else's turns, orders or pins."""
        orders, model = self._orders, goals.models[goals.replicas[name].model].config
        if name in {*orders.drained, *orders.stopped, *orders.seats} or not self._renewals.stands(name, goals.config):
            return False
        return goals.config.turns is None and self._replicas[name].serves and not model.slices

    def _successor(self, name: str, goals: Goals) -> Goal | None:
        """What could start beside `name`; None where that may not be, or no slice that will do is free."""
        if not self._may_be_elsewhere(name, goals):
            return None
        open_to_all = for_demand(goals.config, goals.inventory, self._paths)
        occupied = {r.goal.slice.id for r in self._replicas.values()} | set(self._strays)
        target = place_beside(goals, name, occupied | open_to_all.barred)
        if target is None:
            return None
        stopped, seats = self._orders.stopped, goals.config.seats or ()
        used = {*goals.replicas, *goals.unplaced, *self._replicas, *stopped, *seats}
        try:
            return replace(goals.on(fresh_name(name, used), target, self._workshop), in_place_of=name)
        except PlacementError:
            return None

    def _seek_room(self, name: str, goals: Goals) -> bool:
        """Have a slice made for a successor, once for each specification. Whether that is under way."""
        goal, rooms = goals.replicas[name], self._sources.rooms
        sought = name, goal.spec_hash
        if rooms is None or goals.config.seats is None or goal.slice.kind is not SliceKind.MIG:
            return False
        if sought in self._room_sought or not self._may_be_elsewhere(name, goals):
            return False
        self._room = asyncio.create_task(self._make_room(rooms, goal, not_on(goals, name)))
        return True

    async def _make_room(self, rooms: Rooms, goal: Goal, apart_from: Collection[str]) -> None:
        try:
            found = await asyncio.to_thread(rooms.find, goal.slice.id, apart_from)
            if found is not None:
                self._renewals.made(found)
                await asyncio.to_thread(rooms.make, found)
                log.info("%s: %s is made, to start another one there beside it", goal.replica, found)
                await self._take_new_numbers()
            self._room_sought.add((goal.replica, goal.spec_hash))
            self._changed.set()
        except (
            StateLocked,
            ConfigError,
        ):  # a plan that is carried out, a file that is being written: it is tried again
            self._postponed = True
        except (SlicewayError, OSError) as error:
            log.warning("%s: no room is made to start another one beside it: %s", goal.replica, error)
            self._room_sought.add((goal.replica, goal.spec_hash))
            self._changed.set()
        finally:
            self._room = None

    def _tidy_up(self, goals: Goals) -> None:
        """Slices beyond the plan are given back when nothing is to be replaced any more, and nobody is about to leave them."""
        spare, rooms = self._renewals.spare, self._sources.rooms
        if not spare or rooms is None or self._room is not None:
            return
        if self._renewals.under_way or self._leaving or self._turns.outdated(goals):
            self._postponed = True
            return
        self._room = asyncio.create_task(self._give_back(rooms))

    async def _give_back(self, rooms: Rooms) -> None:
        try:
            async with self._deciding:
                for slice_id in self._renewals.spare:
                    if slice_id in self._in_use():
                        self._renewals.given_back(slice_id)
                    elif await asyncio.to_thread(rooms.give_back, slice_id):
                        log.info("%s is given back: nothing is to be replaced any more", slice_id)
                        self._renewals.given_back(slice_id)
                    else:
                        self._postponed = True
            await self._take_new_numbers()
        except (StateLocked, ConfigError):
            self._postponed = True
        except (SlicewayError, OSError) as error:
            log.warning("what was made to start a replica beside another one is not given back yet: %s", error)
            self._postponed = True
        finally:
            self._room = None

    def _in_use(self) -> set[str]:
        """Slices that something runs on, or is to."""
        goals = self._goals.replicas.values() if self._goals else ()
        return {goal.slice.id for goal in (*goals, *(r.goal for r in self._replicas.values()))}

    async def _hand_over(self, one: Successor) -> None:
        """A successor that serves has the place, and the other one ends."""
        goals, new, old = self._goals, self._replicas.get(one.replica), self._replicas.get(one.of)
        if goals is None or new is None or new.goal.in_place_of is None or not new.serves:
            return
        config = await asyncio.to_thread(self._renewals.finish, one, goals.config)
        if config is None:
            self._postponed = True
            return
        log.info("%s: %s has its place", one.of, one.replica)
        goal = replace(new.goal, in_place_of=None)
        new.reconfigure(goal, config.engine)
        others = {name: g for name, g in goals.replicas.items() if name != one.of}
        self._adopt(replace(goals, config=config, replicas=others | {one.replica: goal}))
        if old is not None and one.of not in self._leaving:
            self._leaving[one.of] = asyncio.create_task(self._retire(old, gone=True))
        self._accepted.remember(config)

    # ---- demand

    async def _follow_demand(self) -> None:
        """Look at what gateways see of demand, and have the numbers of replicas changed where that asks for others."""
        while True:
            await self._clock.sleep(self._goals.config.fleet.autoscale.look_every if self._goals else 1.0)
            if self._goals is None:
                continue
            now, wall = self._clock.monotonic(), self._clock.now().timestamp()
            if self._postponed:
                self._changed.set()
            changed = self._scaling.look(self._goals.config, now_seconds=now, wall_seconds=wall)
            if changed or any(cannot_rest(replica) for replica in self._replicas.values()):
                self._rescale.set()
                self._changed.set()
            policy, short = self._goals.config.fleet.autoscale, self._scaling.short(self._goals)
            self._repartitioning.look(policy, short, self._scaling.wish)

    async def _take_new_numbers(self) -> None:
        """Start and stop replicas as demand asks. Nobody waits for those that finish their requests."""
        if self._goals is None:
            return
        async with self._deciding:
            try:
                goals = await self._plan(self._goals.config, self._seats())
                self._change(goals)
                return
            except SlicewayError as error:
                log.warning("replicas cannot follow demand at the moment; it is tried again: %s", error)
        await self._clock.sleep(self._goals.config.fleet.autoscale.look_every)
        self._rescale.set()

    # ---- the end

    async def _end(self) -> None:
        self._state = "stopping"
        self._stop.clear()
        await self._repartitioning.stop()
        if self._room is not None:
            self._room.cancel()
            await asyncio.gather(self._room, return_exceptions=True)
        for task in self._launching.values():
            task.cancel()
        stops = [asyncio.create_task(self._retire(r, gone=True)) for r in list(self._replicas.values())]
        self._changed.set()
        hurried = asyncio.create_task(self._hurry_when_asked_again())
        await asyncio.gather(*stops, *self._strays.values())
        await asyncio.to_thread(self._launcher.end_cards)
        hurried.cancel()

    async def _hurry_when_asked_again(self) -> None:
        await self._stop.wait()
        log.warning("asked to stop again: killing what is left")
        for replica in list(self._replicas.values()):
            replica.hurry()

    # ---- telling

    async def _publish_changes(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                self._publish()
                await self._renew()
            except OSError as error:
                log.error("cannot write to the state directory: %s", error)
                self._changed.set()
                await self._clock.sleep(1.0)
            await self._clock.sleep(_COALESCE_SECONDS)

    def _publish(self) -> None:
        if self._goals is None:
            return
        self._teller.tell(
            self._state,
            self._goals,
            self._replicas.values(),
            orders=self._carried_out,
            scaling=self._scaling.rows(self._goals, self._resting.choices),
            repartition=self._repartitioning.status(self._goals.config.fleet.autoscale),
            used_bytes=self._memory.used_bytes,
            outdated=self._turns.outdated(self._goals),
            notes=(*self._goals.inventory.notes, *self._turns.notes(self._goals)),
        )

    # ---- small things

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self._stop.set, signal.SIGINT: self._stop.set, signal.SIGHUP: self._reload.set}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)
