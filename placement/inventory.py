"""Which slices there are: discovered, or as the operator lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from model_registry.errors import ConfigError
from placement.core_shares import share_cores
from placement.cores import format_cores, parse_cores
from placement.errors import InventoryError
from placement.gpu_slices import unused_notes
from placement.host import SHARE_FOR_SLICES, Host, cut, read_host
from placement.nvml import NvidiaState, read_nvidia
from placement.schema import ExplicitSlice, FleetConfig, SimulatedFleet
from placement.sharing import share
from placement.slices import Inventory, Slice, SliceKind


@dataclass(frozen=True, slots=True)
class Sources:
    """Where slices are read from; tests put other readers here."""

    host: Callable[[], Host] = read_host
    nvidia: Callable[[], NvidiaState] = read_nvidia


def observe(fleet: FleetConfig, sources: Sources | None = None) -> Inventory:
    """The slices of `fleet`, in a fixed order, with notes on what was left out and why.

    Raises InventoryError where the machine cannot give what is asked for, ConfigError where an explicit list is wrong.
    """
    sources = sources or Sources()
    if fleet.slices:
        return _with_cores(_explicit(fleet, sources), fleet, sources)
    if fleet.discover == "none":
        return Inventory((), notes=("Discovery is off and fleet.slices lists none.",))
    if fleet.discover == "cpu":
        return _cores(fleet, sources)
    nvidia = _nvidia(fleet, sources)
    if isinstance(fleet.discover, SimulatedFleet):
        return _simulated(fleet, nvidia, sources)
    if fleet.discover == "nvidia" or nvidia.slices:
        return _gpus(fleet, nvidia, sources)
    cores = _cores(fleet, sources)
    return replace(cores, notes=(*nvidia.notes, *cores.notes))


def _nvidia(fleet: FleetConfig, sources: Sources) -> NvidiaState:
    """What the driver shows, with what helps against GPUs that hold nothing, as `fleet` is cut."""
    found = sources.nvidia()
    unused = unused_notes(found.gpus, planned=fleet.partition == "planned")
    return replace(found, notes=(*found.notes, *unused))


def _cores(fleet: FleetConfig, sources: Sources) -> Inventory:
    slices, notes = cut(sources.host(), fleet.cpu)
    return Inventory(slices, notes=notes)


def _gpus(fleet: FleetConfig, nvidia: NvidiaState, sources: Sources) -> Inventory:
    if fleet.discover == "nvidia" and not nvidia.slices:
        why = "; ".join(nvidia.notes) or "no NVIDIA driver answers"
        raise InventoryError(
            f"no GPU slice was found: {why}",
            where="fleet.discover",
            remedy="Check `nvidia-smi`, or use `discover: cpu`.",
        )
    return _of(fleet, nvidia, sources)


def _of(fleet: FleetConfig, nvidia: NvidiaState, sources: Sources) -> Inventory:
    found = Inventory(nvidia.slices, notes=nvidia.notes, users=nvidia.users, gpus=nvidia.gpus, driver=nvidia.driver)
    return _with_cores(share(found, fleet.sharing), fleet, sources)


def _with_cores(inventory: Inventory, fleet: FleetConfig, sources: Sources) -> Inventory:
    """GPU slices with their share of the host's cores. A host that does not tell its cores costs no slice."""
    if not fleet.pin_cores or all(s.kind is SliceKind.CPU for s in inventory.slices):
        return inventory
    try:
        return share_cores(inventory, sources.host())
    except InventoryError as error:
        note = f"Engines are not pinned to cores: {error.message}."
        return replace(inventory, notes=(*inventory.notes, note))


def _simulated(fleet: FleetConfig, nvidia: NvidiaState, sources: Sources) -> Inventory:
    """A simulated fleet may have no slices yet: then its notes say how to make some."""
    if not nvidia.gpus or not all(gpu.simulated for gpu in nvidia.gpus):
        raise InventoryError(
            "the simulated GPUs are not what this process sees",
            where="fleet.discover.simulate",
            remedy="Another NVML was loaded before; this is a fault in sliceway if no driver's library is preloaded.",
        )
    return _of(fleet, nvidia, sources)


def _explicit(fleet: FleetConfig, sources: Sources) -> Inventory:
    listed = fleet.slices
    host = sources.host() if any(s.kind == "cpu" for s in listed) else None
    nvidia = _nvidia(fleet, sources) if any(s.kind != "cpu" for s in listed) else NvidiaState()
    known = {s.uuid: s for s in nvidia.slices}
    slices: list[Slice] = []
    for i, wanted in enumerate(listed):
        where = f"fleet.slices[{i}]"
        slices.append(
            _cpu_slice(wanted, host, len(listed), i, where)
            if host and wanted.kind == "cpu"
            else _gpu_slice(wanted, known, where)
        )
    _refuse_overlaps(slices)
    ids = {s.id for s in slices}
    return Inventory(
        tuple(slices),
        notes=nvidia.notes,
        users=tuple(u for u in nvidia.users if u.slice_id in ids),
        gpus=nvidia.gpus,
        driver=nvidia.driver,
    )


def _cpu_slice(wanted: ExplicitSlice, host: Host, count: int, index: int, where: str) -> Slice:
    cores = parse_cores(wanted.cores or "")
    missing = sorted(set(cores) - set(host.threads))
    if missing:
        raise ConfigError(
            f"cores {format_cores(missing)} are not this process's to use",
            where=f"{where}.cores",
            remedy=f"There are {format_cores(host.threads)}.",
        )
    memory = wanted.memory or int(host.memory_bytes * SHARE_FOR_SLICES) // count
    return Slice(wanted.id or f"cpu-{index}", SliceKind.CPU, None, memory, cores=cores)


def _gpu_slice(wanted: ExplicitSlice, known: dict[str | None, Slice], where: str) -> Slice:
    """What the driver knows of the UUID; a slice that it cannot see is taken as described, if its memory is."""
    found = known.get(wanted.uuid)
    if found is None and wanted.memory is None:
        raise ConfigError(
            f"{wanted.uuid} is not among the slices that the driver shows",
            where=f"{where}.uuid",
            remedy=f"`sliceway slices` lists them ({len(known)} found). A slice the driver cannot see needs `memory`.",
        )
    if found is None:
        cores = parse_cores(wanted.cores or "")
        kind, memory = SliceKind(wanted.kind), wanted.memory or 0
        return Slice(wanted.id or str(wanted.uuid), kind, None, memory, uuid=wanted.uuid, cores=cores)
    if found.kind.value != wanted.kind:
        raise ConfigError(f"{wanted.uuid} is a {found.kind} slice, not {wanted.kind}", where=f"{where}.kind")
    memory = min(wanted.memory, found.memory_bytes) if wanted.memory else found.memory_bytes
    return replace(found, id=wanted.id or found.id, memory_bytes=memory, cores=parse_cores(wanted.cores or ""))


def _refuse_overlaps(slices: list[Slice]) -> None:
    for i, one in enumerate(slices):
        for other in slices[:i]:
            if one.id == other.id:
                raise ConfigError(f"two slices are called {one.id!r}", where="fleet.slices")
            if one.uuid and one.uuid == other.uuid:
                raise ConfigError(f"{one.uuid} is listed twice", where="fleet.slices")
            if shared := set(one.cores) & set(other.cores):
                raise ConfigError(
                    f"slices {other.id!r} and {one.id!r} share cores {format_cores(shared)}",
                    where="fleet.slices",
                    remedy="Give every core to one slice only.",
                )
