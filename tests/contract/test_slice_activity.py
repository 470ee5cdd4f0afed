"""How full and how busy slices are, read from the simulated driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from placement.nvml.activity import read_activity

Nvml = Callable[..., Any]
ONE, THREE = 19, 9  # profile ids of the eight-slice family
MIB = 2**20


def cut(n: Any, gpu: Any, profile_id: int, start: int, size: int, g: int) -> None:
    placement = n.byref(n.c_nvmlGpuInstancePlacement_t(start, size))
    instance = n.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile_id, placement)
    n.nvmlGpuInstanceCreateComputeInstance(instance, {1: 0, 3: 2}[g])


def no_pause(seconds: float) -> None:
    assert seconds > 0


def test_each_mig_device_has_its_own_memory_and_activity(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    cut(n, gpu, THREE, 0, 4, 3)
    cut(n, gpu, ONE, 4, 1, 1)
    idle, busy = (n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i) for i in range(2))
    n.machine.attach(1, n.nvmlDeviceGetUUID(busy), memory_bytes=2048 * MIB, ghost=True)
    found = {one.uuid: one for one in read_activity(n, pause=no_pause)}
    assert set(found) == {n.nvmlDeviceGetUUID(idle), n.nvmlDeviceGetUUID(busy)}
    here, there = found[n.nvmlDeviceGetUUID(busy)], found[n.nvmlDeviceGetUUID(idle)]
    assert {one.gpu for one in found.values()} == {n.nvmlDeviceGetUUID(gpu)}
    assert here.gpu_instance == n.nvmlDeviceGetGpuInstanceId(busy) != there.gpu_instance
    assert here.used_bytes - 2048 * MIB >= 0 < there.total_bytes
    assert set(here.busy) == {"graphics_engine", "sm", "sm_occupancy", "tensor", "dram"}
    assert (set(here.busy.values()), set(there.busy.values())) == ({0.5}, {0.0})


def test_a_whole_gpu_is_no_instance(nvml: Nvml) -> None:
    (one,) = read_activity(nvml("h200-sxm"), pause=no_pause)
    assert (one.gpu_instance, one.uuid) == (None, one.gpu)
    assert set(one.busy.values()) == {0.0}


def test_before_hopper_there_is_memory_only_and_no_waiting(nvml: Nvml) -> None:
    (one,) = read_activity(nvml("a100-80gb"), pause=lambda _: pytest.fail("waited for nothing"))
    assert one.total_bytes > 0
    assert one.busy == {}


@pytest.mark.parametrize("function", ["nvmlGpmSampleGet", "nvmlGpmMetricsGet", "nvmlGpmSampleAlloc"])
def test_counters_that_fail_leave_the_memory(nvml: Nvml, function: str) -> None:
    n = nvml("h100-sxm")
    n.machine.inject(function, n.NVML_ERROR_NO_PERMISSION, times=0)
    (one,) = read_activity(n, pause=lambda _: None)
    assert one.total_bytes > 0
    assert one.busy == {}


def test_a_lost_gpu_hides_no_other(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2")
    n.machine.lose(0)
    assert len(read_activity(n, pause=no_pause)) == 1
