"""How much of what a GPU has free can still be used: the fragmentation measure of arXiv 2511.18906.

F(GPU) looks at every profile that the number of free memory slices would admit, and counts the starts that the profile
has lost because one of their memory slices is taken, weighted by the memory slices it needs. An empty GPU and a full one
have F = 0: nothing is lost where nothing is free. Placing every newcomer where F grows least keeps large profiles
placeable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from model_registry.catalogue import Product
from model_registry.geometry import Geometry, Placement


@dataclass(frozen=True)
class Fragmentation:
    """F on one product, prepared for being asked often.

    `masks` holds the memory slices of every placement on the product, one bit each. Media and graphics variants do not
    count towards F: they start where their base profile does.
    """

    product: Product
    masks: Mapping[Placement, int] = field(init=False, repr=False, compare=False)
    _windows: tuple[tuple[int, tuple[int, ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        masks, windows = _prepared(self.product)
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "_windows", windows)

    def of(self, placements: Iterable[Placement]) -> int:
        """F of a GPU that holds these."""
        return self.of_mask(self.taken(placements))

    def taken(self, placements: Iterable[Placement]) -> int:
        """The memory slices that these take together, one bit each."""
        mask = 0
        for placement in placements:
            mask |= self.masks[placement]
        return mask

    def of_mask(self, mask: int) -> int:
        """F of a GPU with these memory slices taken, one bit each."""
        if not mask:
            return 0
        free = (self.product.memory_slices or 0) - mask.bit_count()
        lost = 0
        for size, windows in self._windows:
            if size <= free:
                for window in windows:
                    if window & mask:
                        lost += size
        return lost


@lru_cache(maxsize=64)
def _prepared(product: Product) -> tuple[Mapping[Placement, int], tuple[tuple[int, tuple[int, ...]], ...]]:
    """The memory slices of every placement on a product, and for each profile its size and those of its starts."""
    masks = {o.placement: o.mask for o in Geometry.with_variants(product).options}
    windows = tuple(
        (p.memory_slices or 0, tuple(masks[Placement(start, p.name)] for start in p.placements))
        for p in product.base_profiles
        if p.plannable
    )
    return masks, windows
