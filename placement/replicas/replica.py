"""One replica's life: start, become ready, serve, end, wait, start again; and its orderly stop.

The process, the questions asked of it, the time and the chance are handed in, so the whole life is tested without any of
them. `view` is all that the controller sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from model_registry.errors import SlicewayError
from placement.replicas.backoff import Restarts, after_end
from placement.replicas.diagnose import Diagnosis, diagnose
from placement.replicas.ending import NEWS_SECONDS, POLL_SECONDS, drain, end_process, first_of
from placement.replicas.liveness import Liveness
from placement.replicas.parts import Goal, Hands, Prober, Process, View
from placement.replicas.probe import Activity
from placement.replicas.progress import stage
from placement.schema import EngineConfig
from placement.slices import SliceKind
from placement.table import ReplicaState

_log = logging.getLogger(__name__)

_HEALTH_SECONDS = 5.0
DRAINED = "drained: no request runs on it"
ASLEEP = "its engine sleeps: the slice is kept, its memory is free"
_SLEEP_SECONDS = 120.0
_NOT_WOKEN = "It is started anew. `autoscale.sleep: stop` ends engines of models without requests instead of putting them to sleep."
_MISPLACED = "It was ended before it took a request. Compare `sliceway slices` with nvidia-smi; see docs/pinning.md."


@dataclass(frozen=True, slots=True)
class _Life:
    """One process's life, told at its end."""

    was_ready: bool
    uptime_seconds: float
    diagnosis: Diagnosis


class Replica:
    """Keeps one engine running on one slice until it is stopped or fails for good."""

    def __init__(self, goal: Goal, config: EngineConfig, hands: Hands) -> None:
        self.goal = goal
        self.view = View(ReplicaState.PENDING, since=hands.clock.now())
        self._config = config
        self._hands = hands
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._budget_exceeded: tuple[int, int] | None = None
        self._held = False
        self._turned = asyncio.Event()

    def begin(self, found: Process | None = None) -> None:
        """Start the engine, or go on with `found`, which runs this goal's specification already."""
        self._process = found
        if found is not None:
            self._pin(found)
        self._task = asyncio.create_task(self._live(), name=f"replica {self.goal.replica}")

    @property
    def running_hash(self) -> str | None:
        """The specification hash of what runs, else of what would be started."""
        return self._process.entry.spec_hash if self._process is not None else self.goal.spec_hash

    @property
    def serves(self) -> bool:
        """Whether it takes requests, or would if nobody held it."""
        return self.view.state is ReplicaState.READY or (self._held and self.view.state is ReplicaState.DRAINING)

    def may_stay_for(self, goal: Goal) -> bool:
        """Whether what runs serves on the very slice of `goal`, though by another specification: it can wait for its turn."""
        process, spec = self._process, goal.spec
        if process is None or process.ended or spec is None or process.entry.ready_at is None:
            return False
        return self.goal.slice.id == goal.slice.id and process.entry.place_hash == spec.place_hash

    def reconfigure(self, goal: Goal, config: EngineConfig) -> None:
        """Go on with the same engine under a new goal that its specification still meets, and other timings.

        A GPU slice's cores may be others than before: what is around it on the host has changed.
        """
        moved = goal.slice.cores != self.goal.slice.cores
        if goal.asleep != self.goal.asleep:
            self._turned.set()
        self.goal = goal
        self._config = config
        if moved and self._process is not None:
            self._pin(self._process)

    def _pin(self, process: Process) -> None:
        if self.goal.slice.cores and self.goal.slice.kind is not SliceKind.CPU:
            process.pin(self.goal.slice.cores)

    def hold(self, on: bool) -> None:
        """Take no new requests while `on`, with the engine going on: the replica is `draining`, and `drained` in its stage
        once nothing runs on it. A replica that is not ready yet is held as soon as it would be.
        """
        if self._held != on:
            self._held = on
            self._turned.set()

    def hurry(self) -> None:
        """End the engine without waiting for anything."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Let requests finish, end the engine, and return when all of it is gone."""
        was_ready = self.view.state in (ReplicaState.READY, ReplicaState.DRAINING)
        await self._cancel()
        process = self._process
        if process is not None and not process.ended:
            self._set(ReplicaState.DRAINING, stage="finishing requests")
            await end_process(process, self._probe(process), self._config, self._hands.clock, serving=was_ready)
        self._set(ReplicaState.STOPPED)

    def exceed(self, used_bytes: int) -> None:
        """End the engine, because it uses more memory than its slice has."""
        if self._process is not None and self._budget_exceeded is None:
            self._budget_exceeded = (used_bytes, self.goal.slice.memory_bytes)
            self._process.kill()

    async def _cancel(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _live(self) -> None:
        try:
            await self._run()
        except Exception as error:  # noqa: BLE001 - the root of a task: nobody above would ever see it
            _log.exception("replica %s: a fault of sliceway itself", self.goal.replica)
            if self._process is not None:
                self._process.kill()
            self._set(
                ReplicaState.FAILED,
                reason=f"a fault of sliceway itself: {error!r}",
                remedy="The controller's log has the details.",
            )

    async def _run(self) -> None:
        restarts = Restarts()
        while True:
            life = await self._one_life(restarts)
            decision = after_end(
                restarts,
                self._config.restart,
                was_ready=life.was_ready,
                uptime_seconds=life.uptime_seconds,
                jitter=self._hands.jitter(),
            )
            restarts = decision.restarts
            self._process, self._budget_exceeded = None, None
            reason, remedy = life.diagnosis.message, life.diagnosis.remedy
            if self.goal.asleep:  # nobody asks for it: it is started when somebody does
                self._set(ReplicaState.STOPPED, reason=reason, remedy=remedy, restarts=restarts)
                return
            if decision.delay_seconds is None or self.goal.spec is None:
                self._set(ReplicaState.FAILED, reason=reason, remedy=remedy, restarts=restarts)
                return
            retry_at = self._hands.clock.now() + timedelta(seconds=decision.delay_seconds)
            self._set(ReplicaState.BACKOFF, reason=reason, remedy=remedy, restarts=restarts, retry_at=retry_at)
            await self._hands.clock.sleep(decision.delay_seconds)

    async def _one_life(self, restarts: Restarts) -> _Life:
        """From start (or adoption) to end."""
        ready = False
        try:
            async with self._gate():
                process = self._started(restarts)
                if await self._still_serves(process):
                    ending = None
                else:
                    ending = await self._become_ready(process)
            if ending is None:
                ready = True
                ending = await self._serve(process)
        except SlicewayError as error:
            return _Life(False, 0.0, Diagnosis("not_started", error.message, error.remedy or ""))
        uptime = self._hands.clock.now() - process.entry.started_at
        return _Life(ready, uptime.total_seconds(), ending)

    def _gate(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Starts wait for one another (`placement.replicas.gates`); an engine that was ready has its start behind it."""
        if self._process is not None and self._process.entry.ready_at:
            return contextlib.nullcontext()
        return self._hands.gate(self.goal, self._show_stage)

    def _started(self, restarts: Restarts) -> Process:
        """The engine's process: the one that was found, or a new one. The last end's reason stays visible while it starts."""
        before = self.view
        adopted = self._process is not None
        if self._process is None:
            if self.goal.spec is None:
                raise ValueError(f"{self.goal.replica} cannot be started without a specification")
            self._process = self._hands.start(self.goal.spec, self._config)
        entry = self._process.entry
        self._set(
            ReplicaState.STARTING,
            reason=before.reason,
            remedy=before.remedy,
            endpoint=entry.endpoint,
            secret=entry.secret,
            engine_pid=entry.engine_pid,
            session=self._process.session,
            adopted=adopted,
            restarts=restarts,
        )
        return self._process

    async def _still_serves(self, process: Process) -> bool:
        """Whether an adopted engine was ready and is: it has proven itself before, and must not lose requests to a new proof."""
        if process.entry.ready_at is None or process.ended:
            return False
        return await self._probe(process).healthy(timeout_seconds=_HEALTH_SECONDS)

    async def _become_ready(self, process: Process) -> Diagnosis | None:
        """None when it has answered a real request, on its slice; why it ended otherwise."""
        clock, probe = self._hands.clock, self._probe(process)
        began = clock.monotonic()
        while True:
            waited = clock.monotonic() - began
            if process.ended:
                return await self._diagnosis(process)
            if waited >= self._config.start_timeout_seconds:
                return await self._give_up(process, "start_timeout", waited)
            if await probe.healthy(timeout_seconds=_HEALTH_SECONDS):
                self._hands.secure(process.endpoint)
                self._show_stage("answering a first request")
                if await probe.answers(timeout_seconds=max(1.0, self._config.start_timeout_seconds - waited)):
                    return await self._admit(process)
            else:
                self._show_stage(stage(self._hands.read_log(process.entry)))
            await self._pause(process, POLL_SECONDS)

    async def _admit(self, process: Process) -> Diagnosis | None:
        """The last step to readiness: an engine in the wrong place would take what belongs to another, so it is ended."""
        proof = await self._hands.prove(self.goal, process.entry)
        self.view = replace(self.view, proof=proof)
        if proof.reason is None:
            process.mark_ready(self._hands.clock.now())
            took = process.entry.ready_at - process.entry.started_at if process.entry.ready_at else timedelta()
            self._hands.learned(self.goal, "start", took.total_seconds())
            return None
        if process.ended:
            return await self._diagnosis(process)
        _log.error("%s: %s", self.goal.replica, proof.reason)
        process.kill()
        await process.wait()
        return Diagnosis("misplaced", proof.reason, _MISPLACED)

    async def _serve(self, process: Process) -> Diagnosis:
        """Watch an engine that is ready until it ends, or is ended because it serves no longer."""
        clock, probe, config = self._hands.clock, self._probe(process), self._config.liveness
        sleeping = await self._ask_to_sleep(process)
        if sleeping and (ending := await self._rest(process)) is not None:
            return ending
        liveness = self._liveness()
        held_at: float | None = self._show_serving(clock.monotonic())
        while not process.ended:
            if self.goal.asleep and self.view.can_sleep:
                ending = await self._fall_asleep(process)
                if ending is not None:
                    return ending
                liveness = self._liveness()
                held_at = self._show_serving(clock.monotonic())
            busy = self._held and self.view.stage != DRAINED
            await self._pause(process, POLL_SECONDS if busy else liveness.interval_seconds)
            if process.ended:
                break
            if self._turned.is_set():
                held_at = self._show_serving(clock.monotonic())
            healthy = await probe.healthy(timeout_seconds=config.timeout_seconds)
            activity = await probe.activity(timeout_seconds=config.timeout_seconds) if healthy else None
            silent = liveness.observe(clock.monotonic(), healthy=healthy, activity=activity)
            if silent is not None and not process.ended:
                return await self._give_up(process, "unresponsive", silent)
            if held_at is not None and clock.monotonic() - held_at >= NEWS_SECONDS and _idle(activity):
                self._show_stage(DRAINED)
        return await self._diagnosis(process)

    def _liveness(self) -> Liveness:
        place = self.goal.slice
        on_gpu = place.kind is not SliceKind.CPU and not place.simulated
        return Liveness(self._config.liveness, at=self._hands.clock.monotonic(), on_gpu=on_gpu)

    async def _ask_to_sleep(self, process: Process) -> bool:
        """Find out whether this engine has a sleep mode, where its model may sleep. Whether it sleeps already."""
        if not self.goal.may_sleep or self.view.can_sleep is False:
            return False
        told = await self._probe(process).asleep(timeout_seconds=_HEALTH_SECONDS)
        self.view = replace(self.view, can_sleep=told is not None)
        return told is True

    async def _fall_asleep(self, process: Process) -> Diagnosis | None:
        """Finish requests and sleep, until the goal has it awake again: None then, or why its engine has ended."""
        clock, probe = self._hands.clock, self._probe(process)
        self._turned.clear()
        self._set(ReplicaState.DRAINING, stage="finishing requests before it sleeps")
        await first_of(clock.sleep(NEWS_SECONDS), process.wait())
        await drain(process, probe, self._config.drain_timeout_seconds, clock)
        if process.ended:
            return await self._diagnosis(process)
        if not self.goal.asleep:
            return None
        if not await probe.sleep(timeout_seconds=_SLEEP_SECONDS):
            _log.warning("%s: its engine does not fall asleep; it is stopped instead", self.goal.replica)
            self.view = replace(self.view, can_sleep=False)
            return await self._diagnosis(process) if process.ended else None
        process.mark_asleep(True)
        return await self._rest(process)

    async def _rest(self, process: Process) -> Diagnosis | None:
        """Asleep, as long as the goal says so and the engine lives; then awake: None, or why its engine has ended."""
        clock, probe, config = self._hands.clock, self._probe(process), self._config.liveness
        liveness = self._liveness()
        self._set(ReplicaState.ASLEEP, stage=ASLEEP)
        while self.goal.asleep and not process.ended:
            self._turned.clear()
            await self._pause(process, liveness.interval_seconds)
            healthy = process.ended or await probe.healthy(timeout_seconds=config.timeout_seconds)
            silent = liveness.observe(clock.monotonic(), healthy=healthy, activity=None)
            if silent is not None and not process.ended:
                return await self._give_up(process, "unresponsive", silent)
        return await self._diagnosis(process) if process.ended else await self._wake(process)

    async def _wake(self, process: Process) -> Diagnosis | None:
        """None when it answers again. An engine that does not is ended, and not put to sleep again."""
        clock, probe = self._hands.clock, self._probe(process)
        began = clock.monotonic()
        self._set(ReplicaState.STARTING, stage="waking up")
        awake = await probe.wake(timeout_seconds=_SLEEP_SECONDS)
        if awake and await probe.answers(timeout_seconds=_SLEEP_SECONDS):
            process.mark_asleep(False)
            self._hands.learned(self.goal, "wake", clock.monotonic() - began)
            return None
        if process.ended:
            return await self._diagnosis(process)
        self._hands.learned(self.goal, "no_wake", 0.0)
        self.view = replace(self.view, can_sleep=False)
        process.kill()
        await process.wait()
        return Diagnosis("not_woken", "it did not wake from sleep mode", _NOT_WOKEN)

    def _show_serving(self, at: float) -> float | None:
        """Ready, or held. Returns since when it is held."""
        self._turned.clear()
        if self._held:
            self._set(ReplicaState.DRAINING, stage="finishing requests")
            return at
        self._set(ReplicaState.READY)
        return None

    async def _give_up(self, process: Process, why: str, waited_seconds: float) -> Diagnosis:
        process.kill()
        await process.wait()
        return await self._diagnosis(process, why=why, waited_seconds=waited_seconds)

    async def _diagnosis(self, process: Process, *, why: str | None = None, waited_seconds: float = 0.0) -> Diagnosis:
        record = await process.wait()
        return diagnose(
            record,
            self._hands.read_log(process.entry),
            budget_exceeded=self._budget_exceeded,
            ended_by_us="start_timeout" if why == "start_timeout" else "unresponsive" if why else None,
            waited_seconds=waited_seconds,
        )

    async def _pause(self, process: Process, seconds: float) -> None:
        """Wait `seconds`, or until the process ends or somebody holds or releases the replica."""
        waits: list[Coroutine[Any, Any, object]] = [self._hands.clock.sleep(seconds), process.wait()]
        if self.view.state in (ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.ASLEEP):
            waits.append(self._turned.wait())
        await first_of(*waits)

    def _probe(self, process: Process) -> Prober:
        return self._hands.probe(process.endpoint, self.goal.model, self.goal.task)

    def _show_stage(self, words: str | None) -> None:
        if words != self.view.stage and words is not None:
            self.view = replace(self.view, stage=words)
            self._hands.changed()

    def _set(self, state: ReplicaState, **news: object) -> None:
        """Enter `state`. Reason, stage and retry time are the new state's own; the rest stays."""
        kept = replace(
            self.view, state=state, since=self._hands.clock.now(), stage=None, reason=None, remedy=None, retry_at=None
        )
        if state in (ReplicaState.BACKOFF, ReplicaState.FAILED, ReplicaState.STOPPED):
            kept = replace(kept, engine_pid=None, session=None)
        self.view = replace(kept, **news)  # type: ignore[arg-type]  # names and types are View's own
        self._hands.changed()


def _idle(activity: Activity | None) -> bool:
    return activity is not None and activity.running + activity.waiting == 0
