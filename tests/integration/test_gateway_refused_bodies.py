"""A refusal before the body is whole: every client that looks gets to see it, and little of the body is read. The same for every relay."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator

import httpx2
import openai
import pytest

from gateway.ingress.protocol import KEPT_BYTES
from gateway.testing import RELAYS
from tests.integration.gateway_harness import CHAT, Bench, bench, raw_request, read_all, read_until

pytestmark = pytest.mark.integration

LARGE = 50_000_000


@pytest.fixture(params=RELAYS, scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), request.param) as made:
        made.fleet.start("m-0", "m", output_tokens=4)
        made.know()
        yield made


def head(length: int, more: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (CHAT.encode(), more, length)


def sent_until_closed(sock: socket.socket, part: bytes) -> int:
    """Send `part` until the other side has had enough of it; the bytes that went out."""
    sent = 0
    try:
        while sent < LARGE:
            sent += sock.send(part)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def test_a_long_body_is_refused_by_its_head_and_our_side_is_closed_at_once(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(head(LARGE))
        answer = read_all(sock)  # without a byte of the body having been sent
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer


def test_only_a_part_of_a_refused_body_is_read(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(head(LARGE))
        assert sent_until_closed(sock, b"x" * 65536) < LARGE


def test_clients_that_look_get_to_see_the_refusal(served: Bench) -> None:
    body = b"x" * LARGE
    assert httpx2.post(served.url + CHAT, content=body, timeout=30).status_code == 413
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * LARGE}])
    assert caught.value.status_code == 413


def test_a_client_that_sends_all_before_it_looks_gets_to_see_the_refusal(served: Bench) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # not all of it was wanted
        connection.request("POST", CHAT, body=b"x" * LARGE)
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_a_chunked_body_is_refused_when_it_passes_the_limit(served: Bench) -> None:
    part = b"%x\r\n%b\r\n" % (2**20, b" " * 2**20)
    with served.connect() as sock:
        sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode())
        try:
            for _ in range(100):
                sock.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer


def test_what_is_announced_and_refused_is_never_asked_for(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(head(LARGE, b"expect: 100-continue\r\n"))
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert b"100 Continue" not in answer


@pytest.mark.parametrize("more", [b"content-encoding: gzip\r\n", b"content-encoding: gzip\r\nexpect: 100-continue\r\n"])
def test_any_refusal_before_a_long_body_closes(served: Bench, more: bytes) -> None:
    with served.connect() as sock:
        sock.sendall(head(KEPT_BYTES + 1, more))
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer


def test_after_a_refusal_before_a_short_body_the_connection_serves_on(served: Bench) -> None:
    refused = head(KEPT_BYTES, b"content-encoding: gzip\r\n")
    good = raw_request(json.dumps({"model": "m", "messages": []}).encode(), head=b"connection: close\r\n")
    with served.connect() as sock:
        sock.sendall(refused)
        answer = read_until(sock, b'"code":"invalid_request"}}')
        assert b"connection: close" not in answer
        sock.sendall(b"x" * KEPT_BYTES + good)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_a_long_body_that_is_served_leaves_the_connection_open(served: Bench) -> None:
    body = json.dumps({"model": "m", "messages": [], "more": "x" * 2 * KEPT_BYTES}).encode()
    with served.connect() as sock:
        sock.sendall(raw_request(body))
        assert b"connection: close" not in read_until(sock, b"\r\n\r\n")
        sock.sendall(raw_request(b'{"model":"m","messages":[]}', head=b"connection: close\r\n"))
        assert read_all(sock).count(b"HTTP/1.1 200 ") == 1


def test_a_request_to_a_cold_path_with_a_long_body_is_refused_the_same_way(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % LARGE)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close" in answer
