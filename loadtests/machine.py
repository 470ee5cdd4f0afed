"""The machine that a measurement was made on, as far as Linux tells: what is needed to repeat it, and what else it was doing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Clicks:
    """Processor time since boot, in clock ticks: all of it, what was idle, and what a hypervisor took (`steal`)."""

    total: int
    idle: int
    steal: int


def describe(proc: Path = Path("/proc")) -> dict[str, Any]:
    """Cores, memory, processor, kernel and Python; None where the system does not tell."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _line_of(proc / "cpuinfo", "model name"),
        "memory_bytes": _memory_bytes(proc),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def usable_cores() -> frozenset[int]:
    """The cores that a process started here can be put on: the machine's, or those of the container (its cpuset).

    The caller's own affinity, as by `taskset`, is none of it: a child may leave that. The kernel tells by what it grants to a
    thread that asks for every core, and affinity is a thread's own, so that nothing else moves.
    """
    mine = os.sched_getaffinity(0)
    every = range(max(os.sysconf("SC_NPROCESSORS_CONF"), max(mine) + 1))

    def granted() -> frozenset[int]:
        try:
            os.sched_setaffinity(0, every)
        except OSError:
            return frozenset(mine)
        return frozenset(os.sched_getaffinity(0))

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(granted).result()


def clicks(proc: Path = Path("/proc")) -> Clicks | None:
    """The counters as they are; None where there are none. See proc(5), /proc/stat."""
    try:
        fields = [int(text) for text in (proc / "stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return Clicks(sum(fields), fields[3] + fields[4], fields[7])


def used_between(before: Clicks | None, after: Clicks | None) -> Mapping[str, float | None]:
    """`busy_ratio` and `steal_ratio` of all cores over the time between."""
    if before is None or after is None or after.total <= before.total:
        return {"busy_ratio": None, "steal_ratio": None}
    passed = after.total - before.total
    return {
        "busy_ratio": round(1 - (after.idle - before.idle) / passed, 3),
        "steal_ratio": round((after.steal - before.steal) / passed, 3),
    }


def _line_of(path: Path, name: str) -> str | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _memory_bytes(proc: Path) -> int | None:
    told = _line_of(proc / "meminfo", "MemTotal")
    return int(told.split()[0]) * 1024 if told else None
