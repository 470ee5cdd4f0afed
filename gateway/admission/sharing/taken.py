"""What each process of a machine takes of limits, in a file that outlives it: whoever comes next knows what it had not told the store yet.

A process holds a lock on its file for as long as it lives, so that its end is known at once, however it ended. The file is memory that the
kernel keeps, so a process that is killed loses nothing of it. It lies in no file system on a disk where that can be had: who writes to
memory that a disk is just taking a page of waits for the disk, and here that would be every request. With the machine it is gone,
and what its processes had taken is unknown then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

log = logging.getLogger("sliceway.limits")

SHARED_MEMORY = Path("/dev/shm")
MOST_LIMITS = 4096
MOST_LEFT = 256
OLD_SECONDS = 2 * 86400.0  # no window counts what was taken before
TOUCH_SECONDS = 3600.0  # not every file system dates what is written to memory
_WORDS = 3  # of each limit: its key, units taken since the start, and as many of them as the store was told
_BYTES = MOST_LIMITS * _WORDS * 8


def taken_folder(otherwise: Path, memory: Path = SHARED_MEMORY) -> Path:
    """Where all gateways of this user keep their files: in shared memory, where there is none in the directory `otherwise`."""
    return memory / f"sliceway-{os.getuid()}" if os.access(memory, os.W_OK) else otherwise


class Taker(Protocol):
    """A sliding window: it adds what it takes to `taken[place]`."""

    taken: list[int] | memoryview[int]
    place: int


class TakenBook:
    """The file of this process. Nothing is opened before the first `watch`; where there can be none, the store is all that others know."""

    def __init__(self, folder: Path, process: str, wall: Callable[[], float]) -> None:
        self._path = folder / process
        self._wall = wall
        self._touched_at = 0.0
        self._places: dict[str, int] = {}
        self._windows: list[Taker] = []
        self._file = -1
        self._memory: mmap.mmap | None = None
        self._words: memoryview[int] | None = None

    def watch(self, name: str, window: Taker) -> None:
        """From here on the file tells what `window` takes of the limit `name`."""
        if self._file == -1:
            self._open()
        words = self._words
        if words is None or window.taken is words or (name not in self._places and len(self._places) == MOST_LIMITS):
            return
        at = self._places.setdefault(name, len(self._places) * _WORDS)
        words[at] = _key(name)
        window.taken, window.place = words, at + 1
        self._windows.append(window)

    def marks(self) -> Mapping[str, int]:
        """How much was taken so far, by limit."""
        words = self._words
        return {name: words[at + 1] for name, at in self._places.items()} if words is not None else {}

    def told(self, marks: Mapping[str, int], names: Iterable[str]) -> None:
        """The store knows of all that was taken of `names` until `marks` were made."""
        if self._words is not None:
            for name in names:
                if name in marks:
                    self._words[self._places[name] + 2] = marks[name]
            self._touch()

    def _touch(self) -> None:
        """Let the file be as young as what it holds, so that nobody sweeps it."""
        now = self._wall()
        if abs(now - self._touched_at) >= TOUCH_SECONDS:
            self._touched_at = now
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def close(self, *, remove: bool) -> None:
        """Nothing more is noted. The file stays for the others unless the store knows everything (`remove`)."""
        for window in self._windows:
            window.taken, window.place = [0], 0
        self._windows.clear()
        if self._words is not None:
            self._words.release()
            self._words = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._file >= 0:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
        self._file = -2

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_mine(self._path.parent):
                raise PermissionError(f"{self._path.parent} is somebody else's")
            _sweep(self._path.parent, self._wall() - OLD_SECONDS)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, _BYTES)  # a page that finds no room later would end the process
            self._memory = mmap.mmap(self._file, _BYTES)
            self._words = memoryview(self._memory).cast("Q")
        except OSError as error:
            log.warning("what is taken of limits cannot be noted for the next gateway: %s", error)
            self.close(remove=True)


class LeftBooks:
    """What processes left that ended without a word."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, Mapping[int, int]] = {}

    def ended(self, process: str) -> bool:
        """Whether it is known to live no longer."""
        return self._of(process) is not None

    def untold(self, process: str, name: str) -> int | None:
        """The most that it took of the limit `name` without telling the store; None where nobody knows."""
        known = self._of(process)
        return None if known is None else known.get(_key(name))

    def _of(self, process: str) -> Mapping[int, int] | None:
        known = self._read.get(process)
        if known is None and _is_mine(self._folder) and (known := _read(self._folder / process)) is not None:
            self._read[process] = known
        return known


def _read(path: Path) -> Mapping[int, int] | None:
    """Key and units of each limit; None for a process that lives, or left no file that is whole."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            data = file.read()
    except OSError:  # BlockingIOError: it lives
        return None
    if len(data) != _BYTES:
        return None
    words = memoryview(data).cast("Q")
    rows = (words[at : at + _WORDS].tolist() for at in range(0, len(words), _WORDS))
    return {key: max(0, taken - told) for key, taken, told in rows if key}


def _sweep(folder: Path, before: float) -> None:
    """Take away what is older than any window, and of a process that ends again and again all but the last files."""
    left: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if _read(path) is not None:
                left.append((path.stat().st_mtime, path))
    left.sort(reverse=True)
    for place, (dated, path) in enumerate(left):
        if dated < before or place >= MOST_LEFT:
            path.unlink(missing_ok=True)


def _is_mine(folder: Path) -> bool:
    """Whether nobody else could have put files there."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), sys.byteorder) | 1
