"""A configuration's files, looked at while they are served: has an operator, or a mounted volume, put others in their place?

A change counts when the files were the same at two looks in a row, so that a file that is being written, or the second of two
files that belong together, is waited for.
"""

from __future__ import annotations

from pathlib import Path

from model_registry.configfile.includes import files_of

_Seen = dict[Path, tuple[int, int, int] | None]


class ConfigWatch:
    """The file at `path` and all that it includes. What is there when this is made counts as known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._before = self._look()

    def poll(self) -> bool:
        """Look once; True if there are other files than those last told of, and they have come to rest."""
        seen = self._look()
        at_rest, self._before = seen == self._before, seen
        if not at_rest or seen == self._known:
            return False
        self._known = seen
        return True

    def _look(self) -> _Seen:
        return {file: _signature(file) for file in files_of(self._path)}


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
