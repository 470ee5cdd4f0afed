"""The digest against exact quantiles of the same samples."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from gateway.digests import WINDOWS, Series, WindowedDigest, WindowSums
from gateway.sketch import RELATIVE_ERROR

SPAN = {"1m": (60.0, 10.0), "5m": (300.0, 60.0), "1h": (3600.0, 600.0)}

latencies = st.floats(min_value=1e-6, max_value=600.0, allow_nan=False)
steps = st.floats(min_value=0.0, max_value=900.0, allow_nan=False)


def exact(samples: list[float], q: float) -> float:
    """The nearest rank: the smallest sample that at least the share q does not exceed."""
    return sorted(samples)[math.ceil(q * len(samples)) - 1]


@given(st.lists(latencies, min_size=1, max_size=700))
def test_quantiles_are_within_the_stated_error(samples: list[float]) -> None:
    digest = WindowedDigest(1000.0)
    for sample in samples:
        digest.add(sample, 1000.0)
    got = digest.quantiles("1m", 1000.0)
    assert got.count == len(samples)
    for value, q in ((got.p50, 0.5), (got.p99, 0.99)):
        assert value is not None
        assert abs(value - exact(samples, q)) <= RELATIVE_ERROR * exact(samples, q) * (1 + 1e-9)


@given(st.lists(st.tuples(steps, latencies), min_size=1, max_size=200), steps)
def test_a_window_holds_what_is_young_and_nothing_that_is_old(walk: list[tuple[float, float]], rest: float) -> None:
    """Every sample of the last W is there, none older than W plus one sub-window, whatever the gaps between samples."""
    digest, now, taken = WindowedDigest(5000.0), 5000.0, []
    for step, sample in walk:
        now += step
        digest.add(sample, now)
        taken.append((now, sample))
    now += rest
    for window in WINDOWS:
        span, slack = SPAN[window]
        young = [s for at, s in taken if now - at <= span]
        possible = [s for at, s in taken if now - at <= span + slack]
        got = digest.quantiles(window, now)
        assert len(young) <= got.count <= len(possible)
        if young == possible and young:
            assert got.p99 is not None
            assert abs(got.p99 - exact(young, 0.99)) <= RELATIVE_ERROR * exact(young, 0.99) * (1 + 1e-9)


@given(st.lists(st.tuples(steps, latencies), min_size=1, max_size=100))
def test_totals_never_forget(walk: list[tuple[float, float]]) -> None:
    digest, now = WindowedDigest(0.0), 0.0
    for step, sample in walk:
        now += step
        digest.add(sample, now)
    digest.advance(now)
    assert sum(digest.bucket_counts) == len(walk)
    assert math.isclose(digest.sum_seconds, sum(s for _, s in walk))


@given(st.lists(latencies, min_size=1, max_size=100), st.lists(latencies, min_size=1, max_size=100))
def test_a_slice_is_its_tenants_together(first: list[float], second: list[float]) -> None:
    a, b = Series(0.0), Series(0.0)
    for series, samples in ((a, first), (b, second)):
        for sample in samples:
            series.ttft_seconds.add(sample, 1.0)
    whole = WindowSums()
    for series in (a, b):
        whole.add(WindowSums.of(series, 1.0))
    got = whole.table()["5m"]["ttft_seconds"]
    assert got["count"] == len(first) + len(second)
    both = exact(first + second, 0.5)
    assert got["p50"] is not None
    assert abs(got["p50"] - both) <= RELATIVE_ERROR * both * (1 + 1e-9)
