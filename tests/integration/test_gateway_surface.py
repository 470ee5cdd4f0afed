"""The surface that clients see, through the official client, on simulated engines; the same suite for every relay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.config import Config
from gateway.digests import METRICS
from gateway.keys import Keystore
from gateway.testing import RELAYS, FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from gateway.wiring import wall_clock

pytestmark = pytest.mark.integration

HELLO: Any = [{"role": "user", "content": "Hello there, engine"}]


@pytest.fixture(params=sorted(RELAYS), scope="module")
def relay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class System:
    """A gateway with keys for two tenants in front of a chat model, a model with a slash in its name, and an embedding model."""

    def __init__(self, gateway: RunningGateway, fleet: FakeFleet, keys: dict[str, str], state: Path) -> None:
        self.gateway, self.fleet, self.keys, self.state = gateway, fleet, keys, state
        self._open = ExitStack()

    def client(self, tenant: str = "acme", **options: Any) -> openai.OpenAI:
        client = openai.OpenAI(
            base_url=f"{self.gateway.url}/v1", api_key=self.keys[tenant], **{"max_retries": 0} | options
        )
        self._open.enter_context(client)
        return client

    def close(self) -> None:
        self._open.close()

    def async_client(self, tenant: str = "acme") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.gateway.url}/v1", api_key=self.keys[tenant], max_retries=0)


@pytest.fixture(scope="module")
def system(relay: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    state = tmp_path_factory.mktemp("state")
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "tenants": [{"name": "acme"}, {"name": "beta", "models": ["chat"]}],
            "models": [{"name": name, "source": "x"} for name in ("chat", "org/name", "embed", "idle")],
            "gateway": {"listen": "127.0.0.1:0", "max_body": "1MiB"},
        }
    )
    keystore = Keystore(state)
    keys = {tenant: keystore.create(tenant, now=wall_clock())[0] for tenant in ("acme", "beta")}
    with fake_fleet(state) as fleet:
        fleet.start("chat-0", "chat", itl_seconds=0.001, ttft_seconds=0.005)
        fleet.start("named-0", "org/name", engine_model="engine-name")
        fleet.start("embed-0", "embed", task="embed")
        fleet.start("idle-0", "idle")
        with running_gateway(config, relay=relay) as gateway:
            made = System(gateway, fleet, keys, state)
            yield made
            made.close()
            wait_until(lambda: gateway.idle, what="all counters are back at zero")


def last_request(system: System, replica: str) -> dict[str, Any]:
    return system.fleet.engines[replica].state.last_request


def test_a_chat_completion_comes_back_whole(system: System) -> None:
    answer = system.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=4)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    assert answer._request_id


def test_a_stream_has_the_text_and_no_usage_that_nobody_asked_for(system: System) -> None:
    chunks = list(system.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=4, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "the quick brown fox"
    assert all(c.choices and c.usage is None for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last_request(system, "chat-0")["body"]["stream_options"] == {"include_usage": True}


def test_a_client_that_asks_gets_the_usage_chunk(system: System) -> None:
    stream = system.client().chat.completions.create(
        model="chat", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    last = list(stream)[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def test_completions_stream_too(system: System) -> None:
    chunks = list(system.client().completions.create(model="chat", prompt="one two", max_tokens=3, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "the quick brown"
    assert (
        system.client().completions.create(model="chat", prompt="one two", max_tokens=3).choices[0].text
        == "the quick brown"
    )


def test_embeddings_have_their_vectors_and_usage(system: System) -> None:
    answer = system.client().embeddings.create(model="embed", input=["one two", "three"], encoding_format="float")
    assert [len(item.embedding) for item in answer.data] == [8, 8]
    assert answer.usage.prompt_tokens == 3


async def test_the_asynchronous_client_streams(system: System) -> None:
    async with system.async_client() as client:
        stream = await client.chat.completions.create(model="chat", messages=HELLO, max_tokens=4, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "the quick brown fox"


def test_streams_carry_their_headers(system: System) -> None:
    with system.client().chat.completions.with_streaming_response.create(
        model="chat", messages=HELLO, stream=True
    ) as response:
        headers = response.headers
        body = response.read()
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-request-id"].startswith("req_")
    assert headers["x-sliceway-replica"] == "chat-0"
    assert "server" not in headers
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_sane_request_id_is_kept_and_passed_to_the_engine(system: System) -> None:
    raw = system.client().chat.completions.with_raw_response.create(
        model="chat",
        messages=HELLO,
        max_tokens=2,
        extra_headers={"x-request-id": "client-id.42", "traceparent": "00-ab-cd-01"},
    )
    sent = {name.lower(): value for name, value in last_request(system, "chat-0")["headers"].items()}
    assert raw.headers["x-request-id"] == sent["x-request-id"] == "client-id.42"
    assert sent["traceparent"] == "00-ab-cd-01"


@pytest.mark.parametrize("offered", ["with space", "x" * 129, "semi;colon", "tab\tinside"])
def test_other_request_ids_are_replaced(system: System, offered: str) -> None:
    raw = system.client().chat.completions.with_raw_response.create(
        model="chat", messages=HELLO, max_tokens=2, extra_headers={"x-request-id": offered}
    )
    assert raw.headers["x-request-id"].startswith("req_")


def test_credentials_and_other_headers_stay_here(system: System) -> None:
    system.client().chat.completions.create(
        model="chat", messages=HELLO, max_tokens=2, extra_headers={"x-data-parallel-rank": "7", "cookie": "a=b"}
    )
    names = {name.lower() for name in last_request(system, "chat-0")["headers"]}
    assert names == {"host", "content-type", "content-length", "x-request-id"}


def test_the_model_is_called_what_the_engine_calls_it(system: System) -> None:
    for stream in (False, True):
        answer = system.client().chat.completions.create(model="org/name", messages=HELLO, max_tokens=2, stream=stream)
        if stream:
            list(answer)  # type: ignore[call-overload]
        body = last_request(system, "named-0")["body"]
        assert body["model"] == "engine-name"
        assert body["messages"] == HELLO


def test_models_are_listed_and_shown_one_by_one(system: System) -> None:
    client = system.client()
    assert [card.id for card in client.models.list()] == ["chat", "embed", "idle", "org/name"]
    assert client.models.retrieve("chat").owned_by == "sliceway"
    for quoted in ("org/name", "org%2Fname"):
        got = client.get(f"/models/{quoted}", cast_to=object)
        assert isinstance(got, dict)
        assert got["id"] == "org/name"
        assert got["max_model_len"] == 8192


def test_a_tenant_sees_its_own_models_only(system: System) -> None:
    client = system.client("beta")
    assert [card.id for card in client.models.list()] == ["chat"]
    for ask in (
        lambda: client.models.retrieve("embed"),
        lambda: client.embeddings.create(model="embed", input="x"),
        lambda: client.embeddings.create(model="never-was", input="x"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"


def test_the_wrong_kind_of_model_is_refused_with_the_right_route(system: System) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/embeddings") as caught:
        system.client().chat.completions.create(model="embed", messages=HELLO)
    assert caught.value.code == "unsupported_operation"


def test_a_prompt_that_is_too_long_has_openais_code(system: System) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        system.client().chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "word " * 9000}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message
    assert caught.value.request_id


@pytest.mark.parametrize("key", ["sk-wrong", "sk-sliceway-aaaaaaaa-" + "x" * 43, "sk-sliceway-äöü"])
def test_a_wrong_key_is_401(system: System, key: str) -> None:
    answer = httpx2.post(
        f"{system.gateway.url}/v1/chat/completions",
        headers={"authorization": b"Bearer " + key.encode()},
        json={"model": "chat"},
    )
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


def test_a_key_is_not_accepted_with_anothers_id(system: System) -> None:
    acme, beta = system.keys["acme"], system.keys["beta"]
    forged = acme[:20] + beta[20:]
    with pytest.raises(openai.AuthenticationError):
        system.client(default_headers={"authorization": f"Bearer {forged}"}).models.list()


Post = Callable[..., Any]


@pytest.fixture
def post(system: System) -> Post:
    def send(body: bytes, path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> Any:
        given = {"authorization": f"Bearer {system.keys['acme']}"} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        return httpx2.request(method, f"{system.gateway.url}{path}", headers=given, content=body)

    return send


def test_no_key_is_401_and_says_how_to_send_one(system: System) -> None:
    for headers in ({}, {"authorization": "Basic abc"}, {"authorization": "Bearer"}):
        answer = httpx2.get(f"{system.gateway.url}/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "missing_api_key"
        assert "Bearer" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "chat",\n "messages": [}', "line 2, column 15"),
        (b'{"model": "chat"', "ends too early"),
        (b"", "no body"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"{}", "`model` is missing"),
        (b'{"model": 7}', "Expected `str | null`, got `int`, in `model`"),
        (b'{"model": "chat", "stream": "yes"}', "in `stream`"),
        (b'{"model": "chat", "x": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"model": "chat", "x": NaN}', "not valid JSON"),
    ],
)
def test_bad_bodies_are_400_and_say_where(post: Post, body: bytes, said: str) -> None:
    answer = post(body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_compressed_body_is_refused_in_words(post: Post) -> None:
    answer = post(b"\x1f\x8b", content_encoding="gzip")
    assert answer.status_code == 400
    assert "gzip" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_are_told_in_json(post: Post) -> None:
    lost = post(b"", "/v1/nothing")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "unknown_path")
    for path, method, allowed in (
        ("/v1/chat/completions", "GET", "POST"),
        ("/v1/models", "DELETE", "GET"),
        ("/slices", "POST", "GET"),
    ):
        answer = post(b"", path, method)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
        assert answer.json()["error"]["code"] == "method_not_allowed"
        assert answer.headers["x-request-id"]


def test_every_answer_tells_which_configuration_decided(post: Post) -> None:
    """Relayed or not, served or refused, with a key or without one."""
    answers = [
        post(b"", "/healthz", "GET"),
        post(b"", "/readyz", "GET"),
        post(b"", "/v1/models", "GET"),
        post(b"", "/v1/models", "GET", authorization="Bearer nonsense"),
        post(b"", "/v1/nothing"),
        post(b"", "/v1/chat/completions", "GET"),
        post(b"", "/v1/responses/resp_1", "PUT"),
        post(b"{}"),
        post(json.dumps({"model": "chat", "messages": HELLO, "max_tokens": 1}).encode()),
    ]
    told = [(answer.status_code, answer.headers.get("x-sliceway-generation")) for answer in answers]
    assert {generation for _, generation in told} == {str(answers[1].json()["config_generation"])}, told
    assert {status // 100 for status, _ in told} == {2, 4}


def test_engine_paths_that_are_not_in_the_table_are_not_forwarded(system: System, post: Post) -> None:
    for path in (
        "/tokenizer_info",
        "/v1/chat/completions/",
        "/v1/chat/completions/../../tokenize",
        "/fake/state",
        "/v1//completions",
        "/version",
    ):
        assert post(b'{"model": "chat", "prompt": "x"}', path).status_code == 404
    assert system.fleet.engines["chat-0"].state.last_request.get("path") != "/tokenizer_info"


def test_slices_have_the_schema_and_the_tenants(system: System) -> None:
    list(system.client("beta").chat.completions.create(model="chat", messages=HELLO, max_tokens=4, stream=True))

    def rows() -> list[dict[str, Any]]:
        return list(httpx2.get(f"{system.gateway.url}/slices").json())

    def measured_to_the_end(row: dict[str, Any]) -> bool:
        beta = row["tenants"].get("beta")
        return beta is not None and beta["windows"]["1m"]["e2e_seconds"]["count"] > 0

    chat = wait_until(
        lambda: next((r for r in rows() if r["replica"] == "chat-0" and measured_to_the_end(r)), None),
        what="beta is on the slice, with a whole answer",
    )
    assert set(chat) == {"slice", "model", "replica", "state", "queue", "windows", "tenants", "batches"}
    assert chat["slice"] == {
        "id": "slice-of-chat-0",
        "kind": "cpu",
        "profile": None,
        "uuid": None,
        "gpu": None,
        "product": None,
    }
    assert (chat["model"], chat["state"]) == ("chat", "ready")
    for windows in (chat["windows"], chat["tenants"]["beta"]["windows"]):
        assert set(windows) == {"1m", "5m", "1h"}
        for metric in METRICS:
            measured = windows["1m"][metric]
            assert set(measured) == {"p50", "p99", "count"}
            assert measured["count"] > 0
            assert 0 < measured["p50"] <= measured["p99"]
    assert chat["windows"]["1m"]["itl_seconds"]["p50"] >= 0.001
    assert chat["windows"]["1m"]["ttft_seconds"]["p50"] >= 0.005
    # Four tokens are one first content and three gaps; opening, usage and [DONE] are none.
    streams = chat["tenants"]["beta"]["windows"]["1m"]["ttft_seconds"]["count"]
    assert chat["tenants"]["beta"]["windows"]["1m"]["itl_seconds"]["count"] <= 3 * streams


def test_idle_slices_say_null(system: System) -> None:
    rows = [row for row in httpx2.get(f"{system.gateway.url}/slices").json() if row["replica"] == "idle-0"]
    assert rows[0]["windows"]["1h"]["ttft_seconds"] == {"p50": None, "p99": None, "count": 0}
    assert rows[0]["tenants"] == {}


def test_metrics_count_what_was_served(system: System) -> None:
    system.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=4)
    page = httpx2.get(f"{system.gateway.url}/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'sliceway_requests_total{model="chat",status="200",tenant="acme"}' in page.text
    assert 'sliceway_tokens_total{kind="completion",model="chat",tenant="acme"}' in page.text
    assert 'sliceway_e2e_seconds_bucket{le="+Inf",slice="slice-of-chat-0",tenant="acme"}' in page.text
    assert "never-was" not in page.text


def test_health_readiness_and_the_document(system: System) -> None:
    url = system.gateway.url
    assert httpx2.get(f"{url}/healthz").json() == {"status": "ok"}
    ready = httpx2.get(f"{url}/readyz")
    assert ready.status_code == 200
    assert ready.json()["generation"] == system.fleet.generation
    assert ready.json()["models"]["chat"]["ready"] == 1
    document = httpx2.get(f"{url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/models", "/slices"} <= set(document["paths"])
    json.dumps(document)
