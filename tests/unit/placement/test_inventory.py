from __future__ import annotations

import pytest

from model_registry.errors import ConfigError
from placement.errors import InventoryError
from placement.host import Host
from placement.inventory import Sources, observe
from placement.nvml import NvidiaState
from placement.schema import ExplicitSlice, FleetConfig
from placement.slices import Gpu, Slice, SliceKind, SliceUser

GIB = 2**30
GPU = Gpu("GPU-a", 0, "H100-80 SXM", 80 * GIB)
MIG = Slice("GPU-a/1g.10gb@0", SliceKind.MIG, "1g.10gb", 9 * GIB, uuid="MIG-1", gpu=GPU)
WHOLE = Slice("GPU-b", SliceKind.GPU, None, 80 * GIB, uuid="GPU-b", gpu=Gpu("GPU-b", 1, "L4", 24 * GIB))


def sources(*gpus: Slice, notes: tuple[str, ...] = ()) -> Sources:
    users = (SliceUser("GPU-a/1g.10gb@0", 42, "python", None),) if gpus else ()
    nvidia = NvidiaState("580.1" if gpus else None, gpus, users, notes)
    return Sources(host=lambda: Host(((0,), (1,), (2,), (3,)), 40 * GIB), nvidia=lambda: nvidia)


def ids(fleet: FleetConfig, *gpus: Slice) -> list[str]:
    return [s.id for s in observe(fleet, sources(*gpus)).slices]


def test_gpus_are_taken_where_there_are_any_else_cores() -> None:
    assert ids(FleetConfig(), MIG, WHOLE) == ["GPU-a/1g.10gb@0", "GPU-b"]
    assert ids(FleetConfig()) == ["cpu-0", "cpu-1", "cpu-2", "cpu-3"]
    assert ids(FleetConfig(discover="cpu"), MIG) == ["cpu-0", "cpu-1", "cpu-2", "cpu-3"]
    assert ids(FleetConfig(discover="none"), MIG) == []


def test_a_driver_that_ails_is_told_beside_the_cores() -> None:
    found = observe(FleetConfig(), sources(notes=("The NVIDIA driver does not answer: Unknown Error.",)))
    assert len(found.slices) == 4
    assert "does not answer" in found.notes[0]


def test_gpus_that_must_be_there_and_are_not_are_an_error() -> None:
    with pytest.raises(InventoryError, match="no NVIDIA driver answers"):
        observe(FleetConfig(discover="nvidia"), sources())
    with pytest.raises(InventoryError, match="broken"):
        observe(FleetConfig(discover="nvidia"), sources(notes=("broken",)))


def test_who_uses_a_slice_is_kept_for_the_slices_listed() -> None:
    assert observe(FleetConfig(), sources(MIG)).users[0].pid == 42
    listed = FleetConfig(slices=(ExplicitSlice(kind="gpu", uuid="GPU-b"),))
    assert observe(listed, sources(MIG, WHOLE)).users == ()


def test_an_explicit_list_takes_what_the_driver_knows() -> None:
    fleet = FleetConfig(
        slices=(
            ExplicitSlice(kind="mig", uuid="MIG-1", id="left"),
            ExplicitSlice(kind="cpu", cores="0-1", memory="4GiB"),
            ExplicitSlice(kind="mig", uuid="MIG-9", memory="8GiB"),
        )
    )
    left, cores, unseen = observe(fleet, sources(MIG)).slices
    assert (left.id, left.profile, left.memory_bytes, left.gpu) == ("left", "1g.10gb", 9 * GIB, GPU)
    assert (cores.id, cores.cores, cores.memory_bytes) == ("cpu-1", (0, 1), 4 * GIB)
    assert (unseen.id, unseen.memory_bytes) == ("MIG-9", 8 * GIB)


def test_an_explicit_budget_is_never_more_than_the_slice_has() -> None:
    fleet = FleetConfig(slices=(ExplicitSlice(kind="mig", uuid="MIG-1", memory="80GiB"),))
    assert observe(fleet, sources(MIG)).slices[0].memory_bytes == 9 * GIB


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([{"kind": "mig", "uuid": "MIG-7"}], "not among the slices that the driver shows"),
        ([{"kind": "gpu", "uuid": "MIG-1"}], "is a mig slice, not gpu"),
        ([{"kind": "cpu", "cores": "2-9"}], "cores 4-9 are not this process's to use"),
        ([{"kind": "cpu", "cores": "0-1"}, {"kind": "cpu", "cores": "1-2"}], "'cpu-0' and 'cpu-1' share cores 1"),
        (
            [{"kind": "cpu", "cores": "0", "id": "x"}, {"kind": "cpu", "cores": "1", "id": "x"}],
            "two slices are called 'x'",
        ),
        (
            [{"kind": "mig", "uuid": "MIG-1", "id": "a"}, {"kind": "mig", "uuid": "MIG-1", "id": "b"}],
            "MIG-1 is listed twice",
        ),
    ],
)
def test_a_wrong_list_is_told_with_the_field(listed: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        observe(FleetConfig.model_validate({"slices": listed}), sources(MIG, WHOLE))
    assert str(error.value.where).startswith("fleet.slices")


def test_this_machine_can_be_observed() -> None:
    found = observe(FleetConfig(discover="cpu"))
    assert found.slices
    assert all(s.memory_bytes > 0 and s.cores for s in found.slices)
