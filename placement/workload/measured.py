"""What engines and load tests measured, as planning uses it: memory instead of its estimate, throughput instead of the roofline.

A load test's figure counts where it is about the same: the same model on a slice of the same kind, requests of the same
length, an SLO at least as strict and met by as many requests, the same version of the engine, and not too long ago. What does
not count says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from model_registry.sizing.calibration import Calibration, CalibrationKey
from model_registry.sizing.speed import Demand
from model_registry.sizing.throughput import Throughput
from placement.workload.cards import Place

_ALIKE_RATIO = 0.1
"""Requests whose lengths differ by no more are the same workload."""
KEPT = timedelta(days=90)
"""Older measurements are stale: drivers, kernels and neighbours have changed meanwhile."""


@dataclass(frozen=True, slots=True)
class Where:
    """A kind of slice, as measurements tell of it: a profile of a product, a whole card (no profile), or so many cores."""

    product: str | None
    profile: str | None
    cores: int | None = None

    @classmethod
    def of(cls, place: Place) -> Where:
        """A place that is planned with."""
        return cls(place.product, place.profile if place.mig else None)

    def __str__(self) -> str:
        return (
            f"{self.cores} core{'s' * (self.cores > 1)}"
            if self.cores
            else " ".join(filter(None, (self.product, self.profile)))
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """Requests per second that one replica bore; None where no measurement counts. `ignored` says of each one why not."""

    requests_per_second: float | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was measured on slices: `memory` by engines when they started, `throughput` by `sliceway bench capacity`.

    `engine_version` is what would be started; None where that is not known, and then every version counts. `now` is when
    this is asked; without it nothing is too old.
    """

    memory: Mapping[CalibrationKey, Calibration] = field(default_factory=dict)
    throughput: tuple[Throughput, ...] = ()
    engine_version: str | None = None
    now: datetime | None = None

    def judged(self, source: str, where: Where, demand: Demand | None) -> Judged:
        """What one replica of `source` bears there under `demand`: the best of the measurements that count.

        Without a `demand` nobody knows how long requests are, so that none counts.
        """
        rates: list[float] = []
        ignored: list[str] = []
        for record in self.throughput:
            if record.key.source != source or record.requests_per_second <= 0:
                continue
            reason = self._why_not(record, where, demand)
            if reason is None:
                rates.append(record.requests_per_second)
            else:
                ignored.append(f"{record.requests_per_second:.2f} requests/s of {record.measured_at[:10]}: {reason}")
        return Judged(max(rates, default=None), tuple(sorted(ignored)))

    def _why_not(self, record: Throughput, where: Where, demand: Demand | None) -> str | None:
        key = record.key
        there = Where(key.product, key.profile, key.cores)
        if there != where:
            return f"on {there}, not on {where}"
        if self._foreign(record):
            return f"with vLLM {key.engine_version}, {self.engine_version} is used here"
        if self._stale(record):
            return f"more than {KEPT.days} days ago"
        if demand is None:
            return "how long requests are is not known: the model names no demand"
        if not (_alike(key.prompt_tokens, demand.prompt_tokens) and _alike(key.output_tokens, demand.output_tokens)):
            asked = f"{demand.prompt_tokens} in and {demand.output_tokens} out"
            return f"requests had {key.prompt_tokens} tokens in and {key.output_tokens} out, {asked} are asked for"
        return _laxer(record, demand)

    def _foreign(self, record: Throughput) -> bool:
        """A simulated engine is of every version."""
        told = record.key.engine_version
        if self.engine_version is None or told is None or record.simulated:
            return False
        return told.split()[0] != self.engine_version.split()[0]

    def _stale(self, record: Throughput) -> bool:
        if self.now is None:
            return False
        try:
            return self.now - datetime.fromisoformat(record.measured_at) > KEPT
        except (ValueError, TypeError):  # written by hand, without a time or a zone
            return True


def _alike(measured_tokens: int, asked_tokens: int) -> bool:
    return abs(measured_tokens - asked_tokens) <= _ALIKE_RATIO * asked_tokens


def _laxer(record: Throughput, demand: Demand) -> str | None:
    """In what the SLO that was measured within promises less than the model's; None where it is at least as strict."""
    limits = {"ttft": demand.ttft_slo_seconds, "itl": demand.itl_slo_seconds}
    for name, limit in ((name, limit) for name, limit in limits.items() if limit is not None):
        measured = record.key.slo.get(f"{name}_seconds")
        if measured is None:
            return f"without a limit on {name}, which the model's SLO has: measure with --slo {name}={limit:g}s"
        if measured > limit:
            return "within a later SLO than the model's"
    if any(limit is not None for limit in limits.values()) and record.attainment < demand.slo_attainment:
        wanted = f"{demand.slo_attainment:g}"
        return f"{record.attainment:.1%} of the requests met it, the model's SLO is for {wanted}: measure with --attainment {wanted}"
    return None
