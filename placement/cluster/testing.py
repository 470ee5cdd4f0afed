"""A cluster in memory, for tests of its head: GPUs that refuse what a driver refuses, Ray's books, and the store of the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from model_registry.catalogue import load_catalogue
from model_registry.errors import IllegalLayout
from model_registry.geometry import Layout, Placement
from model_registry.model import SliceFit
from placement.cluster.members import NodeOrder, Owner, Seat, Versions
from placement.cluster.nodes import Hold
from placement.demanded import model_of
from placement.errors import PartitionError
from placement.gpus import ComputeInstance, GpuInstance, GpuState, MigMode
from placement.partition.apply import ModeChange
from placement.slices import Slice
from placement.table import ReplicaRow, ReplicaState, RoutingTable, SliceRow

GIB = 2**30
VERSIONS = Versions(sliceway="1", python="3.11", ray="2.60.0")


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


@dataclass(kw_only=True)
class FakeBooks:
    """Who holds which slice, as Ray would have it. Holders of the first `slow` replicas asked for do not answer at once, those of slices
    in `never` at no time. Asking for a slice that another one has is a fault of the head's.
    """

    holders: dict[str, Seat] = field(default_factory=dict)
    never: frozenset[str] = frozenset()
    slow: int = 0

    def rival(self, seat: Seat) -> str | None:
        """Who else has the slice."""
        return next((r for r, s in self.holders.items() if s.key == seat.key and r != seat.replica), None)

    async def hold(self, seat: Seat) -> Hold:
        """Note it, and give an owner."""
        assert self.rival(seat) is None, "two replicas would hold one slice"
        self.holders[seat.replica] = seat
        if self.slow > 0:
            self.slow -= 1
            return Hold(seat, waits_for="its holder to answer")
        if seat.key in self.never:
            return Hold(seat, waits_for="a miracle")
        return Hold(seat, owner=Owner(pid=1, start_ticks=1, boot_id="x"))

    async def belong(self, node: str, order: NodeOrder) -> None:
        """Engines here ask nobody whether their owners live."""

    async def let_go(self, replica: str) -> None:
        """Strike it out."""
        self.holders.pop(replica, None)

    async def held(self) -> Mapping[str, Seat]:
        """All of it."""
        return dict(self.holders)


@dataclass
class FakeStore:
    """A journal in memory. Nothing is written while it is not `reachable`; while it is `mute` whoever writes does not hear that it was done."""

    journal: bytes | None = None
    reachable: bool = True
    mute: bool = False

    async def load(self) -> bytes | None:
        """The last one."""
        return self.journal

    async def save(self, journal: bytes) -> None:
        """Raises ConnectionError where it is not reachable or mute."""
        if not self.reachable:
            raise ConnectionError("the store is gone")
        self.journal = journal
        if self.mute:
            raise ConnectionError("only the answer was lost")


def fits_anywhere(_: str, target: Slice) -> SliceFit:
    """Any model on any slice."""
    return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 8192, GIB)


def node_table(running: Mapping[str, str], state: Callable[[str], ReplicaState]) -> RoutingTable:
    """What a node's controller publishes of replicas and their slices; `state` is that of a replica."""
    return RoutingTable(
        generation=1,
        replicas=tuple(
            ReplicaRow(
                replica=replica,
                model=model_of(replica),
                engine_model="m",
                endpoint="http://10.0.0.1:1",
                slice=SliceRow(id=slice_id, kind="cpu"),
                state=state(replica),
            )
            for replica, slice_id in running.items()
        ),
    )
