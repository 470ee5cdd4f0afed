"""GPUs shared by several engines without MIG: `mps` and `time-slice` slices. Neither isolates, and both say so.

MPS lets the engines' kernels run side by side, each capped to its share of the SMs and of the memory where the driver
can (Volta and later); time-slicing takes turns and caps nothing. In both, one engine's fault can end the others' work.
Source: NVIDIA Multi-Process Service documentation (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from model_registry.catalogue import MIB, load_catalogue
from model_registry.errors import ConfigError
from placement.gpus import GpuState
from placement.partition.select import GpuSelection, selected
from placement.slices import Inventory, Slice, SliceKind

MOST_CLIENTS = 48
"""Contexts that one MPS server takes."""


class SharingRule(GpuSelection):
    """GPUs that several engines use at once, without isolation. `all` are those that MIG does not cut."""

    kind: Literal["mps", "time-slice"] = Field(description="How; neither isolates.")
    slices: int = Field(ge=2, le=MOST_CLIENTS, description="How many engines share one GPU.")


def share(inventory: Inventory, rules: Sequence[SharingRule]) -> Inventory:
    """`inventory` with the GPUs that `rules` name in shares. The last rule that names a GPU counts.

    Raises ConfigError for a GPU that is not there, or that has MIG on: MPS under MIG is not offered.
    """
    ruled = _by_gpu(inventory.gpus, rules)
    if not ruled:
        return inventory
    slices = [
        part
        for one in inventory.slices
        for part in (_parts(one, ruled[one.id]) if one.kind is SliceKind.GPU and one.id in ruled else (one,))
    ]
    notes = tuple(
        f"GPU {gpu.index} is shared by {rule.slices} engines ({rule.kind}): they are not isolated from each other."
        for gpu in inventory.gpus
        if (rule := ruled.get(gpu.uuid))
    )
    users = tuple(u for u in inventory.users if u.slice_id not in ruled)
    return replace(inventory, slices=tuple(slices), notes=(*inventory.notes, *notes), users=users)


def share_environment(target: Slice, runtime: Path) -> dict[str, str]:
    """What keeps an engine to its share: MPS's caps and the pipe to its server. Empty for every other kind of slice.

    Devices in the memory limit are numbered as the engine sees them; it sees one.
    """
    if target.kind is not SliceKind.MPS or target.gpu is None:
        return {}
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(mps_directory(target.gpu.uuid, runtime)),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{100 / target.sharers:.4g}",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={target.memory_bytes // MIB}M",
    }


def utilization_of_card(target: Slice, share_ratio: float) -> float:
    """vLLM's --gpu-memory-utilization for a `share_ratio` of the slice: it counts from the whole card's memory."""
    if target.gpu is None or target.sharers == 1 or not target.gpu.memory_bytes:
        return share_ratio
    return round(share_ratio * target.memory_bytes / target.gpu.memory_bytes, 4)


def mps_directory(gpu: str, runtime: Path) -> Path:
    """Where the MPS server of one GPU has its pipes. Short: they are sockets."""
    return runtime / f"mps-{gpu.removeprefix('GPU-')[:8]}"


def _by_gpu(gpus: Sequence[GpuState], rules: Sequence[SharingRule]) -> dict[str, SharingRule]:
    ruled: dict[str, SharingRule] = {}
    catalogue = load_catalogue()
    for number, rule in enumerate(rules):
        where = f"fleet.sharing[{number}]"
        for gpu in selected(gpus, rule, where, catalogue):
            if not gpu.mig:
                ruled[gpu.uuid] = rule
            elif rule.gpus != "all":
                raise ConfigError(
                    f"{gpu.label} has MIG on, and its slices are not shared further",
                    where=where,
                    remedy="Leave it out, or switch MIG off: fleet.layouts: [{gpus: [...], mig: false}].",
                )
    return ruled


def _parts(whole: Slice, rule: SharingRule) -> tuple[Slice, ...]:
    return tuple(
        replace(
            whole,
            id=f"{whole.id}/{rule.kind}-{i}",
            kind=SliceKind(rule.kind),
            memory_bytes=whole.memory_bytes // rule.slices,
            sharers=rule.slices,
        )
        for i in range(rule.slices)
    )
