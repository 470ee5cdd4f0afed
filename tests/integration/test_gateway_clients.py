"""The official `openai` client, in the ways applications use it: tools, formats, log probabilities, pictures, retries, timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest

from gateway.testing import RELAYS, wait_until
from placement.table import ReplicaState
from tests.integration.surface_harness import Surface, surface

HELLO: Any = [{"role": "user", "content": "Hello there, engine"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Fox(pydantic.BaseModel):
    name: str
    legs: int
    colours: list[str]


@pytest.fixture(params=sorted(RELAYS), scope="module")
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    with surface(tmp_path_factory.mktemp("state"), relay=str(request.param)) as made:
        yield made


def test_tools_are_called_and_answered(system: Surface) -> None:
    client = system.client()
    first = client.chat.completions.create(model="chat", messages=HELLO, tools=[WEATHER]).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls or []
    messages = [*HELLO, first.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(model="chat", messages=messages, tools=[WEATHER], max_tokens=4)
    assert second.choices[0].message.content == "the quick brown fox"


def test_tools_are_called_in_streams(system: Surface) -> None:
    with system.client().chat.completions.stream(model="chat", messages=HELLO, tools=[WEATHER]) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in message.tool_calls or []] == ["weather"]


def test_answers_have_the_form_that_was_asked_for(system: Surface) -> None:
    client = system.client()
    fox = client.chat.completions.parse(model="chat", messages=HELLO, response_format=Fox).choices[0].message.parsed
    assert fox == Fox(name="fox", legs=7, colours=["fox"])
    answer = client.responses.parse(model="chat", input="Hello", text_format=Fox)
    assert answer.output_parsed == fox


def test_log_probabilities_come_through(system: Surface) -> None:
    choice = (
        system.client()
        .chat.completions.create(model="chat", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=1)
        .choices[0]
    )
    assert choice.logprobs is not None
    assert [token.token for token in choice.logprobs.content or []] == ["the", " quick", " brown"]


def test_pictures_reach_the_engine_as_they_were_sent(system: Surface) -> None:
    picture = "data:image/png;base64," + "iVBORw0KGgo" * 500
    parts: Any = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": picture}}]
    system.client().chat.completions.create(model="chat", messages=[{"role": "user", "content": parts}])
    bodies = [system.seen(name).get("body") or {} for name in ("chat-0", "chat-1")]
    assert parts in [body["messages"][0]["content"] for body in bodies if "messages" in body]


async def test_many_asynchronous_streams_at_once(system: Surface) -> None:
    async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key=system.keys["acme"], max_retries=0) as client:

        async def one() -> str:
            stream = await client.chat.completions.create(model="chat", messages=HELLO, max_tokens=5, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert set(await asyncio.gather(*(one() for _ in range(20)))) == {"the quick brown fox jumps"}


def test_the_client_retries_by_itself_until_an_engine_is_there(system: Surface) -> None:
    """503 with retry-after is what its retries are for: the second or third attempt finds the replica ready."""
    for name in ("chat-0", "chat-1"):
        system.fleet.mark(name, ReplicaState.BACKOFF)
    system.gateway.look()
    refused = system.gateway.gateway.exchanges.stats.errors
    before = refused["model_unavailable"]
    client = system.client(max_retries=8)

    def bring_back() -> None:
        wait_until(lambda: refused["model_unavailable"] > before, what="the client was refused once")
        for name in ("chat-0", "chat-1"):
            system.fleet.mark(name, ReplicaState.READY)

    with ThreadPoolExecutor(1) as thread:
        bringing = thread.submit(bring_back)
        answer = client.chat.completions.create(model="chat", messages=HELLO, max_tokens=4)
        bringing.result()
    assert answer.choices[0].message.content == "the quick brown fox"


def test_what_cannot_get_better_is_not_retried(system: Surface) -> None:
    client = system.client(max_retries=5)
    requests = system.gateway.gateway.exchanges.stats.requests
    before = sum(requests.values())
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="never-was", messages=HELLO)
    wait_until(lambda: sum(requests.values()) == before + 1, what="one request is counted")


def test_errors_have_string_codes_and_request_ids_everywhere(system: Surface) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/chat/completions", 400),
        ("POST", "/v1/rerank", 400),
        ("POST", "/v1/responses", 400),
        ("POST", "/v1/batches", 400),
        ("POST", "/v1/files", 400),
        ("GET", "/v1/files?limit=x", 400),
        ("GET", "/v1/files/file-1", 404),
        ("GET", "/v1/batches/batch_1", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/v1/models/never-was", 404),
    ):
        answer = system.send(method, path)
        assert answer.status_code == status, path
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str)
        assert answer.headers["x-request-id"].startswith("req_")
    for path in ("/v1/chat/completions", "/v1/rerank", "/v1/responses", "/v1/files", "/v1/audio/transcriptions"):
        answer = system.send("POST", path, tenant=None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")


def test_what_a_client_sends_of_tracing_reaches_the_engine_on_every_kind_of_route(system: Surface) -> None:
    told = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "tracestate": "k=v", "cookie": "secret"}
    for path, body, engines in (
        ("/v1/chat/completions", {"model": "chat", "messages": HELLO}, ("chat-0", "chat-1")),
        ("/v1/messages", {"model": "chat", "messages": HELLO, "max_tokens": 2}, ("chat-0", "chat-1")),
        ("/v1/rerank", {"model": "pool", "query": "a", "documents": ["b"]}, ("pool-0",)),
    ):
        assert system.send("POST", path, json=body, headers=told).status_code == 200
        seen = [system.seen(name) for name in engines if system.seen(name).get("path") == path]
        sent = [{name.lower(): value for name, value in one["headers"].items()} for one in seen]
        assert told["traceparent"] in [one.get("traceparent") for one in sent]
        assert all("cookie" not in one and "authorization" not in one and "x-api-key" not in one for one in sent)
