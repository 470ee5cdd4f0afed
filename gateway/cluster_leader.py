"""Where the leader of a cluster plans: for one reason at a time, in a thread beside everything else that it does.

A cluster's head has neither the models' files nor a planner, so the `sliceway up --ray` that leads it plans for it, and hands it a
transition as `sliceway apply --ray` does. Why to plan is a `Reason`: GPUs that the configuration wants cut, or demand that finds no
slice. The first one that is due is attended to, and no other one before that is over.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.config import Config
from model_registry.errors import SlicewayError
from placement.cluster.errors import ClusterError
from placement.cluster.survey import Survey
from placement.cluster.transitions import Why
from placement.repartitioning import Repartitioned
from placement.status import LeaderStatus
from placement.transition.steps import Transition

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the leader knows in one round: its configuration, and what the head tells (`Head.status`)."""

    config: Config
    status: Mapping[str, Any]


class LedHead(Protocol):
    """The cluster's head, as the leader's planning asks it. Everything blocks, and raises ClusterError where it does not answer."""

    def survey(self) -> Survey:
        """As `Head.survey`. Raises NotSurveyed."""

    def carry_out(self, survey: Survey, transition: Transition, why: Why) -> None:
        """Have it begin what was planned on `survey`. Raises StalePlan, also where another process leads by now."""

    def transition(self) -> Mapping[str, Any] | None:
        """As `Head.transition`."""

    def tell(self, told: LeaderStatus) -> None:
        """What it tells people and gateways of the leader's plans."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an attempt may use. `say` tells the step that is taken, `pause` waits for so many seconds and tells whether to give up."""

    seen: Seen
    head: LedHead
    say: Callable[[str], None]
    pause: Callable[[float], bool]


class Reason(Protocol):
    """Why a leader plans. Only `attempt` may take long: it runs in a thread of its own, all others in the leader's rounds."""

    def look(self, seen: Seen) -> bool:
        """One more round: whether to attempt something. Asked in every round, whatever is under way."""

    def begin(self, seen: Seen) -> None:
        """It is attempted from here on."""

    def attempt(self, work: Work) -> Repartitioned:
        """Plan, and have it carried out until it is over. What it raises is a failure, but for ClusterError: who is asked does not answer."""

    def show(self, step: str) -> None:
        """What the attempt does at the moment; called from its thread."""

    def end(self, seen: Seen, found: Repartitioned) -> None:
        """The attempt is over."""

    def told(self, seen: Seen, so_far: LeaderStatus) -> LeaderStatus:
        """With what people are to know of it."""


@dataclass(slots=True)
class _Attempt:
    """One attempt on its way; `found` is what came of it, once the thread has ended."""

    reason: Reason
    thread: threading.Thread | None = None
    found: Repartitioned | None = None


class LeaderPlanning:
    """See the module. `look` is a round of the leader and takes no longer than the head needs to be told something."""

    def __init__(self, head: LedHead, reasons: Sequence[Reason]) -> None:
        """Of two reasons that are due at once the first one counts."""
        self._head, self._reasons = head, tuple(reasons)
        self._ending = threading.Event()
        self._now: _Attempt | None = None

    def look(self, seen: Seen) -> None:
        """Attend to what is due, and have the head tell what is another than it tells: again in the next round where it does not answer."""
        self._collect(seen)
        due = [reason for reason in self._reasons if reason.look(seen)]
        if due and self._now is None and not self._ending.is_set():
            self._begin(due[0], seen)
        told = LeaderStatus()
        for reason in self._reasons:
            told = reason.told(seen, told)
        if not told.same_as(seen.status.get("leader")):
            with contextlib.suppress(ClusterError):
                self._head.tell(told)

    def stop(self) -> None:
        """Give up what is under way, of which the head carries out what it has begun."""
        self._ending.set()
        if self._now is not None and self._now.thread is not None:
            self._now.thread.join(STOP_SECONDS)

    def _begin(self, reason: Reason, seen: Seen) -> None:
        reason.begin(seen)
        now = self._now = _Attempt(reason)
        work = Work(seen, self._head, reason.show, self._ending.wait)
        now.thread = threading.Thread(target=self._attempt, args=(now, work), name="planning", daemon=True)
        now.thread.start()

    @staticmethod
    def _attempt(now: _Attempt, work: Work) -> None:
        try:
            now.found = now.reason.attempt(work)
        except ClusterError as error:  # a head or a node that is killed is started again
            now.found = Repartitioned("busy", str(error))
        except SlicewayError as error:
            now.found = Repartitioned("failed", str(error))
        except Exception as error:  # the root of a thread: nobody above would ever see it
            log.exception("a fault of sliceway itself")
            now.found = Repartitioned("failed", f"a fault of sliceway itself: {error!r}")

    def _collect(self, seen: Seen) -> None:
        now = self._now
        if now is None or now.thread is None or now.thread.is_alive():
            return
        now.thread.join()
        self._now = None
        now.reason.end(seen, now.found or Repartitioned("failed", "it was given up"))
