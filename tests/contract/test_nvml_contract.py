"""What callers rely on from NVML. The same tests run on the simulator and, reading only, on a driver where there is one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_registry.catalogue import load_catalogue

MACHINES = {
    "hopper": ("h100-sxm:2", {}),
    "hopper-mig": ("h200:2", {"mig": True}),
    "ampere-mig": ("a100-40gb:2", {"mig": True}),
    "four-slices": ("a30:2", {"mig": True}),
    "twelve-slices": ("rtx-pro-6000:2", {"mig": True}),
    "plain": ("plain:2", {}),
    "mixed": ("h100-sxm,plain,a100-80gb", {}),
}


def drivers_library() -> Path | None:
    try:
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, encoding="utf-8", check=False).stdout
    except FileNotFoundError:
        return None
    paths = [line.rsplit(" ", 1)[-1] for line in listed.splitlines() if "libnvidia-ml.so.1 " in line]
    return Path(paths[0]) if paths else None


@pytest.fixture(params=[*MACHINES, pytest.param("driver", marks=pytest.mark.gpu)])
def n(request: pytest.FixtureRequest, nvml: Callable[..., Any], bind: Callable[[Path], Any]) -> Iterator[Any]:
    """nvidia-ml-py, initialised, on a simulated machine with instances of every width, or on the real driver."""
    if request.param != "driver":
        fleet, options = MACHINES[request.param]
        binding = nvml(fleet, **options)
        populate(binding)
        yield binding
        return
    library = drivers_library()
    if library is None:
        pytest.skip("no NVIDIA driver on this machine")
    binding = bind(library)
    binding.nvmlInit()
    yield binding
    binding.nvmlShutdown()


def populate(n: Any) -> None:
    """Whatever fits, widest first, with whole compute instances."""
    for handle in gpus(n):
        if not mig_is_on(n, handle):
            continue
        for info in sorted(profiles(n, handle), key=lambda p: -p.sliceCount)[1:]:
            try:
                instance = n.nvmlDeviceCreateGpuInstance(handle, info.id)
            except n.NVMLError_InsufficientResources:
                continue
            whole = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}[info.sliceCount]
            n.nvmlGpuInstanceCreateComputeInstance(instance, whole)


def gpus(n: Any) -> list[Any]:
    return [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]


def mig_is_on(n: Any, handle: Any) -> bool:
    try:
        return bool(n.nvmlDeviceGetMigMode(handle)[0])
    except n.NVMLError_NotSupported:
        return False


def mig_devices(n: Any, parent: Any) -> Iterator[tuple[int, Any]]:
    for i in range(n.nvmlDeviceGetMaxMigDeviceCount(parent)):
        try:
            yield i, n.nvmlDeviceGetMigDeviceHandleByIndex(parent, i)
        except n.NVMLError_NotFound:
            continue


def profiles(n: Any, handle: Any) -> list[Any]:
    """All GPU instance profiles: numbers up to the first that is no profile's; a GPU without MIG may refuse all alike."""
    found = []
    for number in range(64):
        try:
            found.append(n.nvmlDeviceGetGpuInstanceProfileInfo(handle, number))
        except n.NVMLError_NotSupported:
            continue
        except n.NVMLError_InvalidArgument:
            return found
    assert not found, "the enumeration of profiles does not end"
    return found


def all_devices(n: Any) -> list[Any]:
    return [d for gpu in gpus(n) for d in (gpu, *(m for _, m in mig_devices(n, gpu)))]


def test_versions_are_numbers_with_dots(n: Any) -> None:
    assert all(part.isdigit() for part in n.nvmlSystemGetDriverVersion().split("."))
    assert all(part.isdigit() for part in n.nvmlSystemGetNVMLVersion().split("."))
    assert n.nvmlSystemGetCudaDriverVersion() >= 11000


def test_every_gpu_is_found_by_index_uuid_and_bus_id(n: Any) -> None:
    for index, handle in enumerate(gpus(n)):
        uuid = n.nvmlDeviceGetUUID(handle)
        assert uuid.startswith("GPU-")
        assert n.nvmlDeviceGetIndex(handle) == index
        assert n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(uuid)) == index
        bus = n.nvmlDeviceGetPciInfo(handle).busId
        assert (
            n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByPciBusId(bus.encode() if isinstance(bus, str) else bus))
            == index
        )
        assert n.nvmlDeviceGetPciInfo(handle).pciDeviceId & 0xFFFF == 0x10DE


def test_uuids_are_unique(n: Any) -> None:
    uuids = [n.nvmlDeviceGetUUID(d) for d in all_devices(n)]
    assert len(uuids) == len(set(uuids))


def test_what_is_not_there_is_an_error(n: Any) -> None:
    with pytest.raises(n.NVMLError_InvalidArgument):
        n.nvmlDeviceGetHandleByIndex(n.nvmlDeviceGetCount())
    with pytest.raises((n.NVMLError_NotFound, n.NVMLError_InvalidArgument)):
        n.nvmlDeviceGetHandleByUUID(b"GPU-00000000-0000-0000-0000-000000000000")


def test_memory_adds_up(n: Any) -> None:
    for device in all_devices(n):
        one = n.nvmlDeviceGetMemoryInfo(device)
        assert one.total == one.free + one.used
        two = n.nvmlDeviceGetMemoryInfo(device, version=n.nvmlMemory_v2)
        assert two.total == one.total
        assert two.total >= two.free + two.used


def test_capability_and_architecture_agree(n: Any) -> None:
    for device in all_devices(n):
        major, _ = n.nvmlDeviceGetCudaComputeCapability(device)
        architecture = n.nvmlDeviceGetArchitecture(device)
        assert {n.NVML_DEVICE_ARCH_AMPERE: 8, n.NVML_DEVICE_ARCH_ADA: 8, n.NVML_DEVICE_ARCH_HOPPER: 9}.get(
            architecture, major
        ) == major


def test_processes_are_listed_for_every_device(n: Any) -> None:
    for device in all_devices(n):
        assert isinstance(n.nvmlDeviceGetComputeRunningProcesses(device), list)
        assert isinstance(n.nvmlDeviceGetMPSComputeRunningProcesses(device), list)


def test_mode_is_a_pair_or_not_supported(n: Any) -> None:
    for handle in gpus(n):
        try:
            assert set(n.nvmlDeviceGetMigMode(handle)) <= {0, 1}
        except n.NVMLError_NotSupported:
            assert profiles(n, handle) == []


def test_profiles_enumerate_with_holes_and_end(n: Any) -> None:
    for handle in gpus(n):
        found = profiles(n, handle)
        assert len({p.id for p in found}) == len(found)
        for info in found:
            same = n.nvmlDeviceGetGpuInstanceProfileInfoById(handle, info.id)
            assert (same.name, same.memorySizeMB) == (info.name, info.memorySizeMB)
            assert info.instanceCount >= 1
            assert info.memorySizeMB * 2**20 <= n.nvmlDeviceGetMemoryInfo(handle).total


def test_possible_placements_are_all_of_them_and_none_is_taken_out(n: Any) -> None:
    for handle in gpus(n):
        for info in profiles(n, handle):
            count = n.c_uint()
            try:
                n.nvmlDeviceGetGpuInstancePossiblePlacements(handle, info.id, None, n.byref(count))
            except n.NVMLError_NoPermission:
                pytest.skip("needs privilege")
            placements = (n.c_nvmlGpuInstancePlacement_t * count.value)()
            n.nvmlDeviceGetGpuInstancePossiblePlacements(handle, info.id, placements, n.byref(count))
            starts = [p.start for p in placements]
            assert starts == sorted(set(starts))
            assert len({p.size for p in placements}) == 1


def test_a_mig_device_knows_itself_and_its_parent(n: Any) -> None:
    for index, parent in enumerate(gpus(n)):
        assert not n.nvmlDeviceIsMigDeviceHandle(parent).value
        for i, device in mig_devices(n, parent):
            assert n.nvmlDeviceIsMigDeviceHandle(device).value
            assert n.nvmlDeviceGetIndex(device) == i
            uuid = n.nvmlDeviceGetUUID(device)
            assert uuid.startswith("MIG-")
            assert n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(uuid)) == i
            assert n.nvmlDeviceGetIndex(n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device)) == index
            old = f"MIG-{n.nvmlDeviceGetUUID(parent)}/{n.nvmlDeviceGetGpuInstanceId(device)}/{n.nvmlDeviceGetComputeInstanceId(device)}"
            assert n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByUUID(old)) == uuid


def test_mig_devices_are_numbered_by_instance_id(n: Any) -> None:
    for parent in gpus(n):
        ids = [
            (n.nvmlDeviceGetGpuInstanceId(d), n.nvmlDeviceGetComputeInstanceId(d)) for _, d in mig_devices(n, parent)
        ]
        assert ids == sorted(ids)


def test_a_mig_device_says_its_profile_and_size(n: Any) -> None:
    for parent in gpus(n):
        names = {p.name.removeprefix("MIG ") for p in profiles(n, parent)}
        for _, device in mig_devices(n, parent):
            attributes = n.nvmlDeviceGetAttributes(device)
            name = n.nvmlDeviceGetName(device)
            assert name.startswith(n.nvmlDeviceGetName(parent))
            if attributes.computeInstanceSliceCount == attributes.gpuInstanceSliceCount:
                assert name.rsplit(" ", 1)[1] in names
            assert attributes.memorySizeMB * 2**20 == pytest.approx(n.nvmlDeviceGetMemoryInfo(device).total, rel=0.03)


def test_instances_say_where_they_lie(n: Any) -> None:
    for parent in gpus(n):
        for info in profiles(n, parent) if mig_is_on(n, parent) else ():
            room, count = (n.c_nvmlGpuInstance_t * max(info.instanceCount, 16))(), n.c_uint()
            try:
                n.nvmlDeviceGetGpuInstances(parent, info.id, room, n.byref(count))
            except n.NVMLError_NoPermission:
                pytest.skip("needs privilege")
            for instance in room[: count.value]:
                about = n.nvmlGpuInstanceGetInfo(instance)
                assert about.profileId == info.id
                assert about.placement.size >= 1


def test_what_a_gpu_in_mig_mode_does_not_tell(n: Any) -> None:
    for parent in gpus(n):
        with pytest.raises(n.NVMLError_NotSupported):
            n.nvmlDeviceGetAttributes(parent)
        if mig_is_on(n, parent):
            with pytest.raises(n.NVMLError_NotSupported):
                n.nvmlDeviceGetUtilizationRates(parent)
            with pytest.raises((n.NVMLError_NotSupported, n.NVMLError_InvalidArgument)):
                n.nvmlDeviceGetUtilizationRates(next(d for _, d in mig_devices(n, parent)))


def test_an_event_set_times_out(n: Any) -> None:
    events = n.nvmlEventSetCreate()
    for parent in gpus(n):
        wanted = n.nvmlEventTypeXidCriticalError & n.nvmlDeviceGetSupportedEventTypes(parent)
        n.nvmlDeviceRegisterEvents(parent, wanted, events)
    with pytest.raises(n.NVMLError_Timeout):
        n.nvmlEventSetWait(events, 5)
    n.nvmlEventSetFree(events)


def test_the_catalogue_says_what_the_driver_says(n: Any) -> None:
    catalogue = load_catalogue()
    for handle in gpus(n):
        product = catalogue.identify(
            nvml_name=n.nvmlDeviceGetName(handle),
            pci_device_id=n.nvmlDeviceGetPciInfo(handle).pciDeviceId,
            total_memory_bytes=n.nvmlDeviceGetMemoryInfo(handle).total,
        )
        for info in profiles(n, handle):
            assert product is not None, n.nvmlDeviceGetName(handle)
            known = product.profile(info.name.removeprefix("MIG "))
            assert (known.id, known.g) == (info.id, info.sliceCount)
            assert known.sm_count in (None, info.multiprocessorCount)


def test_calls_after_shutdown_are_refused(n: Any) -> None:
    n.nvmlShutdown()
    try:
        with pytest.raises(n.NVMLError_Uninitialized):
            n.nvmlDeviceGetCount()
    finally:
        n.nvmlInit()
