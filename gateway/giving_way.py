"""A process that lets others have the processor first."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
        with contextlib.suppress(OSError):  # a kernel without it
            autogroup.write_text(str(nice), encoding="ascii")
