"""What engines and load tests measured, as planning uses it: memory instead of its estimate, throughput instead of the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model_registry.sizing.calibration import Calibration, CalibrationKey
from model_registry.sizing.speed import Demand
from model_registry.sizing.throughput import Throughput
from placement.workload.cards import Place

_ALIKE_RATIO = 0.1
"""Requests whose lengths differ by no more are the same workload."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was measured on slices: `memory` by engines when they started, `throughput` by `sliceway bench capacity`."""

    memory: Mapping[CalibrationKey, Calibration] = field(default_factory=dict)
    throughput: tuple[Throughput, ...] = ()

    def rate(self, source: str, place: Place, demand: Demand) -> float | None:
        """Requests per second that one replica bore in such a place, with such requests, within an SLO at least as strict.

        None where nobody measured that; of several measurements the best.
        """
        rates = [
            t.requests_per_second
            for t in self.throughput
            if t.key.source == source
            and (t.key.product, t.key.profile) == (place.product, place.profile if place.mig else None)
            and _alike(t.key.prompt_tokens, demand.prompt_tokens)
            and _alike(t.key.output_tokens, demand.output_tokens)
            and _as_strict(t.key.slo, demand)
            and t.requests_per_second > 0
        ]
        return max(rates, default=None)


def _alike(measured_tokens: int, asked_tokens: int) -> bool:
    return abs(measured_tokens - asked_tokens) <= _ALIKE_RATIO * asked_tokens


def _as_strict(slo: Mapping[str, float], demand: Demand) -> bool:
    limits = {"ttft_seconds": demand.ttft_slo_seconds, "itl_seconds": demand.itl_slo_seconds}
    return all(limit is None or slo.get(name, float("inf")) <= limit for name, limit in limits.items())
