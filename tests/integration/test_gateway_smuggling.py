"""What two HTTP parsers could read differently, sent byte by byte: framing, headers, paths and hosts. The same suite for every relay.

The engine behind counts what reaches it. A request that is refused must not have reached it, and its connection must not be used
for whatever the sender put behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gateway.config import Config
from gateway.keys import Keystore
from gateway.testing import RELAYS, fake_fleet, running_gateway, wait_until
from gateway.wiring import wall_clock
from tests.integration.gateway_harness import CHAT, Bench, chat_body, read_all

pytestmark = pytest.mark.integration

BODY = json.dumps(chat_body("m", stream=False, max_tokens=1)).encode()
SMUGGLED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


@dataclass
class Target(Bench):
    """A gateway that asks for keys, and a key."""

    key: str = ""

    @property
    def served(self) -> int:
        return self.fleet.engines["m-0"].state.started

    def exchange(self, sent: bytes) -> list[bytes]:
        """The status codes that come back until the gateway closes, which it soon does where it waits for more."""
        with self.connect() as sock:
            sock.sendall(sent)
            return re.findall(rb"HTTP/1\.1 (\d{3}) ", read_all(sock))

    def head(self, *lines: bytes, path: bytes = CHAT.encode(), method: bytes = b"POST") -> bytes:
        auth = b"authorization: Bearer " + self.key.encode()
        return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"host: x", auth, *lines, b"", b""])


@pytest.fixture(params=sorted(RELAYS), scope="module")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    state = tmp_path_factory.mktemp("state")
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": "m", "source": "x"}],
            "tenants": [{"name": "acme"}],
            "gateway": {
                "listen": "127.0.0.1:0",
                "admin_listen": "none",
                "keep_alive_seconds": 1,
                "header_timeout_seconds": 1,
                "body_timeout_seconds": 1,
            },
        }
    )
    key, _ = Keystore(state).create("acme", now=wall_clock())
    with fake_fleet(state) as fleet, running_gateway(config, relay=request.param) as running:
        made = Target(running, fleet, config, key)
        fleet.start("m-0", "m", ttft_seconds=0.0, itl_seconds=0.0)
        made.know()
        yield made
        wait_until(lambda: running.idle, what="all counters are back at zero")


def length(count: int = len(BODY)) -> bytes:
    return b"content-length: %d" % count


def test_the_suite_can_ask_at_all(target: Target) -> None:
    before = target.served
    assert target.exchange(target.head(length()) + BODY) == [b"200"]
    assert target.exchange(target.head(length()) + BODY + target.head(length()) + BODY) == [b"200", b"200"]
    assert target.served == before + 3


CHUNKED_BODY = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

FRAMING = {
    "length and chunks": ([length(6), b"transfer-encoding: chunked"], b"0\r\n\r\nX"),
    "chunks and length": ([b"transfer-encoding: chunked", length(6)], b"0\r\n\r\nX"),
    "two lengths": ([length(), length(1)], BODY),
    "a list of lengths": ([b"content-length: %d, %d" % (len(BODY), len(BODY))], BODY),
    "a signed length": ([b"content-length: +%d" % len(BODY)], BODY),
    "a negative length": ([b"content-length: -1"], BODY),
    "a length in hex": ([b"content-length: 0x10"], BODY),
    "a length with a space in it": ([b"content-length: 1 0"], BODY),
    "a length that overflows": ([b"content-length: 18446744073709551617"], BODY),
    "an empty length": ([b"content-length: "], BODY),
    "chunked not last": ([b"transfer-encoding: chunked, identity"], CHUNKED_BODY),
    "an unknown coding": ([b"transfer-encoding: xchunked"], CHUNKED_BODY),
    "a coding with a vertical tab": ([b"transfer-encoding: \x0bchunked"], CHUNKED_BODY),
    "a coding in quotes": ([b'transfer-encoding: "chunked"'], CHUNKED_BODY),
    "a space before the colon": ([b"transfer-encoding : chunked"], CHUNKED_BODY),
    "a length with a space before the colon": ([b"content-length : %d" % len(BODY)], BODY),
    "a chunk size that is none": ([b"transfer-encoding: chunked"], b"xyz\r\n%s\r\n0\r\n\r\n" % BODY),
    "a chunk size in 0x": ([b"transfer-encoding: chunked"], b"0x1\r\nX\r\n0\r\n\r\n"),
    "a negative chunk size": ([b"transfer-encoding: chunked"], b"-1\r\nX\r\n0\r\n\r\n"),
    "a chunk size that overflows": ([b"transfer-encoding: chunked"], b"fffffffffffffffff\r\nX\r\n0\r\n\r\n"),
    "a chunk longer than it says": ([b"transfer-encoding: chunked"], b"1\r\n%s\r\n0\r\n\r\n" % BODY),
    "a chunk that ends in a bare newline": ([b"transfer-encoding: chunked"], b"%x\n%s\n0\n\n" % (len(BODY), BODY)),
}


@pytest.mark.parametrize("name", sorted(FRAMING))
def test_doubtful_framing_is_refused_and_ends_the_connection(target: Target, name: str) -> None:
    lines, body = FRAMING[name]
    before = target.served
    answers = target.exchange(target.head(*lines) + body + SMUGGLED)
    assert len(answers) <= 1, f"what was smuggled got an answer of its own: {answers}"
    assert all(answer.startswith(b"4") for answer in answers)
    assert target.served == before


HEADERS = {
    "a folded line": b"x-a: 1\r\n folded: 2",
    "a folded line first": b" folded: 2",
    "a carriage return in a value": b"x-a: 1\rx-b: 2",
    "a bare newline in the middle": b"x-a: 1\nx-b: 2",
    "a zero byte": b"x-a: 1\x00",
    "a zero byte in a name": b"x\x00-a: 1",
    "a name with a space": b"x a: 1",
    "no name": b": 1",
    "no colon": b"x-a",
    "a name of brackets": b"x(a): 1",
}


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_doubtful_headers_are_refused(target: Target, name: str) -> None:
    before = target.served
    answers = target.exchange(target.head(HEADERS[name], length()) + BODY + SMUGGLED)
    assert len(answers) == 1
    assert answers[0] == b"400"
    assert target.served == before


LINES = {
    "a tab": b"POST\t/v1/chat/completions HTTP/1.1",
    "no version": b"POST /v1/chat/completions",
    "another protocol": b"POST /v1/chat/completions FTP/1.1",
    "an old version": b"POST /v1/chat/completions HTTP/0.9",
    "a new version": b"POST /v1/chat/completions HTTP/2.0",
    "a version of two digits": b"POST /v1/chat/completions HTTP/1.10",
    "a newline in the path": b"POST /v1/chat/completions\n HTTP/1.1",
    "an unknown method": b"SMUGGLE /v1/chat/completions HTTP/1.1",
    "a method in small letters": b"post /v1/chat/completions HTTP/1.1",
    "a tunnel": b"CONNECT 127.0.0.1:22 HTTP/1.1",
    "http2 by prior knowledge": b"PRI * HTTP/2.0",
}


@pytest.mark.parametrize("name", sorted(LINES))
def test_doubtful_request_lines_are_refused(target: Target, name: str) -> None:
    before = target.served
    head = LINES[name] + b"\r\n" + target.head(length()).split(b"\r\n", 1)[1]
    answers = target.exchange(head + BODY)
    assert answers
    assert all(answer.startswith(b"4") for answer in answers)
    assert target.served == before


PATHS = [
    b"//v1/chat/completions",
    b"/v1//chat/completions",
    b"/v1/chat/completions/",
    b"/v1/chat/completions/.",
    b"/v1/x/../chat/completions",
    b"/v1/%2e%2e/v1/chat/completions",
    b"/v1/chat/completions;a=b",
    b"/v1/chat/completions%00",
    b"/v1/chat/completions%20",
    b"/v1/chat/completions%0d%0ax-a:%20b",
    b"/v1/chat%5ccompletions",
    b"\\v1\\chat\\completions",
    b"/V1/CHAT/COMPLETIONS",
    b"/v1/chat/completions%252f",
    b"/invocations",
    b"/sleep",
    b"/collective_rpc",
    b"/v1/load_lora_adapter",
    b"/admin/keys",
    b"/admin/tenants",
    b"/%61dmin/keys",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.decode("latin-1"))
def test_paths_beside_the_table_reach_no_engine(target: Target, path: bytes) -> None:
    before = target.served
    answers = target.exchange(target.head(length(), b"connection: close", path=path) + BODY)
    assert [answer[:1] for answer in answers] == [b"4"]
    assert target.served == before


@pytest.mark.parametrize(
    "path",
    [
        *PATHS,
        CHAT.encode(),
        b"/v1/chat%2Fcompletions",
        b"/%761/chat/completions",
        b"http://x/v1/chat/completions",
        b"/v1/models",
    ],
    ids=lambda path: path.decode("latin-1"),
)
def test_no_spelling_of_a_path_goes_round_the_key(target: Target, path: bytes) -> None:
    for method in (b"POST", b"GET", b"HEAD", b"OPTIONS"):
        head = method + b" " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + length() + b"\r\n\r\n"
        answers = target.exchange(head + BODY)
        assert [answer[:1] for answer in answers] == [b"4"], method


HOSTS = [
    b"evil.test",
    b"127.0.0.1:1",
    b"x@y",
    b"x\tz",
    b'"><script>',
    b"a" * 3000,
    b"\xff\xfe",
    b"localhost:99999",
    b"",
]


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.decode("latin-1")[:20])
def test_the_host_decides_nothing_and_is_never_repeated(target: Target, host: bytes) -> None:
    for path in (b"/v1/models", b"/v1/models/", b"/docs", b"/nothing", CHAT.encode()):
        key = b"authorization: Bearer " + target.key.encode()
        with target.connect() as sock:
            sock.sendall(
                b"GET " + path + b" HTTP/1.1\r\nhost: " + host + b"\r\n" + key + b"\r\nconnection: close\r\n\r\n"
            )
            answer = read_all(sock)
        status = int(answer.split(b" ", 2)[1])
        assert status in (200, 400, 404, 405)
        assert not re.search(rb"\r\nlocation:", answer, re.IGNORECASE)
        if len(host) > 3:
            assert host not in answer


@pytest.mark.parametrize("head", [b"", b"host: x\r\nhost: y\r\n"], ids=["none", "two"])
@pytest.mark.parametrize("path", [CHAT.encode(), b"/v1/models"])
def test_a_request_has_one_host(target: Target, path: bytes, head: bytes) -> None:
    method = b"POST" if path == CHAT.encode() else b"GET"
    body = BODY if method == b"POST" else b""
    key = b"authorization: Bearer " + target.key.encode() + b"\r\n"
    answers = target.exchange(
        method + b" " + path + b" HTTP/1.1\r\n" + head + key + length(len(body)) + b"\r\n\r\n" + body
    )
    assert answers == [b"400"]


def test_two_credentials_are_one_too_many(target: Target) -> None:
    """A proxy in front might look at the first one, this gateway at the last."""
    before = target.served
    answers = target.exchange(target.head(b"authorization: Bearer sk-other", length()) + BODY)
    assert answers == [b"400"]
    assert target.served == before


def test_nothing_that_a_client_sends_becomes_a_header_of_an_answer(target: Target) -> None:
    """Response splitting: what is reflected (request id, model, path) stays inside a value or a JSON text."""
    for line in (b"x-request-id: a%0d%0ax-evil: 1", b"x-request-id: a\tx-evil: 1", b"traceparent: 00\tx-evil: 1"):
        with target.connect() as sock:
            sock.sendall(target.head(line, length(), b"connection: close") + BODY)
            head = read_all(sock).split(b"\r\n\r\n")[0].lower()
        assert b"x-evil" not in head
    body = json.dumps({"model": "m\r\nx-evil: 1\r\n\r\n", "messages": []}).encode()
    with target.connect() as sock:
        sock.sendall(target.head(length(len(body)), b"connection: close") + body)
        head = read_all(sock).split(b"\r\n\r\n")[0].lower()
    assert b"x-evil" not in head


def test_the_engine_gets_one_length_and_nothing_of_the_clients_framing(target: Target) -> None:
    lines = [b"transfer-encoding: chunked", b"connection: x-a, keep-alive", b"x-a: 1", b"te: trailers", b"upgrade: h2c"]
    assert target.exchange(target.head(*lines) + CHUNKED_BODY) == [b"200"]
    got = {name.lower() for name in target.fleet.engines["m-0"].state.last_request["headers"]}
    assert got == {"host", "content-type", "content-length", "x-request-id"}


def test_trailers_do_not_become_headers(target: Target) -> None:
    sent = b"%x\r\n%s\r\n0\r\nauthorization: Bearer %s\r\nx-request-id: trailer\r\n\r\n" % (
        len(BODY),
        BODY,
        target.key.encode(),
    )
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode()
    assert target.exchange(head + sent) == [b"401"]
