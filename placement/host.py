"""This machine's cores and memory, cut into `cpu` slices.

`read_host` reads; `cut` is a function of what was read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model_registry.words import are, counted
from placement.cgroup import ControlGroup
from placement.cores import format_cores, numa_nodes, parse_cores
from placement.errors import InventoryError
from placement.schema import CpuFleet
from placement.slices import Slice, SliceKind

MOST_AUTOMATIC_SLICES = 7
# The rest is for the kernel, the gateway, the controller and the page cache.
SHARE_FOR_SLICES = 0.9


@dataclass(frozen=True, slots=True)
class Host:
    """What this process may use of the machine.

    `cores` are groups of hardware threads, one group per physical core, neighbours in the same NUMA node side by side.
    `quota_cores` is the control group's processor time, `memory_bytes` the lesser of the machine's memory and the
    control group's limit.
    """

    cores: tuple[tuple[int, ...], ...]
    memory_bytes: int
    quota_cores: float | None = None
    memory_limited: bool = False

    @property
    def threads(self) -> tuple[int, ...]:
        """Every hardware thread, siblings side by side."""
        return tuple(thread for core in self.cores for thread in core)


def read_host(root: Path = Path("/"), *, allowed: frozenset[int] | None = None) -> Host:
    """Read cores and memory.

    `allowed` are the hardware threads to consider, those of this process's affinity mask if None.
    Raises InventoryError where `/proc/meminfo` cannot be read.
    """
    threads = allowed if allowed is not None else frozenset(os.sched_getaffinity(0))
    group = ControlGroup(root)
    total = _memory_total(root / "proc" / "meminfo")
    limit = group.memory_limit_bytes()
    return Host(
        cores=_physical_cores(threads, root / "sys" / "devices" / "system"),
        memory_bytes=min(total, limit) if limit else total,
        quota_cores=group.cpu_quota_cores(),
        memory_limited=limit is not None and limit < total,
    )


def cut(host: Host, fleet: CpuFleet) -> tuple[tuple[Slice, ...], tuple[str, ...]]:
    """Slices of equal size, and notes on what a reader would not expect.

    Hardware threads of one physical core stay in one slice where there are enough cores. What does not divide evenly is
    left to the gateway and the controller.
    Raises InventoryError where the memory asked for is more than the machine has.
    """
    threads, notes = _usable_threads(host)
    wanted = _automatic(host, len(threads)) if fleet.slices == "auto" else fleet.slices
    count = min(wanted, len(threads))
    if count < wanted:
        notes += (
            f"{counted(wanted, 'cpu slice')} {'was' if wanted == 1 else 'were'} asked for, but {_there_are(len(threads), 'core')}; {_there_are(count, 'slice')}.",
        )
    if count == 1 and fleet.slices == "auto":
        notes += ("This machine has one core to use, so there is one slice: one model replica at a time.",)
    sets, shared = _core_sets(host, threads, count)
    if shared:
        notes += (
            f"{shared} slices share physical cores with a neighbour (hardware threads): they disturb each other more than whole cores do.",
        )
    memory = _memory_per_slice(host, fleet, count)
    slices = tuple(
        Slice(id=f"cpu-{i}", kind=SliceKind.CPU, profile=None, memory_bytes=memory, cores=cores)
        for i, cores in enumerate(sets)
    )
    left = sorted(set(threads) - {core for cores in sets for core in cores})
    if left:
        notes += (f"Cores {format_cores(left)} are in no slice; they are left to the gateway.",)
    return slices, notes


def _usable_threads(host: Host) -> tuple[tuple[int, ...], tuple[str, ...]]:
    threads = host.threads
    if host.quota_cores is None or host.quota_cores >= len(threads):
        return threads, ()
    usable = max(1, int(host.quota_cores))
    note = f"The control group allows {host.quota_cores:g} cores' worth of time, so {usable} of {len(threads)} cores are used."
    return threads[:usable], (note,)


def _automatic(host: Host, threads: int) -> int:
    """One slice per physical core; per hardware thread where there is one physical core, so that two models still run."""
    cores = min(len(host.cores), threads)
    return min(MOST_AUTOMATIC_SLICES, cores if cores > 1 else threads)


def _core_sets(host: Host, threads: Sequence[int], count: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """`count` disjoint sets of equal size, and how many of them share a physical core with another."""
    usable = frozenset(threads)
    cores = [tuple(t for t in core if t in usable) for core in host.cores]
    cores = [core for core in cores if core]
    if count <= len(cores):
        size = len(cores) // count
        sets = [tuple(sorted(t for core in cores[i * size : (i + 1) * size] for t in core)) for i in range(count)]
        return tuple(sets), 0
    size = len(threads) // count
    sets = [tuple(sorted(threads[i * size : (i + 1) * size])) for i in range(count)]
    return tuple(sets), sum(_shares(one, sets, cores) for one in sets)


def _shares(one: tuple[int, ...], sets: Sequence[tuple[int, ...]], cores: Sequence[tuple[int, ...]]) -> bool:
    physical = {core for core in cores if set(core) & set(one)}
    return any(set(core) & set(other) for other in sets if other != one for core in physical)


def _memory_per_slice(host: Host, fleet: CpuFleet, count: int) -> int:
    if fleet.memory is None:
        return int(host.memory_bytes * SHARE_FOR_SLICES) // count
    if fleet.memory * count > host.memory_bytes:
        whose = "its control group allows" if host.memory_limited else "this machine has"
        raise InventoryError(
            f"{count} cpu slices of {_gib(fleet.memory)} are {_gib(fleet.memory * count)}, but {whose} {_gib(host.memory_bytes)}",
            where="fleet.cpu.memory",
            remedy=f"Use at most {_gib(int(host.memory_bytes * SHARE_FOR_SLICES) // count)} per slice, or fewer slices.",
        )
    return fleet.memory


def _physical_cores(threads: frozenset[int], system: Path) -> tuple[tuple[int, ...], ...]:
    nodes = {core: node for node, cores in numa_nodes(system / "node").items() for core in cores}
    groups = {_siblings(thread, system) & threads or frozenset({thread}) for thread in threads}
    return tuple(sorted((tuple(sorted(g)) for g in groups), key=lambda group: (nodes.get(group[0], 0), group)))


def _siblings(thread: int, system: Path) -> frozenset[int]:
    try:
        return frozenset(
            parse_cores(
                (system / "cpu" / f"cpu{thread}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8")
            )
        )
    except (OSError, ValueError):
        return frozenset({thread})


def _memory_total(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        raise InventoryError(f"this machine's memory cannot be read: {error}", where=str(meminfo)) from error
    raise InventoryError(
        "this machine's memory is not told", where=str(meminfo), remedy="Name the slices in fleet.slices."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}GiB"


def _there_are(count: int, noun: str) -> str:
    return f"there {are(count)} {counted(count, noun)}"
