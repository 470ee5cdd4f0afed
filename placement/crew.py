"""The replicas that a controller has on one machine: adopted where they run already, started, replaced and ended as goals ask.

What takes time is a task of its own: a start waits for its slice, an end for its requests. Nobody waits for either unless
the tasks that `change` gives are awaited.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from placement.clock import Clock
from placement.found import keeps, kept_as_found, unchanged
from placement.goals import Goals
from placement.orders import Orders
from placement.replicas.diagnose import diagnose
from placement.replicas.ending import end_process
from placement.replicas.journal import JournalEntry
from placement.replicas.parts import Goal
from placement.replicas.process import EngineProcess, LocalLauncher, kill_session
from placement.replicas.replica import Replica
from placement.table import ReplicaState
from placement.workbench import Workbench

log = logging.getLogger(__name__)

# Until adopted engines have been asked whether they still serve, the last controller's table stays.
_ADOPTION_SECONDS = 10.0


class Crew:
    """What runs, by name (`replicas`), beside what is to run (`goals`, None before the first) and what is asked of single
    replicas (`orders`); the controller sets both. `leaving` are the tasks of replicas that are being ended, by name.
    """

    def __init__(self, launcher: LocalLauncher, bench: Workbench, clock: Clock, changed: Callable[[], None]) -> None:
        self.goals: Goals | None = None
        self.orders = Orders()
        self.replicas: dict[str, Replica] = {}
        self.leaving: dict[str, asyncio.Task[None]] = {}
        self._launcher = launcher
        self._bench = bench
        self._clock = clock
        self._changed = changed
        self._launching: dict[str, asyncio.Task[None]] = {}  # by replica: those that wait for their slice
        self._strays: dict[str, asyncio.Task[None]] = {}  # by slice: engines that were found and are ended

    @property
    def seats(self) -> dict[str, str]:
        """Where what runs runs: slice ids by replica."""
        return {r.goal.replica: r.goal.slice.id for r in self.replicas.values() if r.view.session is not None}

    @property
    def occupied(self) -> set[str]:
        """The slices that somebody has, or is still leaving."""
        left = {there for there, task in self._strays.items() if not task.done()}
        return left | {r.goal.slice.id for r in self.replicas.values()}

    @property
    def in_use(self) -> set[str]:
        """The slices that something runs on, or is to."""
        goals = self.goals.replicas.values() if self.goals else ()
        return {goal.slice.id for goal in (*goals, *(r.goal for r in self.replicas.values()))}

    # ---- what already runs

    def begin(self, entries: Iterable[JournalEntry], goals: Goals) -> list[Replica]:
        """Adopt the engines of `entries` that are what they should be, end the others, and start what is missing.

        Gives those that were adopted.
        """
        strays = [process for entry in entries if (process := self._take_over(entry, goals)) is not None]
        adopted = list(self.replicas.values())
        self._strays = {p.entry.slice_id: asyncio.create_task(self._end_stray(p)) for p in strays}
        for goal in goals.replicas.values():
            if goal.replica not in self.replicas:
                self.launch(goal, {self._strays.get(goal.slice.id)})
        return adopted

    async def settle(self, adopted: Collection[Replica]) -> None:
        """Wait until it is known of those adopted whether they still serve, for a while at most."""
        deadline = self._clock.monotonic() + _ADOPTION_SECONDS
        unsure = (ReplicaState.PENDING, ReplicaState.STARTING)
        while any(r.view.state in unsure for r in adopted) and self._clock.monotonic() < deadline:
            await self._clock.sleep(0.05)
        self._changed()

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
        why = diagnose(self._launcher.journal.exit_record(entry), self._bench.read_log(entry))
        log.warning("%s: its engine ended while no controller ran: %s", entry.replica, why.message)
        if entry.replica not in goals.replicas:
            self._launcher.discard(entry.replica)

    async def _end_stray(self, process: EngineProcess) -> None:
        """Nobody routes to it: it is in no table that this controller publishes."""
        entry = process.entry
        probe = self._bench.probe(process.endpoint, entry.model, entry.task)
        await end_process(process, probe, self._bench.engine, self._clock, serving=entry.ready_at is not None)
        if self.goals is None or entry.replica not in self.goals.replicas:
            self._launcher.discard(entry.replica)

    # ---- new goals

    def change(self, goals: Goals) -> list[asyncio.Task[None]]:
        """Leave alone what is as it should be, stop what is not, start what is missing as soon as its slice is free.

        What serves by an earlier configuration, in the place that it is to have, goes on until its turn comes. What is under
        way for earlier goals is taken over or given up. Gives the tasks of all that is left to be done.
        """
        while self._launching:
            self._launching.popitem()[1].cancel()
        for name, replica in self.replicas.items():
            replica.hold(name in self.orders.drained)
        for name, replica in self.replicas.items():
            if name in self.leaving:
                continue
            goal = goals.replicas.get(name)
            if goal is not None and unchanged(replica, goal):
                replica.reconfigure(goal, goals.config.engine)
            elif goal is None or not replica.may_stay_for(goal):
                self.dismiss(replica, gone=name not in goals.replicas)
        vacated = self._strays | {self.replicas[n].goal.slice.id: task for n, task in self.leaving.items()}
        for goal in goals.replicas.values():
            if goal.replica not in self.replicas or goal.replica in self.leaving:
                self.launch(goal, {vacated.get(goal.slice.id), self.leaving.get(goal.replica)})
        self._changed()
        return [*self.leaving.values(), *self._launching.values()]

    # ---- single replicas

    def launch(self, goal: Goal, after: Iterable[asyncio.Task[None] | None] = ()) -> None:
        """Start it when all tasks `after` which it is to start have ended."""
        self._launching[goal.replica] = asyncio.create_task(self._launch_after(goal, after))

    def restart(self, goal: Goal) -> None:
        """End the replica of that name, then start it as `goal` has it."""
        self.dismiss(self.replicas[goal.replica], gone=False)
        self.launch(goal, {self.leaving[goal.replica]})

    def dismiss(self, replica: Replica, *, gone: bool) -> None:
        """Let it finish its requests and end it. `gone` is whether nothing will run under its name any more."""
        self.leaving[replica.goal.replica] = asyncio.create_task(self._retire(replica, gone=gone))

    def _add(self, goal: Goal) -> Replica:
        self.replicas[goal.replica] = Replica(goal, self._bench.engine, self._bench.hands())
        self.replicas[goal.replica].hold(goal.replica in self.orders.drained)
        return self.replicas[goal.replica]

    async def _launch_after(self, goal: Goal, after: Iterable[asyncio.Task[None] | None]) -> None:
        waits = [task for task in after if task is not None]
        if waits:
            await asyncio.wait(waits)
        self._launching.pop(goal.replica, None)
        self._add(goal).begin()

    async def _retire(self, replica: Replica, *, gone: bool) -> None:
        try:
            await replica.stop()
        finally:
            self.leaving.pop(replica.goal.replica, None)
        if self.replicas.get(replica.goal.replica) is replica:
            del self.replicas[replica.goal.replica]
        if gone:
            self._launcher.discard(replica.goal.replica)
        self._changed()

    # ---- the end

    async def end(self, hurry: asyncio.Event) -> None:
        """End every engine, and return when all of them have ended. Once `hurry` is set, what is left is killed."""
        for task in self._launching.values():
            task.cancel()
        stops = [asyncio.create_task(self._retire(r, gone=True)) for r in list(self.replicas.values())]
        self._changed()
        hurried = asyncio.create_task(self._kill_when_set(hurry))
        await asyncio.gather(*stops, *self._strays.values())
        await asyncio.to_thread(self._launcher.end_cards)
        hurried.cancel()

    async def _kill_when_set(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        log.warning("asked to stop again: killing what is left")
        for replica in list(self.replicas.values()):
            replica.hurry()
