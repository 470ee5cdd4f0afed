"""When each API key was last used: to the minute, in a file beside the keystore, for whoever wants to know which keys are dead.

No request writes anything, and none is even counted: a verified key is remembered for `USE_SECONDS`, then verified anew, and that is
what is noted here. Gateways write what they have noted every few seconds into one file, which keeps the latest time of each key.

::

    STATE/keys.used.json    {"version": 1, "used": {id: seconds since 1970, UTC}}
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from model_registry.atomic import write_atomically

log = logging.getLogger("sliceway.keys")

USE_SECONDS = 60.0  # how exact a last use is
WRITE_SECONDS = 5.0


class _File(msgspec.Struct, frozen=True):
    version: int
    used: dict[str, float]


def read_uses(root: Path) -> dict[str, float]:
    """When each key of the state directory `root` was last used, by id, in seconds since 1970; only those that were.

    A file that cannot be read counts as none: it is for people, and the next use writes it anew.
    """
    try:
        file = msgspec.json.decode(_path(root).read_bytes(), type=_File)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return {}
    return file.used if file.version == 1 else {}


def merge_uses(root: Path, noted: Mapping[str, float]) -> None:
    """Write `noted` down; the later time of each key stays. Any number of processes may. Blocks on the disk. Raises OSError."""
    with _locked(root):
        used = read_uses(root)
        for key_id, at in noted.items():
            used[key_id] = max(at, used.get(key_id, at))
        write_atomically(_path(root), msgspec.json.encode(_File(1, used)) + b"\n", mode=0o600)


class KeyUses:
    """What one gateway has noted and not yet written down. To be used by one thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._noted: dict[str, float] = {}
        self._written_at = float("-inf")
        self._failing = False

    def note(self, key_id: str, now: float) -> None:
        """The key was used at `now`, in seconds since 1970."""
        self._noted[key_id] = round(now)

    async def tick(self, now: float) -> None:
        """Write down what was noted, at most every WRITE_SECONDS of the monotonic `now`, off the event loop. Never raises."""
        if self._noted and now - self._written_at >= WRITE_SECONDS:
            self._written_at = now
            await self.write()

    async def write(self) -> None:
        """Write down what was noted; where that fails it is kept for the next time, and logged once."""
        noted, self._noted = self._noted, {}
        if not noted:
            return
        try:
            await asyncio.to_thread(merge_uses, self._root, noted)
        except OSError as error:
            self._noted = noted | self._noted
            if not self._failing:
                log.warning("when keys were last used cannot be written down in %s: %s", _path(self._root), error)
            self._failing = True
        else:
            self._failing = False


def _path(root: Path) -> Path:
    return root / "keys.used.json"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    lock = os.open(root / "keys.used.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
