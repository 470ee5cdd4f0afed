"""Replicas that were to take another one's place and did not start: who serves on meanwhile, and when another one is tried. Pure.

A head that waited for one that has failed would wait until somebody mends the configuration, and would carry out no plan meanwhile. So it
is let go, the other one serves on, and the next one is tried later, the longer the more often that went wrong: a machine that had no room
for a moment mends itself. Engines that do not start are tried a few times by their controllers before all this (`engine.restart`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict

from placement.cluster.members import Seat

FIRST_SECONDS = 60.0
MOST_SECONDS = 1800.0


class FailedStart(BaseModel):
    """The last one of a model: `replica`, which was to take the place of `of`, on the slice of that name. `count` are those in a row."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    replica: str
    of: str
    slice: str
    reason: str
    retry_at: datetime
    count: int = 1

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return self.model_dump(mode="json")


class FailedStarts:
    """By model, as long as the configuration is the same. Values in, values out; `restore` sets them."""

    def __init__(self) -> None:
        self._config: str | None = None
        self._failed: dict[str, FailedStart] = {}

    def restore(self, failed: Mapping[str, FailedStart], config: str) -> None:
        """Go on where a head before this one was. `config` is what it worked by."""
        self._failed, self._config = dict(failed), config

    @property
    def failed(self) -> Mapping[str, FailedStart]:
        """By model, for the journal and for people."""
        return self._failed

    @property
    def slices(self) -> frozenset[str]:
        """Where the last ones did not start; others are tried first."""
        return frozenset(one.slice for one in self._failed.values())

    def still_there(self, going: Collection[str]) -> bool:
        """Whether one of them is in `going`, and its slice soon free for the next one."""
        return any(one.replica in going for one in self._failed.values())

    def look(self, config: str, outdated: Collection[str]) -> None:
        """Forget what has failed by another configuration, and those of models that are not in `outdated`: all of theirs are replaced."""
        if config != self._config:
            self._config, self._failed = config, {}
        self._failed = {model: one for model, one in self._failed.items() if model in outdated}

    def started(self, models: Iterable[str]) -> None:
        """One of these has taken a place: the next one is tried at once."""
        for model in models:
            self._failed.pop(model, None)

    def note(self, seat: Seat, of: str, reason: str, now: datetime) -> FailedStart:
        """One more, which sat on `seat`."""
        before = self._failed.get(seat.model)
        count = before.count + 1 if before is not None else 1
        wait = min(FIRST_SECONDS * 2.0 ** min(count - 1, 30), MOST_SECONDS)
        found = FailedStart(
            replica=seat.replica,
            of=of,
            slice=seat.key,
            reason=reason,
            retry_at=now + timedelta(seconds=wait),
            count=count,
        )
        self._failed[seat.model] = found
        return found

    def serving_on(self, serving: Mapping[str, Seat], now: datetime, has_room: Callable[[str], bool]) -> frozenset[str]:
        """Of the replicas that are `serving`, those that are not to be replaced yet: it is too early, or nothing is free beside them, and
        ended for one that may not start they would be missed.
        """
        return frozenset(
            replica
            for replica, seat in serving.items()
            if (one := self._failed.get(seat.model)) is not None and (now < one.retry_at or not has_room(replica))
        )
