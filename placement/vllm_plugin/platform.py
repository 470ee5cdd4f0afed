"""vLLM's CUDA platform, answering for one MIG slice. Imported by vLLM only, after `register` has named it."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
import vllm
from vllm.platforms.cuda import NvmlCudaPlatform, pynvml
from vllm.platforms.interface import DeviceCapability

from .device import MigDevice, find, slice_named_in
from .report import LOGGER, tell
from .versions import is_tested


@cache
def _device() -> MigDevice:
    """This process's slice, read from the driver once: nothing in it changes while the slice exists."""
    name = slice_named_in(os.environ)
    if name is None:
        raise RuntimeError("CUDA_VISIBLE_DEVICES named one MIG slice when this process started, and does not now")
    pynvml.nvmlInit()
    try:
        return find(pynvml, name)
    finally:
        pynvml.nvmlShutdown()


class MigCudaPlatform(NvmlCudaPlatform):
    """`NvmlCudaPlatform` with the slice as the one device there is.

    Three kinds of id meet here (the words are vLLM's): *logical* and *visible* ids, of which there is only 0, and the
    *physical* id, an NVML index, which stands for the parent GPU: topology questions (NUMA node, PCI address, NVLink) are
    about the card. Questions about the device itself are answered from the slice, whatever id they come with. How many
    SMs there are and how much memory is free vLLM asks CUDA, which is right on a slice.
    """

    def __init__(self) -> None:
        super().__init__()
        device = _device()
        tested = is_tested(vllm.__version__)
        if not tested:
            logging.getLogger(LOGGER).warning(
                "sliceway's MIG plugin was not tested with vLLM %s; it takes part all the same, and sliceway's controller "
                "checks where this engine ended up.",
                vllm.__version__,
            )
        tell(
            "slice",
            uuid=device.uuid,
            parent=device.parent_uuid,
            gi=device.gpu_instance,
            ci=device.compute_instance,
            memory_bytes=device.memory_bytes,
            name=device.name,
            capability=device.capability,
            vllm=vllm.__version__,
            tested=tested,
        )

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id: str) -> int:
        """The parent's index for this slice's name; anything else is vLLM's to translate."""
        if device_id.strip() in {slice_named_in(os.environ), _device().uuid}:
            return _device().parent_index
        return int(super().device_control_id_to_physical_device_id(device_id))

    @classmethod
    def device_id_to_physical_device_id(cls, device_id: int) -> int:
        """The parent's index."""
        return _device().parent_index

    @classmethod
    def visible_device_id_to_physical_device_id(cls, device_id: int) -> int:
        """The parent's index."""
        return _device().parent_index

    @classmethod
    def logical_device_id_to_visible_device_id(cls, device_id: int) -> int:
        """0: CUDA shows this process one device."""
        return 0

    @classmethod
    def device_count(cls) -> int:
        """1. vLLM's own way asks CUDA when it meets a MIG name, after which the process can no longer fork."""
        return 1

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        """The parent's compute capability; vLLM asks for it on every step, so it costs no driver call."""
        return DeviceCapability(*_device().capability)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """The card's name without the profile: vLLM looks tuned kernel parameters up by it."""
        return _device().name

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        """The slice's UUID, which differs between the slices of one GPU."""
        return _device().uuid

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """The slice's memory in bytes."""
        return _device().memory_bytes

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """As vLLM does it, then tell which limits came out of it."""
        super().check_and_update_config(vllm_config)
        if vllm_config.model_config is not None:  # None in the configuration that vLLM makes up for want of one
            _tell_limits(*_limits(vllm_config))

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """As vLLM does it. Workers ask this right after they took their device, so CUDA's own view is told here."""
        super().check_if_supports_dtype(dtype)
        if torch.cuda.is_initialized():
            _tell_cuda()


def _limits(vllm_config: Any) -> tuple[Any, ...]:
    scheduler, cache_config = vllm_config.scheduler_config, vllm_config.cache_config
    return (
        getattr(scheduler, "max_num_seqs", None),
        getattr(scheduler, "max_num_batched_tokens", None),
        getattr(vllm_config.model_config, "max_model_len", None),
        getattr(cache_config, "gpu_memory_utilization", None),
        getattr(cache_config, "kv_cache_memory_bytes", None),
    )


@cache  # vLLM settles its configuration several times over; a repeated line tells nothing
def _tell_limits(seqs: Any, batched_tokens: Any, model_len: Any, utilization: Any, kv_cache_bytes: Any) -> None:
    tell(
        "limits",
        max_num_seqs=seqs,
        max_num_batched_tokens=batched_tokens,
        max_model_len=model_len,
        gpu_memory_utilization=utilization,
        kv_cache_memory_bytes=kv_cache_bytes,
    )


@cache
def _tell_cuda() -> None:
    properties = torch.cuda.get_device_properties(0)
    tell(
        "cuda",
        total_bytes=int(properties.total_memory),
        sm_count=int(properties.multi_processor_count),
        uuid=str(getattr(properties, "uuid", "")) or None,
    )
