"""The MIG catalogue: which GPU products can be cut, into which profiles, and how sure each figure is.

The data lies in `data/catalogue.json`; this module gives it types and finds things in it by the names that people,
NVML and PCI use. A table cannot know a machine: where a driver answers, its answer wins, and `differences` tells where
the two disagree. Profile names and ids mean something per product only, so nothing here is keyed by profile alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

from model_registry.errors import UnknownProduct, UnknownProfile

MIB = 2**20
# As many tell a generation: h100, a30, b200. Fewer are no word that anybody began.
_FAMILY_LETTERS = 3


class Confidence(StrEnum):
    """How a figure is known, from best to worst."""

    MEASURED = "measured"  # printed by hardware, in a published transcript
    DOCUMENTED = "documented"  # in a vendor's document, header or software
    INFERRED = "inferred"  # follows from other figures or from the product's family
    WEAK = "weak"  # one third-party source or fixture, or sources that disagree
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Figure:
    """How sure one number of the catalogue is, and who says so."""

    confidence: Confidence
    source: str


@dataclass(frozen=True, slots=True)
class Engines:
    """Fixed-function engines that an instance of a profile gets."""

    copy: int = 0
    decoder: int = 0
    encoder: int = 0
    jpeg: int = 0
    ofa: int = 0


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """One GPU instance profile of one product.

    `name` is a label: `memory_bytes` is what an instance really has, None where nobody has published it.
    `id` is NVML's `info.id`, `nvml_enum` the constant that asks for it. `g` counts compute slices.
    `placements` are the memory slices at which an instance may start, `memory_slices` how many it takes from there.
    """

    name: str
    id: int | None
    nvml_enum: int
    g: int
    memory_bytes: int | None
    sm_count: int | None
    memory_slices: int | None
    placements: tuple[int, ...]
    max_instances: int
    media_extensions: bool = False
    gfx: bool = False
    engines: Engines = Engines()
    p2p: bool = False
    alternate_names: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict, hash=False)

    @property
    def variant(self) -> str:
        """What follows the memory in the name: "", "+me", "+me.all", "-me" or "+gfx"."""
        return re.sub(r"^\d+g\.\d+gb", "", self.name)

    @property
    def is_base(self) -> bool:
        """Whether this is a profile without media or graphics variant."""
        return not self.variant

    @property
    def plannable(self) -> bool:
        """Whether starts and size are known, so that a layout can be planned without the driver."""
        return bool(self.placements) and self.memory_slices is not None

    def confidence(self, figure: str) -> Confidence:
        """How sure `figure` is: `id`, `memory_bytes`, `sm_count`, `placements` or `max_instances`."""
        known = self.figures.get(figure)
        return known.confidence if known else Confidence.UNKNOWN

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway profiles --json`."""
        return {
            "name": self.name,
            "id": self.id,
            "memory_bytes": self.memory_bytes,
            "sm_count": self.sm_count,
            "memory_slices": self.memory_slices,
            "placements": list(self.placements),
            "max_instances": self.max_instances,
            "confidence": {name: figure.confidence.value for name, figure in self.figures.items()},
        }


@dataclass(frozen=True, slots=True)
class Product:
    """A GPU product that MIG can cut. Two products are equal if all their figures are.

    `aliases` are its NVML names first, then short names and what else it is called.
    `total_memory_bytes` is the whole GPU with MIG off. `min_driver` is the first driver that cuts it.
    """

    name: str
    aliases: tuple[str, ...]
    memory_slices: int | None
    compute_slices: int
    total_memory_bytes: int | None
    sm_count: int | None
    compute_capability: str
    min_driver: str | None
    profiles: tuple[ProfileInfo, ...]
    architecture: str = ""
    short_names: tuple[str, ...] = ()
    nvml_names: tuple[str, ...] = ()
    pci_device_ids: tuple[str, ...] = ()
    mode_change_needs_reset: bool = False
    quirks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def base_profiles(self) -> tuple[ProfileInfo, ...]:
        """Profiles without media or graphics variants."""
        return tuple(p for p in self.profiles if p.is_base)

    def cut_by(self, driver: str) -> bool:
        """Whether this driver version is new enough to cut the product."""
        return self.min_driver is None or _version(driver) >= _version(self.min_driver)

    def profile(self, name: str) -> ProfileInfo:
        """The profile called `name`, also by a name that other drivers give it.

        Raises UnknownProfile with the nearest names.
        """
        for profile in self.profiles:
            if name == profile.name or name in profile.alternate_names:
                return profile
        names = [p.name for p in self.profiles]
        raise UnknownProfile(
            f"{self.name} has no profile {name!r}", remedy=f"{_nearest(name, names)}All of them: {', '.join(names)}."
        )

    def profile_by_id(self, profile_id: int) -> ProfileInfo | None:
        """The profile with NVML's `profile_id`; ids mean nothing without the product."""
        return next((p for p in self.profiles if p.id == profile_id), None)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All products, and the finding of one by any of its names."""

    products: tuple[Product, ...]
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def product(self, name: str) -> Product:
        """The product called `name`: the catalogue's name, a short name, NVML's name, or a PCI device id.

        Upper and lower case, spaces, dashes and a leading "NVIDIA" make no difference. PCI ids are taken as `2330`,
        `0x233010DE`, `10de:2330` or `10de2330`. Raises UnknownProduct with the nearest names, or, for a name that
        several products begin with (`h100`), with all of these.
        """
        wanted = _key(name)
        for product in self.products:
            if any(wanted == _key(alias) for alias in (product.name, *product.aliases)):
                return product
        if (device := _pci_device(name)) and (found := self.by_pci(device)):
            return found
        raise self._unknown(name, wanted)

    def by_pci(self, device_id: int | str) -> Product | None:
        """The product with this PCI device id (16 bits, or 32 with NVIDIA's vendor id as NVML gives it)."""
        device = (
            f"{device_id >> 16 if device_id > 0xFFFF else device_id:04X}" if isinstance(device_id, int) else device_id
        )
        return next((p for p in self.products if device.upper() in p.pci_device_ids), None)

    def identify(self, *, nvml_name: str, pci_device_id: int, total_memory_bytes: int | None) -> Product | None:
        """The product of a GPU that a driver reports; None where the catalogue has none that is like it.

        The PCI id is asked first, then the name. A GPU whose memory is more than 5% off the table is another product
        under a known name (the H20 comes with 96 and 141 GB) and is not identified; None skips that check.
        """
        found = self.by_pci(pci_device_id) or next(
            (p for p in self.products if any(_key(nvml_name) == _key(n) for n in p.nvml_names)), None
        )
        if found is None or found.total_memory_bytes is None or total_memory_bytes is None:
            return found
        return found if abs(total_memory_bytes / found.total_memory_bytes - 1) <= 0.05 else None

    def _unknown(self, name: str, wanted: str) -> UnknownProduct:
        short = {p.name: p.short_names[0] for p in self.products}
        several = self._beginning_with(wanted)
        if len(several) > 1:
            return UnknownProduct(
                f"{name!r} could be any of {len(several)} products", remedy=f"Say which: {', '.join(several)}."
            )
        return UnknownProduct(
            f"there is no GPU product {name!r} in the MIG catalogue",
            remedy=f"{self._near(wanted)}All of them: {', '.join(short.values())}.",
        )

    def _beginning_with(self, key: str) -> list[str]:
        """The short names of the products that one of whose short names begins with `key`; none for the empty key."""
        begins = [[s for s in p.short_names if key and _key(s).startswith(key)] for p in self.products]
        return [names[0] for names in begins if names]

    def _near(self, wanted: str) -> str:
        """Whoever writes `h1000` means a card of the generation that the word begins with, though `a100-80` has as many letters
        in common.
        """
        for length in range(len(wanted), _FAMILY_LETTERS - 1, -1):
            if family := self._beginning_with(wanted[:length]):
                return f"Did you mean {' or '.join(family)}? "
        by_key = {_key(a): a for p in self.products for a in (p.name, *p.aliases)}
        return _nearest(wanted, by_key, labels=by_key)


def load_catalogue() -> Catalogue:
    """Read the catalogue from the package's data. A few milliseconds: callers keep what they get."""
    raw = json.loads(files("model_registry").joinpath("data/catalogue.json").read_text(encoding="utf-8"))
    return Catalogue(products=tuple(_product(p, raw["sources"]) for p in raw["products"]), sources=raw["sources"])


@cache
def profile_names() -> tuple[str, ...]:
    """Every name that a profile of any product has, by any driver, and `gpu` for a whole card; sorted."""
    profiles = (profile for product in load_catalogue().products for profile in product.profiles)
    return tuple(sorted({"gpu"} | {name for p in profiles for name in (p.name, *p.alternate_names)}))


def differences(table: Product, driver: Product) -> tuple[str, ...]:
    """Where what a driver says differs from the table, one sentence each. The driver is right.

    A figure that the table does not know is no difference.
    """
    known = {p.name: p for p in table.profiles} | {a: p for p in table.profiles for a in p.alternate_names}
    found = [f"{p.name} is not in the table" for p in driver.profiles if p.name not in known]
    for profile in driver.profiles:
        if expected := known.get(profile.name):
            found += _profile_differences(expected, profile)
    return tuple(found)


def _profile_differences(table: ProfileInfo, driver: ProfileInfo) -> Iterable[str]:
    for name in ("id", "g", "memory_bytes", "sm_count", "memory_slices", "placements", "max_instances"):
        expected, got = getattr(table, name), getattr(driver, name)
        if expected not in (None, ()) and got not in (None, ()) and expected != got:
            yield f"{driver.name}: {name} is {got}, the table says {expected} ({table.confidence(name).value})"


def _product(raw: Mapping[str, Any], sources: Mapping[str, str]) -> Product:
    return Product(
        name=raw["name"],
        aliases=(*raw["nvml_names"], *raw["short_names"], *raw["other_names"]),
        memory_slices=raw["memory_slices"],
        compute_slices=raw["compute_slices"],
        total_memory_bytes=_mib(raw["total_memory_mib"]),
        sm_count=raw["sm_count"],
        compute_capability=raw["compute_capability"],
        min_driver=raw["min_driver"],
        profiles=tuple(_profile(p, sources) for p in raw["profiles"]),
        architecture=raw["architecture"],
        short_names=tuple(raw["short_names"]),
        nvml_names=tuple(raw["nvml_names"]),
        pci_device_ids=tuple(raw["pci_device_ids"]),
        mode_change_needs_reset=raw["mode_change_needs_reset"],
        quirks=tuple(raw["quirks"]),
        notes=tuple(raw["notes"]),
    )


def _profile(raw: Mapping[str, Any], sources: Mapping[str, str]) -> ProfileInfo:
    return ProfileInfo(
        name=raw["name"],
        id=raw["id"],
        nvml_enum=raw["nvml_enum"],
        g=raw["g"],
        memory_bytes=_mib(raw["memory_mib"]),
        sm_count=raw["sm_count"],
        memory_slices=raw["memory_slices"],
        placements=tuple(raw["placements"]),
        max_instances=raw["max_instances"],
        media_extensions=raw["media_extensions"],
        gfx=raw["gfx"],
        engines=Engines(**raw["engines"]),
        p2p=raw["p2p"],
        alternate_names=tuple(raw.get("alternate_names", ())),
        figures={name: Figure(Confidence(how), sources[source]) for name, (how, source) in raw["figures"].items()},
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _mib(value: int | None) -> int | None:
    return None if value is None else value * MIB


def _key(name: str) -> str:
    """A name without what people write differently: case, separators, and the maker's name."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")


def _pci_device(text: str) -> str | None:
    """The device half of a PCI id in any of its spellings, as four upper-case hex digits."""
    match = re.fullmatch(r"(?:0x)?([0-9a-f]{4})(?:10de)?|(?:0x)?10de:?([0-9a-f]{4})", text.strip().lower())
    return (match[1] or match[2]).upper() if match else None


def _nearest(name: str, names: Iterable[str], labels: Mapping[str, str] | None = None) -> str:
    near = [labels[n] if labels else n for n in get_close_matches(name, list(names), n=3, cutoff=0.5)]
    return f"Did you mean {' or '.join(near)}? " if near else ""
