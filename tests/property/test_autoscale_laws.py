"""Whatever comes in: replicas stay within their bounds, rest after a change, follow a lasting demand, and do not flap."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st

from placement.autoscale import Scaled, ScaledModel, Signals, decide, needed_replicas
from placement.policy import AutoscalePolicy

POLICY = AutoscalePolicy()
PERIOD = 5.0

signals = st.builds(
    Signals,
    arrivals_per_second=st.floats(0, 200),
    queued=st.integers(0, 500),
    running=st.integers(0, 500),
    ttft_seconds=st.none() | st.floats(0, 10),
    itl_seconds=st.none() | st.floats(0, 1),
    idle_seconds=st.floats(0, 5000),
)


@st.composite
def models(draw: st.DrawFn) -> ScaledModel:
    least = draw(st.integers(0, 5))
    return ScaledModel(
        "chat",
        least,
        least + draw(st.integers(0, 10)),
        draw(st.none() | st.floats(0.1, 20)),
        draw(st.integers(1, 64)),
        draw(st.none() | st.floats(0.1, 5)),
        draw(st.none() | st.floats(0.01, 1)),
    )


def run(model: ScaledModel, seen: Iterable[Signals], start: int) -> Iterator[Scaled]:
    state = Scaled(start)
    for number, signal in enumerate(seen):
        state = decide(POLICY, model, signal, state, number * PERIOD)
        yield state


@given(models(), st.lists(signals, min_size=1, max_size=120), st.integers(0, 30))
def test_replicas_stay_within_their_bounds(model: ScaledModel, seen: list[Signals], start: int) -> None:
    for state in run(model, seen, start):
        assert model.least <= state.replicas <= model.most
        assert state.reason


@given(models(), st.lists(signals, min_size=1, max_size=200))
def test_changes_are_a_cool_down_apart_but_for_waking(model: ScaledModel, seen: list[Signals]) -> None:
    last, changed = model.bounded(1), None
    for number, state in enumerate(run(model, seen, last)):
        if state.replicas != last:
            if changed is not None and last != 0:
                assert number * PERIOD - changed >= POLICY.cool_down
            changed = number * PERIOD
        last = state.replicas


@settings(max_examples=60)
@given(
    st.floats(0.2, 80),
    st.lists(st.floats(-1, 1), min_size=80, max_size=200),
    st.integers(1, 12),
    st.floats(0.5, 8),
)
def test_noise_within_the_tolerance_never_turns_the_direction(
    rate: float, noise: list[float], start: int, capacity: float
) -> None:
    model = ScaledModel("chat", 1, 40, capacity, 1000)
    seen = [Signals(arrivals_per_second=rate * (1 + POLICY.tolerance * n)) for n in noise]
    counts = [start, *(s.replicas for s in run(model, seen, start))]
    steps = [b - a for a, b in itertools.pairwise(counts) if b != a]
    assert all(s > 0 for s in steps) or all(s < 0 for s in steps)


@settings(max_examples=60)
@given(st.floats(0.2, 80), st.floats(0.5, 8), st.integers(1, 40))
def test_a_lasting_demand_is_met_and_not_exceeded(rate: float, capacity: float, start: int) -> None:
    model = ScaledModel("chat", 1, 200, capacity, 1000)
    seen = Signals(arrivals_per_second=rate)
    *_, end = run(model, [seen] * 200, start)
    need = needed_replicas(POLICY, model, seen)
    assert end.replicas >= ceil(need / (1 + POLICY.tolerance) - 1e-9)
    assert end.replicas <= max(1, ceil(need / (1 - POLICY.tolerance) - 1e-9))


@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 50.0]), min_size=30, max_size=120))
def test_a_burst_shorter_than_the_wait_moves_nothing(rates: list[float]) -> None:
    model = ScaledModel("chat", 1, 10, 2.0, 1000)
    short = int(POLICY.scale_up_after / PERIOD)
    seen, burst = [], 0
    for rate in rates:
        burst = burst + 1 if rate else 0
        seen.append(Signals(arrivals_per_second=rate if burst < short else 0.0))
        burst = 0 if burst >= short else burst
    assert all(s.replicas == 1 for s in run(model, seen, 1))


@given(models(), signals, st.floats(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_more_demand_never_needs_fewer_replicas(
    model: ScaledModel, seen: Signals, rate: float, queued: int, running: int
) -> None:
    more = replace(
        seen,
        arrivals_per_second=seen.arrivals_per_second + rate,
        queued=seen.queued + queued,
        running=seen.running + running,
    )
    assert needed_replicas(POLICY, model, more) >= needed_replicas(POLICY, model, seen)


@settings(max_examples=40)
@given(models(), signals, st.floats(0, 100), st.integers(0, 10))
def test_a_lasting_demand_that_is_higher_ends_with_no_fewer_replicas(
    model: ScaledModel, seen: Signals, rate: float, start: int
) -> None:
    higher = replace(seen, arrivals_per_second=seen.arrivals_per_second + rate)
    *_, less = run(model, [seen] * 120, start)
    *_, more = run(model, [higher] * 120, start)
    assert more.replicas >= less.replicas


@settings(max_examples=60)
@given(models(), signals, st.integers(0, 20))
def test_constant_load_settles_and_stays(model: ScaledModel, seen: Signals, start: int) -> None:
    """Up goes one step per cool-down where answers are late, so bounds of 15 replicas are reached in a quarter of an hour."""
    counts = [state.replicas for state in run(model, [seen] * 400, start)]
    assert len(set(counts[300:])) == 1


@given(st.floats(0.1, 50), st.floats(1.1, 5))
def test_a_replica_that_was_measured_to_bear_more_is_needed_less_often(rate: float, factor: float) -> None:
    seen = Signals(arrivals_per_second=rate)
    slow, fast = (ScaledModel("chat", 0, 1000, 2.0 * f, 1000) for f in (1.0, factor))
    assert needed_replicas(POLICY, fast, seen) < needed_replicas(POLICY, slow, seen)
