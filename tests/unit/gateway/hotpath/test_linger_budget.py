"""Bodies of refused requests are read at a bounded pace, whoever sends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from gateway.ingress.protocol import LINGER_TICK_BYTES, LingerBudget


class Loop:
    """Timers that a test lets go off."""

    def __init__(self) -> None:
        self.timers: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def call_later(self, _: float, callback: Callable[..., None], *arguments: Any) -> object:
        self.timers.append((callback, arguments))
        return object()

    def tick(self) -> None:
        (callback, arguments), self.timers = self.timers[0], self.timers[1:]
        callback(*arguments)


class Connection:
    """As much of a connection as the budget touches: it is its own flow and transport."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.flow = self.transport = self
        self.paused = self.closing = False

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closing


def test_what_is_within_the_budget_is_not_held_up() -> None:
    loop, budget = Loop(), LingerBudget()
    connection = Connection(loop)
    for _ in range(5):
        budget.spend(LINGER_TICK_BYTES, cast(Any, connection))
        assert not connection.paused
        loop.tick()


def test_everyone_who_goes_beyond_waits_and_goes_on() -> None:
    loop, budget = Loop(), LingerBudget()
    greedy, next_one = Connection(loop), Connection(loop)
    budget.spend(3 * LINGER_TICK_BYTES, cast(Any, greedy))
    budget.spend(1, cast(Any, next_one))
    assert greedy.paused
    assert next_one.paused
    assert len(loop.timers) == 1
    ticks = 0
    while greedy.paused:
        loop.tick()
        ticks += 1
    assert ticks == 3
    assert next_one.paused, "as many go on at once as a tick has room for"
    loop.tick()
    assert not next_one.paused
    assert not loop.timers, "nobody waits"


def test_a_connection_that_closed_meanwhile_is_left_alone() -> None:
    loop, budget = Loop(), LingerBudget()
    connection = Connection(loop)
    budget.spend(LINGER_TICK_BYTES + 1, cast(Any, connection))
    connection.closing = True
    loop.tick()
    assert connection.paused


def test_a_read_of_many_small_parts_waits_once_and_does_not_hold_up_the_others() -> None:
    loop, budget = Loop(), LingerBudget()
    greedy, next_one = Connection(loop), Connection(loop)
    for _ in range(LINGER_TICK_BYTES // 100 + 1000):
        budget.spend(100, cast(Any, greedy))
    budget.spend(1, cast(Any, next_one))
    ticks = 0
    while next_one.paused:
        loop.tick()
        ticks += 1
    assert ticks <= 3, "one tick for what was read too much, and one for each"
    assert not greedy.paused
