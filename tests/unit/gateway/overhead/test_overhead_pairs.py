"""The arithmetic of `sliceway bench overhead`, on latencies that are known."""

from __future__ import annotations

import random

import pytest

from gateway.overhead import Pair, Timing, arrivals, summarize


def pairs(added: float, count: int = 300, *, noise: float = 0.0) -> list[Pair]:
    generator = random.Random(7)
    made = []
    for _ in range(count):
        engine = 0.05 + generator.random() * 0.01
        more = added + generator.random() * noise
        gaps = tuple(0.01 + generator.random() * 0.001 for _ in range(5))
        through = Timing(engine + more, 1.0, tuple(gap + more for gap in gaps), gateway_says=more)
        made.append(Pair(Timing(engine, 1.0, gaps), through))
    return made


@pytest.mark.parametrize("added", [0.0, 0.0005, 0.02])
def test_what_is_added_to_every_request_is_found(added: float) -> None:
    table = summarize(pairs(added), stream=True, generator=random.Random(1))
    for name in ("ttft", "itl"):
        for figure in ("added_p50_ms", "added_p99_ms", "paired_median_ms"):
            assert table[name][figure]["value"] == pytest.approx(added * 1000, abs=1e-3)
    assert table["gateway_says_ms"]["p50"] == pytest.approx(added * 1000, abs=1e-3)
    assert table["pairs"] == 300


def test_intervals_hold_the_value_and_widen_with_noise() -> None:
    quiet, noisy = (
        summarize(pairs(0.001, noise=n), stream=False, generator=random.Random(1))["e2e"]["paired_median_ms"]
        for n in (0.0001, 0.01)
    )
    for figure in (quiet, noisy):
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert noisy["high"] - noisy["low"] > quiet["high"] - quiet["low"]


def test_whole_answers_have_no_gaps() -> None:
    assert "itl" not in summarize(pairs(0.0), stream=False, generator=random.Random(1))


def test_a_plan_has_both_ways_of_each_pair_side_by_side_and_in_either_order() -> None:
    plan = arrivals(200, 100.0, random.Random(3))
    assert [a.at for a in plan] == sorted(a.at for a in plan)
    firsts = {plan[2 * n].through for n in range(200)}
    assert firsts == {True, False}
    for n in range(200):
        one, other = plan[2 * n : 2 * n + 2]
        assert (one.pair, other.pair) == (n, n)
        assert one.through is not other.through
    assert plan[-1].at == pytest.approx(400 / 100.0, rel=0.2)
