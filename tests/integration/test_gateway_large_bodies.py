"""Bodies over 256 KiB, from a client to an engine: the same as small ones, and nothing is left of them. The same for every relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.large_bodies import LARGE_BYTES, LargeBodies, LargeBody
from gateway.large_bodies.testing import InlineReader
from gateway.request import outgoing_body, parse_body
from gateway.testing import RELAYS, FakeFleet, wait_until
from placement.table import ReplicaState
from tests.integration.gateway_harness import CHAT, Bench, bench, raw_request, read_all

pytestmark = pytest.mark.integration

ANSWER = b'{"id":"1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)


class Engine:
    """An engine that keeps the bodies it gets. The first `deaths` requests it answers by closing the connection."""

    def __init__(self, fleet: FakeFleet, replica: str, *, deaths: int = 0) -> None:
        self.bodies: list[bytes] = []
        self._deaths = deaths
        fleet.script(replica, "m", self._unused)
        self._serve_at(fleet, replica)

    async def _unused(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    def _serve_at(self, fleet: FakeFleet, replica: str) -> None:
        path = fleet.directory / f"{replica}-{id(self):x}.sock"
        self._fleet, self._server = fleet, fleet.thread.call(asyncio.start_unix_server(self._serve, path))
        fleet.adopt(replica, "m", f"unix:{path}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                if self._deaths:
                    self._deaths -= 1
                    return
                self.bodies.append(body)
                writer.write(OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        self._fleet.thread.loop.call_soon_threadsafe(self._server.close)


@pytest.fixture(params=RELAYS, scope="module")
def relay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def served(relay: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), relay) as made:
        yield made


@pytest.fixture
def made(served: Bench) -> Iterator[Bench]:
    yield served
    served.reset()
    wait_until(lambda: not large(served).room.held and not large(served).reader.waiting, what="nothing is held")


def large(served: Bench) -> LargeBodies:
    return served.gateway.gateway.exchanges.large_bodies


def body(count: int = 600_000, **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * count}]} | fields).encode()


def reader_pid(served: Bench) -> int:
    process = large(served).reader._process
    assert process is not None
    return int(process.pid)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fields", [{}, {"cache_salt": "mine"}, {"stream": True, "stream_options": {"more": 1}}])
def test_an_engine_gets_what_it_would_of_a_small_body(made: Bench, fields: dict[str, Any]) -> None:
    engine = Engine(made.fleet, "m-0")
    made.know()
    raw = body(**fields)
    answer = httpx2.post(made.url + CHAT, content=raw, timeout=60)
    assert answer.status_code == 200
    got = json.loads(engine.bodies[0])
    salt = got["cache_salt"]
    small = outgoing_body(raw, parse_body(raw), engine_model="m", sets={"cache_salt": salt})
    assert got == json.loads(small)
    assert len(engine.bodies[0]) == len(small), "nothing stands there twice"
    assert salt != fields.get("cache_salt")
    engine.close()


def test_what_is_wrong_is_told_with_its_place(made: Bench) -> None:
    made.fleet.start("m-0", "m")
    made.know()
    refused = httpx2.post(made.url + CHAT, content=body()[:-2] + b"\n ?", timeout=60)
    assert refused.status_code == 400
    assert "line 2, column 2" in refused.json()["error"]["message"]


def test_one_that_came_in_chunks_is_served(made: Bench) -> None:
    engine = Engine(made.fleet, "m-0")
    made.know()
    raw = body()
    pieces = (raw[at : at + 50_000] for at in range(0, len(raw), 50_000))
    assert httpx2.post(made.url + CHAT, content=pieces, timeout=60).status_code == 200
    assert json.loads(engine.bodies[0])["messages"] == json.loads(raw)["messages"]
    engine.close()


def chunked(parts: Iterator[bytes]) -> bytes:
    """The body of a request without its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


CHUNKED = b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode()


def test_small_chunks_are_gathered_before_they_are_written(made: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(made.fleet, "m-0")
    made.know()
    writes, plain_append = [], LargeBody.append

    def spied(one: LargeBody, part: bytes) -> None:
        writes.append(len(part))
        plain_append(one, part)

    monkeypatch.setattr(LargeBody, "append", spied)
    raw = body(400_000)
    with made.connect() as sock:
        sock.sendall(CHUNKED + chunked(raw[at : at + 16] for at in range(0, len(raw), 16)) + b"0\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")
    assert json.loads(engine.bodies[0])["messages"] == json.loads(raw)["messages"]
    assert sum(writes) == len(raw)
    assert len(writes) < 1000, "of 25,000 chunks"
    engine.close()


def test_the_byte_that_is_too_much_is_refused_without_the_end_of_the_body(relay: str, tmp_path: Path) -> None:
    with bench(tmp_path, relay, max_body="300KiB") as small, small.connect() as sock:
        sock.sendall(CHUNKED + chunked(iter([b" " * 290 * 2**10, b" " * 10 * 2**10, b" "])))
        assert read_all(sock).startswith(b"HTTP/1.1 413 ")


def test_an_engine_that_dies_has_the_whole_body_sent_to_another(made: Bench) -> None:
    engines = [Engine(made.fleet, f"m-{index}", deaths=1) for index in range(2)]
    engines.append(Engine(made.fleet, "m-2"))
    made.fleet.mark("m-1", ReplicaState.STARTING)
    made.know()
    for _ in range(4):  # the one that dies once is asked sooner or later
        assert httpx2.post(made.url + CHAT, content=body(), timeout=60).status_code == 200
    assert all(json.loads(got)["model"] == "m" for engine in engines for got in engine.bodies)
    for engine in engines:
        engine.close()


def test_a_tenant_and_all_of_them_have_a_bound_and_the_refusal_says_which(relay: str, tmp_path: Path) -> None:
    with bench(tmp_path, relay, max_body="1MiB", max_body_memory="1.5MiB", max_body_memory_per_tenant="1MiB") as small:
        small.fleet.start("m-0", "m")
        small.know()
        with small.connect() as holds:
            holds.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n{" % CHAT.encode())
            wait_until(lambda: large(small).room.held == 900_000, what="the first body has its room")
            refused = httpx2.post(small.url + CHAT, content=body(), timeout=60)
            assert refused.status_code == 429
            assert "max_body_memory_per_tenant" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"]
            small.gateway.on_loop(lambda: large(small).room._by_tenant.clear())  # as if it were somebody else's
            assert httpx2.post(small.url + CHAT, content=body(700_000), timeout=60).status_code == 503
            small.gateway.on_loop(lambda: large(small).room._by_tenant.update(anonymous=900_000))
            assert httpx2.post(small.url + CHAT, json={"model": "m", "messages": []}, timeout=60).status_code == 200
        wait_until(lambda: small.gateway.idle and not large(small).room.held, what="the room is given back")


def test_the_end_of_its_reader_is_a_503_and_the_next_one_is_served(made: Bench) -> None:
    made.fleet.start("m-0", "m")
    made.know()
    assert httpx2.post(made.url + CHAT, content=body(), timeout=60).status_code == 200
    pid = reader_pid(made)
    os.kill(pid, signal.SIGSTOP)
    with made.connect() as sock:
        sock.sendall(raw_request(body(), head=b"connection: close\r\n"))
        wait_until(lambda: large(made).reader.waiting, what="the body is with the reader")
        os.kill(pid, signal.SIGKILL)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"body_reader_gone"' in answer
    assert b"retry-after: 1\r\n" in answer
    assert httpx2.get(made.url + "/healthz", timeout=60).status_code == 200
    wait_until(lambda: httpx2.post(made.url + CHAT, content=body(), timeout=60).status_code == 200, what="it serves on")
    assert reader_pid(made) != pid


def test_nobody_who_sends_none_pays_for_a_reader_and_none_is_left(relay: str, tmp_path: Path) -> None:
    with bench(tmp_path, relay) as served:
        served.fleet.start("m-0", "m")
        served.know()
        assert httpx2.post(served.url + CHAT, content=body(LARGE_BYTES - 1000), timeout=60).status_code == 200
        assert large(served).reader.starts == 0
        assert httpx2.post(served.url + CHAT, content=body(), timeout=60).status_code == 200
        pid = reader_pid(served)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_clients_that_leave_at_any_moment_leave_nothing_behind(made: Bench) -> None:
    made.fleet.start("m-0", "m", output_tokens=3)
    made.know()
    chance, raw = random.Random(7), body(model="m", stream=True)
    for _ in range(40):
        with made.connect() as sock:
            sent = raw_request(raw)
            sock.sendall(sent[: chance.choice((100, 300_000, len(sent) - 1, len(sent), len(sent)))])
            if chance.random() < 0.5:
                sock.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    sock.recv(chance.choice((1, 100_000)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_until(lambda: made.gateway.idle, what="all counters are back at zero")
    wait_until(lambda: not large(made).room.held and not large(made).reader.waiting, what="nothing is held")
    assert httpx2.post(made.url + CHAT, content=body(), timeout=60).status_code == 200


def test_no_step_of_the_gateway_handles_more_than_a_part(made: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made.fleet.start("m-0", "m")
    made.know()
    bodies, opened = large(made), []
    plain_open = bodies.open

    def spied(*arguments: Any) -> Any:
        opened.append(plain_open(*arguments))
        return opened[-1]

    monkeypatch.setattr(bodies, "open", spied)
    raw = body(5_000_000, cache_salt="mine")
    assert httpx2.post(made.url + CHAT, content=raw, timeout=60).status_code == 200
    (one,) = opened
    assert one.size == len(raw)
    assert 0 < one.largest_step <= 2 * LARGE_BYTES


def test_a_body_that_is_written_anew_takes_no_place_at_an_engine_meanwhile(
    made: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(made.fleet, "m-0")
    made.know()
    loads, reader = made.gateway.gateway.admission.loads, InlineReader(at_once=False)
    monkeypatch.setattr(large(made), "reader", reader)
    with made.connect() as sock:
        sock.sendall(raw_request(body(cache_salt="mine"), head=b"connection: close\r\n"))
        wait_until(lambda: reader.tickets, what="the body is to be read")
        made.gateway.on_loop(reader.work)
        wait_until(lambda: reader.tickets, what="and to be written")
        assert not loads.total()
        assert httpx2.post(made.url + CHAT, content=body(100), timeout=60).status_code == 200
        made.gateway.on_loop(reader.work)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")
    assert len(engine.bodies) == 2
    engine.close()
