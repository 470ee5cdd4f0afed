"""One process at a time: a lock on a file that also tells who holds it.

The kernel lets go of it when the holder ends, however it ends, so it can never be stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from placement.errors import StateLocked


@contextlib.contextmanager
def exclusive(path: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock at `path` for the block. `what` is in words what only one may be: "controller".

    Raises StateLocked, naming the holder's pid, if another process holds it. Children do not inherit it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _try(descriptor):
            pid = _pid(descriptor)
            whom = f"pid {pid}" if pid else "another process"
            raise StateLocked(
                f"a {what} is at work already ({whom})", where=str(path.parent), remedy=remedy.format(pid=pid or "PID")
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    """Take the lock. `holder` holds it for microseconds when it looks, so one refusal is not believed."""
    for _ in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def holder(path: Path) -> int | None:
    """The pid that holds the lock at `path`; None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(descriptor)
    finally:
        os.close(descriptor)
    return None


def _pid(descriptor: int) -> int | None:
    with contextlib.suppress(ValueError, OSError):
        return int(os.pread(descriptor, 32, 0))
    return None
