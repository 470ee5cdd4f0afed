"""NVML read on simulated machines, and on ones that ail."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from placement.gpu_slices import notes_of, unused_notes
from placement.gpus import Recovery
from placement.nvml import profile_name, read_nvidia
from placement.slices import SliceKind

MIB = 2**20


def test_a_whole_gpu_is_one_slice(nvml: Callable[..., Any]) -> None:
    state = read_nvidia(nvml("h100-sxm"))
    (only,) = state.slices
    assert state.driver
    assert only.kind is SliceKind.GPU
    assert only.id == only.uuid
    assert only.gpu is not None
    assert only.gpu.product == "H100-80GB-SXM", "the catalogue's name"
    assert 0 < only.memory_bytes <= only.gpu.memory_bytes


def test_a_gpu_cut_but_without_instances_can_run_nothing_and_says_so(nvml: Callable[..., Any]) -> None:
    state = read_nvidia(nvml("h100-sxm", mig=True))
    assert state.slices == ()
    layouts, planned = (tuple(unused_notes(state.gpus, planned=planned)) for planned in (False, True))
    assert layouts == (
        "GPU 0 has MIG on and no usable instance, so nothing can run on it. Name its layout in fleet.layouts and run "
        "`sliceway apply`, or switch MIG off.",
    )
    assert planned == (
        "GPU 0 has MIG on and no usable instance, so nothing can run on it. `sliceway plan CONFIG` shows what a plan would "
        "make there, if it needs it.",
    )


def make_instance(n: Any, enum: int, start: int) -> None:
    """A GPU instance with its full compute instance."""
    device = n.nvmlDeviceGetHandleByIndex(0)
    info = n.nvmlDeviceGetGpuInstanceProfileInfo(device, enum, version=2)
    sizes = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 9: 2}
    place = n.c_nvmlGpuInstancePlacement_t(start, sizes[enum])
    instance = n.nvmlDeviceCreateGpuInstanceWithPlacement(device, info.id, n.byref(place))
    compute = n.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, enum if enum < 5 else 0, 0)
    n.nvmlGpuInstanceCreateComputeInstance(instance, compute.id)


def test_mig_devices_are_slices_named_by_profile_and_place(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm", mig=True)
    make_instance(n, 2, 4)
    make_instance(n, 0, 0)
    state = read_nvidia(n)
    gpu = state.slices[0].gpu
    assert gpu is not None
    uuid = gpu.uuid
    assert {s.id for s in state.slices} == {f"{uuid}/3g.40gb@4", f"{uuid}/1g.10gb@0"}
    for one in state.slices:
        assert one.kind is SliceKind.MIG
        assert str(one.uuid).startswith("MIG-")
        assert one.uuid != uuid
    small = next(s for s in state.slices if s.profile == "1g.10gb")
    assert small.memory_bytes == 9984 * MIB, "the driver's memory, not the profile's name"


def test_without_privilege_instances_are_named_by_their_ids(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm", mig=True)
    make_instance(n, 0, 3)
    make_instance(n, 2, 4)
    (one, three) = sorted(read_nvidia(n).slices, key=lambda s: s.memory_bytes)
    n.machine.set_privilege("none")
    state = read_nvidia(n)
    assert {s.id.split("/")[1].split("#")[0] for s in state.slices} == {"1g.10gb", "3g.40gb"}
    assert all("#gi" in s.id for s in state.slices)
    assert {(s.uuid, s.memory_bytes) for s in state.slices} == {(s.uuid, s.memory_bytes) for s in (one, three)}
    assert state.slices[0].gpu is not None
    assert state.slices[0].gpu.product == "H100-80GB-SXM"
    assert state.slices[0].gpu.memory_bytes == 81559 * MIB, "the catalogue's: the driver does not tell it"
    told = " ".join(state.notes)
    assert "may be read by root only" in told
    assert "Insufficient Permissions" in told
    assert "XID" not in told


def test_without_privilege_a_gpu_without_mig_lacks_nothing(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm,plain")
    before = read_nvidia(n)
    n.machine.set_privilege("none")
    after = read_nvidia(n)
    assert after.slices == before.slices
    assert after.notes == ()


def test_two_products_under_one_name_are_told_apart_by_their_profiles(
    nvml: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    n = nvml("h200", mig=True)
    make_instance(n, 0, 0)
    monkeypatch.setattr(n, "nvmlDeviceGetName", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(n, "nvmlDeviceGetPciInfo", lambda _: SimpleNamespace(pciDeviceId=0x233010DE, busId="0"))
    n.machine.set_privilege("none")
    assert read_nvidia(n).gpus[0].product == "NVIDIA H100 80GB HBM3", "not the catalogue's: the profiles are others"


def test_what_a_gpu_tells_of_itself(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm,a100-80gb,plain", mig=True)
    n.machine.attach(4242, n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(2)), kind="mps", ghost=True, name="server")
    n.machine.set(2, "compute-mode", n.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)
    n.machine.set(0, "ecc-uncorrected", 3)
    n.machine.set(1, "persistence", 0)
    hopper, ampere, plain = read_nvidia(n).gpus
    assert (hopper.mode_needs_reset, ampere.mode_needs_reset, plain.mode_needs_reset) == (False, True, None)
    assert (hopper.mig, ampere.mig, plain.mode) == (True, True, None)
    assert (plain.compute_mode, plain.mps, hopper.mps) == ("exclusive-process", True, False)
    assert (hopper.uncorrected_errors, ampere.uncorrected_errors) == (3, 0)
    assert (hopper.persistence, ampere.persistence) == (True, False)
    assert all(g.simulated for g in (hopper, ampere, plain)), "a simulated machine says so"
    assert plain.as_public()["processes"] == [{"pid": 4242, "name": "server", "memory_bytes": 0, "how": "mps"}]


def test_a_driver_too_old_for_a_product_is_told(nvml: Callable[..., Any]) -> None:
    state = read_nvidia(nvml("h200", driver="535.183.01"))
    assert [s.kind for s in state.slices] == [SliceKind.GPU]
    assert "too old to cut a H200" in " ".join(state.notes)


def test_an_instance_without_compute_instance_is_no_slice_and_told(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm", mig=True)
    make_instance(n, 0, 0)
    place = n.c_nvmlGpuInstancePlacement_t(4, 4)
    n.nvmlDeviceCreateGpuInstanceWithPlacement(n.nvmlDeviceGetHandleByIndex(0), 9, n.byref(place))
    state = read_nvidia(n)
    assert [s.profile for s in state.slices] == ["1g.10gb"]
    assert "3g.40gb@4 is left out, it has none" in " ".join(state.notes)


def test_the_drivers_figures_win_and_a_difference_is_told_once(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm:2", mig=True)
    real = n.nvmlDeviceGetGpuInstanceProfileInfo

    def other(device: Any, number: int, version: int = 2) -> Any:
        info = real(device, number, version)
        if number == 0:
            info.memorySizeMB = 9856
        return info

    n.nvmlDeviceGetGpuInstanceProfileInfo = other
    try:
        state = read_nvidia(n)
    finally:
        n.nvmlDeviceGetGpuInstanceProfileInfo = real
    assert state.gpus[0].geometry is not None
    assert state.gpus[0].geometry.profile("1g.10gb").memory_bytes == 9856 * MIB
    assert len([note for note in state.notes if "1g.10gb: memory_bytes is" in note]) == 1


def test_a_gpu_that_is_lost_is_left_out_and_told(nvml: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n = nvml("h100-sxm:2")
    real = n.nvmlDeviceGetHandleByIndex

    def lost(index: int) -> Any:
        if index == 0:
            raise n.NVMLError(n.NVML_ERROR_GPU_IS_LOST)
        return real(index)

    monkeypatch.setattr(n, "nvmlDeviceGetHandleByIndex", lost)
    state = read_nvidia(n)
    assert len(state.slices) == 1
    assert "GPU 0 is left out" in state.notes[0]


def test_no_driver_is_no_news_and_a_broken_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> Callable[[], None]:
        def initialise() -> None:
            raise pynvml.NVMLError(code)

        return initialise

    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert read_nvidia() == read_nvidia().__class__()
    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    state = read_nvidia()
    assert state.driver is None
    assert "does not answer" in state.notes[0]


@pytest.mark.parametrize(
    ("slices", "memory_mib", "total_mib", "name"),
    [
        (1, 4864, 40960, "1g.5gb"),
        (3, 20096, 40960, "3g.20gb"),
        (1, 9984, 81559, "1g.10gb"),
        (2, 20096, 81559, "2g.20gb"),
        (7, 81152, 81559, "7g.80gb"),
        (1, 16384, 143771, "1g.18gb"),
        (3, 71424, 143771, "3g.71gb"),
        (1, 5952, 24576, "1g.6gb"),
    ],
)
def test_profile_names_follow_from_memory(slices: int, memory_mib: int, total_mib: int, name: str) -> None:
    assert profile_name(slices, memory_mib, total_mib * MIB) == name


def test_each_gpu_tells_the_cores_and_the_memory_node_next_to_it(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm:3", mig=True, cpus=((0, 1, 64, 65), (130, 131)), numa_nodes=(0, 1))
    assert [(g.cpus, g.numa_node) for g in read_nvidia(n).gpus] == [
        ((0, 1, 64, 65), 0),
        ((130, 131), 1),
        ((0, 1, 64, 65), 0),
    ]
    device = n.nvmlDeviceGetHandleByIndex(1)
    assert list(n.nvmlDeviceGetCpuAffinityWithinScope(device, 3, n.NVML_AFFINITY_SCOPE_SOCKET)) == [0, 0, 12]
    with pytest.raises(n.NVMLError, match="Not Supported"):
        n.nvmlDeviceGetNumaNodeId(device)


def test_a_simulated_gpu_is_next_to_cores_that_this_machine_has(nvml: Callable[..., Any]) -> None:
    (gpu,) = read_nvidia(nvml("h100-sxm")).gpus
    assert gpu.cpus
    assert set(gpu.cpus) <= set(range(os.cpu_count() or 1))
    assert gpu.numa_node is not None


@pytest.mark.parametrize(
    ("recovery", "words"),
    [
        ("reset", "--gpu-reset -i 0, then `sliceway apply`"),
        ("reboot", "for a reboot of the machine"),
        ("drain-and-reset", "drained and reset"),
        ("other", "nvidia-smi -q -i 0"),
    ],
)
def test_what_the_driver_asks_for_after_an_error_is_told_with_how_it_is_done(
    recovery: Recovery, words: str, nvml: Callable[..., Any]
) -> None:
    (gpu,) = read_nvidia(nvml("h100-sxm")).gpus
    assert notes_of([replace(gpu, recovery="none")]) == ()
    (note,) = notes_of([replace(gpu, recovery=recovery)])
    assert words in note


def test_errors_that_outlast_an_application_are_in_the_inventory_until_the_gpu_is_reset(
    nvml: Callable[..., Any],
) -> None:
    n = nvml("h100-sxm:2")
    n.machine.xid(0, 31)
    assert [g.recovery for g in read_nvidia(n).gpus] == ["none", "none"], "an application's own fault"
    n.machine.xid(1, 119)
    state = read_nvidia(n)
    assert [g.recovery for g in state.gpus] == ["none", "reset"]
    assert "GPU 1: after an error" in state.notes[0]
    n.machine.reset(1)
    assert [g.recovery for g in read_nvidia(n).gpus] == ["none", "none"]


def test_a_driver_that_does_not_know_recovery_tells_none(nvml: Callable[..., Any]) -> None:
    n = nvml("h100-sxm", driver="550.90.07")
    n.machine.xid(0, 119)
    assert read_nvidia(n).gpus[0].recovery is None
