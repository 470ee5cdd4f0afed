"""Every GPU as the driver shows it, read in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model_registry.catalogue import Catalogue, Product, differences
from placement.cores import parse_cores
from placement.gpus import (
    ComputeInstance,
    ComputeMode,
    GpuInstance,
    GpuState,
    MigMode,
    Recovery,
)
from placement.nvml.access import bare_profile_name, mig_handles, mig_mode, or_none, processes, profile_name, text
from placement.nvml.product import drivers_product, known_product

_COMPUTE_MODES: Mapping[int, ComputeMode] = {
    0: "default",
    1: "exclusive-thread",
    2: "prohibited",
    3: "exclusive-process",
}
_RECOVERY: Mapping[int, Recovery] = {0: "none", 1: "reset", 2: "reboot", 3: "drain", 4: "drain-and-reset", 7: "reboot"}
# More than any GPU holds: the count that NVML gives for a profile is wrong on some products.
_MOST_INSTANCES = 16
_CPU_WORDS = 128  # 8192 hardware threads, the most that Linux is built for on common machines (CONFIG_MAXSMP)
_NODE_WORDS = 16
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def is_simulated(nvml: Any) -> bool:
    """Whether the library behind the binding is our simulator: it says so by a symbol that no driver has."""
    return hasattr(getattr(nvml, "nvmlLib", None), "sliceway_sim_create")


def read_gpu(nvml: Any, index: int, handle: Any, catalogue: Catalogue, driver: str) -> GpuState:
    """One GPU. Raises NVMLError only for a GPU that does not even tell its name."""
    name, uuid = str(nvml.nvmlDeviceGetName(handle)), str(nvml.nvmlDeviceGetUUID(handle))
    memory = _memory(nvml, handle)
    table = known_product(nvml, handle, name, memory.total, catalogue)
    geometry = drivers_product(nvml, handle, name, memory.total, table)
    mode = mig_mode(nvml, handle)
    known, instances = _instances(nvml, handle, geometry, memory.total) if mode and mode[0] else (True, ())
    total = memory.total or _widest(geometry)
    read = partial(or_none, nvml)
    return GpuState(
        uuid=uuid,
        index=index,
        name=name,
        product=table.name if table else name,
        memory_bytes=total,
        usable_bytes=memory.usable or total,
        driver=driver,
        pci_device_id=read(lambda: int(nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId)) or 0,
        pci_bus=read(lambda: text(nvml.nvmlDeviceGetPciInfo(handle).busId)) or "",
        minor=read(lambda: int(nvml.nvmlDeviceGetMinorNumber(handle))),
        numa_node=_numa_node(nvml, handle),
        cpus=_cpus_nearby(nvml, handle),
        geometry=geometry,
        differences=differences(table, geometry) if table and geometry else (),
        mode=MigMode(*mode) if mode else None,
        instances=instances,
        instances_known=known,
        processes=() if mode and mode[0] else processes(nvml, handle) or (),
        mode_needs_reset=_needs_reset(nvml, handle, table),
        display=bool(read(lambda: nvml.nvmlDeviceGetDisplayActive(handle))),
        persistence=_flag(read(lambda: nvml.nvmlDeviceGetPersistenceMode(handle))),
        compute_mode=_COMPUTE_MODES.get(_number(read(lambda: nvml.nvmlDeviceGetComputeMode(handle)))),
        uncorrected_errors=read(partial(_uncorrected, nvml, handle)),
        recovery=_recovery(nvml, handle),
        notes=memory.notes,
        simulated=is_simulated(nvml),
    )


@dataclass(frozen=True, slots=True)
class _Memory:
    total: int | None = None
    usable: int | None = None
    notes: tuple[str, ...] = ()


def _memory(nvml: Any, handle: Any) -> _Memory:
    """The GPU's bytes in all, and those that CUDA can hand out (less `nvmlMemory_v2_t.reserved`).

    A GPU in MIG mode tells them to the privileged only (nvml.h, nvmlDeviceGetMemoryInfo).
    """
    try:
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError as error:
        return _Memory(notes=(f"its own memory is not told ({error}), so the profile table's figure is shown",))
    info = or_none(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    return _Memory(total, int(info.total - info.reserved) if info else total)


def _widest(geometry: Product | None) -> int:
    """The best that is known of a GPU that does not tell its memory."""
    if geometry is None:
        return 0
    profiles = [p.memory_bytes for p in geometry.profiles if p.memory_bytes]
    return geometry.total_memory_bytes or max(profiles, default=0)


@dataclass(frozen=True, slots=True)
class _Device:
    """A MIG device and the profile of the GPU instance that it is on."""

    profile: str
    g: int
    compute: ComputeInstance


def _instances(
    nvml: Any, parent: Any, geometry: Product | None, total: int | None
) -> tuple[bool, tuple[GpuInstance, ...]]:
    """Whether all instances could be enumerated, and those that could. MIG devices need no privilege, the rest does."""
    devices: dict[int, list[_Device]] = {}
    for handle in mig_handles(nvml, parent):
        if (found := or_none(nvml, partial(_device, nvml, handle, total or _widest(geometry)))) is not None:
            devices.setdefault(nvml.nvmlDeviceGetGpuInstanceId(handle), []).append(found)
    try:
        listed = list(_enumerated(nvml, parent, geometry, devices))
        known = geometry is not None
    except nvml.NVMLError:
        listed, known = [], False
    rest = [
        GpuInstance(id, _canonical(geometry, on[0].profile), on[0].g, None, tuple(d.compute for d in on))
        for id, on in devices.items()
        if id not in {i.id for i in listed}
    ]
    return known and not rest, tuple(sorted((*listed, *rest), key=lambda i: (i.start or 0, i.id)))


def _enumerated(
    nvml: Any, parent: Any, geometry: Product | None, devices: Mapping[int, list[_Device]]
) -> Iterator[GpuInstance]:
    for profile in geometry.profiles if geometry else ():
        room, count = (nvml.c_nvmlGpuInstance_t * _MOST_INSTANCES)(), nvml.c_uint(_MOST_INSTANCES)
        nvml.nvmlDeviceGetGpuInstances(parent, profile.id, room, nvml.byref(count))
        for handle in room[: count.value]:
            info = nvml.nvmlGpuInstanceGetInfo(handle)
            compute = tuple(d.compute for d in devices.get(info.id, ()))
            yield GpuInstance(info.id, profile.name, profile.g, info.placement.start, compute)


def _device(nvml: Any, handle: Any, gpu_memory_bytes: int) -> _Device:
    attributes = nvml.nvmlDeviceGetAttributes(handle)
    named = bare_profile_name(or_none(nvml, lambda: str(nvml.nvmlDeviceGetName(handle))) or "")
    computed = partial(profile_name, attributes.gpuInstanceSliceCount, attributes.memorySizeMB, gpu_memory_bytes or 1)
    compute = ComputeInstance(
        id=nvml.nvmlDeviceGetComputeInstanceId(handle),
        g=attributes.computeInstanceSliceCount,
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        processes=processes(nvml, handle) or (),
    )
    return _Device(named or computed(), attributes.gpuInstanceSliceCount, compute)


def _canonical(geometry: Product | None, profile: str) -> str:
    """The one name that configurations use, where drivers disagree about it."""
    for known in geometry.profiles if geometry else ():
        if profile == known.name or profile in known.alternate_names:
            return known.name
    return profile


def _numa_node(nvml: Any, handle: Any) -> int | None:
    """The host's node next to the GPU. Not nvmlDeviceGetNumaNodeId: that is the node which a GPU's own memory makes up."""
    near = or_none(
        nvml,
        lambda: _bits(nvml.nvmlDeviceGetMemoryAffinity(handle, _NODE_WORDS, nvml.NVML_AFFINITY_SCOPE_NODE)),
    )
    return near[0] if near else None


def _cpus_nearby(nvml: Any, handle: Any) -> tuple[int, ...]:
    """The host's hardware threads next to the GPU, as the driver tells it, else as the kernel does."""
    told = or_none(nvml, lambda: _bits(nvml.nvmlDeviceGetCpuAffinity(handle, _CPU_WORDS)))
    if told:
        return told
    bus = or_none(nvml, lambda: text(nvml.nvmlDeviceGetPciInfo(handle).busId)) or ""
    try:
        return parse_cores((_PCI_DEVICES / bus[-12:].lower() / "local_cpulist").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()


def _bits(words: Iterable[int]) -> tuple[int, ...]:
    """The numbers of the bits that are set, over 64-bit words."""
    return tuple(64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1)


def _needs_reset(nvml: Any, handle: Any, table: Product | None) -> bool | None:
    value = _field(nvml, handle, nvml.NVML_FI_DEV_IS_RESETLESS_MIG_SUPPORTED)
    if value is not None:
        return not value
    return table.mode_change_needs_reset if table else None


def _recovery(nvml: Any, handle: Any) -> Recovery | None:
    """What the driver wants done after errors such as an XID; it knows this from R560 on."""
    value = _field(nvml, handle, nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)
    return None if value is None else _RECOVERY.get(value, "other")


def _field(nvml: Any, handle: Any, field: int) -> int | None:
    values = or_none(nvml, lambda: nvml.nvmlDeviceGetFieldValues(handle, [field]))
    if not values or values[0].nvmlReturn != nvml.NVML_SUCCESS:
        return None
    value = values[0].value
    wide = values[0].valueType in (nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, nvml.NVML_VALUE_TYPE_UNSIGNED_LONG)
    return int(value.ullVal if wide else value.uiVal)


def _uncorrected(nvml: Any, handle: Any) -> int:
    return int(
        nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    )


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _number(value: int | None) -> int:
    return -1 if value is None else int(value)
