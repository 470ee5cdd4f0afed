"""What a driver says of a GPU's profiles, on top of the catalogue's table. The driver is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from model_registry.catalogue import Catalogue, Product, ProfileInfo
from model_registry.errors import UnknownProfile
from placement.nvml.access import MIB, bare_profile_name, or_none, profile_name, text

_SUFFIXES = {
    "+me": ("1_SLICE_REV1", "2_SLICE_REV1"),
    "+gfx": ("1_SLICE_GFX", "2_SLICE_GFX", "3_SLICE_GFX", "4_SLICE_GFX"),
    "-me": ("1_SLICE_NO_ME", "2_SLICE_NO_ME"),
    "+me.all": ("1_SLICE_ALL_ME", "2_SLICE_ALL_ME"),
}
"""What the profiles behind these constants are called, for drivers that do not tell names."""

# The instance count that NVML gives for these products is wrong; see mig-parted pkg/mig/discovery/discovery.go.
_WRONG_COUNTS = "nvml-instance-count-wrong"


def known_product(nvml: Any, handle: Any, name: str, memory_bytes: int | None, catalogue: Catalogue) -> Product | None:
    """The catalogue's product, or None.

    Without the GPU's memory (which takes privilege in MIG mode) two products under one name are told apart by the names
    of their profiles.
    """
    pci = or_none(nvml, lambda: int(nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId)) or 0
    product = catalogue.identify(nvml_name=name, pci_device_id=pci, total_memory_bytes=memory_bytes)
    if product is None or memory_bytes is not None:
        return product
    told = {bare_profile_name(text(getattr(info, "name", ""))) for info in _infos(nvml, handle)} - {None}
    known = {alias for p in product.profiles for alias in (p.name, *p.alternate_names)}
    return product if not told or told & known else None


def drivers_product(
    nvml: Any, handle: Any, name: str, memory_bytes: int | None, table: Product | None
) -> Product | None:
    """The GPU's profiles as the driver tells them, the table's figures where it does not; None if neither knows any.

    Where profiles may start is told to the privileged only; without privilege the table's starts stand.
    """
    profiles = tuple(
        _profile(nvml, handle, number, info, memory_bytes, table)
        for number, info in enumerate(_by_number(nvml, handle))
        if info is not None
    )
    if not profiles:
        return table
    memory_slices = max((max(p.placements) + (p.memory_slices or 0) for p in profiles if p.placements), default=None)
    if table is not None:
        return replace(table, profiles=profiles, memory_slices=memory_slices or table.memory_slices)
    return Product(
        name=name,
        aliases=(name,),
        memory_slices=memory_slices,
        compute_slices=max(p.g for p in profiles),
        total_memory_bytes=memory_bytes,
        sm_count=None,
        compute_capability="",
        min_driver=None,
        profiles=profiles,
        nvml_names=(name,),
    )


def _by_number(nvml: Any, handle: Any) -> Iterator[Any | None]:
    for number in range(nvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        yield next(
            (
                info
                for version in (2, 1)
                if (info := or_none(nvml, partial(_info, nvml, handle, number, version))) is not None
            ),
            None,
        )


def _info(nvml: Any, handle: Any, number: int, version: int) -> Any:
    return nvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, number, version=version)


def _infos(nvml: Any, handle: Any) -> Iterator[Any]:
    return (info for info in _by_number(nvml, handle) if info is not None)


def _profile(
    nvml: Any, handle: Any, number: int, info: Any, memory_bytes: int | None, table: Product | None
) -> ProfileInfo:
    name = bare_profile_name(text(getattr(info, "name", ""))) or _computed_name(nvml, number, info, memory_bytes, table)
    known = _known(table, name)
    starts, size = _starts(nvml, handle, info.id) or ((known.placements, known.memory_slices) if known else ((), None))
    trusted = known is not None and table is not None and _WRONG_COUNTS in table.quirks
    told = ProfileInfo(
        name=known.name if known else name,
        id=info.id,
        nvml_enum=number,
        g=info.sliceCount,
        memory_bytes=int(info.memorySizeMB) * MIB,
        sm_count=info.multiprocessorCount,
        memory_slices=size,
        placements=starts,
        max_instances=known.max_instances if known and trusted else info.instanceCount,
        media_extensions=name.endswith(("+me", "+me.all")),
        gfx=name.endswith("+gfx"),
    )
    if known is None:
        return told
    return replace(told, engines=known.engines, p2p=known.p2p, alternate_names=(*known.alternate_names, name))


def _known(table: Product | None, name: str) -> ProfileInfo | None:
    try:
        return table.profile(name) if table else None
    except UnknownProfile:
        return None


def _computed_name(nvml: Any, number: int, info: Any, memory_bytes: int | None, table: Product | None) -> str:
    """For drivers too old to tell names."""
    total = memory_bytes or (table.total_memory_bytes if table else None) or int(info.memorySizeMB) * MIB
    base = profile_name(info.sliceCount, int(info.memorySizeMB), total)
    constants = {getattr(nvml, f"NVML_GPU_INSTANCE_PROFILE_{c}", None): s for s, cs in _SUFFIXES.items() for c in cs}
    return base + constants.get(number, "")


def _starts(nvml: Any, handle: Any, profile_id: int) -> tuple[tuple[int, ...], int] | None:
    """Every start, free or not, and the size in memory slices; None without the privilege to ask."""
    count = nvml.c_uint()

    def read() -> Any:
        nvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile_id, None, nvml.byref(count))
        found = (nvml.c_nvmlGpuInstancePlacement_t * count.value)()
        nvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile_id, found, nvml.byref(count))
        return found

    found = or_none(nvml, read)
    if not found:
        return None
    return tuple(sorted(p.start for p in found)), int(found[0].size)
