"""Who runs on every device that an engine can be pinned to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pynvml

from placement.nvml.access import gpu_handles, mig_handles, mig_mode, or_none, process_name, session
from placement.slices import DeviceUse


def read_use(nvml: Any = pynvml) -> tuple[DeviceUse, ...] | None:
    """Who runs on every GPU without MIG and every MIG device; None where NVML does not answer. Needs no privilege."""
    try:
        with session(nvml):
            gpus = [handle for _, handle in gpu_handles(nvml) if handle is not None]
            handles = [handle for gpu in gpus for handle in _devices(nvml, gpu)]
            return tuple(use for handle in handles if (use := or_none(nvml, partial(_use, nvml, handle))) is not None)
    except nvml.NVMLError:
        return None


def _devices(nvml: Any, gpu: Any) -> Iterator[Any]:
    """What CUDA can be pinned to on one GPU: itself, or its MIG devices."""
    current, _ = mig_mode(nvml, gpu) or (False, False)
    if current:
        yield from mig_handles(nvml, gpu)
    else:
        yield gpu


def _use(nvml: Any, handle: Any) -> DeviceUse:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    listed = or_none(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    if listed is not None:  # MPS clients are in a list of their own
        listed = [*listed, *(or_none(nvml, lambda: nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)) or ())]
    return DeviceUse(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        processes=None if listed is None else {p.pid: process_name(nvml, p.pid) for p in listed},
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
    )
