"""Describes a simulated machine for the C library: everything particular to a product comes from the catalogue.

The description is lines of numbers and names. Placements are listed in the order in which a driver tries them when it is
left to choose: first those that the fewest placements of any profile overlap, then the lowest start. That rule gives what
the MIG User Guide shows of an A100: 1g at 6, 4, 5, 0, 1, 2, 3; 2g at 4, 0, 2; 3g at 4, 0; and with it the failure of
1g, 1g, 2g, 3g in that order.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model_registry.catalogue import MIB, Catalogue, Product, ProfileInfo
from model_registry.geometry import Geometry, Option
from placement.errors import WrongFleet

Privilege = Literal["none", "monitor", "config", "root"]
PRIVILEGES: tuple[Privilege, ...] = ("none", "monitor", "config", "root")
_ARCHITECTURES = {"Ampere": 7, "Hopper": 9, "Blackwell": 10, "Blackwell Ultra": 10}
_MEDIA = {"": 0, "+gfx": 0, "+me": 1, "+me.all": 2, "-me": 3}
_BRAND_NVIDIA, _BRAND_NVIDIA_RTX = 14, 13
_NO_NUMA_NODE = 0xFFFFFFFF
MAX_GPUS = 32


@dataclass(frozen=True, slots=True)
class PlainGpu:
    """A GPU without MIG, for fleets that have some. The default is an NVIDIA L4."""

    name: str = "NVIDIA L4"
    memory_bytes: int = 23034 * MIB
    compute_capability: str = "8.9"
    pci_device_id: str = "27B8"


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What of a machine is not its GPUs.

    `gi_ids`: `tree` numbers GPU instances as published transcripts show, `sequential` never the same way twice.
    `uuids`: whether a MIG device made again gets a `fresh` UUID, or the `same` one at the same place: both are reported.
    `memory_bytes` overrides single placements (`{"3g.20gb@0": ...}`): on real GPUs two slices of one profile may differ.
    `cpus` are the cores next to each GPU and `numa_nodes` the host's memory nodes; GPUs take them in turn, so one of each
    stands for all.
    """

    driver: str = "610.43.02"
    cuda: int = 13010
    mig: bool = False
    privilege: Privilege = "root"
    gi_ids: Literal["tree", "sequential"] = "tree"
    uuids: Literal["fresh", "same"] = "fresh"
    seed: str = "sliceway"
    persistence: bool = True
    cpus: Sequence[Sequence[int]] = ()
    numa_nodes: Sequence[int] = ()
    memory_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Description:
    """A machine as the C library reads it, and what had to be assumed because nobody has published it."""

    text: str
    assumptions: tuple[str, ...]


def parse_fleet(catalogue: Catalogue, text: str) -> tuple[tuple[Product | PlainGpu, int], ...]:
    """`h100-sxm:8`, or several like `h100-sxm:4,a30:2,plain`; a product alone means one of it.

    `plain` is a GPU without MIG. Raises UnknownProduct, or WrongFleet for a count that makes no sense or a product
    whose geometry nobody has published.
    """
    fleet: list[tuple[Product | PlainGpu, int]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, colon, count = part.partition(":")
        if colon and not re.fullmatch(r"[1-9]\d*", count):
            raise WrongFleet(
                f"{part!r}: {count!r} is no number of GPUs", remedy="Write product:count, like h100-sxm:8."
            )
        product = PlainGpu() if name == "plain" else catalogue.product(name)
        if isinstance(product, Product):
            _simulable(product)
        fleet.append((product, int(count or 1)))
    total = sum(count for _, count in fleet)
    if not 1 <= total <= MAX_GPUS:
        raise WrongFleet(
            f"a simulated machine has 1 to {MAX_GPUS} GPUs, not {total}", remedy="Write product:count, like h100-sxm:8."
        )
    return tuple(fleet)


def _simulable(product: Product) -> None:
    if product.memory_slices is None or not all(p.plannable and p.id is not None for p in product.profiles):
        raise WrongFleet(
            f"{product.name} cannot be simulated: where its profiles start is not published",
            remedy="Take a product that has layouts: sliceway profiles --gpu NAME shows them.",
        )


def describe(fleet: Sequence[tuple[Product | PlainGpu, int]], options: MachineOptions) -> Description:
    """The description of a machine with these GPUs. The same arguments give the same text, UUIDs included."""
    assumptions: list[str] = []
    lines = [f"driver {options.driver}", f"nvml 13.{options.driver}", f"options {options.cuda} {_options(options)}"]
    for product, _ in fleet:
        lines += _plain(product) if isinstance(product, PlainGpu) else _product(product, options, assumptions)
    numbers = [index for index, (_, count) in enumerate(fleet) for _ in range(count)]
    for index, number in enumerate(numbers):
        lines += _gpu(index, number, fleet[number][0], options)
    return Description("\n".join(lines) + "\n", tuple(assumptions))


def _options(options: MachineOptions) -> str:
    privilege = PRIVILEGES.index(options.privilege)
    return f"{privilege} {int(options.gi_ids == 'sequential')} {int(options.uuids == 'same')}"


def _plain(gpu: PlainGpu) -> list[str]:
    major, minor = gpu.compute_capability.split(".")
    return [
        f"product {_pci(gpu.pci_device_id)} 8 {major} {minor} {_BRAND_NVIDIA} 0 0 0 0 0 {gpu.memory_bytes // MIB} 512 0 {gpu.name}"
    ]


def _product(product: Product, options: MachineOptions, assumptions: list[str]) -> list[str]:
    major, minor = product.compute_capability.split(".")
    memory = product.total_memory_bytes
    if memory is None:
        memory = max(_gigabytes(p) for p in product.profiles) * 1000 * MIB
        assumptions.append(f"{product.name}: {memory // MIB} MiB in all")
    brand = _BRAND_NVIDIA_RTX if "RTX" in product.name else _BRAND_NVIDIA
    cores = (product.sm_count or 0) * (64 if product.compute_capability == "8.0" else 128)
    lines = [
        f"product {_pci(product.pci_device_ids[0])} {_ARCHITECTURES[product.architecture]} {major} {minor} {brand} {cores} "
        f"{product.memory_slices} {product.compute_slices} {int(supports_mig(product, options.driver))} "
        f"{int(product.mode_change_needs_reset)} {memory // MIB} 512 13 {product.nvml_names[0]}"
    ]
    geometry = Geometry.with_variants(product)
    for profile in product.profiles:
        lines += _profile(product, profile, geometry, options, assumptions)
    return lines


def _profile(
    product: Product, profile: ProfileInfo, geometry: Geometry, options: MachineOptions, assumptions: list[str]
) -> Iterator[str]:
    memory, sms = profile.memory_bytes, profile.sm_count
    if memory is None:
        memory = _gigabytes(profile) * 9 // 10 * 1024 * MIB
        assumptions.append(f"{product.name} {profile.name}: {memory // MIB} MiB")
    if sms is None:
        sms = 16 * profile.g
        assumptions.append(f"{product.name} {profile.name}: {sms} SMs")
    e = profile.engines
    yield (
        f"profile {profile.id} {profile.nvml_enum} {profile.g} {profile.memory_slices} {sms} {profile.max_instances} "
        f"{_MEDIA[profile.variant]} {e.copy} {e.decoder} {e.encoder} {e.jpeg} {e.ofa} {int(profile.p2p)} {int(profile.gfx)} "
        f"{memory // MIB} {profile.name}"
    )
    for option in drivers_order(geometry, profile):
        here = options.memory_bytes.get(str(option.placement), memory)
        yield f"place {option.placement.start} {here // MIB}"


def drivers_order(geometry: Geometry, profile: ProfileInfo) -> list[Option]:
    """The placements of a profile in the order in which a driver tries them."""
    mine = [o for o in geometry.options if o.profile.name == profile.name]
    return sorted(mine, key=lambda o: (sum(bool(o.mask & other.mask) for other in geometry.options), o.placement.start))


def supports_mig(product: Product, driver: str) -> bool:
    """Whether this driver knows how to cut the product."""
    return product.min_driver is None or _version(driver) >= _version(product.min_driver)


def _gpu(index: int, number: int, product: Product | PlainGpu, options: MachineOptions) -> Iterator[str]:
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"sliceway-simulator/{options.seed}/{index}")
    mig = options.mig and isinstance(product, Product) and supports_mig(product, options.driver)
    node = options.numa_nodes[index % len(options.numa_nodes)] if options.numa_nodes else _NO_NUMA_NODE
    yield (
        f"gpu {number} GPU-{identity} {1_320_000_000_000 + index} {index} 0 {4 + 7 * index:x} {node} {int(mig)} "
        f"{int(options.persistence)} {30 + index % 8} {70_000 + 1_000 * index}"
    )
    if options.cpus:
        yield "cpus " + " ".join(map(str, options.cpus[index % len(options.cpus)]))


def _gigabytes(profile: ProfileInfo) -> int:
    match = re.search(r"\.(\d+)gb", profile.name)
    return int(match[1]) if match else 0


def _pci(device: str) -> str:
    return f"{device}10DE"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
