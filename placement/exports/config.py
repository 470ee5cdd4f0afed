"""What is there, as the `fleet.layouts` that would bring it about."""

from __future__ import annotations

from collections.abc import Sequence

from placement.gpus import GpuState


def export_config(gpus: Sequence[GpuState]) -> dict[str, object]:
    """A configuration whose layouts are those of `gpus`: exact starts, counts where starts may not be read.

    GPUs that hold the same share a rule: `all` if every GPU that can be cut does, else by UUID, which no change of
    order among the GPUs touches. GPUs without MIG are left out.
    """
    cuttable = [g for g in gpus if g.mode is not None]
    groups: dict[str, tuple[dict[str, object], list[GpuState]]] = {}
    for gpu in cuttable:
        content = _content(gpu)
        groups.setdefault(repr(content), (content, []))[1].append(gpu)
    capable = [g for g in gpus if g.geometry is not None]
    rules = [
        {"gpus": "all" if len(members) == len(capable) else [g.uuid for g in members]} | content
        for content, members in groups.values()
    ]
    return {"version": "v1", "fleet": {"layouts": rules}}


def _content(gpu: GpuState) -> dict[str, object]:
    if not gpu.mig:
        return {"mig": False}
    if gpu.instances_known:
        return {"layout": [str(p) for p in gpu.placements]}
    counts: dict[str, int] = {}
    for instance in gpu.instances:
        counts[instance.profile] = counts.get(instance.profile, 0) + 1
    return {"layout": counts}
