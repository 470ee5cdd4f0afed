"""What one replica bears, as autoscaling counts with it: measured where a load test's figure counts, else estimated. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from model_registry.catalogue import load_catalogue
from model_registry.errors import SlicewayError
from model_registry.model import SliceFit
from model_registry.sizing.report import fp8_compute
from model_registry.sizing.speed import Roof, best_batch, card_roof, slice_roof
from placement.launch import SizedModel
from placement.slices import Slice, SliceKind
from placement.workload.measured import Measured, Where
from placement.workload.options import Subject, demand_of

Origin = Literal["measured", "estimated", "unknown"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests per second that one replica bears within its latencies, and where that comes from.

    None where nobody knows: then requests at once and latencies decide alone. `ignored` says why measurements did not count.
    """

    requests_per_second: float | None
    origin: Origin
    reason: str
    ignored: tuple[str, ...] = ()


UNKNOWN = Capacity(None, "unknown", "the model names no demand, so nobody knows how long its requests are")


def capacity_on(sized: SizedModel, target: Slice, fit: SliceFit, measured: Measured) -> Capacity:
    """What a replica of `sized` on `target` bears."""
    subject, demand = _subject(sized), demand_of(sized.config)
    where = where_of(target)
    told = measured.judged(str(sized.config.source), where, demand)
    if told.requests_per_second is not None:
        return Capacity(told.requests_per_second, "measured", f"measured on {where}", told.ignored)
    if subject is None or demand is None:
        unknown = UNKNOWN if sized.config.demand is None else _unsized(sized)
        return Capacity(None, "unknown", unknown.reason, told.ignored)
    roof = _roof(subject, target)
    if roof is None:
        return Capacity(None, "unknown", f"nobody has published how fast {where} is", told.ignored)
    speed = best_batch(subject.sized, subject.limits, fit, roof, demand)
    if speed is None:
        return Capacity(None, "unknown", f"by the estimate {where} is too slow for its slo", told.ignored)
    return Capacity(speed.requests_per_second, "estimated", f"estimated for {where}", told.ignored)


def together(capacities: Sequence[Capacity]) -> Capacity:
    """What a replica of a model bears on average over these slices; unknown if it is unknown of one."""
    if not capacities:
        return Capacity(None, "unknown", "it has no slice")
    rates = [c.requests_per_second for c in capacities if c.requests_per_second is not None]
    ignored = tuple(sorted({why for c in capacities for why in c.ignored}))
    if len(rates) < len(capacities):
        unknown = next(c for c in capacities if c.requests_per_second is None)
        return Capacity(None, "unknown", unknown.reason, ignored)
    origin: Origin = "measured" if all(c.origin == "measured" for c in capacities) else "estimated"
    reasons = " and ".join(sorted({c.reason for c in capacities}))
    return Capacity(fmean(rates), origin, reasons, ignored)


def where_of(target: Slice) -> Where:
    """The kind of slice that `target` is."""
    cores = len(target.cores) if target.kind is SliceKind.CPU else None
    return Where(target.gpu.product if target.gpu else None, target.profile if not cores else None, cores)


def _subject(sized: SizedModel) -> Subject | None:
    if sized.spec is None or sized.limits is None:
        return None
    return Subject.of(sized.config, sized.spec, sized.limits)


def _unsized(sized: SizedModel) -> Capacity:
    return Capacity(None, "unknown", f"the files of {sized.config.name} cannot be read, and nobody measured it here")


def _roof(subject: Subject, target: Slice) -> Roof | None:
    if target.gpu is None or target.kind not in (SliceKind.MIG, SliceKind.GPU):
        return None
    fp8 = fp8_compute(subject.limits, subject.spec)
    try:
        if target.profile is None:
            return card_roof(target.gpu.product, fp8=fp8)
        product = load_catalogue().product(target.gpu.product)
        return slice_roof(product, product.profile(target.profile), fp8=fp8)
    except SlicewayError:
        return None
