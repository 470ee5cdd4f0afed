"""One MIG slice as NVML shows it: found by its name, read once into plain values.

Values and not handles, because vLLM opens and closes NVML around every question, and a handle does not outlive that.
Functions take the NVML binding as an argument: inside vLLM it is the one that vLLM carries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OLD_STYLE = re.compile(r"MIG-(?P<gpu>GPU-[0-9A-Za-z-]+)/(?P<gi>\d+)/(?P<ci>\d+)")


class DeviceNotFound(Exception):
    """NVML has no slice of this name."""


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A slice and its parent. `parent_index` is NVML's index of the GPU; `memory_bytes` is the slice's own total."""

    uuid: str
    parent_uuid: str
    parent_index: int
    gpu_instance: int
    compute_instance: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int


def slice_named_in(environment: Mapping[str, str]) -> str | None:
    """The one slice that `CUDA_VISIBLE_DEVICES` names, or None.

    None also for a list: an engine of ours has exactly one slice, and what CUDA makes of several depends on the driver
    (one of them up to R565, all from R570). Both styles count, `MIG-<uuid>` and `MIG-GPU-<uuid>/<GI>/<CI>`.
    """
    value = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    return value if value.startswith("MIG-") and "," not in value else None


def find(nvml: Any, name: str) -> MigDevice:
    """The slice called `name`, in either style. NVML must be initialised.

    Raises DeviceNotFound, or the binding's NVMLError where the driver refuses an answer.
    """
    handle = _handle(nvml, name)
    parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(parent)
    return MigDevice(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        parent_uuid=_text(nvml.nvmlDeviceGetUUID(parent)),
        parent_index=int(nvml.nvmlDeviceGetIndex(parent)),
        gpu_instance=int(nvml.nvmlDeviceGetGpuInstanceId(handle)),
        compute_instance=int(nvml.nvmlDeviceGetComputeInstanceId(handle)),
        name=_text(nvml.nvmlDeviceGetName(parent)),
        capability=(int(major), int(minor)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _handle(nvml: Any, name: str) -> Any:
    """NVML takes both styles by name; an old-style name that this driver refuses is looked up by its parts."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError as error:
        parts = _OLD_STYLE.fullmatch(name)
        if parts is None:
            raise DeviceNotFound(f"{name}: {error}") from error
    parent = nvml.nvmlDeviceGetHandleByUUID(parts["gpu"])
    wanted = (int(parts["gi"]), int(parts["ci"]))
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, index)
        except nvml.NVMLError:  # an index that is free; instances leave gaps
            continue
        if (nvml.nvmlDeviceGetGpuInstanceId(handle), nvml.nvmlDeviceGetComputeInstanceId(handle)) == wanted:
            return handle
    raise DeviceNotFound(
        f"{name}: GPU {parts['gpu']} has no GPU instance {wanted[0]} with compute instance {wanted[1]}"
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
