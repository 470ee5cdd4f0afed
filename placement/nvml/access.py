"""What every caller of NVML needs: a session, answers that may be missing, and the names of things."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from placement.gpus import GpuProcess, How

MIB = 2**20
T = TypeVar("T")


@contextlib.contextmanager
def session(nvml: Any) -> Iterator[None]:
    """NVML initialised for the block. Raises NVMLError where there is no driver, or none that answers."""
    nvml.nvmlInit()
    try:
        yield
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def or_none(nvml: Any, read: Callable[[], T]) -> T | None:
    """What `read` gives, or None where the driver cannot or may not tell."""
    try:
        return read()
    except nvml.NVMLError:
        return None


def gpu_handles(nvml: Any) -> Iterator[tuple[int, Any]]:
    """Index and handle of every GPU; the handle is None for one that has fallen off the bus."""
    for index in range(nvml.nvmlDeviceGetCount()):
        yield index, or_none(nvml, partial(nvml.nvmlDeviceGetHandleByIndex, index))


def mig_handles(nvml: Any, parent: Any) -> Iterator[Any]:
    """Handles of all MIG devices of a GPU in MIG mode. Needs no privilege."""
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        device = or_none(nvml, partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, i))
        if device is not None:
            yield device


def mig_mode(nvml: Any, handle: Any) -> tuple[bool, bool] | None:
    """Current and pending mode; None where the driver offers no MIG on this GPU."""
    mode = or_none(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    return None if mode is None else (bool(mode[0]), bool(mode[1]))


def processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...] | None:
    """Who runs on a GPU or MIG device; None where the driver does not tell."""
    kinds: tuple[tuple[str, How], ...] = (
        ("nvmlDeviceGetComputeRunningProcesses", "compute"),
        ("nvmlDeviceGetMPSComputeRunningProcesses", "mps"),
        ("nvmlDeviceGetGraphicsRunningProcesses", "graphics"),
    )
    found: list[GpuProcess] = []
    for function, how in kinds:
        listed = or_none(nvml, partial(getattr(nvml, function), handle))
        if listed is None and how == "compute":
            return None
        found += [GpuProcess(p.pid, process_name(nvml, p.pid), p.usedGpuMemory, how) for p in listed or ()]
    return tuple(found)


def process_name(nvml: Any, pid: int) -> str:
    """The program's name, `?` where it is hidden or gone."""
    return or_none(nvml, lambda: str(nvml.nvmlSystemGetProcessName(pid))) or "?"


def text(value: str | bytes) -> str:
    """Names in structures come as bytes, those from functions as text."""
    return value.decode() if isinstance(value, bytes) else value


def bare_profile_name(name: str) -> str | None:
    """`1g.18gb` from `MIG 1g.18gb` or `NVIDIA H200 MIG 1c.1g.18gb`; None if the text names no profile."""
    found = re.search(r"\bMIG (?:\d+c\.)?(\d+g\.\d+gb\S*)", name)
    return found.group(1) if found else None


def profile_name(slices: int, memory_mib: int, gpu_memory_bytes: int) -> str:
    """`1g.18gb` from compute slices, the instance's MiB and the GPU's bytes.

    The gigabytes are those of whole eighths of the GPU (go-nvlib v0.8, pkg/nvlib/device/mig_profile.go,
    getMigMemorySizeGB), not the instance's real size.
    """
    eighths = math.ceil(8 * memory_mib * MIB / gpu_memory_bytes)
    gigabytes = math.floor(eighths / 8 * math.ceil(gpu_memory_bytes / 2**30) + 0.5)  # Go rounds halves up: 3g.71gb
    return f"{slices}g.{gigabytes}gb"
