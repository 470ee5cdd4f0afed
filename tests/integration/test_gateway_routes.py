"""The routes beside chat and completions: stored responses, Anthropic's messages, pooling, tokens, audio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import openai
import pytest

from gateway.testing import RELAYS, wait_until
from placement.table import ReplicaState
from tests.integration.surface_harness import Surface, surface

HELLO = "Hello there, engine"


@pytest.fixture(params=sorted(RELAYS), scope="module")
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    with surface(tmp_path_factory.mktemp("state"), relay=str(request.param)) as made:
        yield made


@pytest.fixture
def claude(system: Surface) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=system.url, api_key=system.keys["acme"], max_retries=0) as client:
        yield client


# ---- responses


def test_a_response_is_fetched_and_followed_up_where_it_lies(system: Surface) -> None:
    """A conversation on each of two replicas: all its later requests find the engine that has the first one."""
    client = system.client()
    made = {}
    for holder, other in (("chat-0", "chat-1"), ("chat-1", "chat-0")):
        with only(system, away=other):
            raw = client.responses.with_raw_response.create(model="chat", input=HELLO, max_output_tokens=4)
        assert raw.headers["x-sliceway-replica"] == holder
        made[holder] = raw.parse()
    for holder, first in made.items():
        assert first.output_text == "the quick brown fox"
        got = client.responses.with_raw_response.retrieve(first.id)
        assert (got.parse().id, got.headers["x-sliceway-replica"]) == (first.id, holder)
        followed = client.responses.with_raw_response.create(
            model="chat", input="more", previous_response_id=first.id, max_output_tokens=4
        )
        assert followed.headers["x-sliceway-replica"] == holder
        assert followed.parse().previous_response_id == first.id
        assert followed.parse().usage.input_tokens == 1 + first.usage.total_tokens  # type: ignore[union-attr]


@contextmanager
def only(system: Surface, *, away: str) -> Iterator[None]:
    """Without the replica `away`, for as long as the block runs."""
    system.fleet.mark(away, ReplicaState.STARTING)
    system.gateway.look()
    try:
        yield
    finally:
        system.fleet.mark(away, ReplicaState.READY)
        system.gateway.look()


def test_a_background_response_is_cancelled_in_its_engine(system: Surface) -> None:
    client = system.client()
    for name in ("chat-0", "chat-1"):
        behaviour = system.fleet.engines[name].behaviour
        object.__setattr__(behaviour, "ttft_seconds", 600.0)
    try:
        started = client.responses.create(model="chat", input=HELLO, background=True)
        assert started.status == "queued"
        assert client.responses.retrieve(started.id).status == "in_progress"
        assert client.responses.cancel(started.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(started.id)
    finally:
        for name in ("chat-0", "chat-1"):
            object.__setattr__(system.fleet.engines[name].behaviour, "ttft_seconds", 0.0)


def test_a_background_response_holds_its_seat_until_it_ends_and_is_metered_then(system: Surface) -> None:
    client, exchanges = system.client(), system.gateway.gateway.exchanges
    counted = ("chat", "acme", "completion")
    wait_until(lambda: system.gateway.idle, what="what came before is over and counted")
    before, engines = exchanges.stats.tokens[counted], [system.fleet.engines[name] for name in ("chat-0", "chat-1")]
    for engine in engines:
        object.__setattr__(engine.behaviour, "ttft_seconds", 2.0)
    try:
        started = client.responses.create(model="chat", input=HELLO, background=True, max_output_tokens=4)
    finally:
        for engine in engines:
            object.__setattr__(engine.behaviour, "ttft_seconds", 0.0)
    # The client may have its answer before the gateway has put the request away.
    wait_until(
        lambda: (len(exchanges.background), exchanges.router.in_flight) == (1, 1),  # type: ignore[arg-type]
        what="its engine goes on with it",
    )
    wait_until(lambda: not len(exchanges.background), what="the response has ended")  # type: ignore[arg-type]
    assert client.responses.retrieve(started.id).status == "completed"
    assert exchanges.stats.tokens[counted] == before + 4
    wait_until(lambda: system.gateway.idle, what="its seat is free")


def test_a_streamed_response_has_every_event_and_is_stored(system: Surface) -> None:
    client = system.client()
    with client.responses.stream(model="chat", input=HELLO, max_output_tokens=4) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 4
    assert final.output_text == "the quick brown fox"
    assert client.responses.retrieve(final.id).id == final.id


def test_a_response_of_another_tenant_does_not_exist(system: Surface) -> None:
    made = system.client().responses.create(model="chat", input=HELLO)
    other = system.client("beta")
    for ask in (lambda: other.responses.retrieve(made.id), lambda: other.responses.cancel(made.id)):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        other.responses.create(model="chat", input="x", previous_response_id=made.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


@pytest.mark.parametrize("wrong", ["resp_1", "resp_" + "0" * 64, "nothing", "a%2F..%2Fb", "%00"])
def test_ids_that_nobody_gave_are_unknown_here_and_never_reach_an_engine(system: Surface, wrong: str) -> None:
    before = [dict(system.seen(name)) for name in system.fleet.engines]
    answer = system.send("GET", f"/v1/responses/{wrong}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("response_not_found", "unknown_path")
    assert [dict(system.seen(name)) for name in system.fleet.engines] == before


def test_the_client_cannot_choose_the_id_of_a_response(system: Surface) -> None:
    made = system.client().responses.create(model="chat", input=HELLO, extra_body={"request_id": "resp_mine"})
    assert made.id != "resp_mine"
    assert system.client().responses.retrieve(made.id).id == made.id


def test_only_the_known_part_of_a_query_reaches_the_engine(system: Surface) -> None:
    made = system.client().responses.create(model="chat", input=HELLO)
    system.send("GET", f"/v1/responses/{made.id}?stream=false&starting_after=3&level=2&x=%0d%0a")
    asked = [seen for seen in map(system.seen, ("chat-0", "chat-1")) if seen.get("path", "").endswith(made.id)]
    assert [seen["query"] for seen in asked] == [{"stream": "false", "starting_after": "3"}]


def test_stored_responses_take_their_methods_only(system: Surface) -> None:
    for method, path, allowed in (
        ("DELETE", "/v1/responses/resp_1", "GET"),
        ("GET", "/v1/responses/resp_1/cancel", "POST"),
        ("GET", "/v1/responses", "POST"),
    ):
        answer = system.send(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert system.send("GET", "/v1/responses/resp_1/input_items").status_code == 404


def test_what_is_fetched_is_not_counted_again(system: Surface) -> None:
    client = system.client()
    stats = system.gateway.gateway.exchanges.stats
    made = client.responses.create(model="chat", input=HELLO, max_output_tokens=4)
    wait_until(lambda: system.gateway.idle, what="the response is counted")
    before, silent = stats.tokens["chat", "acme", "completion"], stats.without_usage["chat"]
    client.responses.retrieve(made.id)
    system.send("POST", "/tokenize", json={"model": "chat", "prompt": "one"})
    wait_until(lambda: system.gateway.idle, what="what follows is counted")
    assert (stats.tokens["chat", "acme", "completion"], stats.without_usage["chat"]) == (before, silent)


# ---- messages


def test_a_message_comes_back_in_anthropics_shape(claude: anthropic.Anthropic, system: Surface) -> None:
    raw = claude.messages.with_raw_response.create(
        model="chat", max_tokens=4, messages=[{"role": "user", "content": HELLO}]
    )
    message = raw.parse()
    assert message.content[0].text == "the quick brown fox"  # type: ignore[union-attr]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 4)
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    assert message._request_id


def test_a_message_streams_and_is_metered(claude: anthropic.Anthropic, system: Surface) -> None:
    def counted() -> int:
        stats = system.gateway.gateway.exchanges.stats
        return stats.tokens["chat", "acme", "completion"]

    before = counted()
    with claude.messages.stream(model="chat", max_tokens=4, messages=[{"role": "user", "content": HELLO}]) as stream:
        assert "".join(stream.text_stream) == "the quick brown fox"
        assert stream.get_final_message().stop_reason == "max_tokens"
    wait_until(lambda: counted() == before + 4, what="the tokens of the stream are counted")


def test_tools_and_token_counts_of_messages(claude: anthropic.Anthropic) -> None:
    tool: Any = {
        "name": "weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    messages: Any = [{"role": "user", "content": HELLO}]
    message = claude.messages.create(model="chat", max_tokens=16, tools=[tool], messages=messages)
    assert message.stop_reason == "tool_use"
    assert message.content[0].input == {"city": "fox"}  # type: ignore[union-attr]
    assert claude.messages.count_tokens(model="chat", messages=messages).input_tokens == 3


def test_anthropics_client_lists_the_models_too(claude: anthropic.Anthropic) -> None:
    assert [model.id for model in claude.models.list()] == ["chat", "pool"]
    assert claude.models.retrieve("chat").display_name == "chat"


@pytest.mark.parametrize(
    ("key", "model", "error", "kind"),
    [
        ("sk-wrong", "chat", anthropic.AuthenticationError, "authentication_error"),
        (None, "never-was", anthropic.NotFoundError, "not_found_error"),
        (None, "pool", anthropic.BadRequestError, "invalid_request_error"),
    ],
)
def test_errors_of_messages_have_anthropics_shape(
    system: Surface, key: str | None, model: str, error: type[anthropic.APIStatusError], kind: str
) -> None:
    with (
        anthropic.Anthropic(base_url=system.url, api_key=key or system.keys["acme"], max_retries=0) as client,
        pytest.raises(error) as caught,
    ):
        client.messages.create(model=model, max_tokens=4, messages=[{"role": "user", "content": "x"}])
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert body["request_id"] == caught.value.request_id


# ---- pooling and tokens


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_are_ranked(system: Surface, path: str) -> None:
    body = {"model": "pool", "query": "brown fox", "documents": ["a dog", "the brown fox", "a fox"], "top_n": 2}
    answer = system.send("POST", path, json=body).json()
    assert [row["index"] for row in answer["results"]] == [1, 2]
    assert system.seen("pool-0")["path"] == path


@pytest.mark.parametrize(
    ("path", "fields", "key"),
    [
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c"]}, "score"),
        ("/score", {"queries": "a", "documents": ["b", "c"]}, "score"),
        ("/classify", {"input": ["a", "b"]}, "probs"),
        ("/pooling", {"input": ["a", "b"]}, "data"),
    ],
)
def test_pooling_routes_answer(system: Surface, path: str, fields: dict[str, Any], key: str) -> None:
    answer = system.send("POST", path, json={"model": "pool"} | fields)
    assert answer.status_code == 200
    assert [key in row for row in answer.json()["data"]] == [True, True]


def test_tokens_there_and_back(system: Surface) -> None:
    told = system.send("POST", "/tokenize", json={"model": "chat", "prompt": "one two three"}).json()
    assert told["count"] == 3
    back = system.send("POST", "/detokenize", json={"model": "pool", "tokens": told["tokens"]}).json()
    assert back["prompt"] == "the quick brown"


def test_the_wrong_kind_of_model_is_named(system: Surface) -> None:
    answer = system.send("POST", "/v1/rerank", json={"model": "chat", "query": "a", "documents": ["b"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_operation")


# ---- audio

SOUND = ("speech.wav", b"RIFF" + b"\0" * 64_000, "audio/wav")


def test_speech_becomes_text(system: Surface) -> None:
    answer = system.client().audio.transcriptions.create(model="chat", file=SOUND)
    assert answer.text.startswith("the quick")
    whole = system.send("POST", "/v1/audio/translations", files={"file": SOUND}, data={"model": "chat"})
    assert whole.json()["text"].startswith("the quick")


def test_a_transcription_streams_without_the_usage_that_nobody_asked_for(system: Surface) -> None:
    answer = system.send(
        "POST", "/v1/audio/transcriptions", files={"file": SOUND}, data={"model": "chat", "stream": "true"}
    )
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert all("usage" not in json.loads(line) for line in lines[:-1])
    seen = next(s for s in map(system.seen, ("chat-0", "chat-1")) if s.get("path") == "/v1/audio/transcriptions")
    assert seen["body"]["stream_include_usage"] == "true"


def test_forms_that_cannot_be_read_say_why(system: Surface) -> None:
    path = "/v1/audio/transcriptions"
    form = {"content-type": "multipart/form-data; boundary=b"}
    for body, headers, said in (
        (b"{}", {"content-type": "application/json"}, "multipart/form-data"),
        (b"--b\r\nnothing", form, "form"),
        (b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n', form, "`model` is missing"),
        (
            b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nchat\r\n'
            b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\npool\r\n--b--\r\n',
            form,
            "once",
        ),
    ):
        answer = system.send("POST", path, content=body, headers=headers)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
