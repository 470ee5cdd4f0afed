"""Latency quantiles over sliding windows, per slice and tenant.

Each sample goes into a sketch (`gateway.sketch`), whose quantiles are within `RELATIVE_ERROR` of a
true sample's value, and whose merge loses nothing. One sketch covers ten seconds; finished ones are folded into sketches
of one minute and these into sketches of ten, so that a window is answered by merging a handful of sketches and an hour takes as
little memory as its resolution needs. A slice's own figures are its tenants' sketches merged, so that a sample is added
once. See docs/adr for why this sketch.

A window of W covers at least the last W and at most one of its sub-windows more. Time comes from the caller: seconds of any
monotonic clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, get_args

from msgspec import Struct, field

from gateway.sketch import Sketch, bins_of, merged
from placement.latency_grid import BUCKETS_SECONDS

PENDING_SAMPLES = 256  # whoever adds the last of them pays for all: some 70 us

Metric = Literal[
    "ttft_seconds",
    "itl_seconds",
    "e2e_seconds",
    "queue_seconds",
    "gateway_seconds",
    "engine_seconds",
    "streaming_seconds",
]
METRICS: tuple[Metric, ...] = get_args(Metric)

Window = Literal["1m", "5m", "1h"]
WINDOWS: tuple[Window, ...] = ("1m", "5m", "1h")

# Seconds of a sub-window, and how many finished ones are kept: the first level answers 1m, the second 5m, the third 1h.
LEVELS: tuple[tuple[float, int], ...] = ((10.0, 6), (60.0, 5), (600.0, 6))

_bucket_of = partial(bisect_left, BUCKETS_SECONDS)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one metric in one window; None where nothing was measured. Values in seconds."""

    p50: float | None
    p99: float | None
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        """The JSON shape of `/slices`."""
        return {"p50": self.p50, "p99": self.p99, "count": self.count}


def quantiles_of(sketch: Sketch) -> Quantiles:
    """The quantiles of a sketch by nearest rank, within RELATIVE_ERROR."""
    return Quantiles(sketch.nearest_rank(0.5), sketch.nearest_rank(0.99), sketch.count)


class _Finished(Struct, frozen=True, gc=False):
    """A sub-window that is over."""

    index: int
    sketch: Sketch


class _Level(Struct, gc=False):
    """Sub-windows of one length: an open one, number `index`, and the last `kept` finished ones, oldest first."""

    seconds: float
    kept: int
    index: int
    open: Sketch = field(default_factory=Sketch)
    finished: deque[_Finished] = field(default_factory=deque)
    _together: Sketch | None = None  # all of `finished`, until it changes

    def advance(self, now: float) -> Sketch | None:
        """Close the open sub-window if its time is over, forget what is too old, and give the closed one if it has samples."""
        index = int(now // self.seconds)
        closed = None
        if index != self.index:
            if self.open.count:
                closed = self.open
                self.finished.append(_Finished(self.index, closed))
                self._together = None
                self.open = Sketch()
            self.index = index
        while self.finished and self.finished[0].index < index - self.kept:
            self.finished.popleft()
            self._together = None
        return closed

    def sketches(self) -> tuple[Sketch, ...]:
        """What is open, and what is finished together."""
        if self.finished and self._together is None:
            self._together = merged(finished.sketch for finished in self.finished)
        return (self.open,) if self._together is None else (self.open, self._together)


class WindowedDigest:
    """One metric of one tenant on one slice.

    `add` costs a list append; samples reach the sketch in batches of PENDING_SAMPLES, when a sub-window ends, and when
    somebody looks. `bucket_counts` (one more entry than BUCKETS_SECONDS, for larger values) and `sum_seconds` are totals since the start.
    """

    __slots__ = ("_end", "_levels", "_pending", "bucket_counts", "sum_seconds")

    def __init__(self, now: float) -> None:
        self._levels = tuple(_Level(seconds, kept, int(now // seconds)) for seconds, kept in LEVELS)
        self._pending: list[float] = []
        self._end = self._next_end(now)
        self.bucket_counts = [0] * (len(BUCKETS_SECONDS) + 1)
        self.sum_seconds = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Record one sample taken at `now`."""
        if now >= self._end:
            self.advance(now)
        self._pending.append(seconds)
        if len(self._pending) >= PENDING_SAMPLES:
            self._flush()

    def advance(self, now: float) -> None:
        """Bring the sub-windows up to `now`."""
        self._flush()
        if now < self._end:
            return
        for number in range(len(self._levels)):
            self._close(number, now)
        self._end = self._next_end(now)

    def _close(self, number: int, now: float) -> None:
        """Advance one level; what it closes goes into the coarser sub-window that it was measured in."""
        level = self._levels[number]
        began = level.index * level.seconds
        closed = level.advance(now)
        if closed is not None and number + 1 < len(self._levels):
            self._close(number + 1, began)
            self._levels[number + 1].open.merge(closed)

    def _next_end(self, now: float) -> float:
        seconds = LEVELS[0][0]
        return (now // seconds + 1) * seconds

    def _flush(self) -> None:
        pending = self._pending
        if not pending:
            return
        self._levels[0].open.add(Counter(bins_of(pending)))
        for bucket, count in Counter(map(_bucket_of, pending)).items():
            self.bucket_counts[bucket] += count
        self.sum_seconds += sum(pending)
        pending.clear()

    def window(self, window: Window, now: float) -> Sketch:
        """A sketch of its own with the samples of `window` at `now`."""
        self.advance(now)
        *finer, level = self._levels[: WINDOWS.index(window) + 1]
        # What finer levels have open has not been folded into `level`.
        return merged((*level.sketches(), *(unfinished.open for unfinished in finer)))

    def quantiles(self, window: Window, now: float) -> Quantiles:
        """Of all samples in `window` at `now`."""
        return quantiles_of(self.window(window, now))

    @property
    def empty(self) -> bool:
        """Nothing in any window; may be said late, never early."""
        return not self._pending and not any(level.open.count or level.finished for level in self._levels)


class Series:
    """The metrics of one tenant on one slice."""

    __slots__ = METRICS

    def __init__(self, now: float) -> None:
        self.ttft_seconds = WindowedDigest(now)
        self.itl_seconds = WindowedDigest(now)
        self.e2e_seconds = WindowedDigest(now)
        self.queue_seconds = WindowedDigest(now)
        self.gateway_seconds = WindowedDigest(now)
        self.engine_seconds = WindowedDigest(now)
        self.streaming_seconds = WindowedDigest(now)

    def digest(self, metric: Metric) -> WindowedDigest:
        """The digest of `metric`."""
        digest: WindowedDigest = getattr(self, metric)
        return digest

    def advance(self, now: float) -> None:
        """Bring all of them up to `now`."""
        for metric in METRICS:
            self.digest(metric).advance(now)

    @property
    def empty(self) -> bool:
        """No sample in any window of any metric."""
        return all(self.digest(metric).empty for metric in METRICS)


WindowTable = dict[str, dict[str, dict[str, float | int | None]]]
"""`{"1m": {"ttft_seconds": {"p50", "p99", "count"}, ...}, ...}`"""


class LatencyBook:
    """Every series there is, by slice and tenant."""

    def __init__(self) -> None:
        self._series: dict[str, dict[str, Series]] = {}

    def series(self, slice_id: str, tenant: str, now: float) -> Series:
        """The series of `tenant` on `slice_id`, made if it is the first request."""
        tenants = self._series.setdefault(slice_id, {})
        if (series := tenants.get(tenant)) is None:
            series = tenants[tenant] = Series(now)
        return series

    def tenants(self, slice_id: str) -> Mapping[str, Series]:
        """The series of one slice by tenant."""
        return self._series.get(slice_id, {})

    def items(self) -> Iterator[tuple[str, str, Series]]:
        """Every series as (slice id, tenant, series)."""
        for slice_id, tenants in self._series.items():
            for tenant, series in tenants.items():
                yield slice_id, tenant, series

    def forget(self, known_slices: frozenset[str], now: float) -> None:
        """Drop the series of slices that are gone, once an hour has passed over them."""
        for slice_id in [s for s in self._series if s not in known_slices]:
            for series in self._series[slice_id].values():
                series.advance(now)
            if all(series.empty for series in self._series[slice_id].values()):
                del self._series[slice_id]


class WindowSums:
    """Every window and metric of one series, or of several together."""

    def __init__(self) -> None:
        self._sketches = {(window, metric): Sketch() for window in WINDOWS for metric in METRICS}

    @classmethod
    def of(cls, series: Series, now: float) -> Self:
        """Of one series at `now`."""
        sums = cls()
        for window, metric in sums._sketches:
            sums._sketches[window, metric] = series.digest(metric).window(window, now)
        return sums

    def add(self, other: WindowSums) -> None:
        """Take in the samples of `other`."""
        for key, sketch in self._sketches.items():
            sketch.merge(other._sketches[key])

    def table(self) -> WindowTable:
        """The quantiles."""
        return {
            window: {metric: quantiles_of(self._sketches[window, metric]).as_dict() for metric in METRICS}
            for window in WINDOWS
        }
