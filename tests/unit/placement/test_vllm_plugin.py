"""How the plugin finds its slice, on a stand-in for the NVML binding. The real class runs in tests/integration."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from placement.vllm_plugin import DeviceNotFound, find, register, slice_named_in


class NVMLError(Exception):
    """The binding's root of errors."""


@dataclass(frozen=True)
class Handle:
    uuid: str
    index: int
    gi: int = -1
    ci: int = -1
    parent: "Handle | None" = None


@dataclass
class FakeBinding:
    """Two GPUs; the second has slices with gaps between their GI ids. `refuses_old_style` is an early driver."""

    refuses_old_style: bool = False
    as_bytes: bool = False
    NVMLError: type[Exception] = NVMLError
    gpus: list[Handle] = field(default_factory=lambda: [Handle("GPU-a", 0), Handle("GPU-b", 1)])

    def slices(self) -> Iterator[Handle]:
        for index, (gi, ci) in {0: (7, 0), 2: (9, 0), 3: (9, 1)}.items():
            yield Handle(f"MIG-{gi}-{ci}", index, gi, ci, parent=self.gpus[1])

    def nvmlDeviceGetHandleByUUID(self, name: str) -> Handle:
        for handle in (*self.gpus, *self.slices()):
            old_style = f"MIG-{handle.parent.uuid}/{handle.gi}/{handle.ci}" if handle.parent else None
            if name == handle.uuid or (name == old_style and not self.refuses_old_style):
                return handle
        raise NVMLError("Not Found")

    def nvmlDeviceGetMigDeviceHandleByIndex(self, parent: Handle, index: int) -> Handle:
        for handle in self.slices():
            if (handle.parent, handle.index) == (parent, index):
                return handle
        raise NVMLError("Not Found")

    def nvmlDeviceGetMaxMigDeviceCount(self, parent: Handle) -> int:
        return 7

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Handle) -> Handle | None:
        return handle.parent

    def nvmlDeviceGetCudaComputeCapability(self, handle: Handle) -> list[int]:
        return [9, 0]

    def nvmlDeviceGetUUID(self, handle: Handle) -> str | bytes:
        return handle.uuid.encode() if self.as_bytes else handle.uuid

    def nvmlDeviceGetIndex(self, handle: Handle) -> int:
        return handle.index

    def nvmlDeviceGetName(self, handle: Handle) -> str | bytes:
        name = "NVIDIA H100 80GB HBM3" + (" MIG 1g.10gb" if handle.parent else "")
        return name.encode() if self.as_bytes else name

    def nvmlDeviceGetGpuInstanceId(self, handle: Handle) -> int:
        return handle.gi

    def nvmlDeviceGetComputeInstanceId(self, handle: Handle) -> int:
        return handle.ci

    def nvmlDeviceGetMemoryInfo(self, handle: Handle) -> SimpleNamespace:
        return SimpleNamespace(total=10_468_982_784 if handle.parent else 85_520_809_984)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_slice_is_described_by_itself_and_its_parent(as_bytes: bool) -> None:
    device = find(FakeBinding(as_bytes=as_bytes), "MIG-9-1")
    assert (device.uuid, device.gpu_instance, device.compute_instance) == ("MIG-9-1", 9, 1)
    assert (device.parent_uuid, device.parent_index) == ("GPU-b", 1)
    assert (device.name, device.capability) == ("NVIDIA H100 80GB HBM3", (9, 0))
    assert device.memory_bytes == 10_468_982_784


@pytest.mark.parametrize("refuses", [False, True])
def test_an_old_style_name_is_the_same_slice_with_or_without_the_drivers_help(refuses: bool) -> None:
    assert find(FakeBinding(refuses_old_style=refuses), "MIG-GPU-b/9/1").uuid == "MIG-9-1"


@pytest.mark.parametrize("name", ["MIG-gone", "MIG-GPU-b/8/0", "MIG-GPU-b/9"])
def test_a_name_without_a_slice_is_an_error_that_repeats_it(name: str) -> None:
    with pytest.raises(DeviceNotFound, match=name.replace("/", ".")):
        find(FakeBinding(refuses_old_style=True), name)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, None),
        ("", None),
        ("0", None),
        ("GPU-a", None),
        ("MIG-1,MIG-2", None),
        (" MIG-1 ", "MIG-1"),
        ("MIG-GPU-a/1/0", "MIG-GPU-a/1/0"),
    ],
)
def test_only_one_slice_named_alone_makes_the_plugin_act(value: str | None, name: str | None) -> None:
    assert slice_named_in({} if value is None else {"CUDA_VISIBLE_DEVICES": value}) == name


@pytest.mark.parametrize("value", ["0", "GPU-a", "", "MIG-1,MIG-2"])
def test_off_mig_it_declines_before_it_touches_vllm(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM is not installed beside sliceway, so getting further than the name would be an ImportError.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert register() is None
