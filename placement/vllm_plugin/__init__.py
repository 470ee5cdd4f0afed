"""The vLLM platform plugin: what makes vLLM see its MIG slice as device 0 instead of another GPU, or a crash.

vLLM reaches the driver by GPU *index*. For `CUDA_VISIBLE_DEVICES=MIG-<uuid>` it crashes up to 0.23, and from 0.24 takes
the slice's index within its parent for the index of a GPU. This plugin answers from the slice's own handle and its
parent instead; the reasons and the limits are in docs/pinning.md and docs/adr/0006-mig-plugin.md.

vLLM finds `register` through the entry-point group `vllm.platform_plugins`, in each process of the engine. The package
is self-contained (standard library and what vLLM itself carries), because `placement.plugin` copies it to where the
engine's interpreter finds it; nothing here imports the rest of sliceway, and importing it imports no vLLM.
"""

from __future__ import annotations

import logging
import os

from .device import DeviceNotFound, MigDevice, find, slice_named_in
from .report import LOGGER
from .versions import TESTED_VERSIONS, is_tested

__all__ = ["TESTED_VERSIONS", "DeviceNotFound", "MigDevice", "find", "is_tested", "register", "slice_named_in"]


def register() -> str | None:
    """The platform class for this process, or None to leave vLLM's own choice alone.

    None off MIG, in a vLLM that was not built for CUDA, and where NVML or the slice cannot be reached; the last of these
    is logged as an error, because vLLM's own way ends in a message about something else. Never raises: vLLM calls this
    twice in each process, and swallows what the first call raises.
    """
    name = slice_named_in(os.environ)
    if name is None or not _vllm_runs_on_cuda():
        return None
    # The binding that vLLM carries: it is there in every release since 0.7, and an installed `pynvml` may be another one.
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        try:
            find(pynvml, name)
        finally:
            pynvml.nvmlShutdown()
    except (DeviceNotFound, pynvml.NVMLError) as error:
        logging.getLogger(LOGGER).error(
            "CUDA_VISIBLE_DEVICES names the slice %s, and the driver has no such slice (%s). It was removed or made anew "
            "since this engine's environment was written; `sliceway slices` lists the slices there are.",
            name,
            error,
        )
        return None
    return f"{__name__}.platform.MigCudaPlatform"


def _vllm_runs_on_cuda() -> bool:
    """Whether vLLM's own CUDA platform would be chosen: a CUDA build, a driver, a GPU."""
    from vllm.platforms import builtin_platform_plugins

    try:
        return builtin_platform_plugins["cuda"]() is not None
    except Exception:  # vLLM's probe lets anything out; whatever it was, this is no CUDA platform to extend
        logging.getLogger(LOGGER).debug("vLLM's CUDA probe failed", exc_info=True)
        return False
