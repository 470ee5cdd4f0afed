"""Layouts carried out on simulated drivers: what stays is not touched, what fails is undone, what is there is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from placement.errors import (
    CannotBeCut,
    GpuLost,
    ModeBlocked,
    ModeChangeNeeded,
    NotPrivileged,
    PartitionError,
    SimulatorError,
    SliceInUse,
)
from placement.gpus import GpuState, MigMode
from placement.nvml.partition import NvmlPartitioner
from placement.partition import Applied, LayoutRule, Tools, apply

Nvml = Callable[..., Any]

COUNTS = {"1g.10gb": 4, "3g.40gb": 1}
OTHER = {"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1}


def cut(n: Any, layout: Any, *, tools: Tools | None = None, mode: bool = False, **rule: Any) -> Applied:
    rules = [LayoutRule(layout=layout, **rule)]
    return apply(NvmlPartitioner(n), rules, allow_mode_change=mode, tools=tools)


def held(n: Any, index: int = 0) -> list[str]:
    return [i.name for i in NvmlPartitioner(n).observe()[index].instances]


def uuid_of(n: Any, name: str, index: int = 0) -> str:
    gpu = NvmlPartitioner(n).observe()[index]
    return next(i.compute[0].uuid for i in gpu.instances if i.name == name)


def instances_id(n: Any, name: str, index: int = 0) -> int:
    gpu = NvmlPartitioner(n).observe()[index]
    return next(i.id for i in gpu.instances if i.name == name)


def make(n: Any, profile_id: int, start: int, size: int, ci: int | None = None) -> Any:
    gpu = n.nvmlDeviceGetHandleByIndex(0)
    place = n.c_nvmlGpuInstancePlacement_t(start, size)
    instance = n.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile_id, n.byref(place))
    if ci is not None:
        n.nvmlGpuInstanceCreateComputeInstance(instance, ci)
    return instance


def test_a_layout_is_made_with_full_compute_instances_and_a_second_time_nothing_happens(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    done = cut(n, COUNTS)
    assert [g.result for g in done.gpus] == ["changed", "changed"]
    for gpu in NvmlPartitioner(n).observe():
        assert [i.name for i in gpu.instances] == ["1g.10gb@0", "1g.10gb@1", "1g.10gb@2", "1g.10gb@3", "3g.40gb@4"]
        assert all(i.complete for i in gpu.instances)
    before = n.machine.journal()
    again = cut(n, COUNTS)
    assert again.ok
    assert not again.changed
    assert n.machine.journal() == before


def test_slices_that_stay_keep_their_engines_and_are_in_no_call(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, COUNTS)
    engines = {name: uuid_of(n, name) for name in ("3g.40gb@4", "1g.10gb@2")}
    for pid, uuid in enumerate(engines.values(), start=100):
        n.machine.attach(pid, uuid, memory_bytes=2**30, ghost=True)
    kept = {instances_id(n, name) for name in engines}
    before = len(n.machine.journal())
    assert cut(n, {"1g.10gb": 1, "2g.20gb": 1, "3g.40gb": 1}).ok
    assert {name: uuid_of(n, name) for name in engines} == engines
    touched = {
        int(part[3:]) for line in n.machine.journal()[before:] for part in line.split() if part.startswith("gi=")
    }
    assert not touched & kept


def test_the_order_in_a_configuration_makes_no_difference(nvml: Nvml) -> None:
    n = nvml("a100-40gb", mig=True)
    assert cut(n, ["1g.5gb", "1g.5gb", "2g.10gb", "3g.20gb"]).ok, "the order that fails with driver-chosen places"


def test_busy_slices_that_must_go_are_refused_with_who_is_there_before_anything_changes(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    cut(n, COUNTS)
    n.machine.attach(4242, uuid_of(n, "3g.40gb@4", 1), memory_bytes=5 * 2**30, ghost=True, name="VLLM::EngineCore")
    before = n.machine.journal()
    with pytest.raises(SliceInUse) as refused:
        cut(n, {"7g.80gb": 1})
    assert "GPU 1 (H100-80GB-SXM): 3g.40gb@4 would have to go" in str(refused.value)
    assert "VLLM::EngineCore (pid 4242, 5.0 GiB)" in str(refused.value)
    assert "Nothing was changed" in str(refused.value)
    assert n.machine.journal() == before


def test_a_drain_is_asked_with_all_that_goes_by_both_names_and_then_it_goes_on(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, {"3g.40gb": 1, "1g.10gb": 1})
    busy, idle = uuid_of(n, "3g.40gb@4"), uuid_of(n, "1g.10gb@0")
    n.machine.attach(4242, busy, ghost=True)
    asked: list[Sequence[str]] = []

    def drain(slices: Sequence[str]) -> None:
        asked.append(slices)
        n.machine.detach(4242)

    uuid = NvmlPartitioner(n).observe()[0].uuid
    assert cut(n, {"7g.80gb": 1}, tools=Tools(drain=drain)).ok
    assert asked == [[f"{uuid}/1g.10gb@0", idle, f"{uuid}/3g.40gb@4", busy]]


def test_a_drain_that_does_not_help_still_refuses(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, COUNTS)
    n.machine.attach(4242, uuid_of(n, "3g.40gb@4"), ghost=True)
    with pytest.raises(SliceInUse):
        cut(n, {"7g.80gb": 1}, tools=Tools(drain=lambda _: None))


# ---------------------------------------------------------------- failures in the middle

CALLS = [
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceDestroy",
    "nvmlDeviceGetGpuInstanceById",
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_passing_failure_is_rolled_forward(nvml: Nvml, call: str, after: bool, nth: int) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, COUNTS)
    n.machine.inject(call, n.NVML_ERROR_UNKNOWN, nth=nth, after=after)
    done = cut(n, {"2g.20gb": 2, "3g.40gb": 1})
    assert done.ok, done.gpus[0].error
    assert held(n) == ["2g.20gb@0", "2g.20gb@2", "3g.40gb@4"]


@pytest.mark.parametrize("call", CALLS[:2])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_lasting_failure_is_rolled_back_to_what_was_there(nvml: Nvml, call: str, nth: int) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, OTHER)
    before = held(n)
    # The way back makes instances too: the fault ends after the second try, before it is needed.
    n.machine.inject(call, n.NVML_ERROR_UNKNOWN, nth=nth, times=2)
    (gpu,) = cut(n, COUNTS).gpus
    assert gpu.result == "rolled-back"
    assert held(n) == before
    assert gpu.error is not None
    assert "Unknown" in gpu.error.message
    assert gpu.now == NvmlPartitioner(n).observe()[0], "what is told is what is there"
    assert all(i.complete for i in gpu.now.instances)


def test_where_the_way_back_is_barred_too_the_state_is_told_exactly_and_mended_next_time(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, {"7g.80gb": 1})
    n.machine.inject("nvmlGpuInstanceCreateComputeInstance", n.NVML_ERROR_UNKNOWN, times=0)
    (gpu,) = cut(n, COUNTS).gpus
    assert gpu.result == "failed"
    assert gpu.now == NvmlPartitioner(n).observe()[0]
    assert gpu.error is not None
    assert "undoing that failed too" in gpu.error.message
    n.machine.clear_faults()
    assert cut(n, COUNTS).ok
    assert held(n) == ["1g.10gb@0", "1g.10gb@1", "1g.10gb@2", "1g.10gb@3", "3g.40gb@4"]


def test_one_gpu_that_fails_does_not_keep_the_others_from_it(nvml: Nvml) -> None:
    n = nvml("h100-sxm:3", mig=True)
    n.machine.inject("nvmlDeviceCreateGpuInstanceWithPlacement", n.NVML_ERROR_UNKNOWN, gpu=1, times=0)
    done = cut(n, COUNTS)
    assert [g.result for g in done.gpus] == ["changed", "rolled-back", "changed"]
    assert not done.ok
    assert held(n, 1) == []


def test_a_gpu_that_falls_off_the_bus_meanwhile_is_told_as_lost(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    plain = NvmlPartitioner(n)

    class Falling:
        """Loses GPU 0 with the first instance that is made there."""

        observe, complete, destroy, set_mode = plain.observe, plain.complete, plain.destroy, plain.set_mode

        def create(self, gpu: str, placement: Any) -> None:
            if gpu == first:
                n.machine.lose(0)
            plain.create(gpu, placement)

    first = plain.observe()[0].uuid
    done = apply(Falling(), [LayoutRule(layout=COUNTS)])
    assert [g.result for g in done.gpus] == ["failed", "changed"]
    assert done.gpus[0].now is None
    assert isinstance(done.gpus[0].error, GpuLost)


def test_someone_who_cuts_at_the_same_time_is_noticed_and_left_alone(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    plain = NvmlPartitioner(n)

    class Meddled:
        """Somebody takes the place of the last instance just before it is made."""

        observe, complete, destroy, set_mode = plain.observe, plain.complete, plain.destroy, plain.set_mode

        def create(self, gpu: str, placement: Any) -> None:
            if placement.profile == "3g.40gb" and "1g.10gb@6" not in held(n):
                make(n, 19, 6, 1, ci=0)
            plain.create(gpu, placement)

    (gpu,) = apply(Meddled(), [LayoutRule(layout=COUNTS)]).gpus
    assert gpu.result == "rolled-back"
    assert held(n) == ["1g.10gb@6"], "theirs stays, ours goes"


def test_what_the_driver_made_is_compared_with_what_was_asked_for(nvml: Nvml) -> None:
    """A driver that says yes and makes another instance, or makes it elsewhere, is not believed."""
    n = nvml("h100-sxm", mig=True)
    plain = NvmlPartitioner(n)

    class Mistaken:
        """Makes the large instance at another start than the one it was given, and tells of no error."""

        observe, complete, destroy, set_mode = plain.observe, plain.complete, plain.destroy, plain.set_mode

        def create(self, gpu: str, placement: Any) -> None:
            if placement.profile == "3g.40gb":
                placement = replace(placement, start=4 - placement.start)
            plain.create(gpu, placement)

    (gpu,) = apply(Mistaken(), [LayoutRule(layout=["3g.40gb@0"])]).gpus
    assert not gpu.ok
    assert gpu.result in ("rolled-back", "failed")
    assert gpu.error is not None
    assert gpu.now is not None
    assert "3g.40gb@0" not in [i.name for i in gpu.now.instances]


def test_a_process_that_starts_meanwhile_stops_it_and_is_named(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, {"3g.40gb": 2})
    plain = NvmlPartitioner(n)
    uuid = uuid_of(n, "3g.40gb@4")

    class Raced:
        """A process starts on the slice just before it is taken away."""

        observe, complete, create, set_mode = plain.observe, plain.complete, plain.create, plain.set_mode

        def destroy(self, gpu: str, instance: int) -> None:
            n.machine.attach(77, uuid, ghost=True, name="late")
            plain.destroy(gpu, instance)

    (gpu,) = apply(Raced(), [LayoutRule(layout=["3g.40gb@0"])]).gpus
    assert gpu.result == "rolled-back"
    assert isinstance(gpu.error, SliceInUse)
    assert "late (pid 77" in gpu.error.message
    assert held(n) == ["3g.40gb@0", "3g.40gb@4"]


# ---------------------------------------------------------------- half-finished earlier changes


def test_an_instance_without_compute_instance_is_completed_or_cleaned(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    make(n, 9, 4, 4)
    make(n, 19, 6 - 4, 1)
    assert cut(n, {"3g.40gb": 1}).ok
    (only,) = NvmlPartitioner(n).observe()[0].instances
    assert (only.name, only.complete) == ("3g.40gb@4", True)
    assert not any("destroy-gi" in line and "3g.40gb" in line for line in n.machine.journal())


def test_parts_of_an_instance_are_put_together(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    instance = make(n, 9, 0, 4, ci=0)
    n.nvmlGpuInstanceCreateComputeInstance(instance, 1)
    assert cut(n, ["3g.40gb@0"]).ok
    (only,) = NvmlPartitioner(n).observe()[0].instances
    assert [c.g for c in only.compute] == [3]


def test_a_process_killed_in_the_middle_leaves_what_the_next_one_finishes(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    plain = NvmlPartitioner(n)

    class Dying:
        """Ends, as if killed, when half of it is done."""

        observe, complete, destroy, set_mode = plain.observe, plain.complete, plain.destroy, plain.set_mode

        def create(self, gpu: str, placement: Any) -> None:
            if placement.start == 2:
                make(n, 19, 2, 1)
                raise KeyboardInterrupt
            plain.create(gpu, placement)

    with pytest.raises(KeyboardInterrupt):
        apply(Dying(), [LayoutRule(layout=COUNTS)])
    assert held(n) == ["1g.10gb@0", "1g.10gb@1", "1g.10gb@2"]
    assert cut(n, COUNTS).ok
    assert all(i.complete for i in plain.observe()[0].instances)
    assert sum("create-gi" in line for line in n.machine.journal()) == 5, "what was made is used"


# ---------------------------------------------------------------- rights


@pytest.mark.parametrize("privilege", ["none", "monitor"])
def test_without_the_right_nothing_changes_and_the_way_is_told(nvml: Nvml, privilege: str) -> None:
    n = nvml("h100-sxm:2", mig=True, privilege=privilege)
    with pytest.raises(NotPrivileged) as refused:
        cut(n, COUNTS)
    assert "sudo sliceway apply" in str(refused.value)
    assert "nvidia-cap1" in str(refused.value)
    assert n.machine.journal() == ()


def test_without_the_right_to_look_what_is_right_by_count_is_recognised(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, COUNTS)
    n.machine.set_privilege("none")
    assert cut(n, COUNTS).ok
    with pytest.raises(NotPrivileged, match=r"it shows 4x 1g.10gb, 1x 3g.40gb"):
        cut(n, OTHER)


def test_changing_instances_needs_no_root_but_the_mode_does(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True, privilege="config")
    assert cut(n, COUNTS).ok
    n.machine.reboot()
    with pytest.raises(NotPrivileged, match="switching MIG on"):
        cut(n, COUNTS, mode=True)


def test_a_driver_too_old_or_a_gpu_without_mig_is_told(nvml: Nvml) -> None:
    with pytest.raises(CannotBeCut, match=r"driver 535.183.01 is too old") as refused:
        cut(nvml("h200", driver="535.183.01"), {"1g.18gb": 1})
    assert "550.90" in str(refused.value)


def test_a_gpu_without_mig_named_by_hand_is_refused(nvml: Nvml) -> None:
    with pytest.raises(CannotBeCut, match="has no MIG"):
        cut(nvml("plain"), {"1g.10gb": 1}, gpus=(0,))


def test_no_driver_is_told(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    n = nvml("h100-sxm")
    n.nvmlShutdown()
    monkeypatch.delenv("SLICEWAY_NVML_STATE")
    with pytest.raises(PartitionError, match="does not answer"):
        cut(n, COUNTS)


# ---------------------------------------------------------------- mode


def simulated(n: Any, *, reset: bool) -> Tools:
    def do(gpu: GpuState) -> None:
        try:
            n.machine.reset(gpu.index)
        except SimulatorError as error:
            raise PartitionError(str(error)) from error

    return Tools(reset=do if reset else None)


def test_the_mode_is_never_switched_unasked(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    with pytest.raises(ModeChangeNeeded, match="MIG would have to be switched on") as refused:
        cut(n, COUNTS)
    assert "--allow-mode-change" in str(refused.value)
    assert n.machine.journal() == ()


def test_hopper_switches_at_once_and_goes_on(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    assert cut(n, COUNTS, mode=True).ok
    assert len(held(n)) == 5
    assert cut(n, {}, mig=False, mode=True).ok
    assert NvmlPartitioner(n).observe()[0].mode == MigMode(False, False)


def test_ampere_waits_for_a_reset_and_says_so(nvml: Nvml) -> None:
    n = nvml("a100-80gb")
    (gpu,) = cut(n, {"1g.10gb": 7}, mode=True).gpus
    assert gpu.result == "pending"
    assert gpu.now is not None
    assert gpu.now.mode == MigMode(False, True)
    assert "nvidia-smi --gpu-reset -i 0" in str(gpu.error)
    with pytest.raises(ModeChangeNeeded, match="pending already and takes a reset"):
        cut(n, {"1g.10gb": 7})
    n.machine.reset(0)
    assert cut(n, {"1g.10gb": 7}).ok


def test_ampere_is_reset_where_that_is_allowed(nvml: Nvml) -> None:
    n = nvml("a100-80gb")
    assert cut(n, {"1g.10gb": 7}, mode=True, tools=simulated(n, reset=True)).ok
    assert len(held(n)) == 7


@pytest.mark.parametrize(("kind", "what"), [("compute", "trainer"), ("graphics", "trainer")])
def test_processes_keep_the_mode_from_being_touched(nvml: Nvml, kind: str, what: str) -> None:
    n = nvml("h100-sxm")
    n.machine.attach(77, n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(0)), kind=kind, ghost=True, name=what)
    with pytest.raises(SliceInUse, match=f"{what} \\(pid 77"):
        cut(n, COUNTS, mode=True)
    assert n.machine.journal() == ()


def test_a_display_is_told(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    n.machine.set(0, "display", 1)
    with pytest.raises(ModeBlocked, match="a display is active"):
        cut(n, COUNTS, mode=True)


def test_a_hidden_client_keeps_the_mode_and_nothing_stays_pending(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    n.machine.attach(88, n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(0)), kind="client", ghost=True)
    (gpu,) = cut(n, COUNTS, mode=True).gpus
    assert gpu.result == "rolled-back"
    assert isinstance(gpu.error, ModeBlocked)
    assert "DCGM" in str(gpu.error)
    assert "nvidia-persistenced" in str(gpu.error)
    assert gpu.now is not None
    assert gpu.now.mode == MigMode(False, False)


def test_a_failure_after_the_switch_takes_the_switch_back(nvml: Nvml) -> None:
    n = nvml("h100-sxm")
    n.machine.inject("nvmlDeviceCreateGpuInstanceWithPlacement", n.NVML_ERROR_UNKNOWN, times=0)
    (gpu,) = cut(n, COUNTS, mode=True).gpus
    assert gpu.result == "rolled-back"
    assert gpu.now is not None
    assert gpu.now.mode == MigMode(False, False)


def test_a_pending_switch_off_is_taken_back_where_mig_is_wanted(nvml: Nvml) -> None:
    n = nvml("a100-80gb", mig=True)
    cut(n, {"1g.10gb": 7})
    assert n.nvmlDeviceSetMigMode(n.nvmlDeviceGetHandleByIndex(0), 0) == n.NVML_ERROR_IN_USE
    with pytest.raises(ModeChangeNeeded):
        cut(n, {"1g.10gb": 7})
    assert cut(n, {"1g.10gb": 7}, mode=True).ok
    assert NvmlPartitioner(n).observe()[0].mode == MigMode(True, True)
    assert len(held(n)) == 7


def test_mig_goes_off_with_what_was_on_it(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    cut(n, COUNTS)
    assert cut(n, {}, mig=False, mode=True).ok
    assert NvmlPartitioner(n).observe()[0].mode == MigMode(False, False)
