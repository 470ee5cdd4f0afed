from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import EngineError
from gateway.sse import MAX_EVENT_BYTES, Usage
from gateway.typed_events import TypedEventMeter


def named(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


MESSAGE = [
    named("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0}}),
    named("content_block_start"),
    named("content_block_delta", delta={"text": "event: message_stop"}),
    named("content_block_delta"),
    named("message_delta", usage={"input_tokens": 9, "output_tokens": 2}),
    named("message_stop"),
]
RESPONSE = [
    named("response.created", response={"usage": None}),
    named("response.output_text.delta", delta="a"),
    named("response.output_text.delta", delta="b"),
    named("response.completed", response={"usage": {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11}}),
]


class Watcher:
    def __init__(self) -> None:
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.meter = TypedEventMeter(first=self.firsts.append, gap=lambda gap, _: self.gaps.append(gap))


@pytest.mark.parametrize("events", [MESSAGE, RESPONSE])
@given(cuts=st.lists(st.integers(0, 900), max_size=8))
def test_bytes_pass_unchanged_and_are_understood_however_they_are_cut(events: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(events)
    edges = [0, *sorted(min(c, len(whole)) for c in cuts), len(whole)]
    watcher = Watcher()
    passed = b"".join(watcher.meter.feed(whole[a:b], float(i)) for i, (a, b) in enumerate(itertools.pairwise(edges)))
    assert passed == whole
    assert (watcher.meter.events, watcher.meter.usage) == (2, Usage(9, 2))
    assert watcher.meter.done
    assert watcher.meter.error is None
    assert len(watcher.firsts) == 1


def test_times_are_those_of_arrivals_with_content() -> None:
    watcher = Watcher()
    for now, event in enumerate(RESPONSE):
        watcher.meter.feed(event, float(now))
    assert (watcher.firsts, watcher.gaps) == ([1.0], [1.0])


def test_an_error_event_is_kept_and_ends_the_stream() -> None:
    watcher = Watcher()
    told = named("error", error={"type": "internal_error", "message": "it broke"})
    assert watcher.meter.feed(told, 0.0) == told
    assert watcher.meter.done
    assert "it broke" in str(watcher.meter.error)


def test_a_stream_that_stops_is_not_done() -> None:
    watcher = Watcher()
    watcher.meter.feed(b"".join(MESSAGE[:-1]), 0.0)
    assert not watcher.meter.done


def test_chats_last_word_is_left_out() -> None:
    watcher = Watcher()
    assert watcher.meter.feed(b"data: [DONE]\n\n", 0.0) == b""


def test_an_event_without_end_is_refused() -> None:
    watcher = Watcher()
    with pytest.raises(EngineError):
        watcher.meter.feed(b"data: " + b"x" * MAX_EVENT_BYTES, 0.0)


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_bytes_break_it(pieces: list[bytes]) -> None:
    watcher = Watcher()
    for piece in pieces:
        watcher.meter.feed(piece, 0.0)
        watcher.meter.feed(b"event: error\ndata: " + piece + b"\n\n", 0.0)


def test_what_a_cache_had_of_a_prompt_counts_as_prompt() -> None:
    meter = TypedEventMeter(first=lambda now: None, gap=None)
    began = {"input_tokens": 1, "cache_creation_input_tokens": 200, "cache_read_input_tokens": 56, "output_tokens": 0}
    meter.feed(named("message_start", message={"usage": began}), 0.0)
    assert meter.usage == Usage(257, 0)
    meter.feed(named("message_delta", usage={"output_tokens": 8}), 1.0)
    assert meter.usage == Usage(257, 8)
