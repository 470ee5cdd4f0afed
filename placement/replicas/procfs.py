"""What `/proc` tells of processes: who a pid is, which processes belong together, what memory they take."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that no other can be mistaken for: a pid alone is given again after its end.

    `start_ticks` is the 22nd field of `/proc/PID/stat`, clock ticks since boot; `boot_id` tells boots apart.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The process that has this pid at the moment; None if there is none, or only its zombie."""
        fields = _stat(pid)
        if fields is None or fields[0] in ("Z", "X"):
            return None
        return cls(pid, int(fields[19]), boot_id())

    @property
    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        return ProcessIdentity.of(self.pid) == self


def boot_id() -> str:
    """Different after every boot; the same in all containers of a machine."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def sessions(wanted: Iterable[int]) -> Mapping[int, Sequence[int]]:
    """The processes of each session in `wanted`, from one walk over `/proc`."""
    members: dict[int, list[int]] = defaultdict(list)
    asked = frozenset(wanted)
    if not asked:
        return members
    for entry in os.scandir(PROC):
        if not entry.name.isdigit():
            continue
        fields = _stat(int(entry.name))
        if fields is not None and fields[0] != "Z" and int(fields[3]) in asked:
            members[int(fields[3])].append(int(entry.name))
    return members


def threads_of(pid: int) -> Sequence[int]:
    """Its threads' ids; empty if it has ended."""
    try:
        return [int(task.name) for task in (PROC / str(pid) / "task").iterdir()]
    except OSError:
        return []


def resident_bytes(pids: Iterable[int]) -> int:
    """Resident memory, summed. Pages that several processes share are counted once for each: an upper bound, cheap to read."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((PROC / str(pid) / "statm").read_text(encoding="utf-8").split()[1]) * page
    return total


def proportional_bytes(pids: Iterable[int]) -> int:
    """Proportional set sizes, summed: shared pages are divided among those that share them.

    The kernel walks every page table for it, so it takes milliseconds per gigabyte: ask only when it matters.
    Where it may not be read, resident memory stands in.
    """
    total = 0
    for pid in pids:
        try:
            text = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
        except (OSError, ValueError):
            total += resident_bytes([pid])
            continue
        total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def _stat(pid: int) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the third (state) on; the second may hold spaces and brackets (proc(5))."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    fields = text.rpartition(")")[2].split()
    return fields if len(fields) > 19 else None
