"""What goes wrong with engines and clients, and what the other side is told. The same suite for every relay."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.testing import RELAYS, wait_until
from placement.table import ReplicaState
from tests.integration.gateway_harness import CHAT, Bench, bench, chat_body, events, raw_request, read_all, read_until

# Every wait here has its own deadline; on a machine that is busy with other things one test may come to several of them.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

MakeBench = Callable[..., AbstractContextManager[Bench]]
EVENT = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
LAST = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"!"},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(params=sorted(RELAYS), scope="module")
def relay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(relay: str, tmp_path: Path) -> MakeBench:
    return lambda **settings: bench(tmp_path / "state", relay, **settings)


@pytest.fixture(scope="module")
def shared(relay: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), relay) as made:
        yield made


@pytest.fixture
def plain(shared: Bench) -> Iterator[Bench]:
    """A gateway with default settings that knows no engine and has counted nothing."""
    yield shared
    shared.reset()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def writes(*parts: bytes, end: bool = True, between: threading.Event | None = None) -> Any:
    """A script that writes a stream in these pieces; with `end` properly, else by closing.

    The pieces may be read together. With `between`, each is followed by nothing before that is set.
    """

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for part in parts:
            writer.write(chunk(part))
            await writer.drain()
            await (asyncio.sleep(0.01) if between is None else asyncio.to_thread(between.wait, 20))
        if end:
            writer.write(b"0\r\n\r\n")

    return answer


HALF_AN_ANSWER = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"id": "x", "choices": ['
)


def dies_after(said: bytes) -> tuple[Any, list[None]]:
    """A script that says this much and closes, and the list that grows with each request it saw."""
    asked: list[None] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(None)
        writer.write(said)

    return answer, asked


@contextmanager
def engine_process(path: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "placement.fake_engine", "--uds", str(path), "--model", "m", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(path.exists, what="the engine process listens", seconds=60)
        yield process
    finally:
        process.kill()
        process.wait()


# ---- engines that die


def test_an_engine_killed_in_the_middle_ends_its_stream_with_an_error_and_no_other(plain: Bench) -> None:
    path = plain.fleet.directory / "victim.sock"
    plain.fleet.start("other-0", "other", itl_seconds=0.05, output_tokens=60)
    with engine_process(path, "--itl-seconds", "0.05", "--output-tokens", "2000") as process:
        plain.fleet.adopt("m-0", "m", f"unix:{path}")
        plain.know()
        with (
            ThreadPoolExecutor() as pool,
            httpx2.stream("POST", plain.url + CHAT, json=chat_body(), timeout=30) as stream,
        ):
            other = pool.submit(plain.ask, chat_body("other"))
            lines = stream.iter_lines()
            while '"content":"the"' not in next(lines):
                pass
            os.kill(process.pid, signal.SIGKILL)
            rest = events("\n".join(lines))
            assert rest[-1] == "[DONE]"
            assert rest[-2]["error"]["code"] == "engine_died"
            assert rest[-2]["error"]["type"] == "server_error"
            whole = events(other.result().text)
        assert whole[-1] == "[DONE]"
        assert sum(bool(e["choices"][0]["delta"].get("content")) for e in whole[:-1]) == 60
        refused = plain.ask()
        assert refused.status_code == 503
        assert float(refused.headers["retry-after"]) >= 1
        plain.fleet.start("m-1", "m")
        plain.know()
        assert plain.ask().headers["x-sliceway-replica"] == "m-1"
    assert plain.errors()["engine_died"] == 1


def test_the_official_client_raises_on_a_stream_that_broke(plain: Bench) -> None:
    plain.fleet.script("m-0", "m", writes(EVENT, EVENT, end=False))
    plain.know()
    got = []
    with openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**chat_body())
        with pytest.raises(openai.APIError, match="stopped before"):
            got.extend(stream)
    assert len(got) == 2


@pytest.mark.parametrize(
    "tail",
    [EVENT[:40], EVENT[:-1], b": keep-alive\n\n", b""],
    ids=["half an event", "one newline short", "a comment", "nothing"],
)
def test_no_half_event_reaches_the_client_before_the_error(plain: Bench, tail: bytes) -> None:
    plain.fleet.script("m-0", "m", writes(EVENT, *([tail] if tail else []), end=False))
    plain.know()
    got = events(plain.ask().text)
    assert [("error" in e) if isinstance(e, dict) else e for e in got] == [False, True, "[DONE]"]


@pytest.mark.parametrize("end", [True, False])
def test_a_complete_stream_without_its_last_word_is_given_it(plain: Bench, end: bool) -> None:
    plain.fleet.script("m-0", "m", writes(EVENT, LAST, USAGE, end=end))
    plain.know()
    got = events(plain.ask().text)
    assert got[-1] == "[DONE]"
    assert got[-2]["choices"][0]["finish_reason"] == "stop"
    assert plain.errors() == {}


def test_a_stream_that_ends_early_but_properly_is_an_error_too(plain: Bench) -> None:
    plain.fleet.script("m-0", "m", writes(EVENT))
    plain.know()
    assert events(plain.ask().text)[-2]["error"]["code"] == "engine_died"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-le",
    ],
)
def test_a_death_before_the_first_byte_has_a_status(plain: Bench, stream: bool, said: bytes) -> None:
    answer, asked = dies_after(said)
    plain.fleet.script("m-0", "m", answer)
    plain.know()
    refused = plain.ask(chat_body(stream=stream))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unreachable"
    assert refused.headers["retry-after"]
    assert len(asked) == 2, (
        "a kept connection may have been closed in the same moment, so the only replica is asked twice"
    )


def test_a_death_in_the_middle_of_a_whole_answer_is_503(plain: Bench) -> None:
    answer, _ = dies_after(HALF_AN_ANSWER)
    plain.fleet.script("m-0", "m", answer)
    plain.know()
    refused = plain.ask(chat_body(stream=False))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unreachable")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", [b"", HALF_AN_ANSWER], ids=["nothing", "half an answer"])
def test_a_death_before_the_first_byte_is_no_loss_while_another_replica_serves(
    plain: Bench, stream: bool, said: bytes
) -> None:
    answer, asked = dies_after(said)
    plain.fleet.script("m-0", "m", answer)
    plain.fleet.start("m-1", "m", output_tokens=3)
    plain.know()
    answers = [plain.ask(chat_body(stream=stream)) for _ in range(4)]
    assert {(a.status_code, a.headers["x-sliceway-replica"]) for a in answers} == {(200, "m-1")}
    assert asked
    assert plain.gateway.gateway.exchanges.router.in_flight == 0


def test_a_request_that_two_engines_died_of_gets_no_third(plain: Bench) -> None:
    answer, asked = dies_after(b"")
    for replica in ("m-0", "m-1", "m-2"):
        plain.fleet.script(replica, "m", answer)
    plain.know()
    assert plain.ask().status_code == 503
    assert len(asked) == 2


def test_what_is_not_http_is_502(plain: Bench) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    plain.fleet.script("m-0", "m", answer)
    plain.know()
    assert plain.ask().status_code == 502


# ---- engines that refuse, in whatever words


@pytest.mark.parametrize("shape", ["vllm", "plain", "detail", "html"])
@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (400, 400, "invalid_request"),
        (401, 502, "engine_unauthorized"),
        (422, 422, "invalid_request"),
        (500, 500, "engine_error"),
        (503, 503, "engine_overloaded"),
    ],
)
def test_engine_errors_come_in_openais_shape(plain: Bench, shape: str, said: int, status: int, code: str) -> None:
    plain.fleet.start("m-0", "m", error_status=said, error_shape=shape, error_message="the reason")
    plain.know()
    refused = plain.ask()
    error = refused.json()["error"]
    assert refused.status_code == status
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert ("the reason" in error["message"]) == (said != 401)
    assert ("retry-after" in refused.headers) == (status == 503)


def test_an_error_event_before_the_first_token_keeps_its_status(plain: Bench) -> None:
    event = b'data: {"error": {"message": "This model\'s maximum context length is 10 tokens.", "type": "BadRequestError", "param": null, "code": 400}}\n\n'
    plain.fleet.script("m-0", "m", writes(event, b"data: [DONE]\n\n"))
    plain.know()
    refused = plain.ask()
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_an_error_event_in_the_middle_gets_a_string_code(plain: Bench) -> None:
    event = b'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
    begun = threading.Event()
    plain.fleet.script("m-0", "m", writes(EVENT, event + b"data: [DONE]\n\n", between=begun))
    plain.know()
    with httpx2.stream("POST", plain.url + CHAT, json=chat_body(), timeout=30) as stream:
        begun.set()  # the client has the status: what comes now is in the middle
        got = events("\n".join(stream.iter_lines()))
    assert got[-2] == {
        "error": {"message": "Internal server error", "type": "server_error", "param": None, "code": "engine_error"}
    }
    assert got[-1] == "[DONE]"


# ---- streams of other makes


def test_carriage_returns_and_split_events_pass(plain: Bench) -> None:
    data = (EVENT + LAST + USAGE + b"data: [DONE]\n\n").replace(b"\n", b"\r\n")
    plain.fleet.script("m-0", "m", writes(*(data[i : i + 7] for i in range(0, len(data), 7))))
    plain.know()
    got = events(plain.ask().text.replace("\r", ""))
    assert [e["choices"][0]["delta"]["content"] for e in got[:-1]] == ["hi", "!"]
    assert got[-1] == "[DONE]"
    wait_until(lambda: plain.gateway.idle, what="the account is made up")
    assert plain.gateway.gateway.exchanges.stats.tokens["m", "anonymous", "completion"] == 2


def test_a_large_answer_passes_without_being_held(plain: Bench) -> None:
    whole = json.dumps({"data": [0.5] * 1_200_000, "usage": {"prompt_tokens": 7, "total_tokens": 7}}).encode()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(whole))
        writer.write(whole)

    plain.fleet.script("m-0", "m", answer)
    plain.know()
    assert plain.ask(chat_body(stream=False)).content == whole
    wait_until(lambda: plain.gateway.idle, what="the account is made up")
    assert plain.gateway.gateway.exchanges.stats.tokens["m", "anonymous", "prompt"] == 7


# ---- replicas that are not there


def test_no_ready_replica_is_503_with_the_states_and_a_time(plain: Bench) -> None:
    plain.fleet.start("m-0", "m")
    plain.fleet.mark("m-0", ReplicaState.FAILED, "CUDA out of memory at /secret/path")
    plain.know()
    refused = plain.ask()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_unavailable"
    assert "1 failed" in refused.json()["error"]["message"]
    assert "/secret/path" not in refused.text
    assert refused.headers["retry-after"] == "30"
    assert plain.get("/readyz").status_code == 503
    plain.fleet.mark("m-0", ReplicaState.READY)
    plain.know()
    assert plain.ask().status_code == 200


def test_what_replicas_without_a_slice_wait_for_is_on_readyz(plain: Bench) -> None:
    plain.fleet.start("m-0", "m")
    plain.know()
    assert "unplaced" not in plain.get("/readyz").json()["models"]["m"]
    why = {"m-1": "no node is left for 'm-1'"}
    plain.fleet.cards["m"] = plain.fleet.cards["m"].model_copy(update={"unplaced": why})
    plain.fleet.publish()
    plain.know()
    assert plain.get("/readyz").json()["models"]["m"]["unplaced"] == why


def test_a_model_without_a_table_is_503_and_not_404(plain: Bench) -> None:
    refused = plain.ask()
    assert refused.status_code == 503
    assert "no replica" in refused.json()["error"]["message"]


def test_a_replica_that_refuses_connections_is_passed_over_and_then_left_out(plain: Bench) -> None:
    plain.fleet.adopt("gone-0", "m", f"unix:{plain.fleet.directory}/nobody.sock")
    plain.fleet.start("m-1", "m")
    plain.know()
    assert {plain.ask().headers["x-sliceway-replica"] for _ in range(8)} == {"m-1"}
    failures = plain.gateway.gateway.exchanges.stats.connect_failures
    assert failures["gone-0"] == 3
    states = {r["replica"]: r["state"] for r in plain.get("/slices").json()}
    assert states == {"gone-0": "backoff", "m-1": "ready"}


def test_a_replica_that_answers_again_is_used_again(plain: Bench) -> None:
    plain.fleet.start("m-0", "m")
    plain.know()
    plain.fleet.stop("m-0")
    wait_until(
        lambda: plain.ask().status_code == 503 and plain.get("/slices").json()[0]["state"] == "backoff",
        what="the replica is out",
    )
    endpoint = Path(plain.fleet.rows["m-0"].endpoint.removeprefix("unix:"))
    with engine_process(endpoint):
        wait_until(lambda: plain.ask().status_code == 200, what="the replica is back")


def test_only_replicas_that_refuse_are_503(plain: Bench) -> None:
    plain.fleet.adopt("gone-0", "m", f"unix:{plain.fleet.directory}/nobody.sock")
    plain.know()
    refused = plain.ask()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unreachable")
    assert refused.headers["retry-after"]


def test_a_full_replica_is_503(make: MakeBench) -> None:
    with make(max_in_flight_per_replica=1, queue={"max_requests": 0}) as one:
        one.fleet.start("m-0", "m", itl_seconds=0.01, output_tokens=50_000)
        one.know()
        with httpx2.stream("POST", one.url + CHAT, json=chat_body(), timeout=30):
            refused = one.ask()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"


def test_the_load_goes_round(plain: Bench) -> None:
    for number in range(3):
        plain.fleet.start(f"m-{number}", "m")
    plain.know()
    served = [plain.ask().headers["x-sliceway-replica"] for _ in range(9)]
    assert {served.count(replica) for replica in set(served)} == {3}


# ---- clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ttft_seconds", [0.0, 30.0])
def test_a_client_that_leaves_cancels_its_request(plain: Bench, stream: bool, ttft_seconds: float) -> None:
    engine = plain.fleet.start("m-0", "m", ttft_seconds=ttft_seconds, itl_seconds=0.05, output_tokens=5000)
    plain.know()
    sock = plain.connect()
    sock.sendall(raw_request(json.dumps(chat_body(stream=stream)).encode()))
    wait_until(lambda: engine.state.running == 1, what="the engine has the request")
    if stream and not ttft_seconds:
        read_until(sock, b'"content":"the"')
    sock.close()
    wait_until(lambda: engine.state.running == 0, what="the engine let go of it")  # it would take longer by itself
    assert engine.state.aborted == 1
    wait_until(lambda: plain.gateway.idle, what="the gateway let go of it")
    assert plain.gateway.gateway.exchanges.stats.disconnects["m"] == 1
    assert plain.gateway.gateway.exchanges.stats.requests["m", "anonymous", 499] == 1


def test_a_second_request_on_a_connection_is_watched_like_the_first(plain: Bench) -> None:
    """The first one's end at the engine may come after the second one's beginning; it must not take the watch away."""

    async def slow_to_end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(EVENT) + chunk(LAST + b"data: [DONE]\n\n"))
        await asyncio.sleep(0.5)
        writer.write(b"0\r\n\r\n")

    plain.fleet.script("slow-0", "slow", slow_to_end)
    engine = plain.fleet.start("m-0", "m", itl_seconds=0.05, output_tokens=5000)
    plain.know()
    sock = plain.connect()
    sock.sendall(raw_request(json.dumps(chat_body("slow")).encode()))
    read_until(sock, b"0\r\n\r\n")
    sock.sendall(raw_request(json.dumps(chat_body()).encode()))
    wait_until(lambda: engine.state.running == 1, what="the second request is at its engine")
    wait_until(lambda: len(plain.gateway.gateway.exchanges.active) == 1, what="the first one has ended")
    sock.close()
    wait_until(lambda: engine.state.running == 0, what="the engine let go of it")


def test_a_client_that_leaves_while_it_sends_its_body_costs_nothing(plain: Bench) -> None:
    sock = plain.connect()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    wait_until(lambda: plain.gateway.gateway.exchanges.active, what="the request is there")
    sock.close()
    wait_until(lambda: plain.gateway.idle, what="the request is gone")


async def test_two_hundred_streams_at_once_and_then_nothing_is_left(plain: Bench) -> None:
    engines = [plain.fleet.start(f"m-{number}", "m", itl_seconds=0.01, output_tokens=40) for number in range(2)]
    await asyncio.to_thread(plain.know)
    async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), timeout=120) as client:

        async def one(number: int) -> list[Any]:
            answer = await client.post(plain.url + CHAT, json=chat_body(max_tokens=20 + number % 20))
            return events(answer.text)

        got = await asyncio.gather(*(one(number) for number in range(200)))
    for number, stream in enumerate(got):
        assert stream[-1] == "[DONE]"
        assert len(stream) == 20 + number % 20 + 2  # the opening event and [DONE]
    assert sum(engine.state.served for engine in engines) == 200
    assert min(engine.state.served for engine in engines) >= 50
    await asyncio.to_thread(wait_until, lambda: plain.gateway.idle, what="the account is made up")
    stats = plain.gateway.gateway.exchanges.stats
    assert (
        stats.stream_events["m"] == stats.tokens["m", "anonymous", "completion"] == sum(20 + n % 20 for n in range(200))
    )


def test_a_storm_of_cancels_leaves_every_counter_at_zero(plain: Bench) -> None:
    engine = plain.fleet.start("m-0", "m", ttft_seconds=0.01, itl_seconds=0.01, output_tokens=5000, max_concurrency=20)
    plain.know()
    body = raw_request(json.dumps(chat_body()).encode())
    for wave in range(6):
        socks = [plain.connect() for _ in range(25)]
        for sock in socks:
            sock.sendall(body)
        if wave % 2:
            read_until(socks[0], b"data: ")
        for sock in socks:
            sock.close()
    wait_until(lambda: plain.gateway.idle, what="the gateway is idle")
    wait_until(lambda: engine.state.running == engine.state.waiting == 0, what="the engine is idle")
    assert (
        plain.get("/metrics").text.count(
            'sliceway_in_flight_requests{model="m",replica="m-0",slice="slice-of-m-0"} 0.0'
        )
        == 1
    )


def test_a_client_that_does_not_read_holds_back_the_engine_and_not_the_memory(plain: Bench) -> None:
    engine = plain.fleet.start("m-0", "m", output_tokens=400_000, events_per_write=64)
    plain.know()
    sock = plain.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(raw_request(json.dumps(chat_body()).encode()))
    seen: list[int] = []

    def stands_still() -> bool:
        seen.append(engine.state.generation_tokens)
        return len(seen) > 40 and seen[-1] == seen[-40] > 0

    wait_until(stands_still, what="the engine is held back")
    assert engine.state.generation_tokens < 100_000
    sock.close()


# ---- clients that send nonsense, too much, or too slowly


def test_a_body_of_50_mb_is_413_with_the_limit(plain: Bench) -> None:
    refused = plain.ask(chat_body(messages=[{"role": "user", "content": "a" * 50_000_000}]))
    assert refused.status_code == 413
    assert str(plain.config.gateway.max_body) in refused.json()["error"]["message"]
    assert refused.json()["error"]["code"] == "body_too_large"


def test_a_chunked_body_is_counted_as_it_comes(make: MakeBench) -> None:
    with make(max_body="64KiB") as small:
        pieces = (b"x" * 8192 for _ in range(100))
        refused = httpx2.post(small.url + CHAT, content=pieces, timeout=30)
        assert refused.status_code == 413


def test_the_connection_serves_on_after_a_refused_body(make: MakeBench) -> None:
    with make(max_body="64KiB") as small, httpx2.Client(timeout=30) as client:
        assert client.post(small.url + CHAT, content=b"x" * 200_000).status_code == 413
        assert client.get(small.url + "/healthz").status_code == 200


def test_a_body_that_does_not_come_is_408(make: MakeBench) -> None:
    with make(body_timeout_seconds=0.3) as quick, quick.connect() as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert b"connection: close" in answer


@pytest.mark.parametrize("sent", [b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-slow", b"POST /v1"])
def test_a_head_that_does_not_come_is_408(make: MakeBench, sent: bytes) -> None:
    with make(header_timeout_seconds=2) as quick, quick.connect() as sock:  # the first bytes have to be there before
        sock.sendall(sent)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"x-request-id: req_" in answer


def test_a_connection_that_says_nothing_is_closed(make: MakeBench) -> None:
    with make(header_timeout_seconds=0.3) as quick, quick.connect() as sock:
        assert read_all(sock) == b""


@pytest.mark.parametrize("pieces", [1, 50])
def test_a_head_that_is_too_large_is_431(make: MakeBench, pieces: int) -> None:
    with make(max_header="8KiB") as small, small.connect() as sock:
        head = (
            b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
            + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(20))
            + b"\r\n"
        )
        size = len(head) // pieces + 1
        try:
            for start in range(0, len(head), size):
                sock.sendall(head[start : start + size])
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it was whole
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"header_too_large"' in answer


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n{}",
    ],
    ids=["tls", "no colon", "length and chunked", "two lengths", "negative length"],
)
def test_what_is_not_http_is_400_in_the_error_shape(plain: Bench, nonsense: bytes) -> None:
    with plain.connect() as sock:
        sock.sendall(nonsense)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"type":"invalid_request_error"' in answer
    assert b"x-request-id: req_" in answer
    assert b"x-sliceway-generation: " in answer


# ---- engines that are too slow


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_sends_nothing_is_504(make: MakeBench, stream: bool) -> None:
    with make(first_byte_timeout_seconds=0.3) as quick:
        engine = quick.fleet.start("m-0", "m", ttft_seconds=60)
        quick.know()
        refused = quick.ask(chat_body(stream=stream))
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "engine_timeout")
        wait_until(lambda: engine.state.running == 0, what="the request is aborted in the engine")


def test_a_stream_that_stands_still_ends_with_an_error(make: MakeBench) -> None:
    with make(idle_timeout_seconds=0.3) as quick:
        quick.fleet.start("m-0", "m", itl_seconds=60)
        quick.know()
        got = events(quick.ask().text)
    assert got[-2]["error"]["code"] == "engine_timeout"
    assert got[-1] == "[DONE]"


# ---- files that go wrong while it serves


def test_a_damaged_table_changes_nothing_but_what_is_reported(plain: Bench) -> None:
    plain.fleet.start("m-0", "m")
    plain.know()
    table = plain.fleet.state.routing_table
    good = table.read_bytes()
    for damage in (
        lambda: table.write_bytes(b'{"version": 1, "gener'),
        lambda: table.write_bytes(b'{"version": 99, "generation": 1}'),
        table.unlink,
    ):
        damage()
        wait_until(lambda: plain.get("/readyz").json()["problems"], what="the problem is told")
        assert plain.get("/readyz").status_code == 200
        assert 'sliceway_file_readable{file="routing_table"} 0.0' in plain.get("/metrics").text
        assert plain.ask().status_code == 200
        table.write_bytes(good)
        wait_until(lambda: not plain.get("/readyz").json()["problems"], what="the table is good again")


def test_a_new_table_counts_while_streams_go_on(plain: Bench) -> None:
    plain.fleet.start("m-0", "m", itl_seconds=0.02, output_tokens=50)
    plain.know()
    done = threading.Event()
    result: list[Any] = []

    def stream() -> None:
        result.extend(events(plain.ask().text))
        done.set()

    threading.Thread(target=stream, daemon=True).start()
    wait_until(lambda: plain.gateway.gateway.exchanges.router.in_flight, what="the stream runs")
    plain.fleet.start("m-1", "m")
    plain.fleet.mark("m-0", ReplicaState.DRAINING)
    plain.know()
    assert plain.ask().headers["x-sliceway-replica"] == "m-1"
    assert done.wait(20)
    assert result[-1] == "[DONE]"
    assert len(result) == 52


# ---- engines that ask who is there


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_others_could_reach_is_shown_its_secret(plain: Bench, stream: bool) -> None:
    plain.fleet.start("m-0", "m", secret="open sesame")
    plain.know()
    refused = plain.ask(chat_body(stream=stream))
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "engine_unauthorized")
    plain.fleet.rows["m-0"] = plain.fleet.rows["m-0"].model_copy(update={"secret": "open sesame"})
    plain.fleet.publish()
    plain.know()
    assert plain.ask(chat_body(stream=stream)).status_code == 200
