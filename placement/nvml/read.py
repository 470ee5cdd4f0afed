"""The whole machine, read once: GPUs, slices, who uses them. Never raises for what a machine lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml

from model_registry.catalogue import load_catalogue
from placement.gpu_slices import notes_of, slices_of, users_of
from placement.gpus import GpuState
from placement.nvml.access import session
from placement.nvml.gpus import read_gpu
from placement.slices import Slice, SliceUser


@dataclass(frozen=True, slots=True)
class NvidiaState:
    """What NVML tells. `driver` is None where there is no driver; then everything else but `notes` is empty."""

    driver: str | None = None
    slices: tuple[Slice, ...] = ()
    users: tuple[SliceUser, ...] = ()
    notes: tuple[str, ...] = ()
    gpus: tuple[GpuState, ...] = ()


def read_nvidia(nvml: Any = pynvml) -> NvidiaState:
    """GPUs with MIG off as `gpu` slices, complete MIG devices as `mig` slices, in NVML's order.

    `nvml` is anything with pynvml's functions. Never raises for what a machine lacks.
    """
    try:
        with session(nvml):
            return _read(nvml)
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return NvidiaState()
    except nvml.NVMLError as error:
        return NvidiaState(notes=(f"The NVIDIA driver does not answer: {error}.",))


def _read(nvml: Any) -> NvidiaState:
    catalogue, driver = load_catalogue(), str(nvml.nvmlSystemGetDriverVersion())
    gpus: list[GpuState] = []
    lost: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(read_gpu(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index), catalogue, driver))
        except nvml.NVMLError as error:
            lost.append(left_out(nvml, index, error))
    return NvidiaState(
        driver=driver,
        slices=tuple(s for gpu in gpus for s in slices_of(gpu)),
        users=tuple(u for gpu in gpus for u in users_of(gpu)),
        notes=(*lost, *notes_of(gpus)),
        gpus=tuple(gpus),
    )


def left_out(nvml: Any, index: int, error: Any) -> str:
    """Why a GPU that the driver counts is not among those that are used."""
    advice = "; check that /dev/nvidia* may be read and written" if error.value == nvml.NVML_ERROR_NO_PERMISSION else ""
    if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
        advice = "; it has fallen off the bus, see `dmesg` for its XID"
    return f"GPU {index} is left out: {error}{advice}."
