"""Steps from what a GPU holds to what it is to hold."""

from __future__ import annotations

from dataclasses import dataclass

from model_registry.geometry import Placement
from placement.gpus import GpuInstance


@dataclass(frozen=True, slots=True)
class SetMode:
    """Switch MIG on or off."""

    gpu: str
    on: bool

    def __str__(self) -> str:
        return f"switch MIG {'on' if self.on else 'off'}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {"action": "set-mode", "mig": self.on}


@dataclass(frozen=True, slots=True)
class Destroy:
    """Take away a GPU instance with its compute instances."""

    gpu: str
    instance: GpuInstance

    def __str__(self) -> str:
        return f"destroy {self.instance.name}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {"action": "destroy", "slice": self.instance.name, "gpu_instance": self.instance.id}


@dataclass(frozen=True, slots=True)
class Complete:
    """Give a GPU instance that lies where it should its one full compute instance, in place of what it has."""

    gpu: str
    instance: GpuInstance

    def __str__(self) -> str:
        return f"complete {self.instance.name}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {"action": "complete", "slice": self.instance.name, "gpu_instance": self.instance.id}


@dataclass(frozen=True, slots=True)
class Create:
    """Make a GPU instance at a memory slice, with its full compute instance."""

    gpu: str
    placement: Placement

    def __str__(self) -> str:
        return f"create {self.placement}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {"action": "create", "slice": str(self.placement)}


Action = SetMode | Destroy | Complete | Create
