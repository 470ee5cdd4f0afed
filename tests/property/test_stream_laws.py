"""Laws of the stream meter: how bytes happen to be cut changes neither what the client gets nor what is counted."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import DONE, StreamMeter, Usage
from gateway.testing import FakeClock

texts = st.text(min_size=1, max_size=12)


def event(value: Any, *, ascii_only: bool) -> bytes:
    return (
        b"data: "
        + json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        + b"\n\n"
    )


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    """A whole stream, what a client gets of it that asked for no usage, and its tokens."""
    ascii_only = draw(st.booleans())
    said = draw(
        st.lists(
            texts.filter(lambda t: ascii_only or not any("\ud800" <= c <= "\udfff" for c in t)), min_size=1, max_size=8
        )
    )
    passed = event(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        ascii_only=ascii_only,
    )
    for number, text in enumerate(said):
        finish = "stop" if number == len(said) - 1 else None
        passed += event(
            {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}, ascii_only=ascii_only
        )
        if draw(st.booleans()):
            passed += b": keep-alive\n\n"
    usage = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(said)}}, ascii_only=ascii_only)
    return passed + usage + DONE, passed + DONE, len(said)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % len(data) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


@given(streams(), st.lists(st.integers(min_value=0, max_value=10_000), max_size=12), st.booleans())
def test_the_cuts_do_not_matter(stream: tuple[bytes, bytes, int], places: list[int], carriage_returns: bool) -> None:
    whole, passed, tokens = stream
    if carriage_returns:
        whole, passed = whole.replace(b"\n", b"\r\n"), passed.replace(b"\n", b"\r\n")
    clock, first, gaps = FakeClock(0.0), list[float](), list[float]()
    meter = StreamMeter(keep_usage=False, first=first.append, gap=lambda gap, _: gaps.append(gap))
    got = b""
    for part in cut(whole, places):
        clock.turn(1.0)
        got += meter.feed(part, clock.now)
    assert got == passed
    assert meter.events == tokens
    assert meter.usage == Usage(5, tokens)
    assert meter.done
    assert meter.ended
    assert len(first) == 1
    assert len(gaps) <= tokens - 1
    assert first[0] + sum(gaps) <= clock.now
    assert first[0] + sum(gaps) == meter.last_content_at
