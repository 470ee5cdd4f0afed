"""Who runs where, read through a stand-in for pynvml: one GPU without MIG, one with two MIG devices, one lost."""

from types import SimpleNamespace
from typing import Any

from placement.nvml import read_use

MIB = 2**20


class NVMLError(Exception):
    """The binding's root of errors."""


class FakeNvml:
    NVMLError = NVMLError

    def __init__(self, *, driver: bool = True, lists_processes: bool = True) -> None:
        self.driver = driver
        self.lists_processes = lists_processes
        self.closed = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index == 2:
            raise NVMLError("GPU is lost")
        return f"GPU-{index}"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle == "GPU-0":
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index not in (0, 3):
            raise NVMLError("Not Found")
        return f"MIG-{index}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=1000 * MIB, used=(600 if handle == "MIG-3" else 0) * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        if not self.lists_processes:
            raise NVMLError("Insufficient Permissions")
        return [SimpleNamespace(pid=41), SimpleNamespace(pid=42)] if handle == "MIG-3" else []

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: str) -> list[Any]:
        if handle.startswith("MIG"):
            raise NVMLError("Not Supported")
        return [SimpleNamespace(pid=43)]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid == 42:
            raise NVMLError("Not Found")
        return "VLLM::EngineCore"


def test_every_device_an_engine_could_be_on_is_listed_and_a_lost_gpu_is_not_in_the_way() -> None:
    nvml = FakeNvml()
    use = read_use(nvml)
    assert use is not None
    assert [device.uuid for device in use] == ["GPU-0", "MIG-0", "MIG-3"]
    assert use[2].processes == {41: "VLLM::EngineCore", 42: "?"}
    assert (use[2].used_bytes, use[2].total_bytes) == (600 * MIB, 1000 * MIB)
    assert use[1].processes == {}
    assert use[0].processes == {43: "VLLM::EngineCore"}, "an MPS client"
    assert nvml.closed == 1


def test_a_driver_that_hides_processes_is_not_mistaken_for_an_idle_device() -> None:
    use = read_use(FakeNvml(lists_processes=False))
    assert use is not None
    assert [device.processes for device in use] == [None, None, None]


def test_without_a_driver_there_is_no_answer() -> None:
    assert read_use(FakeNvml(driver=False)) is None
