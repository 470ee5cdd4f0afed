"""Whatever comes, in whatever order: a tenant never exceeds its limit, and no budget is lost."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.admission.limits import Limits, Need, Reservation, duration
from gateway.admission.schema import RateLimits, TenantLimits
from gateway.admission.windows import Window
from gateway.errors import RateLimited

REQUESTS, TOKENS, DAY, CONCURRENT, MODEL_TOKENS = 7, 500, 2000, 3, 300


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 12)), max_size=80),
    st.sampled_from([1, 4, 60]),
)
def test_no_span_holds_more_than_the_limit(limit: int, steps: list[tuple[float, int]], slots: int) -> None:
    window, now, taken = Window(limit, 60.0, slots), 0.0, []
    for wait, amount in steps:
        now += wait
        window.advance(now)
        if window.used + amount <= limit:
            window.take(amount, now)
            taken.append((now, amount))
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + 60.0) <= limit


@given(st.integers(1, 20), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 12)), max_size=40), st.integers(1, 20))
def test_the_time_to_come_back_is_the_first_that_works(limit: int, steps: list[tuple[float, int]], amount: int) -> None:
    window, now = Window(limit, 60.0), 0.0
    for wait, units in steps:
        now += wait
        window.advance(now)
        if window.used + units <= limit:
            window.take(units, now)
    wait = window.wait_seconds(amount, now)
    if amount > limit:
        assert wait == math.inf
        return
    assert wait <= 61.0
    window.advance(now + wait + 1e-6)
    assert window.used + amount <= limit
    if wait > 1e-3:
        early = Window(limit, 60.0)
        early.restore(window.ages(now + wait + 1e-6), now + wait + 1e-6)
        assert early.used == window.used


@given(st.floats(0, 200_000))
def test_spans_are_written_as_openai_writes_them(seconds: float) -> None:
    text = duration(seconds)
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    total, number = 0.0, ""
    for char in text.replace("ms", "\0"):
        if char in "0123456789.":
            number += char
        else:
            total += float(number) * (0.001 if char == "\0" else units[char])
            number = ""
    assert seconds <= total + 1e-6 <= seconds + 1.001


class OneTenant(RuleBasedStateMachine):
    """A tenant that sends, streams, is refused, cancels, sees engines fail, and waits; against plain book-keeping beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.limits = Limits(
            {
                "t": TenantLimits(
                    requests_per_minute=REQUESTS,
                    tokens_per_minute=TOKENS,
                    tokens_per_day=DAY,
                    max_concurrent=CONCURRENT,
                    models={"m": RateLimits(tokens_per_minute=MODEL_TOKENS)},
                )
            }
        )
        self.running: list[tuple[Reservation, int, dict[str, Any]]] = []
        self.book: deque[dict[str, Any]] = deque()

    @rule(model=st.sampled_from(["m", "other"]), tokens=st.integers(1, 400))
    def send(self, model: str, tokens: int) -> None:
        gauges = self.limits.of("t", model)
        room = self.room(model, tokens)
        try:
            reservation = self.limits.reserve(gauges, Need(tokens, tokens), self.now)
        except RateLimited:
            assert not room, "refused although every limit has room"
            return
        entry = {"at": self.now, "tokens": tokens, "requests": 1, "model": model}
        self.book.append(entry)
        self.running.append((reservation, tokens, entry))

    def room(self, model: str, tokens: int) -> bool:
        """Whether it fits even if everything counts a slot longer than it has to; then it must be admitted."""
        minute, day = self.within(61.0), self.within(86400 + 600)
        fits = sum(e["requests"] for e in minute) < REQUESTS and len(self.running) < CONCURRENT
        fits = fits and sum(e["tokens"] for e in minute) + tokens <= TOKENS and tokens <= TOKENS
        fits = fits and sum(e["tokens"] for e in day) + tokens <= DAY
        if model == "m":
            fits = fits and sum(e["tokens"] for e in minute if e["model"] == "m") + tokens <= MODEL_TOKENS
        return fits

    def within(self, seconds: float) -> list[dict[str, Any]]:
        return [entry for entry in self.book if entry["at"] + seconds > self.now]

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 100), part=st.floats(0, 1))
    def finish(self, pick: int, part: float) -> None:
        reservation, tokens, entry = self.running.pop(pick % len(self.running))
        entry["tokens"] = int(tokens * part)
        reservation.settle(entry["tokens"], self.now)
        reservation.refund(self.now)  # a second end is none

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 100))
    def fail(self, pick: int) -> None:
        reservation, _, entry = self.running.pop(pick % len(self.running))
        entry["tokens"] = entry["requests"] = 0
        reservation.refund(self.now)
        reservation.settle(400, self.now)

    @rule(seconds=st.sampled_from([0.0, 0.5, 7.0, 59.0, 61.0, 3600.0, 90_000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        minute = self.within(60.0)
        assert sum(e["requests"] for e in minute) <= REQUESTS
        assert sum(e["tokens"] for e in minute) <= TOKENS
        assert sum(e["tokens"] for e in minute if e["model"] == "m") <= MODEL_TOKENS
        assert sum(e["tokens"] for e in self.within(86400.0)) <= DAY
        assert len(self.running) <= CONCURRENT

    def teardown(self) -> None:
        for reservation, _, _ in self.running:
            reservation.refund(self.now)
        self.now += 2 * 86400
        for gauge in self.limits:
            gauge.window.advance(self.now)
            assert gauge.window.used == 0, f"{gauge.kind} keeps {gauge.window.used}"


TestOneTenant = OneTenant.TestCase
TestOneTenant.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)
