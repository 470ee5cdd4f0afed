"""How many gateways shared the limits when the store last told, kept for a start at which it does not answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from model_registry.atomic import write_atomically

log = logging.getLogger("sliceway.limits")

FEWER_SECONDS = (
    600.0  # so long there have to be fewer: gateways that are stopped one after the other are no smaller fleet
)
_MOST = 10_000


class KnownGateways:
    """The number in the state directory `root`; written when it grows, and when it has been smaller for FEWER_SECONDS of `clock`."""

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._path = root / "limits.gateways"
        self._clock = clock
        self._kept: int | None = None
        self._fewer_since: float | None = None

    def read(self) -> int:
        """The number that is kept; 1 where none is known."""
        try:
            return min(_MOST, max(1, int(self._path.read_bytes()[:16])))
        except (OSError, ValueError):
            return 1

    def told(self, gateways: int) -> None:
        """There are so many at this moment. To be called often."""
        if self._kept is None:
            self._kept = self.read()
        if gateways == self._kept:
            self._fewer_since = None
        elif gateways > self._kept:
            self._keep(gateways)
        elif self._fewer_since is None:
            self._fewer_since = self._clock()
        elif self._clock() - self._fewer_since >= FEWER_SECONDS:
            self._keep(gateways)

    def _keep(self, gateways: int) -> None:
        """That it cannot be written harms nothing now, and is logged."""
        self._kept, self._fewer_since = gateways, None
        try:
            write_atomically(self._path, b"%d\n" % gateways, mode=0o600)
        except OSError as error:
            log.warning("how many gateways share the limits cannot be kept in %s: %s", self._path, error)
