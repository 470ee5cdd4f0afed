"""Cutting GPUs anew for demand, as a controller does it: when replicas stay short of slices and the configuration allows it.

What is worth it and how it is done is decided behind a seam: the same plan, journal and lock as `sliceway apply`. Here is
the rest: one attempt at a time, beside everything else the controller does, with its history for people.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

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


class Repartitioning:
    """See the module. Without a `repartitioner` (a node of a cluster) nothing is ever cut."""

    def __init__(
        self, paths: StatePaths, repartitioner: Repartitioner | None, clock: Clock, changed: Callable[[], None]
    ) -> None:
        self._under_way = paths.root / UNDER_WAY_FILE
        self._repartitioner = repartitioner
        self._clock = clock
        self._changed = changed
        self._attempts = Attempts()
        self._task: asyncio.Task[None] | None = None
        self._step: str | None = None
        self._events: deque[RepartitionEvent] = deque(maxlen=_EVENTS)
        self._counts: Counter[str] = Counter()

    def look(self, policy: AutoscalePolicy, short: bool, wish: Callable[[], Wish]) -> None:
        """Begin an attempt if it is time for one. `short` is whether replicas that demand asks for have no slice.

        What was begun and killed is finished whatever the configuration says now.
        """
        now = self._clock.monotonic()
        automatic = policy.repartition == "automatic"
        self._attempts = self._attempts.seen(short and automatic, now)
        if self._repartitioner is None or self._task is not None:
            return
        if automatic and self._attempts.due(policy, now):
            self._begin(policy, wish())
        elif now >= self._attempts.not_before and self._under_way.exists():
            self._begin(policy, Wish({}, {}, {}))

    async def stop(self) -> None:
        """Give up what is under way; the journal keeps it for the next controller."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def status(self, policy: AutoscalePolicy) -> RepartitionStatus:
        """What it does and did, for people."""
        wait = self._attempts.not_before - self._clock.monotonic()
        return RepartitionStatus(
            mode=policy.repartition,
            running=self._task is not None,
            step=self._step,
            next_in_seconds=round(wait, 1) if wait > 0 and self._task is None else None,
            counts=dict(self._counts),
            events=tuple(self._events),
        )

    def _begin(self, policy: AutoscalePolicy, wish: Wish) -> None:
        self._task = asyncio.create_task(self._attempt(policy, wish), name="repartition")

    async def _attempt(self, policy: AutoscalePolicy, wish: Wish) -> None:
        assert self._repartitioner is not None
        told = ", ".join(f"{name}: {number}" for name, number in sorted(wish.replicas.items()))
        log.info("weighing whether GPUs are to be cut anew for demand (%s)", told or "finishing what was begun")
        try:
            found = await self._repartitioner(wish, self._show)
        except SlicewayError as error:
            found = Repartitioned("failed", str(error))
        except Exception as error:  # the root of a task: nobody above would ever see it
            log.exception("a fault of sliceway itself")
            found = Repartitioned("failed", f"a fault of sliceway itself: {error!r}")
        finally:
            self._step, self._task = None, None
        self._attempts = self._attempts.ended(policy, found.result, self._clock.monotonic())
        self._note(found)

    def _show(self, step: str) -> None:
        log.info("cutting GPUs anew: %s", step)
        self._step = step
        self._changed()

    def _note(self, found: Repartitioned) -> None:
        level = logging.WARNING if found.result == "failed" else logging.INFO
        log.log(level, "cutting GPUs anew for demand: %s: %s", found.result, found.reason)
        self._counts[found.result] += 1
        event = RepartitionEvent(at=self._clock.now(), result=found.result, reason=found.reason, steps=found.steps)
        last = self._events[-1] if self._events else None
        if last is None or (last.result, last.reason) != (event.result, event.reason):
            self._events.append(event)
        self._changed()
