"""What a replica can be pinned to: slices, and the inventory that lists them.

Values only: nothing here reads the host. `placement.host` and `placement.nvml` fill these in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from placement.gpus import GpuState


class SliceKind(StrEnum):
    """How a slice is cut, and with that what isolates it. See "Slice kinds" in docs/architecture.md."""

    MIG = "mig"
    GPU = "gpu"
    MPS = "mps"
    TIME_SLICE = "time-slice"
    CPU = "cpu"

    @property
    def isolation(self) -> str:
        """One phrase for people: what this kind keeps apart."""
        return {
            SliceKind.MIG: "hardware",
            SliceKind.GPU: "whole card",
            SliceKind.MPS: "not isolated (MPS shares the card)",
            SliceKind.TIME_SLICE: "not isolated (time-slicing shares the card)",
            SliceKind.CPU: "core set",
        }[self]


@dataclass(frozen=True, slots=True)
class Gpu:
    """The card that a slice is part of. `product` is the catalogue's name where the card is in it, else NVML's."""

    uuid: str
    index: int
    product: str
    memory_bytes: int
    numa_node: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """One place for one engine.

    `id` is the slice's identity and outlives restarts: `cpu-0`; a GPU's UUID; for MIG `<GPU UUID>/<profile>@<start>`.
    `uuid` is what `CUDA_VISIBLE_DEVICES` takes and may change when the slice is made again; None on a CPU.
    `memory_bytes` is what an engine may use, as the driver or the budget says, never a profile's name.
    `cores` are the CPU cores of its engine; empty where none are set apart. They are its own, unless `shared_cores` says
    that there were too few and other slices use them as well. `sharers` counts the slices that use one
    card together without isolation, itself included.
    """

    id: str
    kind: SliceKind
    profile: str | None
    memory_bytes: int
    uuid: str | None = None
    gpu: Gpu | None = None
    cores: tuple[int, ...] = ()
    simulated: bool = False
    sharers: int = 1
    shared_cores: bool = False

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0:
            raise ValueError(f"slice {self.id!r} has no memory")
        if self.kind is SliceKind.CPU and not self.cores:
            raise ValueError(f"cpu slice {self.id!r} has no cores")
        if self.kind is not SliceKind.CPU and not self.uuid:
            raise ValueError(f"{self.kind} slice {self.id!r} has no UUID to pin an engine with")

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape: `id`, `kind`, `profile`, `uuid`, `gpu`, `product` as `/slices` and the routing table show them."""
        return {
            "id": self.id,
            "kind": self.kind.value,
            "profile": self.profile,
            "uuid": self.uuid,
            "gpu": self.gpu.uuid if self.gpu else None,
            "product": self.gpu.product if self.gpu else None,
        }


@dataclass(frozen=True, slots=True)
class SliceUser:
    """A process found on a slice."""

    slice_id: str
    pid: int
    name: str
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What runs on one device that an engine can be pinned to: a GPU without MIG, or a MIG device, slice of ours or not.

    `processes` maps pids, as the driver gives them, to names; None where the driver does not tell. `used_bytes` counts
    every process's memory, also of those it does not list.
    """

    uuid: str
    processes: Mapping[int, str] | None
    used_bytes: int | None
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every slice that was found, in a fixed order, and why something is missing from the list (`notes`).

    `gpus` are the cards behind them with everything the driver tells, `driver` is its version; empty and None elsewhere.
    """

    slices: tuple[Slice, ...]
    notes: tuple[str, ...] = ()
    users: tuple[SliceUser, ...] = ()
    gpus: tuple[GpuState, ...] = ()
    driver: str | None = None
    by_id: Mapping[str, Slice] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {s.id: s for s in self.slices}
        if len(by_id) != len(self.slices):
            raise ValueError("two slices share an id")
        object.__setattr__(self, "by_id", by_id)
