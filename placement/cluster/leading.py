"""By whose configuration a cluster works: one `sliceway up` at a time. Pure."""

from __future__ import annotations

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
