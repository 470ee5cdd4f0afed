"""Carrying a transition out: steps as soon as what they wait for is done, each noted, none taken twice.

The fleet is a small protocol, so the same code drives a controller and a fake. Killed at any step, the next run reads the
journal, looks at what there is, and goes on. A step that fails lets what runs beside it end and starts nothing further:
the fleet goes on serving with what it has, and what is done and what is not is told exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from model_registry.errors import SlicewayError
from placement.clock import Clock
from placement.errors import PlanError, StalePlan
from placement.transition.journal import Record, TransitionJournal
from placement.transition.steps import Place, Step, Transition

_LOST = "See `dmesg` for its XID; then plan again with what is left: sliceway plan CONFIG."
_CHANGED = "Something else changed the fleet; plan again: sliceway plan CONFIG."

EngineState = Literal["starting", "serving", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class Observed:
    """What there is: the fleet's fingerprint, instances, and the engine in each place.

    `gpus` are the ids of GPUs that answer. `instances` holds `gpu@0` for a card with MIG off. `engines` maps a place to the
    replica whose engine is there and what it does.
    """

    fingerprint: str
    gpus: frozenset[str]
    instances: frozenset[Place]
    engines: dict[Place, tuple[str, EngineState]] = field(default_factory=dict)

    def engine(self, step: Step) -> EngineState | None:
        """What the engine that `step` is about does; None if it is not there."""
        there = self.engines.get(step.place)
        return there[1] if there is not None and there[0] == step.replica else None


class Fleet(Protocol):
    """Who does it. Everything is idempotent, returns when it is done, and raises SlicewayError where it cannot be done."""

    async def observe(self) -> Observed:
        """What there is, read anew."""

    async def drain(self, step: Step) -> None:
        """No new requests; return when the running ones have ended, or their deadline has passed."""

    async def stop(self, step: Step) -> None:
        """End the engine and wait until it is gone."""

    async def destroy(self, step: Step) -> None:
        """Take the instance away; of `gpu@0`: switch MIG on."""

    async def create(self, step: Step) -> None:
        """Make the instance; of `gpu@0`: switch MIG off."""

    async def start(self, step: Step) -> None:
        """Start the engine in its place and wait until it is ready."""

    async def check(self, step: Step) -> None:
        """Prove that the engine serves in its place, and route to it. Raises where it does not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a transition came. `error` is why it stopped, at `failed`; both None when all is done."""

    done: tuple[Step, ...]
    not_done: tuple[Step, ...]
    failed: Step | None = None
    error: SlicewayError | None = None

    @property
    def ok(self) -> bool:
        """Whether every step is done."""
        return not self.not_done

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "ok": self.ok,
            "done": [s.as_public() for s in self.done],
            "not_done": [s.as_public() for s in self.not_done],
            "failed": self.failed.as_public() if self.failed else None,
            "error": self.error.as_dict() if self.error else None,
        }


Watch = Callable[[Step, Literal["begun", "done", "failed"]], None]


def unwatched(_: Step, __: Literal["begun", "done", "failed"]) -> None:
    """Nobody looks on."""


class Executor:
    """Carries out one transition at a time on `fleet`, noting every step in `journal`."""

    def __init__(self, fleet: Fleet, journal: TransitionJournal, clock: Clock, *, watch: Watch = unwatched) -> None:
        self._fleet = fleet
        self._journal = journal
        self._clock = clock
        self._watch = watch

    async def begin(self, transition: Transition) -> Outcome:
        """Carry out a new transition.

        Raises StalePlan if the fleet is not the one it was made for, with what is missing, or if another one is under way, and
        PlanError if it cannot be noted, before anything is done.
        """
        under_way = self._journal.read()
        if under_way is not None and not under_way.finished:
            raise StalePlan(
                f"another transition is under way, {len(under_way.left)} of {len(under_way.transition.steps)} steps are left",
                where=str(self._journal.path),
                remedy="Let it be finished first: sliceway apply CONFIG goes on with it.",
            )
        observed = await self._fleet.observe()
        _check_gpus(transition, observed)
        if observed.fingerprint != transition.fingerprint:
            raise StalePlan(
                "something was changed on the GPUs since the plan was made",
                remedy="Plan again: sliceway plan CONFIG; then apply.",
            )
        record = Record(transition, self._clock.now())
        if transition.steps and (unwritten := self._note(record)) is not None:
            raise unwritten
        return await self._run(record)

    async def resume(self) -> Outcome | None:
        """Go on with what is under way, if anything is; a step that failed is tried again.

        Raises StalePlan if a GPU that it needs is gone.
        """
        record = self._journal.read()
        if record is None:
            return None
        _check_gpus(record.transition, await self._fleet.observe())
        self._journal.write(record.again())  # by this process from here on
        return await self._run(record.again())

    async def _run(self, record: Record) -> Outcome:
        """Every step as soon as it may be taken, several at a time where they do not wait for each other."""
        running: dict[asyncio.Task[None], Step] = {}
        failure: tuple[Step, SlicewayError] | None = None
        try:
            while True:
                if failure is None:
                    for step in _ready(record, running.values()):
                        running[asyncio.create_task(self._take(step))] = step
                if not running:
                    break
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    step = running.pop(task)
                    error = _error_of(task)
                    if error is None:
                        record = record.with_done(step.number)
                        self._watch(step, "done")
                    else:
                        failure = failure or (step, error)
                        record = record.with_failure(step.number, error)
                        self._watch(step, "failed")
                    if (unwritten := self._note(record)) is not None:
                        failure = failure or (step, unwritten)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if record.finished and failure is None:
            self._journal.clear()
        done = tuple(s for s in record.transition.steps if s.number in record.done)
        failed, error = failure or (None, None)
        return Outcome(done, record.left, failed, error)

    def _note(self, record: Record) -> PlanError | None:
        """Write down how far it came; why that cannot be. What is not noted is looked at again by the next run."""
        try:
            self._journal.write(record)
        except OSError as error:
            return PlanError(
                f"how far the transition came cannot be written down: {error.strerror}",
                where=str(self._journal.path),
                remedy="Make room there, then: sliceway apply CONFIG goes on from here.",
            )
        return None

    async def _take(self, step: Step) -> None:
        """Look first: what was done before a kill, and not noted, is not done again."""
        self._watch(step, "begun")
        observed = await self._fleet.observe()
        if is_done(step, observed):
            return
        obstacle = why_not(step, observed)
        if obstacle is not None:
            lost = step.place.gpu not in observed.gpus
            raise StalePlan(obstacle, remedy=_LOST if lost else _CHANGED)
        actions = {
            "drain": self._fleet.drain,
            "stop": self._fleet.stop,
            "destroy": self._fleet.destroy,
            "create": self._fleet.create,
            "start": self._fleet.start,
            "check": self._fleet.check,
            "seat": self._fleet.start,
            "unseat": self._fleet.stop,
        }
        await actions[step.kind](step)


def is_done(step: Step, observed: Observed) -> bool:
    """The step's postcondition. A check is a question, and a stop forgets the orders that led to it: both are taken again."""
    engine = observed.engine(step)
    match step.kind:
        case "create":
            return step.place in observed.instances
        case "destroy":
            return step.place not in observed.instances
        case "drain" | "unseat":
            return engine is None
        case "start":
            return engine == "serving"
        case "seat":
            return engine is not None
        case _:
            return False


def why_not(step: Step, observed: Observed) -> str | None:
    """The step's precondition: what keeps it from being taken, None if nothing does."""
    there = observed.engines.get(step.place)
    other = there[0] if there is not None and there[0] != step.replica else None
    if step.place.gpu not in observed.gpus:
        return f"GPU {step.place.gpu} does not answer any more"
    match step.kind:
        case "destroy" if there is not None:
            return f"{there[0]} runs there"
        case "create" if step.place.slice_id == step.place.gpu:
            left = [str(p) for p in observed.instances if p.gpu == step.place.gpu]
            return f"it still holds {', '.join(sorted(left))}" if left else None
        case "start" | "seat" if other is not None:
            return f"{other} runs there"
        case "start" | "seat" | "check" if step.place not in observed.instances:
            return "there is no such instance"
        case "check" if observed.engine(step) is None:
            return "its engine is not there"
        case _:
            return None


def _ready(record: Record, running: Iterable[Step]) -> list[Step]:
    """Steps whose predecessors are all done, that are neither done nor being taken."""
    busy = {s.number for s in running}
    return [s for s in record.left if s.number not in busy and all(n in record.done for n in s.after)]


def _error_of(task: asyncio.Task[None]) -> SlicewayError | None:
    """Why the step failed. Anything but a deliberate error, or what the system refuses, is a fault of the program and is raised."""
    error = task.exception()
    if error is None:
        return None
    if isinstance(error, SlicewayError):
        return error
    if isinstance(error, OSError):
        return PlanError(f"the system refuses it: {error.strerror or error}", where=error.filename)
    raise error


def _check_gpus(transition: Transition, observed: Observed) -> None:
    gone = sorted(set(transition.gpus) - observed.gpus)
    if gone:
        raise StalePlan(
            f"the plan was made with GPU{'s' * (len(gone) > 1)} {', '.join(gone)}, which {'are' if len(gone) > 1 else 'is'} gone",
            remedy=_LOST,
        )
