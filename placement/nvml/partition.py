"""Cutting GPUs through NVML: `placement.partition.Driver` on whatever library the binding has loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pynvml

from model_registry.catalogue import Catalogue, ProfileInfo, load_catalogue
from model_registry.errors import UnknownProfile
from model_registry.geometry import Placement
from placement.errors import CannotBeCut, GpuLost, NotPrivileged, PartitionError, SliceInUse
from placement.gpus import GpuState, named
from placement.nvml.access import gpu_handles, mig_handles, or_none, processes, session
from placement.nvml.gpus import read_gpu
from placement.nvml.product import drivers_product, known_product
from placement.nvml.read import left_out
from placement.partition.apply import ModeChange
from placement.partition.diff import PRIVILEGE_REMEDY

# Compute instances share a GPU instance's engines: the only engine profile there is.
_SHARED_ENGINES = 0


class NvmlPartitioner:
    """NVML as the one who cuts. Handles are looked up for every step: they may mean another device after a change."""

    def __init__(self, nvml: Any = pynvml, catalogue: Catalogue | None = None) -> None:
        self._nvml = nvml
        self._catalogue = catalogue or load_catalogue()

    def observe(self) -> tuple[GpuState, ...]:
        """Every GPU that answers. Raises PartitionError where there is no driver."""
        n = self._nvml
        with self._session():
            driver = str(n.nvmlSystemGetDriverVersion())
            found = (
                or_none(n, partial(read_gpu, n, index, handle, self._catalogue, driver))
                for index, handle in gpu_handles(n)
                if handle is not None
            )
            return tuple(gpu for gpu in found if gpu is not None)

    def left_out(self) -> tuple[str, ...]:
        """Why GPUs that the driver counts are not among those that `observe` tells, a sentence for each."""
        n, found = self._nvml, []
        with self._session():
            for index in range(n.nvmlDeviceGetCount()):
                try:
                    n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(index))
                except n.NVMLError as error:
                    found.append(left_out(n, index, error))
        return tuple(found)

    def create(self, gpu: str, placement: Placement) -> None:
        """Make the instance at its start (never where the driver would put it), then its full compute instance."""
        n = self._nvml
        with self._session(gpu, f"creating {placement}"):
            parent = self._gpu(gpu)
            profile = self._profile(parent, placement.profile)
            if profile is None:
                raise CannotBeCut(f"the driver knows no profile {placement.profile}")
            where = n.c_nvmlGpuInstancePlacement_t(placement.start, profile.memory_slices)
            instance = n.nvmlDeviceCreateGpuInstanceWithPlacement(parent, profile.id, n.byref(where))
            self._whole(instance, profile.g)

    def complete(self, gpu: str, instance: int) -> None:
        """Compute instances that are there go first, since the full one leaves no room beside it."""
        n = self._nvml
        with self._session(gpu, f"completing GPU instance {instance}"):
            parent = self._gpu(gpu)
            self._clear(parent, instance)
            handle = n.nvmlDeviceGetGpuInstanceById(parent, instance)
            wanted = n.nvmlGpuInstanceGetInfo(handle).profileId
            g = n.nvmlDeviceGetGpuInstanceProfileInfoById(parent, wanted).sliceCount
            self._whole(handle, g)

    def destroy(self, gpu: str, instance: int) -> None:
        """Compute instances first: the driver refuses to take a GPU instance away that has some."""
        n = self._nvml
        with self._session(gpu, f"destroying GPU instance {instance}"):
            parent = self._gpu(gpu)
            self._clear(parent, instance)
            n.nvmlGpuInstanceDestroy(n.nvmlDeviceGetGpuInstanceById(parent, instance))

    def set_mode(self, gpu: str, on: bool) -> ModeChange:
        """The driver returns how the switch went instead of failing; the mode is read again, not believed."""
        n = self._nvml
        with self._session(gpu, f"switching MIG {'on' if on else 'off'}"):
            status = n.nvmlDeviceSetMigMode(self._gpu(gpu), int(on))
            if status == n.NVML_ERROR_IN_USE:
                return "in-use"
            if status not in (n.NVML_SUCCESS, n.NVML_ERROR_RESET_REQUIRED):
                raise n.NVMLError(status)
            # The switch may have unbound the device, so its handle is looked up again.
            current, _ = n.nvmlDeviceGetMigMode(self._gpu(gpu))
            return "done" if bool(current) == on else "reset-required"

    def _gpu(self, uuid: str) -> Any:
        return self._nvml.nvmlDeviceGetHandleByUUID(uuid)

    def _profile(self, parent: Any, name: str) -> ProfileInfo | None:
        n = self._nvml
        nvml_name, memory = str(n.nvmlDeviceGetName(parent)), or_none(n, lambda: n.nvmlDeviceGetMemoryInfo(parent))
        total = int(memory.total) if memory else None
        table = known_product(n, parent, nvml_name, total, self._catalogue)
        product = drivers_product(n, parent, nvml_name, total, table)
        try:
            return product.profile(name) if product else None
        except UnknownProfile as error:
            raise CannotBeCut(error.message, remedy=error.remedy) from error

    def _whole(self, instance: Any, g: int) -> None:
        n = self._nvml
        for number in range(n.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
            read = partial(n.nvmlGpuInstanceGetComputeInstanceProfileInfo, instance, number, _SHARED_ENGINES)
            info = or_none(n, read)
            if info is not None and info.sliceCount == g:
                n.nvmlGpuInstanceCreateComputeInstance(instance, info.id)
                return
        raise PartitionError(f"the driver offers no compute instance of {g} slices for this instance")

    def _clear(self, parent: Any, instance: int) -> None:
        """Destroy every compute instance of a GPU instance."""
        n = self._nvml
        ids = [
            n.nvmlDeviceGetComputeInstanceId(device)
            for device in mig_handles(n, parent)
            if n.nvmlDeviceGetGpuInstanceId(device) == instance
        ]
        for compute in ids:
            handle = n.nvmlDeviceGetGpuInstanceById(parent, instance)
            n.nvmlComputeInstanceDestroy(n.nvmlGpuInstanceGetComputeInstanceById(handle, compute))

    @contextlib.contextmanager
    def _session(self, gpu: str | None = None, doing: str = "reading the GPUs") -> Iterator[None]:
        """NVML for the block; its errors become ours."""
        n = self._nvml
        try:
            with session(n):
                try:
                    yield
                except n.NVMLError as error:
                    raise self._error(error, gpu, doing) from error
        except n.NVMLError as error:
            raise PartitionError(
                f"the NVIDIA driver does not answer: {error}",
                remedy="Check `nvidia-smi`; `--simulate h100-sxm:8` works without a driver.",
            ) from error

    def _error(self, error: Any, gpu: str | None, doing: str) -> PartitionError:
        n = self._nvml
        message = f"{doing} failed: {error}"
        match error.value:
            case n.NVML_ERROR_NO_PERMISSION:
                return NotPrivileged(message, remedy=PRIVILEGE_REMEDY)
            case n.NVML_ERROR_IN_USE:
                return SliceInUse(
                    f"{doing} failed: it is in use by {self._who(gpu)}", remedy="Stop it, and apply again."
                )
            case n.NVML_ERROR_GPU_IS_LOST:
                return GpuLost(message, remedy="See `dmesg` for its XID; reset the GPU or reboot.")
            case n.NVML_ERROR_INSUFFICIENT_RESOURCES:
                return PartitionError(
                    f"{doing} failed: the driver finds no room there",
                    remedy="Something else may be cutting this GPU; `sliceway plan` shows what is there.",
                )
            case n.NVML_ERROR_NOT_SUPPORTED:
                return CannotBeCut(message, remedy="MIG is off, or this is a virtual GPU, which its guest cannot cut.")
        return PartitionError(message, remedy="See `dmesg` for what the driver says, and apply again.")

    def _who(self, gpu: str | None) -> str:
        n = self._nvml
        parent = or_none(n, partial(n.nvmlDeviceGetHandleByUUID, gpu))
        devices = [parent, *mig_handles(n, parent)] if parent is not None else []
        found = tuple(p for d in devices for p in processes(n, d) or ())
        return ", ".join(named(found)) or "a client that no list shows"
