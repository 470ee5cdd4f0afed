"""Whatever a test or a drill starts ends with it, also if it is killed: `python -S sentinel.py MARK`.

Engines, controllers and gateways are made to outlive who started them, so a test that dies would leave them behind. Every
process that it starts carries a mark in its environment (`DRILL_MARK`; what begins with SLICEWAY_ engines do not inherit),
and so do all their descendants. This process reads its standard input; at its end, which comes when whoever holds the other
end of the pipe is gone, however it went, every process with that mark is killed. Standard library only, so that it starts in
milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

VARIABLE = "DRILL_MARK"

_PASSES = 100
_PAUSE_SECONDS = 0.05


def marked(mark: str) -> Iterator[int]:
    """The processes of this user whose environment has the mark, this one left out. One that has ended is no process any more."""
    wanted = f"{VARIABLE}={mark}".encode()
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib costs half of the start
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123
            if wanted in file.read().split(b"\0"):
                yield int(name)


def end_all(mark: str) -> int:
    """Kill every marked process, and those that they start meanwhile. How many are left, which no signal reached."""
    left: list[int] = []
    for _ in range(_PASSES):
        left = list(marked(mark))
        if not left:
            break
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
    return len(left)


def main() -> int:
    """Wait for the end of standard input, then end everything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    return 1 if end_all(sys.argv[1]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
