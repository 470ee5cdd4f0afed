"""The plan's layouts as NVIDIA's MIG manager takes them: a ConfigMap with mig-parted's file. Pure.

The GPU operator is told of it with `migManager.config.name`, and every node of its layout with the label `nvidia.com/mig.config`.
"""

from __future__ import annotations

from gateway.export.kubernetes.objects import Manifest, Settings, manifest
from gateway.export.kubernetes.text import yaml_text
from gateway.export.model import Exported, GpuContent, NodeLayout

MIG_MAP = "sliceway-mig-parted"
NODE_LABEL = "nvidia.com/mig.config"


def mig_config_map(export: Exported, settings: Settings) -> Manifest:
    """In the operator's namespace, where alone it is looked for."""
    return manifest(
        "v1",
        "ConfigMap",
        MIG_MAP,
        namespace=settings.operator_namespace,
        component="mig",
        data={"config.yaml": yaml_text(mig_parted(export))},
    )


def mig_parted(export: Exported) -> Manifest:
    """The file: one configuration per layout, and `all-disabled`, which the operator falls back to."""
    configs: Manifest = {"all-disabled": [{"devices": "all", "mig-enabled": False}]}
    return {"version": "v1", "mig-configs": configs | {layout.name: _entries(layout) for layout in export.nodes}}


def _entries(layout: NodeLayout) -> list[Manifest]:
    """GPUs of equal content share an entry."""
    groups: dict[GpuContent, list[int]] = {}
    for index, content in enumerate(layout.gpus):
        groups.setdefault(content, []).append(index)
    return [_entry(content, members, len(layout.gpus)) for content, members in groups.items()]


def _entry(content: GpuContent, members: list[int], gpus: int) -> Manifest:
    entry: Manifest = {"devices": "all" if len(members) == gpus else members, "mig-enabled": content.mig}
    if content.mig:
        entry["mig-devices"] = dict(content.profiles)
    return entry
