"""Every packing problem of up to two GPUs: what they may hold at the start, and every demand on them, by looking at them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement

from model_registry.catalogue import Product
from model_registry.geometry import Layout, Placement
from placement.planner.brute_force import beside

Vector = tuple[int, ...]
"""How many of each profile, in the order of `SmallPackings.profiles`."""


class SmallPackings:
    """Everything that two GPUs of one product can hold, in these profiles; without, in all that have published starts.

    GPUs in use that leave room for the same profiles are alike to whoever packs: one of each is looked at.
    """

    def __init__(self, product: Product, profiles: Collection[str] | None = None) -> None:
        self.product = product
        named = profiles if profiles is not None else [p.name for p in product.base_profiles]
        self.profiles = tuple(p.name for p in product.profiles if p.name in named and p.plannable)
        self._candidates = sorted(
            Placement(start, name) for name in self.profiles for start in product.profile(name).placements
        )
        self._room = {held: self._beside(held) for held in beside(product, (), self._candidates)}
        alike: dict[Collection[Vector], tuple[Placement, ...]] = {}
        for held in sorted(self._room, key=lambda h: (len(h), h)):
            alike.setdefault(self._room[held], held)
        self._states = tuple(held for held in alike.values() if held)

    def starts(self) -> Iterator[tuple[Layout, ...]]:
        """GPUs in use at the start: none, one, or two, in every state that makes a difference."""
        for count in range(3):
            for chosen in combinations_with_replacement(self._states, count):
                yield tuple(Layout(self.product, held) for held in chosen)

    def demands(self, start: Sequence[Layout]) -> dict[Vector, int | None]:
        """The fewest GPUs for every demand that two can hold, and None for those that one slice more puts beyond two."""
        reached = {self._nothing: len(start)}
        for layout in start:
            reached = {_sum(a, b): len(start) for a in reached for b in self._room[layout.placements]}
        for gpus in range(len(start) + 1, 3):
            for vector in [_sum(a, b) for a in reached for b in self._room[()]]:
                reached.setdefault(vector, gpus)
        more: dict[Vector, int | None] = dict(reached)
        for vector in reached:
            for n in range(len(self.profiles)):
                more.setdefault((*vector[:n], vector[n] + 1, *vector[n + 1 :]))
        return more

    def named(self, demand: Vector) -> Mapping[str, int]:
        """A demand by the names of the profiles."""
        return dict(zip(self.profiles, demand, strict=True))

    @property
    def _nothing(self) -> Vector:
        return (0,) * len(self.profiles)

    def _beside(self, held: Sequence[Placement]) -> Collection[Vector]:
        """Every choice of profiles that can be added."""
        counts = (Counter(p.profile for p in added) for added in beside(self.product, held, self._candidates))
        return frozenset(tuple(c[name] for name in self.profiles) for c in counts)


def _sum(a: Vector, b: Vector) -> Vector:
    return tuple(map(sum, zip(a, b, strict=True)))
