"""Files that the gateway follows while it serves: the routing table and the keystore.

A file is looked at (`stat`) every quarter of a second, not subscribed to: both are replaced by rename, may lie on a file system
without notifications, and a stat costs a microsecond. What cannot be read changes nothing: the last good value stays and the reason is kept to be
shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from model_registry.errors import SlicewayError

T = TypeVar("T")

POLL_SECONDS = 0.25

_Signature = tuple[int, int, int] | None


class Watched(Generic[T]):
    """The last good value of a file, and what is wrong with the file at the moment (`problem`, None when nothing is).

    `load` reads the file and raises SlicewayError where it cannot; `initial` is the value until the first good read.
    """

    def __init__(self, path: Path, load: Callable[[], T], initial: T) -> None:
        self.path = path
        self.value = initial
        self.problem: SlicewayError | None = None
        self.loads = 0
        self._load = load
        self._seen: _Signature | str = "never"
        self._failed: _Signature | str = "never"  # of the file that could not be read

    def poll(self) -> bool:
        """Look once. True if `value` was replaced; a file with a problem is read again each time."""
        signature = _signature(self.path)
        if signature == self._seen and self.problem is None:
            return False
        try:
            value = self._load()
        except SlicewayError as error:
            self.problem = error
            self._failed = signature
            return False
        # The file may have been replaced between stat and read; then the next poll sees another signature and reads again.
        self._seen = signature
        self.problem = None
        self.loads += 1
        self.value = value
        return True

    def glance(self) -> bool:
        """Look once as `poll` does, but leave a file alone that could not be read, until it is another one: a `stat`, mostly."""
        signature = _signature(self.path)
        known = self._seen if self.problem is None else self._failed
        return signature != known and self.poll()


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
