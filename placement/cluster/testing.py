"""GPUs of nodes in memory, which can be cut and refuse what a driver refuses: for tests of what is planned for a cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from model_registry.catalogue import load_catalogue
from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout, Placement
from placement.errors import PartitionError
from placement.gpus import ComputeInstance, GpuInstance, GpuState, MigMode
from placement.partition.apply import ModeChange


def made_gpu(index: int, product: str = "h100-sxm", holds: Iterable[str] = (), *, mig: bool = True) -> GpuState:
    """A GPU that holds these instances (`1g.10gb@0`). Every machine's GPUs have the same UUIDs, as simulated ones do."""
    known = load_catalogue().product(product)
    memory = known.total_memory_bytes or 0
    gpu = GpuState(
        uuid=f"GPU-{index}",
        index=index,
        name=product,
        product=known.name,
        memory_bytes=memory,
        usable_bytes=memory,
        driver="570.0",
        geometry=known,
        mode=MigMode(mig, mig),
        mode_needs_reset=False,
        simulated=True,
    )
    for text in holds:
        gpu = _with(gpu, Placement.parse(text))
    return gpu


def _with(gpu: GpuState, placement: Placement) -> GpuState:
    assert gpu.geometry is not None
    profile = gpu.geometry.profile(placement.profile)
    number = next(n for n in range(1, 99) if n not in {i.id for i in gpu.instances})
    memory = profile.memory_bytes or 0
    compute = ComputeInstance(0, profile.g, f"MIG-{gpu.uuid}-{placement}", memory)
    made = GpuInstance(number, placement.profile, profile.g, placement.start, (compute,))
    return replace(gpu, instances=(*gpu.instances, made))


@dataclass(slots=True)
class FakeDriver:
    """The `Driver` of one node."""

    gpus: tuple[GpuState, ...]

    def observe(self) -> tuple[GpuState, ...]:
        """As they are."""
        return self.gpus

    def create(self, gpu: str, placement: Placement) -> None:
        """Raises PartitionError for what would overlap."""
        known = self._gpu(gpu)
        try:
            Layout(known.geometry, (*known.placements, placement)) if known.geometry and known.mig else self._refuse(
                gpu
            )
        except IllegalLayout as error:
            raise PartitionError(error.message, where=gpu) from error
        self._put(_with(known, placement))

    def complete(self, gpu: str, instance: int) -> None:
        """Every instance is complete here."""

    def destroy(self, gpu: str, instance: int) -> None:
        """Take it away."""
        known = self._gpu(gpu)
        self._put(replace(known, instances=tuple(i for i in known.instances if i.id != instance)))

    def set_mode(self, gpu: str, on: bool) -> ModeChange:
        """Switch MIG, on an empty GPU."""
        known = self._gpu(gpu)
        if known.instances:
            return "in-use"
        self._put(replace(known, mode=MigMode(on, on)))
        return "done"

    def _refuse(self, gpu: str) -> None:
        raise PartitionError("MIG is off", where=gpu)

    def _gpu(self, uuid: str) -> GpuState:
        return next(g for g in self.gpus if g.uuid == uuid)

    def _put(self, gpu: GpuState) -> None:
        self.gpus = tuple(gpu if g.uuid == gpu.uuid else g for g in self.gpus)
