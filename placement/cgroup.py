"""What the control groups of this process allow it: memory and processor time, version 1 and 2.

A container's limit may stand on any level of the hierarchy, so each value is the least one between this process's group
and the root (kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version 1 writes "no limit" as the largest page-aligned 63-bit number.
_NO_LIMIT_BYTES = 1 << 60


class ControlGroup:
    """The control groups of one process. `root` is where `/proc` and `/sys` are, for tests."""

    def __init__(self, root: Path = Path("/"), *, pid: int | str = "self") -> None:
        self._mount = root / "sys" / "fs" / "cgroup"
        self._membership = _membership(root / "proc" / str(pid) / "cgroup")

    def memory_limit_bytes(self) -> int | None:
        """The least memory limit above this process; None where there is none."""
        limits = [_integer(d / "memory.max") for d in self._unified()]
        limits += [_integer(d / "memory.limit_in_bytes") for d in self._version_1("memory")]
        real = [limit for limit in limits if limit is not None and limit < _NO_LIMIT_BYTES]
        return min(real, default=None)

    def cpu_quota_cores(self) -> float | None:
        """Cores' worth of processor time that this process may use, as in 1.5; None where it is not limited."""
        quotas = [_quota(_words(d / "cpu.max")) for d in self._unified()]
        quotas += [
            _quota(_words(d / "cpu.cfs_quota_us") + _words(d / "cpu.cfs_period_us")) for d in self._version_1("cpu")
        ]
        real = [quota for quota in quotas if quota is not None]
        return min(real, default=None)

    def _unified(self) -> Iterator[Path]:
        if "" in self._membership:
            mount = self._mount / "unified" if (self._mount / "unified").is_dir() else self._mount
            yield from _upwards(mount, self._membership[""])

    def _version_1(self, controller: str) -> Iterator[Path]:
        if controller in self._membership:
            yield from _upwards(self._mount / controller, self._membership[controller])


def _membership(path: Path) -> dict[str, str]:
    """Group path by controller, from `/proc/PID/cgroup`; the unified hierarchy's controller is the empty string."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, group = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), group)
    return found


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """The group's directory and those above it. Inside a container only the mount's root may be there."""
    directory = mount / group.lstrip("/")
    while directory != mount and mount in directory.parents:
        yield directory
        directory = directory.parent
    yield mount


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _integer(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _quota(words: list[str]) -> float | None:
    """`max 100000`, `-1 100000` and a missing file mean no limit."""
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit() or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])
