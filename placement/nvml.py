"""NVIDIA GPUs and their MIG devices, through NVML. The only module that imports `pynvml`.

Reading needs no privilege, with one exception: where on the GPU an instance lies. Without that privilege a MIG slice is
named by its GPU instance instead, which changes when instances are made again (nvml.h marks `nvmlDeviceGetGpuInstances`
"Requires privileged user").

Nothing here raises for want of a driver or for a card that answers badly: what could not be read is told in notes.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pynvml

from model_registry.catalogue import Catalogue, load_catalogue
from model_registry.errors import UnknownProfile
from placement.slices import DeviceUse, Gpu, Slice, SliceKind, SliceUser

MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NvidiaState:
    """What NVML tells. `driver` is None where there is no driver; then everything else is empty."""

    driver: str | None = None
    slices: tuple[Slice, ...] = ()
    users: tuple[SliceUser, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Found:
    slices: tuple[Slice, ...]
    users: tuple[SliceUser, ...]
    notes: tuple[str, ...]


def read_nvidia(nvml: Any = pynvml) -> NvidiaState:
    """GPUs with MIG off as `gpu` slices, complete MIG devices as `mig` slices, in NVML's order.

    `nvml` is anything with pynvml's functions. Never raises for what a machine lacks.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded)
        return NvidiaState(notes=() if isinstance(error, absent) else (f"The NVIDIA driver does not answer: {error}.",))
    try:
        return _read(nvml, load_catalogue())
    except nvml.NVMLError as error:
        return NvidiaState(notes=(f"The NVIDIA driver stopped answering: {error}.",))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _read(nvml: Any, catalogue: Catalogue) -> NvidiaState:
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            found.append(_read_gpu(nvml, index, catalogue))
        except nvml.NVMLError as error:
            found.append(_Found((), (), (f"GPU {index} is left out: {error}. See `dmesg` for its XID.",)))
    return NvidiaState(
        driver=nvml.nvmlSystemGetDriverVersion(),
        slices=tuple(s for f in found for s in f.slices),
        users=tuple(u for f in found for u in f.users),
        notes=tuple(n for f in found for n in f.notes),
    )


def _read_gpu(nvml: Any, index: int, catalogue: Catalogue) -> _Found:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    gpu = Gpu(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        index=index,
        product=_product(nvml, handle, memory, catalogue),
        memory_bytes=memory,
        numa_node=_or_none(nvml, lambda: nvml.nvmlDeviceGetNumaNodeId(handle)),
    )
    current, pending = _or_none(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)) or (0, 0)
    notes = (
        ()
        if current == pending
        else (f"GPU {index}: MIG is about to be switched {'on' if pending else 'off'} at the next reset.",)
    )
    if current:
        return _mig_devices(nvml, handle, gpu, catalogue, notes)
    whole = Slice(
        id=gpu.uuid, kind=SliceKind.GPU, profile=None, memory_bytes=_usable_memory(nvml, handle), uuid=gpu.uuid, gpu=gpu
    )
    return _Found((whole,), tuple(_users(nvml, handle, whole.id)), notes)


def _mig_devices(nvml: Any, parent: Any, gpu: Gpu, catalogue: Catalogue, notes: tuple[str, ...]) -> _Found:
    starts = _placement_starts(nvml, parent)
    slices: list[Slice] = []
    users: list[SliceUser] = []
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        handle = _or_none(nvml, partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, i))
        if handle is None:
            continue
        try:
            device, problem = _mig_device(nvml, handle, gpu, catalogue, starts)
        except nvml.NVMLError as error:
            device, problem = None, f"GPU {gpu.index}: MIG device {i} is left out: {error}."
        if problem:
            notes += (problem,)
        if device:
            slices.append(device)
            users.extend(_users(nvml, handle, device.id))
    if not slices:
        notes += (
            f"GPU {gpu.index} has MIG on and no usable instance, so nothing can run on it. Make some, e.g. nvidia-smi mig -i {gpu.index} -cgi 19 -C",
        )
    elif not starts:
        notes += (
            f"GPU {gpu.index}: where its instances lie may be read by root only; they are named by their GPU instance ids.",
        )
    return _Found(tuple(slices), tuple(users), notes)


def _mig_device(
    nvml: Any, handle: Any, gpu: Gpu, catalogue: Catalogue, starts: dict[int, int]
) -> tuple[Slice | None, str | None]:
    """The slice, or why this MIG device is none: it must be a GPU instance's one and whole compute instance."""
    attributes = nvml.nvmlDeviceGetAttributes(handle)
    instance = nvml.nvmlDeviceGetGpuInstanceId(handle)
    if attributes.computeInstanceSliceCount < attributes.gpuInstanceSliceCount:
        compute = nvml.nvmlDeviceGetComputeInstanceId(handle)
        return None, (
            f"GPU {gpu.index}: compute instance {compute} is only {attributes.computeInstanceSliceCount} of the "
            f"{attributes.gpuInstanceSliceCount} slices of GPU instance {instance}. It would share memory with its neighbours, so it is left out."
        )
    profile = _catalogue_name(_profile(nvml, handle, attributes, gpu.memory_bytes), gpu, catalogue)
    place = f"@{starts[instance]}" if instance in starts else f"#gi{instance}"
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return Slice(
        f"{gpu.uuid}/{profile}{place}", SliceKind.MIG, profile, memory, uuid=nvml.nvmlDeviceGetUUID(handle), gpu=gpu
    ), None


def _profile(nvml: Any, handle: Any, attributes: Any, gpu_memory_bytes: int) -> str:
    """What the driver calls it (`NVIDIA H200 MIG 1g.18gb`), else the name that the driver's own formula gives."""
    named = re.search(
        r"\bMIG (?:\d+c\.)?(\d+g\.\d+gb\S*)", _or_none(nvml, lambda: nvml.nvmlDeviceGetName(handle)) or ""
    )
    if named:
        return named.group(1)
    return profile_name(attributes.gpuInstanceSliceCount, attributes.memorySizeMB, gpu_memory_bytes)


def profile_name(slices: int, memory_mib: int, gpu_memory_bytes: int) -> str:
    """`1g.18gb` from compute slices, the instance's MiB and the GPU's bytes.

    The gigabytes are those of whole eighths of the GPU (go-nvlib v0.8, pkg/nvlib/device/mig_profile.go,
    getMigMemorySizeGB), not the instance's real size.
    """
    eighths = math.ceil(8 * memory_mib * MIB / gpu_memory_bytes)
    gigabytes = math.floor(eighths / 8 * math.ceil(gpu_memory_bytes / 2**30) + 0.5)  # half up, as Go rounds
    return f"{slices}g.{gigabytes}gb"


def _placement_starts(nvml: Any, parent: Any) -> dict[int, int]:
    """Memory slice at which each GPU instance starts, by instance id; empty without the privilege to ask."""
    starts: dict[int, int] = {}
    with contextlib.suppress(nvml.NVMLError):
        for instance in _instances(nvml, parent):
            info = nvml.nvmlGpuInstanceGetInfo(instance)
            starts[info.id] = info.placement.start
    return starts


def _instances(nvml: Any, parent: Any) -> Iterator[Any]:
    for profile in range(nvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        read = partial(nvml.nvmlDeviceGetGpuInstanceProfileInfo, parent, profile, version=2)
        info = _or_none(nvml, read)
        if info is None:
            continue
        handles = (nvml.c_nvmlGpuInstance_t * info.instanceCount)()
        count = nvml.c_uint(0)
        nvml.nvmlDeviceGetGpuInstances(parent, info.id, handles, nvml.byref(count))
        yield from handles[: count.value]


def _users(nvml: Any, handle: Any, slice_id: str) -> Iterator[SliceUser]:
    for process in _or_none(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ():
        yield SliceUser(slice_id, process.pid, _process_name(nvml, process.pid), process.usedGpuMemory)


def _process_name(nvml: Any, pid: int) -> str:
    return _or_none(nvml, lambda: nvml.nvmlSystemGetProcessName(pid)) or "?"


def _usable_memory(nvml: Any, handle: Any) -> int:
    """Bytes that CUDA can hand out: the total less what driver and firmware keep (`nvmlMemory_v2_t.reserved`)."""
    info = _or_none(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    if info is None:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return int(info.total - info.reserved)


def _product(nvml: Any, handle: Any, memory_bytes: int, catalogue: Catalogue) -> str:
    name = str(nvml.nvmlDeviceGetName(handle))
    pci = _or_none(nvml, lambda: int(nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId)) or 0
    product = catalogue.identify(nvml_name=name, pci_device_id=pci, total_memory_bytes=memory_bytes)
    return product.name if product else name


def _catalogue_name(profile: str, gpu: Gpu, catalogue: Catalogue) -> str:
    """The one name that configurations use, where drivers disagree about it."""
    product = next((p for p in catalogue.products if p.name == gpu.product), None)
    try:
        return product.profile(profile).name if product else profile
    except UnknownProfile:
        return profile


def _or_none(nvml: Any, read: Callable[[], T]) -> T | None:
    """What `read` gives, or None where the driver cannot or may not tell."""
    try:
        return read()
    except nvml.NVMLError:
        return None


def read_use(nvml: Any = pynvml) -> tuple[DeviceUse, ...] | None:
    """Who runs on every GPU without MIG and every MIG device; None where NVML does not answer. Needs no privilege."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        gpus = [_or_none(nvml, partial(nvml.nvmlDeviceGetHandleByIndex, i)) for i in range(nvml.nvmlDeviceGetCount())]
        handles = [handle for gpu in gpus if gpu is not None for handle in _devices(nvml, gpu)]
        return tuple(use for handle in handles if (use := _or_none(nvml, partial(_use, nvml, handle))) is not None)
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _devices(nvml: Any, gpu: Any) -> Iterator[Any]:
    """What CUDA can be pinned to on one GPU: itself, or its MIG devices."""
    current, _ = _or_none(nvml, lambda: nvml.nvmlDeviceGetMigMode(gpu)) or (0, 0)
    if not current:
        yield gpu
        return
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        device = _or_none(nvml, partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, i))
        if device is not None:
            yield device


def _use(nvml: Any, handle: Any) -> DeviceUse:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    listed = _or_none(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    if listed is not None:  # MPS clients are in a list of their own
        listed = [*listed, *(_or_none(nvml, lambda: nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)) or ())]
    return DeviceUse(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        processes=None if listed is None else {p.pid: _process_name(nvml, p.pid) for p in listed},
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
    )
