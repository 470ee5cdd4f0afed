"""Cutting GPUs anew for demand, as a controller does it: when replicas stay short of slices and the configuration allows it.

What is worth it and how it is done is decided behind a seam: the same plan, journal and lock as `sliceway apply`. Here is
the rest: one attempt at a time, beside everything else the controller does, with its history for people. `Tries` is the part of it
that the leader of a cluster has as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from model_registry.errors import SlicewayError
from placement.autoscale.attempts import Attempts, Result
from placement.clock import Clock
from placement.policy import AutoscalePolicy
from placement.state import StatePaths
from placement.status import RepartitionEvent, RepartitionStatus

log = logging.getLogger(__name__)

UNDER_WAY_FILE = "repartition.json"
"""In the state directory while GPUs are being cut anew for demand: what has to be tidied up after a kill."""

_EVENTS = 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What demand asks for: numbers of replicas by model (`model@tenant` of a dedicated tenant), requests per second that
    arrive for them, and requests that run. Empty numbers: only what was begun before is to be finished.
    """

    replicas: Mapping[str, int]
    arrivals_per_second: Mapping[str, float]
    running: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Repartitioned:
    """What became of a wish, in words. `steps` are those that were done."""

    result: Result
    reason: str
    steps: tuple[str, ...] = ()


Repartitioner = Callable[[Wish, Callable[[str], None]], Awaitable[Repartitioned]]
"""Weighs a wish and carries it out where that is worth it, telling every step as it begins. Raises SlicewayError."""


class Tries:
    """When it is tried, what is under way, and how it ended before. Whoever carries an attempt out says so; nothing here waits.

    Raises nothing; `note`, `show` and `status` may be called while another thread's attempt is under way.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._attempts = Attempts()
        self._running = False
        self._step: str | None = None
        self._proposed: str | None = None
        self._events: tuple[RepartitionEvent, ...] = ()
        self._counts: Mapping[str, int] = {}

    def look(
        self, policy: AutoscalePolicy, short: bool, *, begun: bool, proposes: bool = False
    ) -> Literal["weigh", "finish"] | None:
        """One more look: what an attempt is to do, if it is time for one. `short` is whether replicas that demand asks for have no slice, `begun` whether
        something is left of an earlier attempt, which is finished whatever the configuration says now. `proposes` is whether what
        may only be proposed is weighed as well.
        """
        now = self._clock.monotonic()
        counts = proposes or policy.repartition == "automatic"
        self._attempts = self._attempts.seen(short and counts, now)
        if not (short and counts):
            self._proposed = None
        if self._running:
            return None
        if counts and self._attempts.due(policy, now):
            return "weigh"
        return "finish" if begun and now >= self._attempts.not_before else None

    def begin(self, wish: Wish) -> None:
        """An attempt begins."""
        told = ", ".join(f"{name}: {number}" for name, number in sorted(wish.replicas.items()))
        log.info("weighing whether GPUs are to be cut anew for demand (%s)", told or "finishing what was begun")
        self._running = True

    def show(self, step: str) -> None:
        """What is done at the moment."""
        log.info("cutting GPUs anew: %s", step)
        self._step = step

    def end(self, policy: AutoscalePolicy, found: Repartitioned | None) -> None:
        """The attempt is over; None: it was given up."""
        self._step, self._running = None, False
        if found is not None:
            self._attempts = self._attempts.ended(policy, found.result, self._clock.monotonic())
            self._note(found)

    def status(self, policy: AutoscalePolicy) -> RepartitionStatus:
        """What is done and was done, for people."""
        wait = self._attempts.not_before - self._clock.monotonic()
        return RepartitionStatus(
            mode=policy.repartition,
            running=self._running,
            step=self._step,
            proposed=self._proposed,
            next_in_seconds=round(wait, 1) if wait > 0 and not self._running else None,
            counts=dict(self._counts),
            events=self._events,
        )

    def _note(self, found: Repartitioned) -> None:
        level = logging.WARNING if found.result == "failed" else logging.INFO
        log.log(level, "cutting GPUs anew for demand: %s: %s", found.result, found.reason)
        self._counts = {**self._counts, found.result: self._counts.get(found.result, 0) + 1}
        self._proposed = found.reason if found.result == "proposed" else None
        event = RepartitionEvent(at=self._clock.now(), result=found.result, reason=found.reason, steps=found.steps)
        last = self._events[-1] if self._events else None
        if (
            last is not None and last.result == event.result == "proposed"
        ):  # what it would gain is another number each time
            self._events = (*self._events[:-1], event)
        elif last is None or (last.result, last.reason) != (event.result, event.reason):
            self._events = (*self._events, event)[-_EVENTS:]


class Repartitioning:
    """See the module. Without a `repartitioner` (a node of a cluster) nothing is ever cut."""

    def __init__(
        self, paths: StatePaths, repartitioner: Repartitioner | None, clock: Clock, changed: Callable[[], None]
    ) -> None:
        self._under_way = paths.root / UNDER_WAY_FILE
        self._repartitioner = repartitioner
        self._changed = changed
        self._tries = Tries(clock)
        self._task: asyncio.Task[None] | None = None

    def look(self, policy: AutoscalePolicy, short: bool, wish: Callable[[], Wish]) -> None:
        """Begin an attempt if it is time for one. `short` is whether replicas that demand asks for have no slice.

        What was begun and killed is finished whatever the configuration says now.
        """
        begun = self._repartitioner is not None and self._task is None and self._under_way.exists()
        due = self._tries.look(policy, short, begun=begun)
        if due is not None and self._repartitioner is not None:
            wanted = wish() if due == "weigh" else Wish({}, {}, {})
            self._tries.begin(wanted)
            self._task = asyncio.create_task(self._attempt(self._repartitioner, policy, wanted), name="repartition")

    async def stop(self) -> None:
        """Give up what is under way; the journal keeps it for the next controller."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def status(self, policy: AutoscalePolicy) -> RepartitionStatus:
        """What it does and did, for people."""
        return self._tries.status(policy)

    async def _attempt(self, repartitioner: Repartitioner, policy: AutoscalePolicy, wish: Wish) -> None:
        found: Repartitioned | None = None
        try:
            found = await repartitioner(wish, self._show)
        except SlicewayError as error:
            found = Repartitioned("failed", str(error))
        except Exception as error:  # the root of a task: nobody above would ever see it
            log.exception("a fault of sliceway itself")
            found = Repartitioned("failed", f"a fault of sliceway itself: {error!r}")
        finally:
            self._task = None
            self._tries.end(policy, found)
        self._changed()

    def _show(self, step: str) -> None:
        self._tries.show(step)
        self._changed()
