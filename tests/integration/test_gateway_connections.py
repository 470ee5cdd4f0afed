"""Connections as clients use them: kept, shared by several requests, and given up. The same suite for every relay."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from gateway.testing import RELAYS
from tests.integration.gateway_harness import CHAT, Bench, bench, chat_body, raw_request, read_all, read_until

pytestmark = pytest.mark.integration

WHOLE = json.dumps(chat_body(stream=False, max_tokens=2)).encode()
STREAM = json.dumps(chat_body(max_tokens=2)).encode()
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@pytest.fixture(params=RELAYS, scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), request.param, keep_alive_seconds=1.0) as made:
        made.fleet.start("m-0", "m", output_tokens=4)
        made.know()
        yield made


def test_requests_sent_at_once_are_answered_in_their_order(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(STREAM) + HEALTH + raw_request(WHOLE) + raw_request(STREAM) + LAST)
        answer = read_all(sock)
    assert STATUS.findall(answer) == [b"200"] * 5
    marks = [b"[DONE]", b'"status"', b'"chat.completion"', b"[DONE]", b'"status"']
    at = 0
    for mark in marks:
        found = answer.find(mark, at)
        assert found >= 0, f"{mark!r} is missing or in the wrong place: {answer!r}"
        at = found + len(mark)


def test_a_refused_request_does_not_disturb_the_one_behind_it(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(b"{") + raw_request(WHOLE) + LAST)
        assert STATUS.findall(read_all(sock)) == [b"400", b"200", b"200"]


@pytest.mark.parametrize("pieces", [1, 7, 10_000])
def test_a_request_may_come_in_any_pieces(served: Bench, pieces: int) -> None:
    data = raw_request(WHOLE) + LAST
    size = max(1, len(data) // pieces)
    with served.connect() as sock:
        for start in range(0, len(data), size):
            sock.sendall(data[start : start + size])
        assert STATUS.findall(read_all(sock)) == [b"200", b"200"]


def test_a_chunked_request_is_served_and_its_trailers_are_no_headers(served: Bench) -> None:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode()
    half = len(WHOLE) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (WHOLE[:half], WHOLE[half:]))
    with served.connect() as sock:
        sock.sendall(head + chunks + b"0\r\nx-request-id: from-a-trailer\r\n\r\n" + LAST)
        answer = read_all(sock)
    assert STATUS.findall(answer) == [b"200", b"200"]
    assert b"from-a-trailer" not in answer


def test_a_client_that_waits_to_be_told_to_continue_is_told(served: Bench) -> None:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    with served.connect() as sock:
        sock.sendall(head % (CHAT.encode(), len(WHOLE)))
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        sock.sendall(WHOLE + LAST)
        assert STATUS.findall(read_all(sock)) == [b"200", b"200"]


def test_an_http_1_0_client_gets_its_answer_to_the_end_of_the_connection(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(
            b"POST %s HTTP/1.0\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(WHOLE), WHOLE)
        )
        answer = read_all(sock)
    assert b" 200 OK" in answer
    assert b'"chat.completion"' in answer


def test_a_client_that_wants_the_connection_closed_gets_it_closed(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(STREAM, head=b"connection: close\r\n"))
        answer = read_all(sock)
    assert b"connection: close" in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_connection_that_is_kept_for_nothing_is_given_up(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(WHOLE))
        assert STATUS.findall(read_all(sock)) == [b"200"]
