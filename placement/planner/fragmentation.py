"""How much of what a GPU has free can still be used: the fragmentation measure of arXiv 2511.18906.

F(GPU) looks at every profile that the number of free memory slices would admit, and counts the starts that the profile
has lost because one of their memory slices is taken, weighted by the memory slices it needs. An empty GPU and a full one
have F = 0: nothing is lost where nothing is free. Placing every newcomer where F grows least keeps large profiles
placeable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from model_registry.catalogue import Product
from model_registry.geometry import Placement, option_of


@dataclass(frozen=True)
class Fragmentation:
    """F on one product, prepared for being asked often. Media and graphics variants are left out: they start where
    their base profile does."""

    product: Product
    _windows: tuple[tuple[int, tuple[int, ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        windows = tuple(
            (p.memory_slices or 0, tuple(option_of(self.product, Placement(s, p.name)).mask for s in p.placements))
            for p in self.product.base_profiles
            if p.plannable
        )
        object.__setattr__(self, "_windows", windows)

    def of(self, placements: Iterable[Placement]) -> int:
        """F of a GPU that holds these."""
        mask = 0
        for placement in placements:
            mask |= option_of(self.product, placement).mask
        return self.of_mask(mask)

    def of_mask(self, mask: int) -> int:
        """F of a GPU with these memory slices taken, one bit each."""
        if not mask:
            return 0
        free = (self.product.memory_slices or 0) - mask.bit_count()
        return sum(
            size * sum(1 for window in windows if window & mask) for size, windows in self._windows if size <= free
        )
