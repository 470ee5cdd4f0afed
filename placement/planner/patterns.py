"""Patterns: every choice of profiles that can be added to what a GPU holds, each where it leaves the most usable rest.

Integer programs over GPUs choose how often each pattern is used, never which GPU gets which start: GPUs in the same
state are alike, and a pattern already says where its profiles go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import le

from model_registry.catalogue import Product
from model_registry.geometry import Geometry, Placement
from placement.planner.fragmentation import Fragmentation

Counts = tuple[tuple[str, int], ...]
"""How many of each profile, sorted by name."""


_Key = tuple[tuple[Placement, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Profiles added to a GPU: how many of each, where, and F of the GPU with them. `mask` has a bit for each slice taken."""

    counts: Counts
    placements: tuple[Placement, ...]
    fragmentation: int
    mask: int = 0

    def count(self, profile: str) -> int:
        """How many of `profile` it adds."""
        return dict(self.counts).get(profile, 0)


class PatternBook:
    """All patterns on one product, enumerated when first asked for and kept."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self._measure = Fragmentation(product)
        self._placed: dict[_Key, tuple[Pattern, ...]] = {}
        self._all: dict[_Key, tuple[Pattern, ...]] = {}
        self._maximal: dict[_Key, tuple[Pattern, ...]] = {}

    def placed(self, profiles: Iterable[str], kept: Iterable[Placement] = ()) -> tuple[Pattern, ...]:
        """Every way to add `profiles` to `kept`, also those that differ only in their starts; the best of equals first."""
        key = (tuple(sorted(kept)), tuple(sorted(set(profiles))))
        if not key[0]:
            return _on_an_empty_gpu(self.product, key[1])
        if key not in self._placed:
            self._placed[key] = _enumerated(self._measure, *key)
        return self._placed[key]

    def patterns(self, profiles: Iterable[str], kept: Iterable[Placement] = ()) -> tuple[Pattern, ...]:
        """Every choice of `profiles` by count that can be added to `kept`, none at all among them; sorted by counts."""
        key = (tuple(sorted(kept)), tuple(sorted(set(profiles))))
        if key not in self._all:
            first: dict[Counts, Pattern] = {}
            for pattern in self.placed(key[1], key[0]):
                first.setdefault(pattern.counts, pattern)
            self._all[key] = tuple(first.values())
        return self._all[key]

    def maximal(self, profiles: Iterable[str], kept: Iterable[Placement] = ()) -> tuple[Pattern, ...]:
        """Those patterns whose counts no other contains: enough where a slice too many does no harm."""
        key = (tuple(sorted(kept)), tuple(sorted(set(profiles))))
        if key not in self._maximal:
            found = self.patterns(key[1], key[0])
            largest = maximal([p.counts for p in found])
            self._maximal[key] = tuple(p for p in found if p.counts in largest)
        return self._maximal[key]

    def best(self, counts: Mapping[str, int], kept: Iterable[Placement] = ()) -> Pattern | None:
        """The pattern that adds exactly `counts` to `kept`; None if they do not fit."""
        wanted = tuple(sorted((name, n) for name, n in counts.items() if n))
        return next((p for p in self.patterns(dict(wanted), kept) if p.counts == wanted), None)


@lru_cache(maxsize=32)
def _on_an_empty_gpu(product: Product, profiles: tuple[str, ...]) -> tuple[Pattern, ...]:
    """What goes on an empty GPU: every plan asks for it, and again for every change that it tries out."""
    return _enumerated(Fragmentation(product), (), profiles)


def _enumerated(measure: Fragmentation, kept: tuple[Placement, ...], profiles: tuple[str, ...]) -> tuple[Pattern, ...]:
    """Every pattern of `profiles` beside `kept`, the best of equals first."""
    taken = measure.taken(kept)
    found = []
    for added in Geometry(measure.product, profiles).additions(kept):
        mask = measure.taken(added)
        found.append(Pattern(counted(added), added, measure.of_mask(taken | mask), mask))
    return tuple(sorted(found, key=lambda p: (p.counts, p.fragmentation, p.placements)))


def counted(placements: Iterable[Placement]) -> Counts:
    """How many of each profile these are."""
    counts: dict[str, int] = {}
    for placement in placements:
        counts[placement.profile] = counts.get(placement.profile, 0) + 1
    return tuple(sorted(counts.items()))


def maximal(choices: Iterable[Counts]) -> Collection[Counts]:
    """Those that no other contains."""
    names = sorted({name for counts in choices for name, _ in counts})
    vectors = {counts: tuple(dict(counts).get(name, 0) for name in names) for counts in choices}
    found: dict[Counts, tuple[int, ...]] = {}
    # The larger first: what contains another one has more in all.
    for counts, mine in sorted(vectors.items(), key=lambda item: (-sum(item[1]), item[0])):
        if not any(all(map(le, mine, other)) for other in found.values()):
            found[counts] = mine
    return found.keys()
