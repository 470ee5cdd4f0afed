"""How busy every slice is at the moment, and how full: for metrics, never for decisions.

Memory is told of every device and to everyone. Activity comes from NVML's GPM counters, which GPUs have from Hopper on; on a GPU in MIG mode they
are per GPU instance. Two samples are taken a moment apart and NVML is left again: a session that stays open would stand in the way of a change of
the MIG mode.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pynvml

from placement.nvml.access import gpu_handles, mig_handles, mig_mode, or_none, session

WINDOW_SECONDS = 0.2

# Ours -> the constant of NVML's metric, in percent of the slice's own capacity (nvml.h, nvmlGpmMetricId_t). The names follow DCGM's profiling fields.
_METRICS: Mapping[str, str] = {
    "graphics_engine": "NVML_GPM_METRIC_GRAPHICS_UTIL",
    "sm": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}


@dataclass(frozen=True, slots=True)
class SliceActivity:
    """One device that an engine can be pinned to.

    `gpu_instance` is None for a whole GPU. `busy` holds shares from 0 to 1 by the names above, and is empty where the driver tells none; a share is of
    the GPU instance, which several compute instances have in common.
    """

    uuid: str
    gpu: str
    gpu_instance: int | None
    used_bytes: int
    total_bytes: int
    busy: Mapping[str, float] = field(default_factory=dict)


def read_activity(nvml: Any = pynvml, *, pause: Callable[[float], None] = time.sleep) -> tuple[SliceActivity, ...]:
    """All GPUs without MIG and all MIG devices; takes `WINDOW_SECONDS` where there are counters. Empty without a driver. Never raises NVMLError."""
    try:
        with session(nvml), contextlib.ExitStack() as samples:
            found = [one for _, gpu in gpu_handles(nvml) if gpu is not None for one in _devices(nvml, gpu, samples)]
            if any(device.sample for device in found):
                pause(WINDOW_SECONDS)
            return tuple(_activity(nvml, device, samples) for device in found)
    except nvml.NVMLError:
        return ()


@dataclass(frozen=True, slots=True)
class _Device:
    gpu: Any
    gpu_uuid: str
    uuid: str
    instance: int | None
    used_bytes: int
    total_bytes: int
    sample: Any


def _devices(nvml: Any, gpu: Any, samples: contextlib.ExitStack) -> Iterator[_Device]:
    current, _ = mig_mode(nvml, gpu) or (False, False)
    counts = bool(or_none(nvml, lambda: nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice))
    for handle in mig_handles(nvml, gpu) if current else (gpu,):
        # A device that goes while it is read is left out: the layout is being changed.
        if (found := or_none(nvml, partial(_device, nvml, gpu, handle, current, counts, samples))) is not None:
            yield found


def _device(nvml: Any, gpu: Any, handle: Any, mig: bool, counts: bool, samples: contextlib.ExitStack) -> _Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    instance = int(nvml.nvmlDeviceGetGpuInstanceId(handle)) if mig else None
    return _Device(
        gpu,
        str(nvml.nvmlDeviceGetUUID(gpu)),
        str(nvml.nvmlDeviceGetUUID(handle)),
        instance,
        int(memory.used),
        int(memory.total),
        or_none(nvml, partial(_sample, nvml, gpu, instance, samples)) if counts else None,
    )


def _sample(nvml: Any, gpu: Any, instance: int | None, samples: contextlib.ExitStack) -> Any:
    sample = nvml.nvmlGpmSampleAlloc()
    samples.callback(nvml.nvmlGpmSampleFree, sample)
    if instance is None:
        nvml.nvmlGpmSampleGet(gpu, sample)
    else:
        nvml.nvmlGpmMigSampleGet(gpu, instance, sample)
    return sample


def _activity(nvml: Any, device: _Device, samples: contextlib.ExitStack) -> SliceActivity:
    busy = or_none(nvml, partial(_busy, nvml, device, samples)) if device.sample else None
    return SliceActivity(
        device.uuid, device.gpu_uuid, device.instance, device.used_bytes, device.total_bytes, busy or {}
    )


def _busy(nvml: Any, device: _Device, samples: contextlib.ExitStack) -> dict[str, float]:
    asked = nvml.c_nvmlGpmMetricsGet_t()
    asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
    asked.numMetrics = len(_METRICS)
    asked.sample1, asked.sample2 = device.sample, _sample(nvml, device.gpu, device.instance, samples)
    for slot, name in enumerate(_METRICS.values()):
        asked.metrics[slot].metricId = getattr(nvml, name)
    told = nvml.nvmlGpmMetricsGet(asked).metrics
    return {
        ours: min(1.0, max(0.0, told[slot].value / 100))
        for slot, ours in enumerate(_METRICS)
        if told[slot].nvmlReturn == nvml.NVML_SUCCESS
    }
