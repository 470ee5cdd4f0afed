"""What comes from engines, cut anywhere and broken anyhow: the fast relay's reading of it, against the plain one's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from gateway.error_map import Headers
from gateway.errors import EngineError
from gateway.hotpath.engines import EngineConnection
from gateway.hotpath.framing import chunk, is_one_chunk_of_events
from gateway.sse import StreamMeter

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


class Pool:
    """As much of a pool as a connection talks to."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.kept: list[Any] = []

    def keep(self, connection: Any) -> None:
        self.kept.append(connection)

    def lost(self, connection: Any) -> None: ...

    def drain(self, connection: Any) -> None: ...

    def is_draining(self, connection: Any) -> bool:
        return False


class Wire:
    """The transport."""

    aborted = False

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    close = abort


class Reader:
    """A receiver that meters a stream as `HotRequest` does, and keeps what a client would get."""

    def __init__(self, connection: EngineConnection) -> None:
        self.connection = connection
        self.meter = meter()
        self.passed = b""
        self.status = 0
        self.whole: list[bytes] = []
        self.completed = 0
        self.failures: list[EngineError] = []

    def passes(self, data: bytes) -> bool:
        if not self.meter.passes(data, 1.0):
            return False
        self.passed += unchunked(data)
        return True

    def answered(self, status: int, headers: Headers, body: bytes, *, complete: bool) -> None:
        assert self.status == 0, "an answer begins once"
        self.status = status
        self.connection.pass_chunks()
        if body or complete:
            self.continued(body, complete=complete)

    def continued(self, body: bytes, *, complete: bool) -> None:
        self.whole.append(body)
        self.passed += self.meter.feed(body, 1.0)
        self.completed += complete

    def engine_failed(self, error: EngineError) -> None:
        self.failures.append(error)


def meter() -> StreamMeter:
    return StreamMeter(keep_usage=True, first=lambda _: None, gap=lambda *_: None)


def unchunked(data: bytes) -> bytes:
    size, _, rest = data.partition(b"\r\n")
    assert rest[int(size, 16) :] == b"\r\n"
    return rest[:-2]


def opened() -> tuple[EngineConnection, Reader, Wire, Pool]:
    pool, wire = Pool(), Wire()
    connection = EngineConnection(cast(Any, pool))
    connection.connection_made(cast(Any, wire))
    reader = Reader(connection)
    connection.ask(reader, "m-0", b"", b"")
    return connection, reader, wire, pool


def feed(connection: EngineConnection, data: bytes, cuts: list[int]) -> None:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(places):
        connection.data_received(data[start:end])


words = st.sampled_from([b"a", b"two words", b"\\n\\n", b"data: ", b'\\"finish_reason\\":null', "é".encode()])
events = st.lists(st.one_of(words.map(lambda word: TEXT % word), st.just(b": keep-alive\n\n")), max_size=8)
cuts = st.lists(st.integers(0, 4000), max_size=30)


@given(events, st.lists(st.integers(1, 5), max_size=8), cuts)
def test_a_stream_reads_the_same_however_it_is_cut_and_chunked(
    stream: list[bytes], grouped: list[int], cuts: list[int]
) -> None:
    parts = [*stream, LAST, USAGE, DONE]
    chunks, rest = [], parts
    for size in grouped:
        chunks.append(b"".join(rest[:size]))
        rest = rest[size:]
    body = b"".join(chunk(part) for part in (*chunks, *rest) if part)
    expected = meter()
    wanted = expected.feed(b"".join(parts), 1.0)
    connection, reader, _, _ = opened()
    feed(connection, STREAM_HEAD + body + b"0\r\n\r\n", cuts)
    assert reader.passed == wanted
    assert (reader.meter.events, reader.meter.usage) == (expected.events, expected.usage)
    assert reader.meter.done
    assert reader.completed == 1
    assert reader.failures == []


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), cuts)
def test_answers_on_one_connection_stay_apart(bodies: list[bytes], cuts: list[int]) -> None:
    connection, _, _, pool = opened()
    for number, body in enumerate(bodies):
        reader = Reader(connection)
        connection.ask(reader, "m-0", b"", b"")
        feed(connection, b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body), cuts)
        assert b"".join(reader.whole) == body
        assert reader.completed == 1
        connection.release()
        assert len(pool.kept) == number + 1


@given(st.binary(max_size=200), st.sampled_from([b"", STREAM_HEAD, STREAM_HEAD + chunk(TEXT % b"a")]), cuts)
def test_garbage_ends_in_one_failure_at_most_and_never_in_an_exception(
    garbage: bytes, before: bytes, cuts: list[int]
) -> None:
    connection, reader, wire, _ = opened()
    feed(connection, before + garbage, cuts)
    assert len(reader.failures) <= 1
    assert bool(reader.failures) == wire.aborted


@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=3), st.booleans())
def test_what_is_passed_unread_is_exactly_one_chunk(text: bytes, at: int, change: bytes, shorten: bool) -> None:
    good = chunk(b"data: " + text.replace(b"\n", b"") + b"\n\n")
    assert is_one_chunk_of_events(good)
    at %= len(good)
    changed = good[:at] + change + good[at + (len(change) if not shorten else len(change) + 1) :]
    if is_one_chunk_of_events(changed):
        payload = unchunked(changed)
        assert chunk(payload) == changed
        assert payload.startswith(b"data: ")
        assert payload.endswith(b"\n\n")


def test_a_second_answer_to_one_request_is_not_kept_for_the_next() -> None:
    connection, reader, wire, pool = opened()
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    connection.data_received(answer + answer)
    assert wire.aborted
    assert len(reader.failures) == 1
    assert pool.kept == []


def test_an_answer_that_nobody_asked_for_closes_the_connection() -> None:
    connection, _, wire, pool = opened()
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    connection.data_received(answer)
    connection.release()
    assert pool.kept == [connection]
    connection.data_received(answer)
    assert wire.aborted


def test_an_interim_answer_is_no_answer() -> None:
    connection, reader, _, _ = opened()
    connection.data_received(
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    )
    assert (reader.status, b"".join(reader.whole), reader.completed) == (200, b"hi", 1)


def test_a_head_without_end_is_a_failure() -> None:
    connection, reader, wire, _ = opened()
    connection.data_received(b"HTTP/1.1 200 OK\r\n")
    for _ in range(100):
        connection.data_received(b"x-a: " + b"y" * 1000 + b"\r\n")
        if wire.aborted:
            break
    assert len(reader.failures) == 1
