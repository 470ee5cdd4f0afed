"""One model against every profile: what fits, what breaks where, and which is the smallest that does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from model_registry.catalogue import Product, ProfileInfo
from model_registry.model import EngineLimits, Footprint, ModelSpec, SliceFit
from model_registry.sizing.fit import fit
from model_registry.sizing.units import gib


@dataclass(frozen=True, slots=True)
class Row:
    """One profile of one product, and how the model fits it. `fit` is None where nobody has published its memory."""

    product: Product
    profile: ProfileInfo
    fit: SliceFit | None

    @property
    def fits(self) -> bool:
        """Whether the model runs there."""
        return self.fit is not None and self.fit.fits


def survey(spec: ModelSpec, footprint: Footprint, limits: EngineLimits, products: Iterable[Product]) -> tuple[Row, ...]:
    """The fit on every profile, in the catalogue's order. Profiles with the same memory share one calculation."""
    known: dict[int, SliceFit] = {}
    rows = []
    for product in products:
        for profile in product.profiles:
            rows.append(Row(product, profile, _fit(spec, footprint, limits, product, profile, known)))
    return tuple(rows)


def _fit(
    spec: ModelSpec,
    footprint: Footprint,
    limits: EngineLimits,
    product: Product,
    profile: ProfileInfo,
    known: dict[int, SliceFit],
) -> SliceFit | None:
    memory = profile.memory_bytes
    if memory is None:
        return None
    if memory not in known:
        known[memory] = fit(spec, footprint, limits, memory_bytes=memory, profile=profile.name)
    return replace(known[memory], product=product.name, profile=profile.name)


def smallest(rows: Iterable[Row]) -> Row | None:
    """The smallest profile that fits: least memory, then fewest compute slices, variants last."""
    return min((r for r in rows if r.fits), key=_order, default=None)


def _order(row: Row) -> tuple[int, int, bool, str]:
    return row.profile.memory_bytes or 0, row.profile.g, not row.profile.is_base, row.profile.name


def verdict(rows: Sequence[Row], footprint: Footprint, limits: EngineLimits) -> str:
    """One sentence: what the model needs, and why the next smaller profile does not do."""
    measured = sorted((r for r in rows if r.fit is not None and r.profile.is_base), key=_order)
    if not measured:
        return "none of these profiles has a published memory size; ask the driver with `sliceway slices`"
    found = smallest(measured)
    if found is None:
        largest = measured[-1]
        assert largest.fit is not None
        return f"fits none of them: on {largest.profile.name} {largest.fit.reason}"
    below = [r for r in measured if not r.fits and _order(r) < _order(found)]
    assert found.fit is not None
    if not below:
        return f"needs no more than {found.profile.name}, the smallest: {found.fit.reason.removeprefix('fits with ')}"
    near = below[-1]
    assert near.fit is not None
    return f"needs {found.profile.name}: on {near.profile.name} {_why(near.fit, footprint, limits)}"


def _why(near: SliceFit, footprint: Footprint, limits: EngineLimits) -> str:
    """Why a profile does not do, in the words of its breaking term."""
    if near.breaking_term != "kv_cache":
        return near.reason
    spare = "" if near.available_kv_bytes < footprint.kv_bytes_per_request else " and the estimate's margin"
    return (
        f"weights, activations and graphs leave {gib(max(near.available_kv_bytes, 0))}, "
        f"one request of {limits.max_model_len:,} tokens needs {gib(footprint.kv_bytes_per_request)}{spare}"
    )
