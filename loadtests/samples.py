"""What was measured, one row per request, and exact percentiles of it.

Percentiles are nearest-rank: the smallest sample that at least that share of all samples does not exceed. They are values
that really occurred, and pooled runs are computed from pooled samples, never from other percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("ttft_seconds", "itl_seconds", "e2e_seconds")
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
"""The percentiles that are told, by the name that they have in JSON; `p999` is the 99.9th."""


def show_percentile(name: str) -> str:
    """`p999` as people write it: `p99.9`."""
    return "p99.9" if name == "p999" else name


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it. Times are seconds since the run began, durations are seconds.

    TTFT and E2E count from `due_seconds`, when the request should have been sent, so that a client or a server that falls
    behind cannot hide it. `failure` is None for an answer that counts; a failed request has no durations.
    """

    tenant: str
    model: str
    slice: str | None
    due_seconds: float
    sent_seconds: float
    ended_seconds: float
    status: int | None = None
    failure: str | None = None
    message: str | None = None
    request_id: str | None = None
    ttft_seconds: float | None = None
    itl_seconds: tuple[float, ...] = ()
    e2e_seconds: float | None = None
    output_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def tpot_seconds(self) -> float | None:
        """The mean gap between tokens of this answer; None where there was one token or no stream."""
        if self.ttft_seconds is None or self.e2e_seconds is None or self.output_tokens < 2:
            return None
        return (self.e2e_seconds - self.ttft_seconds) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Exact percentiles of `count` samples, in seconds; None where there are none.

    A percentile that leaves less than one sample above it is the maximum: `p99` of fewer than 100 samples (`p99_is_maximum`
    says so), `p999` of fewer than 1000.
    """

    count: int
    p50: float | None
    p90: float | None
    p99: float | None
    maximum: float | None
    p999: float | None = None

    @property
    def p99_is_maximum(self) -> bool:
        """Whether there are too few samples for the 99th percentile to be anything else."""
        return 0 < self.count < 100

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        return {
            "p50": self.p50,
            "p90": self.p90,
            "p99": self.p99,
            "p999": self.p999,
            "max": self.maximum,
            "count": self.count,
            "p99_is_maximum": self.p99_is_maximum,
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of `ordered` (ascending, not empty); `share` is in (0, 1].

    Raises ValueError for an empty sequence or a share outside (0, 1].
    """
    if not ordered or not 0 < share <= 1:
        raise ValueError(f"no percentile {share} of {len(ordered)} samples")
    return ordered[math.ceil(share * len(ordered)) - 1]


def quantiles(values: Iterable[float]) -> Quantiles:
    """The percentiles and the maximum of `values`."""
    ordered = sorted(values)
    if not ordered:
        return Quantiles(0, None, None, None, None)
    found = {name: percentile(ordered, share) for name, share in PERCENTILES.items()}
    return Quantiles(len(ordered), maximum=ordered[-1], **found)


def samples_needed(percentile_name: str) -> int:
    """How many samples that percentile takes to be anything but their maximum: 100 for `p99`, 1000 for `p999`."""
    return math.ceil(round(1 / (1 - PERCENTILES[percentile_name]), 6))


@dataclass(frozen=True, slots=True)
class Summary:
    """Many samples of one kind: latencies of those that succeeded, and failures counted apart by kind."""

    requests: int
    failures: dict[str, int]
    output_tokens: int
    ttft_seconds: Quantiles
    itl_seconds: Quantiles
    e2e_seconds: Quantiles

    @property
    def succeeded(self) -> int:
        """Requests that were answered properly."""
        return self.requests - sum(self.failures.values())

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        return {
            "requests": self.requests,
            "succeeded": self.succeeded,
            "failures": self.failures,
            "output_tokens": self.output_tokens,
            **{name: getattr(self, name).as_dict() for name in METRICS},
        }


def summarize(samples: Iterable[Sample]) -> Summary:
    """Latencies of the requests that succeeded, counts of those that did not."""
    rows = list(samples)
    good = [row for row in rows if row.failure is None]
    failures: dict[str, int] = {}
    for row in rows:
        if row.failure is not None:
            failures[row.failure] = failures.get(row.failure, 0) + 1
    return Summary(
        requests=len(rows),
        failures=dict(sorted(failures.items())),
        output_tokens=sum(row.output_tokens for row in good),
        ttft_seconds=quantiles(row.ttft_seconds for row in good if row.ttft_seconds is not None),
        itl_seconds=quantiles(gap for row in good for gap in row.itl_seconds),
        e2e_seconds=quantiles(row.e2e_seconds for row in good if row.e2e_seconds is not None),
    )


def grouped(samples: Iterable[Sample], key: Callable[[Sample], tuple[str, ...]]) -> dict[tuple[str, ...], list[Sample]]:
    """Samples by `key`, in the order in which the keys first occur."""
    groups: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return groups
