"""What a driver tells of its GPUs: MIG mode, instances with their place, who runs where, and what else an operator asks.

Values only, read by `placement.nvml` and by nothing else. What could not be read is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from model_registry.catalogue import Product
from model_registry.geometry import Placement
from placement.cores import format_cores

How = Literal["compute", "graphics", "mps", "open"]
ComputeMode = Literal["default", "exclusive-thread", "prohibited", "exclusive-process"]
Recovery = Literal["none", "reset", "reboot", "drain", "drain-and-reset", "other"]


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process on a GPU or on one of its instances. `how`: `open` holds the device file without computing."""

    pid: int
    name: str
    memory_bytes: int | None = None
    how: How = "compute"

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.1f} GiB" if self.memory_bytes else ""
        return f"{self.name} (pid {self.pid}{memory})"


@dataclass(frozen=True, slots=True)
class ComputeInstance:
    """A compute instance, and with it a MIG device. `uuid`, `id` and what they name end with it."""

    id: int
    g: int
    uuid: str
    memory_bytes: int
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuInstance:
    """A GPU instance. `start` is its first memory slice, None where that may not be read."""

    id: int
    profile: str
    g: int
    start: int | None
    compute: tuple[ComputeInstance, ...] = ()

    @property
    def placement(self) -> Placement | None:
        """Profile and start; None where the start may not be read."""
        return None if self.start is None else Placement(self.start, self.profile)

    @property
    def complete(self) -> bool:
        """Whether it has its one full compute instance: only then it is a slice."""
        return len(self.compute) == 1 and self.compute[0].g >= self.g

    @property
    def processes(self) -> tuple[GpuProcess, ...]:
        """Who runs on any of its compute instances."""
        return tuple(p for c in self.compute for p in c.processes)

    @property
    def name(self) -> str:
        """`1g.10gb@3`, or `1g.10gb#gi9` where the start may not be read."""
        return f"{self.profile}@{self.start}" if self.start is not None else f"{self.profile}#gi{self.id}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "profile": self.profile,
            "start": self.start,
            "gpu_instance": self.id,
            "complete": self.complete,
            "compute_instances": [
                {"id": c.id, "compute_slices": c.g, "uuid": c.uuid, "memory_bytes": c.memory_bytes}
                for c in self.compute
            ],
            "processes": [_process(p) for p in self.processes],
        }


@dataclass(frozen=True, slots=True)
class MigMode:
    """Whether MIG is on, and whether it will be after the next reset."""

    current: bool
    pending: bool


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU as the driver shows it.

    `product` is the catalogue's name where the GPU is in it, else NVML's (`name`). `geometry` holds its profiles: the
    driver's figures where it tells them, the catalogue's else; None for a GPU that neither can cut. `differences` are
    the catalogue's figures that the driver contradicts. `mode` is None where the driver offers no MIG.
    `instances_known` is False without the privilege to enumerate: starts and instances without compute instance are
    missing then. `usable_bytes` is what an engine on the whole GPU may use. `processes` are those on the GPU itself.
    `cpus` are the host's hardware threads next to it and `numa_node` the host's memory node; empty and None where untold.
    """

    uuid: str
    index: int
    name: str
    product: str
    memory_bytes: int
    usable_bytes: int
    driver: str
    pci_device_id: int = 0
    pci_bus: str = ""
    minor: int | None = None
    numa_node: int | None = None
    cpus: tuple[int, ...] = ()
    geometry: Product | None = field(default=None, repr=False)
    differences: tuple[str, ...] = ()
    mode: MigMode | None = None
    instances: tuple[GpuInstance, ...] = ()
    instances_known: bool = True
    processes: tuple[GpuProcess, ...] = ()
    mode_needs_reset: bool | None = None
    display: bool = False
    persistence: bool | None = None
    compute_mode: ComputeMode | None = None
    uncorrected_errors: int | None = None
    recovery: Recovery | None = None
    notes: tuple[str, ...] = ()
    simulated: bool = False

    @property
    def mig(self) -> bool:
        """Whether MIG is on."""
        return self.mode is not None and self.mode.current

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where instances lie, in order of starts; those whose start is unknown are left out."""
        return tuple(sorted(i.placement for i in self.instances if i.placement is not None))

    @property
    def label(self) -> str:
        """How messages name it: by index and product; in a cluster, where `uuid` is `NODE/UUID`, by its node as well."""
        node = self.uuid.rpartition("/")[0]
        return f"{node} GPU {self.index} ({self.product})" if node else f"GPU {self.index} ({self.product})"

    @property
    def all_processes(self) -> tuple[GpuProcess, ...]:
        """Everyone on it, on whatever part."""
        return (*self.processes, *(p for i in self.instances for p in i.processes))

    @property
    def mps(self) -> bool:
        """Whether an MPS server runs on it."""
        return any(p.how == "mps" or "nvidia-cuda-mps" in p.name for p in self.all_processes)

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway slices --json`, one per GPU."""
        return {
            "uuid": self.uuid,
            "index": self.index,
            "name": self.name,
            "product": self.product,
            "memory_bytes": self.memory_bytes,
            "mig": {"current": self.mode.current, "pending": self.mode.pending} if self.mode else None,
            "mode_change_needs_reset": self.mode_needs_reset,
            "instances": [i.as_public() for i in self.instances],
            "instances_known": self.instances_known,
            "processes": [_process(p) for p in self.processes],
            "persistence": self.persistence,
            "compute_mode": self.compute_mode,
            "mps": self.mps,
            "display": self.display,
            "uncorrected_errors": self.uncorrected_errors,
            "recovery": self.recovery,
            "numa_node": self.numa_node,
            "cpus": format_cores(self.cpus),
            "differences": list(self.differences),
            "simulated": self.simulated,
        }


def named(processes: tuple[GpuProcess, ...]) -> Iterator[str]:
    """Each process once, in words."""
    seen: set[int] = set()
    for process in processes:
        if process.pid not in seen:
            seen.add(process.pid)
            yield str(process)


def _process(process: GpuProcess) -> dict[str, object]:
    return {"pid": process.pid, "name": process.name, "memory_bytes": process.memory_bytes, "how": process.how}
