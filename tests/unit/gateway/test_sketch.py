"""The sketch against the published library, and what a garbage collection has to do with it."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
from ddsketch import DDSketch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.digests import METRICS, WINDOWS, LatencyBook
from gateway.sketch import RELATIVE_ERROR, Sketch, bins_of, merged

samples = st.lists(st.floats(min_value=1e-4, max_value=10.0), min_size=1, max_size=20)


def sketch_of(values: list[float]) -> Sketch:
    sketch = Sketch()
    sketch.add(Counter(bins_of(values)))
    return sketch


def tracked_of(book: LatencyBook) -> int:
    """How many objects a garbage collection goes through for the sake of `book`."""
    seen: set[int] = set()
    ahead: list[object] = [book]
    while ahead:
        thing = ahead.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        ahead += gc.get_referents(thing)
    return sum(id(thing) in seen for thing in gc.get_objects())


@settings(max_examples=50)
@given(st.lists(samples, min_size=1, max_size=3))
def test_it_counts_as_the_published_library_does(parts: list[list[float]]) -> None:
    theirs = DDSketch(RELATIVE_ERROR)
    for value in (value for part in parts for value in part):
        theirs.add(value)
    ours = merged(sketch_of(part) for part in parts)
    assert ours.count == theirs.count
    for rank in {1, (ours.count + 1) // 2, ours.count}:
        # Theirs gives the sample of rank q * (n - 1), counted from 0; two samples next to a bin's edge may fall to either side of it.
        told = theirs.get_quantile_value(min(1.0, (rank - 0.5) / max(1, ours.count - 1)))
        assert ours.nearest_rank((rank - 0.5) / ours.count) == pytest.approx(told, rel=2.1 * RELATIVE_ERROR)


@settings(max_examples=50)
@given(samples, samples)
def test_merging_leaves_the_other_as_it_is(one: list[float], other: list[float]) -> None:
    ours, theirs = sketch_of(one), sketch_of(other)
    copied = merged([theirs])
    ours.merge(theirs)
    ours.add(Counter(bins_of(one)))
    copied.merge(ours)
    assert theirs == sketch_of(other)
    assert copied.count == 2 * len(other) + 2 * len(one)


def test_nothing_was_measured() -> None:
    empty = merged([Sketch(), Sketch()])
    empty.add({})
    assert (empty.count, empty.nearest_rank(0.5)) == (0, None)


def test_a_clock_that_did_not_move_counts_as_a_nanosecond() -> None:
    assert sketch_of([0.0, -1.0]).nearest_rank(1.0) == pytest.approx(1e-9, rel=2 * RELATIVE_ERROR)


def test_a_garbage_collection_has_no_more_to_go_through_after_an_hour_than_after_ten_seconds() -> None:
    book = LatencyBook()

    def measure(now: float) -> None:
        series = book.series("s", "t", now)
        for metric in METRICS:
            for latency in (0.01, 0.3, 2.0):
                series.digest(metric).add(latency, now)
            for window in WINDOWS:
                series.digest(metric).window(window, now)

    measure(0.0)
    gc.collect()
    at_first = tracked_of(book)
    for now in range(10, 3610, 10):
        measure(float(now))
    gc.collect()
    assert tracked_of(book) <= at_first
