"""By whose configuration a cluster works: one `sliceway up` at a time; and what that one plans. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from placement.status import LeaderStatus, RepartitionStatus

LEADER_SECONDS = 15.0


class Lead:
    """Who leads says so all the time; who has not done so for `LEADER_SECONDS` is gone, and another one may."""

    def __init__(self) -> None:
        self._leader: str | None = None
        self._said_at = 0.0

    def claim(self, who: str, now: float) -> str | None:
        """Have `who` lead at `now` (monotonic seconds). Who else leads, if somebody does; None: it is `who`."""
        if self._leader not in (None, who) and now - self._said_at < LEADER_SECONDS:
            return self._leader
        self._leader, self._said_at = who, now
        return None

    def leads(self, who: str, now: float) -> bool:
        """Whether it is `who` that leads at `now`."""
        return self._leader == who and now - self._said_at < LEADER_SECONDS


@dataclass(frozen=True, slots=True)
class Leaders:
    """What the leader has told of its plans, and when (monotonic seconds). `told` is None where it has told nothing."""

    told: LeaderStatus | None = None
    at: float = 0.0

    def as_public(self, now: float) -> dict[str, Any] | None:
        """The stable JSON shape, of `sliceway node list --json`: what is waited for counts down."""
        if self.told is None:
            return None
        repartition = self.told.repartition
        if repartition.next_in_seconds is not None:
            left = round(repartition.next_in_seconds - (now - self.at), 1)
            repartition = repartition.model_copy(update={"next_in_seconds": left if left > 0 else None})
        return self.told.model_copy(update={"repartition": repartition}).model_dump(mode="json")

    def repartition(self, *, running: bool) -> RepartitionStatus:
        """What gateways show of cutting GPUs anew, which the head knows to be `running`: nothing that is another one at each look."""
        told = self.told.repartition if self.told is not None else RepartitionStatus()
        return RepartitionStatus(mode=told.mode, running=running, proposed=told.proposed, counts=told.counts)
