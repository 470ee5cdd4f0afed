"""What goes wrong in streams of named events, told in their own words: Anthropic's messages and OpenAI's responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from gateway.testing import RELAYS, Script, wait_until
from tests.integration.gateway_harness import Bench, bench, raw_request, read_until

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODIES: dict[str, Any] = {
    MESSAGES: {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]},
    RESPONSES: {"model": "m", "input": "hi"},
}


def named(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


START = {
    MESSAGES: named(
        "message_start",
        message={
            "id": "m1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "m",
            "usage": {"input_tokens": 1, "output_tokens": 0},
        },
    ),
    RESPONSES: named("response.created", sequence_number=0, response={"id": "resp_1", "usage": None}),
}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def says(*said: bytes) -> Script:
    """An engine that says this and closes."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in said:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)

    return answer


@pytest.fixture(params=sorted(RELAYS), scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), str(request.param)) as made:
        yield made


@pytest.fixture
def plain(shared: Bench) -> Iterator[Bench]:
    yield shared
    shared.reset()


def post(plain: Bench, path: str, **fields: Any) -> httpx2.Response:
    return httpx2.post(plain.url + path, json=BODIES[path] | fields, timeout=30)


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_an_engine_that_dies_in_the_middle_ends_its_stream_with_an_error_event(plain: Bench, path: str) -> None:
    plain.fleet.script("m-0", "m", says(HEAD, chunk(START[path])))
    plain.know()
    answer = post(plain, path, stream=True)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.startswith(START[path])
    last = answer.text.split("\n\n")[-2]
    assert last.startswith("event: error\ndata: {")
    told = json.loads(last.split("data: ")[1])
    assert told["type"] == "error"
    assert (told.get("error") or told)["code"] == "engine_died"
    assert "[DONE]" not in answer.text
    assert plain.errors() == {"engine_died": 1}


def test_the_official_clients_notice_streams_that_broke(plain: Bench) -> None:
    plain.fleet.script("m-0", "m", says(HEAD, chunk(START[MESSAGES])))
    plain.know()
    with (
        anthropic.Anthropic(base_url=plain.url, api_key="x", max_retries=0) as client,
        client.messages.create(**BODIES[MESSAGES], stream=True) as stream,
        pytest.raises(anthropic.APIStatusError, match="engine"),
    ):
        list(stream)
    plain.fleet.script("m-0", "m", says(HEAD, chunk(START[RESPONSES])))
    plain.know()
    with (
        openai.OpenAI(base_url=f"{plain.url}/v1", api_key="x", max_retries=0) as other,
        other.responses.create(**BODIES[RESPONSES], stream=True) as events,
    ):
        last = list(events)[-1]
    assert last.type == "error"
    assert last.code == "engine_died"


def test_a_response_is_not_asked_for_twice_and_a_message_is(plain: Bench) -> None:
    """A response may have called tools; a message leaves nothing behind."""
    asked: list[str] = []

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append("x")

    for path, times, status in ((RESPONSES, 1, 502), (MESSAGES, 2, 503)):
        asked.clear()
        for name in ("m-0", "m-1"):
            plain.fleet.script(name, "m", dies)
        plain.know()
        answer = post(plain, path)
        assert (len(asked), answer.status_code) == (times, status)
        assert answer.headers.get("x-should-retry") == ("false" if path == RESPONSES else None)


def test_an_error_before_the_first_event_keeps_its_status(plain: Bench) -> None:
    told = named("error", error={"type": "internal_error", "message": "the engine is unwell"})
    plain.fleet.script("m-0", "m", says(HEAD, chunk(told), b"0\r\n\r\n"))
    plain.know()
    answer = post(plain, MESSAGES, stream=True)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "api_error"
    assert "unwell" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_a_client_that_leaves_ends_its_request_in_the_engine(plain: Bench, path: str) -> None:
    engine = plain.fleet.start("m-0", "m", itl_seconds=0.05, output_tokens=5000)
    plain.know()
    more = {"max_tokens": 5000} if path == MESSAGES else {"max_output_tokens": 5000}
    sock = plain.connect()
    sock.sendall(raw_request(json.dumps(BODIES[path] | more | {"stream": True}).encode(), path=path))
    read_until(sock, b"delta")
    sock.close()
    wait_until(lambda: engine.state.running == 0, what="the engine let go of it")
    assert engine.state.aborted == 1
