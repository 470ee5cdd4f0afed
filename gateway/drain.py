"""`apply --drain`: has the controller take its engines off slices, waits until it has, and gives the slices back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence

from gateway.config import Config
from placement.errors import PlacementError
from placement.locks import holder
from placement.state import StatePaths
from placement.status import read_status
from placement.withheld import release, withhold

_POLL_SECONDS = 0.2
# Beyond the engines' own drain and stop: reading the configuration, models and slices again.
_SLACK_SECONDS = 30.0


class ControllerDrain:
    """A context: in it, calling the object with slice ids drains them; leaving it gives them back.

    Without a controller it does nothing: whatever runs there then is not ours, and stays in the way.
    """

    def __init__(
        self,
        config: Config,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._paths = StatePaths(config.state)
        self._patience_seconds = (
            config.engine.drain_timeout_seconds + config.engine.stop_timeout_seconds + _SLACK_SECONDS
        )
        self._monotonic = monotonic
        self._sleep = sleep

    def __enter__(self) -> ControllerDrain:
        return self

    def __exit__(self, *_: object) -> None:
        if self._paths.withheld.exists():  # also what an `apply` left that was killed
            release(self._paths)
            self._signal()

    def __call__(self, slices: Sequence[str]) -> None:
        """Return when no replica is on any of `slices`. Raises PlacementError if that takes too long."""
        if holder(self._paths.controller_lock) is None:
            return
        withhold(self._paths, slices)
        self._signal()
        deadline = self._monotonic() + self._patience_seconds
        while left := self._replicas_on(slices):
            if self._monotonic() > deadline:
                raise PlacementError(
                    f"the controller did not take {', '.join(left)} off in {self._patience_seconds:.0f} s; nothing was cut",
                    remedy="`sliceway status` shows what they do; engine.drain_timeout_seconds bounds how long requests may go on.",
                )
            self._sleep(_POLL_SECONDS)

    def _replicas_on(self, slices: Sequence[str]) -> list[str]:
        status, wanted = read_status(self._paths.controller_status), set(slices)
        return [
            r.replica for r in (status.replicas if status else ()) if {r.slice.id, r.slice.uuid, r.slice.gpu} & wanted
        ]

    def _signal(self) -> None:
        pid = holder(self._paths.controller_lock)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)
