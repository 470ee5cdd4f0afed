"""What the GPU operator and the device plugin call what is there: node labels, the strategy, and the resources.

Sources: NVIDIA/k8s-device-plugin internal/rm/rm.go and docs/gpu-feature-discovery (labels of both strategies);
mig-parted deployments/systemd/config-default.yaml (names of configurations).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model_registry.catalogue import MIB
from placement.gpus import GpuInstance, GpuState

Strategy = Literal["none", "single", "mixed"]


@dataclass(frozen=True, slots=True)
class NodeLabels:
    """Labels of a node with these GPUs, the device plugin's MIG strategy that shows all of them, and what it offers."""

    strategy: Strategy
    labels: dict[str, str]
    resources: dict[str, int]

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway export --format labels --json`."""
        return {"strategy": self.strategy, "labels": self.labels, "resources": self.resources}


def export_labels(gpus: Sequence[GpuState], config: str = "current") -> NodeLabels:
    """`config` is what a layout is called that has none of the operator's own names; see `export_mig_parted`.

    `single` shows slices as `nvidia.com/gpu` and needs every GPU cut into slices of one profile; `mixed` gives every
    profile a resource of its own and shows GPUs without MIG as `nvidia.com/gpu`.
    """
    strategy = strategy_for(gpus)
    slices = [(gpu, i) for gpu in gpus for i in gpu.instances if i.complete]
    whole = [gpu for gpu in gpus if not gpu.mig]
    labels = {
        "nvidia.com/mig.capable": "true" if any(g.mode is not None for g in gpus) else "false",
        "nvidia.com/mig.strategy": strategy,
        "nvidia.com/mig.config": config_name(gpus, config),
        "nvidia.com/mig.config.state": "pending" if any(_pending(g) for g in gpus) else "success",
    }
    resources: dict[str, int] = {}
    if strategy == "single":
        gpu, instance = slices[0]
        resources["nvidia.com/gpu"] = len(slices)
        labels |= _described("nvidia.com/gpu", len(slices), instance, gpu)
    elif whole:
        resources["nvidia.com/gpu"] = len(whole)
        labels["nvidia.com/gpu.count"] = str(len(whole))
        labels["nvidia.com/gpu.product"] = label_value(whole[0].name)
        labels["nvidia.com/gpu.memory"] = str(whole[0].memory_bytes // MIB)
    if strategy == "mixed":
        for profile, count in sorted(Counter(i.profile for _, i in slices).items()):
            gpu, instance = next((g, i) for g, i in slices if i.profile == profile)
            resources[resource_name(profile)] = count
            labels |= _described(resource_name(profile), count, instance, gpu)
    return NodeLabels(strategy, labels, resources)


def strategy_for(gpus: Sequence[GpuState]) -> Strategy:
    """The device plugin's `MIG_STRATEGY` that shows everything there is."""
    if not any(g.mig for g in gpus):
        return "none"
    profiles = {i.profile for g in gpus for i in g.instances if i.complete}
    every = all(g.mig and any(i.complete for i in g.instances) for g in gpus)
    return "single" if every and len(profiles) == 1 else "mixed"


def resource_name(profile: str) -> str:
    """`nvidia.com/mig-1g.10gb.me` for `1g.10gb+me`: a plus sign cannot stand in a resource name."""
    return f"nvidia.com/mig-{profile.replace('+', '.')}"


def config_name(gpus: Sequence[GpuState], otherwise: str) -> str:
    """What the operator's own configurations call this: `all-disabled`, `all-1g.10gb`, `all-balanced`, or `otherwise`."""
    capable = [g for g in gpus if g.mode is not None]
    if not any(g.mig for g in capable):
        return "all-disabled"
    if not all(g.mig for g in capable):
        return otherwise
    contents = {tuple(sorted(Counter(i.profile for i in g.instances).items())) for g in capable}
    if contents == {()}:
        return "all-enabled"
    if all(_is_balanced(g) for g in capable):
        return "all-balanced"
    profiles = {p for content in contents for p, _ in content}
    if len(profiles) == 1 and all(_is_full(g) for g in capable):
        return f"all-{profiles.pop().replace('+', '.')}"
    return otherwise


def label_value(text: str) -> str:
    """`text` as a value that Kubernetes takes: at most 63 letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-._")


def _described(resource: str, count: int, instance: GpuInstance, gpu: GpuState) -> dict[str, str]:
    return {
        f"{resource}.count": str(count),
        f"{resource}.product": label_value(f"{gpu.name}-MIG-{instance.profile}"),
        f"{resource}.memory": str(instance.compute[0].memory_bytes // MIB),
        f"{resource}.slices.gi": str(instance.g),
        f"{resource}.slices.ci": str(instance.compute[0].g),
    }


def _pending(gpu: GpuState) -> bool:
    return gpu.mode is not None and gpu.mode.current != gpu.mode.pending


def _is_full(gpu: GpuState) -> bool:
    """Whether it holds as many of its one profile as there can be."""
    if gpu.geometry is None or not gpu.instances:
        return False
    return len(gpu.instances) == gpu.geometry.profile(gpu.instances[0].profile).max_instances


def _is_balanced(gpu: GpuState) -> bool:
    """2x1g, 1x2g and 1x3g of plain profiles; 2x1g and 1x2g where there are four compute slices."""
    if gpu.geometry is None:
        return False
    sizes = Counter(i.g for i in gpu.instances)
    plain = {p.name for p in gpu.geometry.base_profiles if p.memory_slices and p.nvml_enum < 5}
    balanced = {1: 2, 2: 1} if gpu.geometry.compute_slices == 4 else {1: 2, 2: 1, 3: 1}
    return sizes == balanced and all(i.profile in plain for i in gpu.instances)
