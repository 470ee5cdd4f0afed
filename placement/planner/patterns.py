"""Patterns: every choice of profiles that can be added to what a GPU holds, each where it leaves the most usable rest.

Integer programs over GPUs choose how often each pattern is used, never which GPU gets which start: GPUs in the same
state are alike, and a pattern already says where its profiles go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from model_registry.catalogue import Product
from model_registry.geometry import Geometry, Placement
from placement.planner.fragmentation import Fragmentation

Counts = tuple[tuple[str, int], ...]
"""How many of each profile, sorted by name."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Profiles added to a GPU: how many of each, where, and F of the GPU with them."""

    counts: Counts
    placements: tuple[Placement, ...]
    fragmentation: int

    def count(self, profile: str) -> int:
        """How many of `profile` it adds."""
        return dict(self.counts).get(profile, 0)


class PatternBook:
    """All patterns on one product, enumerated when first asked for and kept."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self._measure = Fragmentation(product)
        self._all: dict[tuple[tuple[Placement, ...], tuple[str, ...]], tuple[Pattern, ...]] = {}
        self._maximal: dict[tuple[tuple[Placement, ...], tuple[str, ...]], tuple[Pattern, ...]] = {}

    def patterns(self, profiles: Iterable[str], kept: Iterable[Placement] = ()) -> tuple[Pattern, ...]:
        """Every choice of `profiles` by count that can be added to `kept`, none at all among them; sorted by counts."""
        key = (tuple(sorted(kept)), tuple(sorted(set(profiles))))
        if key not in self._all:
            self._all[key] = self._enumerate(*key)
        return self._all[key]

    def maximal(self, profiles: Iterable[str], kept: Iterable[Placement] = ()) -> tuple[Pattern, ...]:
        """Those patterns whose counts no other contains: enough where a slice too many does no harm."""
        key = (tuple(sorted(kept)), tuple(sorted(set(profiles))))
        if key not in self._maximal:
            found = self.patterns(key[1], key[0])
            counters = [Counter(dict(p.counts)) for p in found]
            self._maximal[key] = tuple(
                p for p, c in zip(found, counters, strict=True) if not any(c < other for other in counters)
            )
        return self._maximal[key]

    def best(self, counts: Mapping[str, int], kept: Iterable[Placement] = ()) -> Pattern | None:
        """The pattern that adds exactly `counts` to `kept`; None if they do not fit."""
        wanted = tuple(sorted((name, n) for name, n in counts.items() if n))
        return next((p for p in self.patterns(dict(wanted), kept) if p.counts == wanted), None)

    def _enumerate(self, kept: tuple[Placement, ...], profiles: tuple[str, ...]) -> tuple[Pattern, ...]:
        geometry = Geometry(self.product, profiles)
        taken = self._measure.taken(kept)
        best: dict[Counts, Pattern] = {}
        for added in geometry.additions(kept):
            counts = tuple(sorted(Counter(p.profile for p in added).items()))
            score = self._measure.of_mask(taken | self._measure.taken(added))
            rival = best.get(counts)
            if rival is None or (score, added) < (rival.fragmentation, rival.placements):
                best[counts] = Pattern(counts, added, score)
        return tuple(best[counts] for counts in sorted(best))
