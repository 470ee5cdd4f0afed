"""The soak test's small version; `python -m gateway.soak` sends a million requests and looks at memory too."""

from __future__ import annotations

from gateway.soak import soak


def test_nothing_is_left_after_a_storm() -> None:
    outcome = soak(10_000)
    left = (outcome.in_flight, outcome.waiting, outcome.active, outcome.sequences, outcome.kv_tokens)
    assert (*left, outcome.concurrent) == (0, 0, 0, 0, 0, 0)
    assert sum(outcome.statuses.values()) == 10_000
    assert {200, 429, 499} <= outcome.statuses.keys()
