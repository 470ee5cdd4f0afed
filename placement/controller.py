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
from collections.abc import Iterable, Iterator, Mapping

from model_registry.errors import SlicewayError
from placement.accepted import AcceptedConfig
from placement.crew import Crew
from placement.demand_slices import OpenToDemand, for_demand
from placement.found import cannot_rest
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.locks import exclusive
from placement.memory_watch import MemoryWatch
from placement.orders import read_orders
from placement.renewals import Renewals, with_successors
from placement.repartitioning import Repartitioning
from placement.replicas.ending import all_of, first_of
from placement.replicas.journal import Journal
from placement.replicas.process import LocalLauncher
from placement.resting import Rester, Resting, available_memory
from placement.scaling import Scaling
from placement.sources import Sources, calibrated_registry
from placement.spare_slices import SpareSlices
from placement.succession import Succession
from placement.telling import State, Teller
from placement.turns import Turns
from placement.withheld import withheld, without
from placement.workbench import Workbench

log = logging.getLogger(__name__)

_COALESCE_SECONDS = 0.1


class Controller:
    """One controller of one state directory. `run` returns after a signal asked it to stop and everything has ended."""

    def __init__(self, sources: Sources, workshop: Workshop) -> None:
        self._sources = sources
        self._workshop = workshop
        self._paths = workshop.paths
        self._clock = sources.clock
        self._teller = Teller(workshop.paths, sources.clock, sources.name)
        self._state: State = "starting"
        self._carried_out = 0  # the orders that are, by number
        # Held while goals are worked out, and while a replica takes another one's place.
        self._deciding = asyncio.Lock()
        self._postponed = False  # whether a renewal waits for somebody else
        self._changed = asyncio.Event()
        self._accepted = AcceptedConfig(workshop.paths.accepted_config)
        self._journal = Journal(workshop.paths)
        launcher = LocalLauncher(workshop.paths, self._journal, workshop.environ, workshop.own_python)
        self._bench = Workbench(workshop, launcher, sources.clock, sources.jitter, self._changed.set)
        self._crew = Crew(launcher, self._bench, sources.clock, self._changed.set)
        self._memory = MemoryWatch(self._crew.replicas, sources.clock, self._changed.set)
        self._turns = Turns(self._crew.replicas, self._crew.leaving)
        self._renewals = Renewals(workshop.paths, sources.alone)
        self._spare = SpareSlices(
            sources.rooms,
            self._renewals,
            self._deciding,
            replan=self._take_new_numbers,
            postpone=self._postpone,
            changed=self._changed.set,
        )
        self._succession = Succession(
            self._crew,
            self._renewals,
            self._spare,
            workshop,
            accepted=self._accepted,
            adopt=self._adopt,
            postpone=self._postpone,
        )
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
        self._crew.orders = read_orders(self._paths)
        found = {*alive, *self._crew.orders.stopped}
        config = await asyncio.to_thread(self._renewals.find, found, config)
        resters = [r for entry in entries if entry.replica in alive and (r := Rester.found(entry))]
        runs_by = {entry.replica: entry.spec_hash for entry in entries if entry.replica in alive}
        goals = await self._plan(config, alive, resters, runs_by)
        self._adopt(goals)
        self._accepted.remember(config)
        adopted = self._crew.begin(entries, goals)
        self._state = "running"
        self._carried_out = self._crew.orders.number
        await self._crew.settle(adopted)

    def _first_config(self, *, anything_runs: bool) -> PlacementConfig:
        """The configuration; the last accepted one if it is wrong and engines run that it would take down with it."""
        try:
            return self._sources.load()
        except SlicewayError as error:
            last = self._accepted.last() if anything_runs else None
            if last is None:
                raise
            self._teller.refuse(error)
            return self._renewals.seated(last)

    # ---- goals

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
            resters = [r for replica in self._crew.replicas.values() if (r := Rester.of(replica))]
        hashes = {n: h for n, r in self._crew.replicas.items() if (h := r.running_hash)} if runs_by is None else runs_by
        successors, names, away = self._renewals.under_way, self._renewals.names, self._renewals.away
        resting = self._resting.choose(config.fleet.autoscale, demanded, resters, self._crew.goals)

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
                orders=self._crew.orders,
                demanded=demanded,
                barred=open_to_demand.barred | {one.slice_id for one in successors},
                closed=open_to_demand.closed,
                resting=resting,
                names=names,
            )
            return with_successors(goals, successors, hashes, open_to_demand.closed, self._workshop, away)

        return await asyncio.to_thread(plan)

    def _adopt(self, goals: Goals) -> None:
        """These are the goals from here on."""
        self._crew.goals = goals
        self._bench.engine = goals.config.engine
        self._scaling.adopt(goals.config, goals)
        self._renewals.give_up(goals)

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
        news, self._crew.orders = ordered != self._crew.orders, ordered
        async with self._deciding:
            try:
                config = await self._new_config(or_last=news)
                goals = await self._plan(config, self._crew.seats)
                if not withheld(self._paths) and not ordered.any:  # else something has nowhere to go for a moment
                    goals.complete()
            except SlicewayError as error:
                log.warning("the new configuration is refused, everything goes on as before: %s", error)
                self._teller.refuse(error)
                self._changed.set()
                return
            log.info("taking over the new configuration%s", f" and orders {ordered.number}" if news else "")
            self._adopt(goals)
            tasks = self._crew.change(goals)
        await all_of(tasks)  # goals of a slice made meanwhile begin launches anew
        self._carried_out = ordered.number
        self._changed.set()

    async def _new_config(self, *, or_last: bool) -> PlacementConfig:
        """The configuration on disk, remembered; the last one if it is wrong and `or_last`. Raises SlicewayError."""
        try:
            config = await asyncio.to_thread(self._sources.load)
        except SlicewayError as error:
            if not or_last or self._crew.goals is None:
                raise
            self._teller.refuse(error)
            return self._crew.goals.config
        self._teller.accept()
        self._accepted.remember(config)
        return config

    # ---- an earlier configuration's replicas

    async def _renew(self) -> None:
        """Replace what runs by an earlier configuration, one replica after another. Not while a plan is carried out: what is
        where is the plan's then.
        """
        if self._crew.goals is None or self._state != "running":
            return
        self._postponed = self._deciding.locked()
        if self._postponed:
            return
        async with self._deciding:
            for successor in self._renewals.under_way:
                await self._succession.hand_over(successor)
            if self._turns.outdated(self._crew.goals) and self._scaling.held:
                self._postponed = True
                return
            for name in self._turns.now(self._crew.goals):
                self._crew.goals = self._succession.renew(name, self._crew.goals)
            unsettled = self._renewals.under_way or self._crew.leaving or self._turns.outdated(self._crew.goals)
            if self._renewals.away and not unsettled and not self._scaling.held:
                self._crew.goals = self._succession.come_home(self._crew.goals)
                unsettled = self._renewals.under_way
            self._spare.tidy_up(lambda: self._crew.in_use, unsettled=bool(unsettled))

    def _postpone(self) -> None:
        """A renewal waits for somebody else: it is looked at again with demand."""
        self._postponed = True

    # ---- demand

    async def _follow_demand(self) -> None:
        """Look at what gateways see of demand, and have the numbers of replicas changed where that asks for others."""
        while True:
            await self._clock.sleep(self._crew.goals.config.fleet.autoscale.look_every if self._crew.goals else 1.0)
            if self._crew.goals is None:
                continue
            now, wall = self._clock.monotonic(), self._clock.now().timestamp()
            if self._postponed:
                self._changed.set()
            changed = self._scaling.look(self._crew.goals.config, now_seconds=now, wall_seconds=wall)
            if changed or any(cannot_rest(replica) for replica in self._crew.replicas.values()):
                self._rescale.set()
                self._changed.set()
            policy, short = self._crew.goals.config.fleet.autoscale, self._scaling.short(self._crew.goals)
            self._repartitioning.look(policy, short, self._scaling.wish)

    async def _take_new_numbers(self) -> None:
        """Start and stop replicas as demand asks. Nobody waits for those that finish their requests."""
        if self._crew.goals is None:
            return
        async with self._deciding:
            try:
                goals = await self._plan(self._crew.goals.config, self._crew.seats)
                self._adopt(goals)
                self._crew.change(goals)
                return
            except SlicewayError as error:
                log.warning("replicas cannot follow demand at the moment; it is tried again: %s", error)
        await self._clock.sleep(self._crew.goals.config.fleet.autoscale.look_every)
        self._rescale.set()

    # ---- the end

    async def _end(self) -> None:
        self._state = "stopping"
        self._stop.clear()
        await self._repartitioning.stop()
        await self._spare.stop()
        await self._crew.end(hurry=self._stop)

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
        goals = self._crew.goals
        if goals is None:
            return
        self._teller.tell(
            self._state,
            goals,
            self._crew.replicas.values(),
            orders=self._carried_out,
            scaling=self._scaling.rows(goals, self._resting.choices),
            repartition=self._repartitioning.status(goals.config.fleet.autoscale),
            used_bytes=self._memory.used_bytes,
            versions=self._bench.engine_version,
            outdated=self._turns.outdated(goals),
            notes=(*goals.inventory.notes, *self._turns.notes(goals)),
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
