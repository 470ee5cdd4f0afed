"""What an engine writes that is not one proper answer to one request, byte by byte. The same suite for every relay.

Whatever came with the answer to one request must reach nobody else: neither the next request on the engine's connection, nor the client's own
connection behind its answer.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest

from gateway.testing import RELAYS, FakeFleet, wait_until
from tests.integration.gateway_harness import Bench, bench, chat_body, raw_request, read_all

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

POISON = b'{"id":"poison","choices":[]}'
ANSWER = b'{"id":"first","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'


def whole(body: bytes, *lines: bytes, status: bytes = b"200 OK") -> bytes:
    head = [b"HTTP/1.1 " + status, b"content-type: application/json", b"content-length: %d" % len(body), *lines]
    return b"\r\n".join([*head, b"", body])


def with_head(*lines: bytes, body: bytes = ANSWER, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([status, b"content-type: application/json", *lines, b"", body])


def chunks(*parts: bytes) -> bytes:
    return with_head(b"transfer-encoding: chunked", body=b"".join(parts))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LENGTH = b"content-length: %d" % len(ANSWER)
EVENT = b'data: {"id":"first","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
SECOND = whole(POISON, b"x-evil: 1")

# What comes as the answer to the first request, in one write. Where the engine's connection is used again is the gateway's affair.
LIES = {
    "another answer behind it": whole(ANSWER) + SECOND,
    "another answer behind its chunks": chunks(chunk(ANSWER), END) + SECOND,
    "half an answer behind it": whole(ANSWER) + SECOND[:30],
    "one byte behind it": whole(ANSWER) + b"H",
    "text behind it": whole(ANSWER) + POISON,
    "empty lines and an answer behind it": whole(ANSWER) + b"\r\n\r\n" + SECOND,
    "an interim answer behind it": whole(ANSWER) + b"HTTP/1.1 100 Continue\r\n\r\n" + SECOND,
    "an answer behind one that closes": whole(ANSWER, b"connection: close") + SECOND,
    "an answer behind an error": whole(b'{"error":"no"}', status=b"400 Bad Request") + SECOND,
    "an answer behind a long error": whole(b"x" * 200_000, status=b"500 Oops") + SECOND,
    "a body behind 204": with_head(b"content-length: %d" % len(POISON), body=POISON, status=b"HTTP/1.1 204 No Content"),
    "an answer behind 304": with_head(body=SECOND, status=b"HTTP/1.1 304 Not Modified"),
    "length and chunks": with_head(LENGTH, b"transfer-encoding: chunked", body=chunk(ANSWER) + END + SECOND),
    "chunks and length": with_head(b"transfer-encoding: chunked", b"content-length: 3", body=chunk(ANSWER) + END + SECOND),
    "two lengths": with_head(LENGTH, b"content-length: 1", body=ANSWER + SECOND),
    "a list of lengths": with_head(LENGTH + b", 1", body=ANSWER + SECOND),
    "a signed length": with_head(b"content-length: +%d" % len(ANSWER), body=ANSWER + SECOND),
    "a negative length": with_head(b"content-length: -1", body=ANSWER + SECOND),
    "a length in hex": with_head(b"content-length: 0x5d", body=ANSWER + SECOND),
    "a length that overflows": with_head(b"content-length: 18446744073709551617", body=ANSWER + SECOND),
    "a length that is too short": with_head(b"content-length: 5", body=ANSWER + SECOND),
    "a space before the colon": with_head(b"content-length : 5", b"transfer-encoding: chunked", body=chunk(ANSWER) + END + SECOND),
    "an unknown coding": with_head(b"transfer-encoding: xchunked", LENGTH, body=ANSWER + SECOND),
    "chunked not last": with_head(b"transfer-encoding: chunked, identity", body=chunk(ANSWER) + END + SECOND),
    "a chunk size that is none": chunks(b"zz\r\n", ANSWER, b"\r\n", END) + SECOND,
    "a chunk size in 0x": chunks(b"0x5d\r\n", ANSWER, b"\r\n", END) + SECOND,
    "a negative chunk size": chunks(b"-1\r\n", ANSWER, b"\r\n", END) + SECOND,
    "a chunk size that overflows": chunks(b"fffffffffffffffff\r\n", ANSWER, b"\r\n", END) + SECOND,
    "a chunk longer than it says": chunks(b"5\r\n", ANSWER, b"\r\n", END) + SECOND,
    "chunks that end in bare newlines": chunks(b"%x\n%b\n0\n\n" % (len(ANSWER), ANSWER)) + SECOND,
    "trailers": chunks(chunk(ANSWER), b"0\r\nx-evil: 1\r\ncontent-length: 9\r\n\r\n") + SECOND,
    "a folded header": with_head(LENGTH, b"x-a: 1\r\n x-evil: 1"),
    "a carriage return in a header": with_head(LENGTH, b"x-a: 1\rx-evil: 1"),
    "a bare newline in a header": with_head(LENGTH, b"x-a: 1\n\nx-evil: 1"),
    "a zero byte in a header": with_head(LENGTH, b"x-a: 1\x00x-evil: 1"),
    "a header without a colon": with_head(LENGTH, b"x-a"),
    "a header without a name": with_head(LENGTH, b": 1"),
    "a header with a space in its name": with_head(LENGTH, b"x a: 1"),
    "headers without end": with_head(*(b"x-%d: %b" % (n, b"y" * 1000) for n in range(3000)), LENGTH),
    "a header of a megabyte": with_head(b"x-a: " + b"y" * 2**20, LENGTH),
    "a status of five digits": with_head(LENGTH, status=b"HTTP/1.1 20000 OK"),
    "a status that is none": with_head(LENGTH, status=b"HTTP/1.1 OK"),
    "a status below all": with_head(LENGTH, status=b"HTTP/1.1 000 Zero"),
    "a status above all": with_head(LENGTH, status=b"HTTP/1.1 600 Over"),
    "another protocol": with_head(LENGTH, status=b"HTTP/2.0 200 OK"),
    "no protocol": ANSWER + b"\r\n\r\n",
    "a change of protocol": with_head(b"upgrade: h2c", b"connection: upgrade", status=b"HTTP/1.1 101 Switching Protocols"),
    "many interim answers": b"HTTP/1.1 103 Early Hints\r\nx-evil: 1\r\n\r\n" * 50 + whole(ANSWER) + SECOND,
    "interim answers without end": b"HTTP/1.1 100 Continue\r\nx-evil: 1\r\n\r\n" * 20_000 + whole(ANSWER) + SECOND,
    "an interim answer with a body": b"HTTP/1.1 100 Continue\r\ncontent-length: %d\r\n\r\n" % len(POISON) + POISON + SECOND,
    "a stream with an answer behind it": STREAM + chunk(EVENT) + chunk(b"data: [DONE]\n\n") + END + SECOND,
    "a stream with an answer behind its last event": STREAM + chunk(EVENT) + chunk(b"data: [DONE]\n\n") + SECOND,
    "a stream with an answer in the middle": STREAM + chunk(EVENT) + SECOND,
    "a stream with more events behind its end": STREAM + chunk(EVENT + b"data: [DONE]\n\n" + b"data: " + POISON + b"\n\n") + END,
}  # fmt: skip

UNTIL_CLOSE = "chunked not last"  # has no end but that of the connection

# What comes of its own accord when the answer to the first request has been passed on and the connection is kept.
LATER = {
    "an answer": SECOND,
    "half an answer": SECOND[:40],
    "a head without end": b"HTTP/1.1 200 OK\r\nx-evil: 1\r\n",
    "text": POISON,
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
}


class Engine:
    """Answers the first request with `lie`, and every other one properly, under the request's own name for itself."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.lie: bytes | None = None
        self.writers: list[asyncio.StreamWriter] = []
        path = fleet.directory / f"liar-{id(self):x}.sock"
        self._fleet = fleet
        self._server = fleet.thread.call(asyncio.start_unix_server(self._serve, path))
        fleet.adopt("m-0", "m", f"unix:{path}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                asked = json.loads(await reader.readexactly(length))
                lie, self.lie = self.lie, None
                writer.write(lie or whole(json.dumps({"id": asked["user"], "choices": []}).encode()))
                if lie == LIES[UNTIL_CLOSE]:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.remove(writer)
            writer.close()

    async def _say(self, data: bytes) -> None:
        for writer in self.writers:
            writer.write(data)

    def say(self, data: bytes) -> None:
        """Write `data` on every connection there is."""
        self._fleet.thread.call(self._say(data))

    def close(self) -> None:
        self._fleet.thread.loop.call_soon_threadsafe(self._server.close)


@pytest.fixture(params=sorted(RELAYS), scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), str(request.param)) as made:
        yield made


@pytest.fixture
def engine(served: Bench) -> Iterator[Engine]:
    made = Engine(served.fleet)
    served.know()
    yield made
    made.close()
    served.reset()


def ask(served: Bench, name: str, **fields: object) -> bytes:
    """All that the gateway writes to a client that sends one request."""
    body = json.dumps(chat_body(stream=False, user=name) | fields).encode()
    with served.connect() as sock:
        sock.sendall(raw_request(body, head=b"connection: close\r\n"))
        return read_all(sock)


def statuses(answer: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/\d(?:\.\d)? (\d+)", answer)


def is_clean(answer: bytes) -> bool:
    """Whether it is one answer, with nothing of what the engine sent beside its own."""
    return len(statuses(answer)) == 1 and b"x-evil" not in answer.lower() and b"poison" not in answer


@pytest.mark.parametrize("name", sorted(LIES))
def test_what_comes_with_an_answer_reaches_nobody_else(served: Bench, engine: Engine, name: str) -> None:
    engine.lie = LIES[name]
    first = ask(served, "first", stream=name.startswith("a stream"))
    head, _, rest = first.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 ")
    assert statuses(head)[0] in (b"200", b"204", b"304", b"400", b"500", b"502")
    assert not re.search(rb"[\r\n]x-evil", head.lower())
    if length := re.search(rb"\r\ncontent-length: (\d+)", head):
        assert len(rest) == int(length[1]), "nothing stands behind the answer"
    else:
        assert name.startswith("a stream") or statuses(head)[0] in (b"204", b"304")
    for marker in ("second", "third"):
        answer = ask(served, marker)
        assert is_clean(answer)
        assert statuses(answer) == [b"200"]
        assert b'"id": "%b"' % marker.encode() in answer


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_an_engine_says_unasked_is_no_answer_to_the_next_request(served: Bench, engine: Engine, name: str) -> None:
    assert b'"id": "first"' in ask(served, "first")
    wait_until(lambda: served.gateway.idle, what="the connection is kept")
    engine.say(LATER[name])
    for marker in ("second", "third"):
        answer = ask(served, marker)
        assert is_clean(answer)
        assert statuses(answer) == [b"200"]
        assert b'"id": "%b"' % marker.encode() in answer
