"""mig-parted's configuration file, read and written with the meaning it has there.

The format holds counts, no starts. Of several entries that name one GPU the last counts: mig-parted applies them in
order. Source: NVIDIA/mig-parted api/spec/v1/spec.go and cmd/nvidia-mig-parted/assert/assert.go (bd7160f).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from model_registry.errors import ConfigError
from placement.gpus import GpuState
from placement.partition.rules import LayoutRule

VERSION = "v1"
_SHAPE = "Such a file begins with `version: v1` and holds `mig-configs:`; a configuration of sliceway needs no import."
_KEYS = ("device-filter", "devices", "mig-enabled", "mig-devices")
_SUBSYSTEM = re.compile(r"(0x[0-9A-Fa-f]{8}):.*")


def export_mig_parted(gpus: Sequence[GpuState], label: str = "current") -> dict[str, object]:
    """The file's content with one configuration, `label`: one entry for each set of GPUs that hold the same.

    GPUs of different products get a device filter, as mig-parted's own export does.
    """
    several = len({g.pci_device_id for g in gpus}) > 1
    entries: list[tuple[dict[str, Any], list[GpuState]]] = []
    for gpu in gpus:
        content = {"mig-enabled": gpu.mig, "mig-devices": _counts(gpu)}
        for known, members in entries:
            if known == content and members[0].pci_device_id == gpu.pci_device_id:
                members.append(gpu)
                break
        else:
            entries.append((content, [gpu]))
    return {
        "version": VERSION,
        "mig-configs": {label: [_entry(content, members, gpus, several) for content, members in entries]},
    }


def _counts(gpu: GpuState) -> dict[str, int]:
    return dict(sorted(Counter(i.profile for i in gpu.instances).items())) if gpu.mig else {}


def _entry(
    content: Mapping[str, Any], members: Sequence[GpuState], gpus: Sequence[GpuState], several: bool
) -> dict[str, Any]:
    same_kind = [g for g in gpus if not several or g.pci_device_id == members[0].pci_device_id]
    devices = "all" if len(members) == len(same_kind) else [g.index for g in members]
    filtered = {"device-filter": [f"0x{members[0].pci_device_id:08X}"]} if several else {}
    return {**filtered, "devices": devices, **content}


def import_mig_parted(path: Path, label: str | None = None) -> tuple[LayoutRule, ...]:
    """The configuration called `label` as rules; the only one, if there is one only.

    Raises ConfigError, with the place in the file, for what mig-parted would refuse too, and for compute instances
    smaller than their GPU instance, which no engine is put on.
    """
    configs = _read(path)
    if label is None and len(configs) == 1:
        label = next(iter(configs))
    if label is None or label not in configs:
        raise ConfigError(
            f"{path} holds several configurations" if label is None else f"there is no configuration {label!r}",
            where=str(path),
            remedy=f"Choose one with --label: {', '.join(configs)}.",
        )
    entries = configs[label]
    if not isinstance(entries, list) or not entries:
        raise ConfigError("must be a list of entries", where=f"{path}: mig-configs.{label}")
    return tuple(_rule(entry, f"{path}: mig-configs.{label}[{i}]") for i, entry in enumerate(entries))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe", pure=True).load(StringIO(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            f"it cannot be read: {error.strerror}", where=str(path), remedy="Name a mig-parted file."
        ) from error
    except (UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"it is no YAML: {error}", where=str(path), remedy=_SHAPE) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ConfigError(f"it is no mig-parted file of version {VERSION}", where=str(path), remedy=_SHAPE)
    unknown = sorted(set(content) - {"version", "mig-configs"})
    configs = content.get("mig-configs")
    if unknown or not isinstance(configs, dict) or not configs:
        raise ConfigError(
            f"unknown key {unknown[0]!r}" if unknown else "it needs `mig-configs` with at least one configuration",
            where=str(path),
            remedy=_SHAPE,
        )
    return {str(name): entries for name, entries in configs.items()}


def _rule(entry: Any, where: str) -> LayoutRule:
    if not isinstance(entry, dict):
        raise ConfigError("must be a mapping", where=where)
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise ConfigError(f"unknown key {unknown[0]!r}", where=where, remedy=f"There are {', '.join(_KEYS)}.")
    for key in ("devices", "mig-enabled"):
        if key not in entry:
            raise ConfigError(f"it needs `{key}`", where=where)
    if not isinstance(entry["mig-enabled"], bool):
        raise ConfigError("must be true or false", where=f"{where}.mig-enabled")
    try:
        return LayoutRule(
            gpus=_devices(entry["devices"], where),
            products=_filters(entry.get("device-filter"), where),
            mig=entry["mig-enabled"],
            layout=_layout(entry, where),
        )
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(str(detail["msg"]).removeprefix("Value error, "), where=where) from error


def _devices(value: Any, where: str) -> Any:
    if value == "all":
        return "all"
    if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return tuple(value)
    raise ConfigError("must be `all` or a list of indices", where=f"{where}.devices")


def _filters(value: Any, where: str) -> tuple[str, ...]:
    filters = [value] if isinstance(value, str) and value else value or []
    if not isinstance(filters, list) or not all(isinstance(f, str) for f in filters):
        raise ConfigError("must be a PCI id like 0x233010DE, or a list of them", where=f"{where}.device-filter")
    for one in filters:
        if match := _SUBSYSTEM.fullmatch(one):
            raise ConfigError(
                f"{one!r} tells boards of one product apart, which layouts here cannot",
                where=f"{where}.device-filter",
                remedy=f"Write {match[1]!r}, or name the GPUs by index under `devices`.",
            )
    return tuple(filters)


def _layout(entry: Mapping[str, Any], where: str) -> dict[str, int]:
    devices = entry.get("mig-devices")
    if devices is None and entry["mig-enabled"]:
        raise ConfigError("it needs `mig-devices` where mig-enabled is true", where=where)
    if devices and not entry["mig-enabled"]:
        raise ConfigError("it has `mig-devices`, and mig-enabled is false", where=where)
    counts: Counter[str] = Counter()
    if not isinstance(devices or {}, dict):
        raise ConfigError("must be a mapping of profiles to numbers", where=f"{where}.mig-devices")
    for name, count in (devices or {}).items():
        place = f"{where}.mig-devices.{name}"
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"must be a number of instances, not {count!r}", where=place)
        counts[_whole(str(name), place)] += count
    return dict(counts)


def _whole(name: str, where: str) -> str:
    """The profile, with `7c.` of `7c.7g.80gb` taken off; a part of an instance is refused."""
    match = re.fullmatch(r"(\d+)c\.((\d+)g\..*)", name)
    if match is None:
        return name
    if match[1] != match[3]:
        raise ConfigError(
            f"{name!r} is a part of a GPU instance; its neighbours there would share its memory",
            where=where,
            remedy=f"Write {match[2]!r}: every engine gets a whole instance.",
        )
    return match[2]
