from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from loadtests.streams import AnswerFailed, events, measure_stream, measure_whole, refusal

Read = tuple[float, bytes]


def chat(content: str | None = None, **delta: object) -> bytes:
    fields = delta | ({"content": content} if content is not None else {})
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": fields}]}).encode() + b"\n\n"


ROLE = chat("", role="assistant")
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


def failure_of(reads: Sequence[Read]) -> AnswerFailed:
    with pytest.raises(AnswerFailed) as caught:
        measure_stream(reads, 0.0)
    return caught.value


def test_ttft_ends_at_the_first_text_not_at_the_role() -> None:
    timing = measure_stream([(10.1, ROLE), (10.5, chat("a")), (10.6, chat("b")), (10.9, DONE)], started=10.0)
    assert timing.ttft_seconds == pytest.approx(0.5)
    assert timing.itl_seconds == pytest.approx((0.1,))
    assert timing.e2e_seconds == pytest.approx(0.9)


def test_an_event_is_timed_by_the_read_that_completes_it() -> None:
    first = chat("a")
    timing = measure_stream(
        [(1.0, first[:9]), (2.0, first[9:-1]), (3.0, first[-1:] + chat("b")), (4.0, DONE)], started=0.0
    )
    assert timing.ttft_seconds == pytest.approx(3.0)
    assert timing.itl_seconds == pytest.approx((0.0,))


def test_the_servers_token_count_wins_over_the_events() -> None:
    assert measure_stream([(1.0, chat("a") + USAGE + DONE)], 0.0).output_tokens == 7
    assert measure_stream([(1.0, chat("a") + chat("b") + DONE)], 0.0).output_tokens == 2


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": [{"text": "a"}]}\n\n',
        chat(reasoning_content="hm"),
        chat(reasoning="hm"),
        chat(tool_calls=[{"index": 0}]),
        b'data: {"choices": [{"delta": {"content": "a"}}]}\r\n\r\n',
        b'data:{"choices": [{"delta": {"content": "a"}}]}\n\n',
        b'event: message\nid: 3\ndata: {"choices":\ndata: [{"delta": {"content": "a"}}]}\n\n',
    ],
)
def test_what_counts_as_text(event: bytes) -> None:
    assert measure_stream([(1.0, event), (2.0, DONE)], 0.0).ttft_seconds == pytest.approx(1.0)


def test_keep_alive_comments_are_no_events() -> None:
    assert list(events([(1.0, b": keep-alive\n\n"), (2.0, b"data: x\n\n"), (3.0, b"data: half")])) == [(2.0, "x")]


def test_a_stream_without_done_is_a_failure_however_fast() -> None:
    assert failure_of([(0.1, ROLE + chat("a") + chat("b"))]).kind == "truncated"


def test_an_error_event_is_a_failure_with_the_servers_words() -> None:
    reads = [(0.1, chat("a") + b'data: {"error": {"message": "the engine died", "code": "engine_failed"}}\n\n' + DONE)]
    failure = failure_of(reads)
    assert (failure.kind, failure.message) == ("error_event", "the engine died")


def test_a_stream_with_no_text_is_a_failure() -> None:
    assert failure_of([(0.1, ROLE + USAGE + DONE)]).kind == "empty"


@pytest.mark.parametrize("data", [b"data: {broken\n\n", b"data: [1, 2]\n\n", b"data: 7\n\n"])
def test_an_event_that_is_no_object_is_a_failure(data: bytes) -> None:
    assert failure_of([(0.1, data + DONE)]).kind == "bad_event"


def test_a_whole_answer_has_no_ttft() -> None:
    timing = measure_whole([(1.0, b'{"usage": {"compl'), (2.5, b'etion_tokens": 3}}')], started=0.5)
    assert (timing.ttft_seconds, timing.itl_seconds, timing.e2e_seconds, timing.output_tokens) == (None, (), 2.0, 3)


@pytest.mark.parametrize(
    ("body", "kind"), [(b"<html>", "bad_body"), (b"[]", "bad_body"), (b'{"error": "overloaded"}', "error_body")]
)
def test_a_whole_answer_that_is_none_is_a_failure(body: bytes, kind: str) -> None:
    with pytest.raises(AnswerFailed) as caught:
        measure_whole([(1.0, body)], 0.0)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "slow down"}}', "slow down"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": "no"}', '{"detail": "no"}'),
        (b"\xff gateway timeout", "\ufffd gateway timeout"),
    ],
)
def test_a_refusal_keeps_status_and_words(body: bytes, message: str) -> None:
    failure = refusal(429, [(1.0, body)])
    assert (failure.kind, failure.message) == ("http_429", message)
