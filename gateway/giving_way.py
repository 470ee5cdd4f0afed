"""A process that lets others have the processor first."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

AGAIN_SECONDS, TRIES = 0.1, 20


def give_way(nice: int, autogroup: Path = Path("/proc/self/autogroup")) -> None:
    """Be `nice` (0 to 19) to every process of the machine, in a session of its own from here on.

    Where Linux shares the processor between sessions first (sched(7), "The autogroup feature"), niceness counts only within one: a process that
    computes without pause would take as much as everybody else's session together. So the session is made nice as well. A leader of a
    process group can have no other session, and stays nice within its own.
    """
    os.nice(nice)
    with contextlib.suppress(PermissionError):
        os.setsid()
    if os.getsid(0) == os.getpid():  # nobody else's
        _tell(lambda: autogroup.write_text(str(nice), encoding="ascii"), time.sleep)


def _tell(write: Callable[[], object], wait: Callable[[float], None]) -> None:
    """A tenth of a second is the kernel's own bound: of all processes without CAP_SYS_ADMIN one may write so often, others try again."""
    with contextlib.suppress(OSError):  # a kernel without it
        for _ in range(TRIES):
            with contextlib.suppress(BlockingIOError):
                write()
                return
            wait(AGAIN_SECONDS)
