"""Kinds of cards that a model can be put on, and the ways to cut each: what options are computed for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from model_registry.catalogue import Product, ProfileInfo
from model_registry.sizing.speed import Roof, card_roof, slice_roof
from placement.gpus import GpuState
from placement.planner.types import WHOLE_GPU

_COMPUTE_WEIGHT = 0.5
"""Of all compute slices, in memory slices: enough to tell profiles apart, not to weigh against memory."""


@dataclass(frozen=True, slots=True)
class Card:
    """One kind of GPU. `geometry` holds its MIG profiles, None where it cannot be cut; `memory_bytes` is the whole card's."""

    name: str
    geometry: Product | None = field(default=None, repr=False)
    memory_bytes: int | None = None

    @classmethod
    def of(cls, product: Product) -> Card:
        """As the catalogue has it."""
        return cls(product.name, product, product.total_memory_bytes)

    def places(self, also: Iterable[str] = ()) -> tuple[Place, ...]:
        """Its plain profiles whose starts are known, small ones first, those of `also` that are variants, and the whole card last."""
        wanted = set(also)
        cut = [
            Place(self.name, p.name, p.memory_bytes, p, self._share(p))
            for p in sorted(self.geometry.profiles if self.geometry else (), key=_size)
            if p.plannable and (p.is_base or p.name in wanted)
        ]
        return (*cut, Place(self.name, WHOLE_GPU, self.memory_bytes))

    def _share(self, profile: ProfileInfo) -> float:
        slices, product = profile.memory_slices or 0, self.geometry
        if product is None or not product.memory_slices:
            return 1.0
        # Of two profiles with the same memory the one with fewer compute slices leaves more.
        return (slices + _COMPUTE_WEIGHT * profile.g / product.compute_slices) / (
            product.memory_slices + _COMPUTE_WEIGHT
        )

    def roof(self, place: Place, *, fp8: bool) -> Roof | None:
        """What the place can do at best; None where nobody has published it."""
        if place.info is None or self.geometry is None:
            return card_roof(self.name, fp8=fp8)
        return slice_roof(self.geometry, place.info, fp8=fp8)


@dataclass(frozen=True, slots=True)
class Place:
    """One way to run on a card: a profile, or `gpu` for all of it. `memory_bytes` None: not published.

    `share` is the part of the card that it takes, by memory slices first.
    """

    product: str
    profile: str
    memory_bytes: int | None
    info: ProfileInfo | None = field(default=None, repr=False)
    share: float = 1.0

    @property
    def mig(self) -> bool:
        """Whether it is a slice."""
        return self.info is not None


def _size(profile: ProfileInfo) -> tuple[int, int, bool, str]:
    return profile.memory_slices or 0, profile.g, not profile.is_base, profile.name


def cards_of(gpus: Iterable[GpuState]) -> tuple[Card, ...]:
    """The kinds of cards among `gpus`, by name, with the driver's figures where it tells them.

    Of several cards of one product the least memory counts, so that what fits one fits all.
    """
    found: dict[str, Card] = {}
    for gpu in gpus:
        known = found.get(gpu.product)
        memory = min(gpu.usable_bytes, known.memory_bytes or gpu.usable_bytes) if known else gpu.usable_bytes
        found[gpu.product] = Card(gpu.product, gpu.geometry, memory)
    return tuple(found[name] for name in sorted(found))
