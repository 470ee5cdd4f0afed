"""The soak test's small version; `python -m gateway.soak` sends a million requests and looks at memory too."""

from __future__ import annotations

from gateway.soak import soak


def test_nothing_is_left_after_a_storm() -> None:
    outcome = soak(8_000, storm_requests=3_000)
    assert outcome.left == 0, outcome
    assert outcome.storms == 2
    assert {200, 499} <= outcome.statuses.keys()
    assert 7_000 < sum(outcome.statuses.values()) <= 8_000  # of a few clients that left there was no whole head
