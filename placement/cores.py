"""Cores as Linux names and groups them: lists such as `0-3,8` (cpuset(7), "List format"), and NUMA nodes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def parse_cores(text: str) -> tuple[int, ...]:
    """Ascending cores of `0-3,8`; empty for an empty text.

    Raises ValueError for anything else, and for a range that runs backwards.
    """
    cores: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"{part!r} runs backwards")
        cores.update(range(low, high + 1))
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """The shortest list of ranges for `cores`, the inverse of `parse_cores`."""
    ranges: list[tuple[int, int]] = []
    for core in sorted(set(cores)):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], core)
        else:
            ranges.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def numa_nodes(directory: Path = _NODES) -> Mapping[int, tuple[int, ...]]:
    """Cores by NUMA node, in order of nodes; nodes without cores are left out.

    A machine that tells of no node is one node with all cores.
    """
    found: dict[int, tuple[int, ...]] = {}
    for path in directory.glob("node[0-9]*"):
        try:
            found[int(path.name.removeprefix("node"))] = parse_cores((path / "cpulist").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    with_cores = {node: cores for node, cores in sorted(found.items()) if cores}
    return with_cores or {0: tuple(range(os.cpu_count() or 1))}
