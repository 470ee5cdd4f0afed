"""What the simulated engine is trusted for, asked of a real vLLM on the CPU: responses by id, messages, tokens, batches."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from gateway.config import Config
from gateway.keys import Keystore
from gateway.testing import RunningGateway, running_gateway, wait_until
from placement.engines import find_engine_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

log = logging.getLogger(__name__)

MODEL = Path(__file__).resolve().parents[2] / ".sliceway" / "models" / "gemma-3-270m"
HELLO: Any = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def engine_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of an engine that stores responses, caches prefixes and tells how much of a prompt it had cached."""
    with tempfile.TemporaryDirectory(prefix="sliceway-") as directory:
        sock, log = Path(directory) / "engine.sock", tmp_path_factory.mktemp("engine") / "engine.log"
        command = [
            *(str(find_engine_python("cpu")), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(MODEL), "--served-model-name", "engine-name", "--uds", str(sock), "--enforce-eager"),
            *("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "1024"),
            *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
        ]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": "",
        }
        with log.open("wb") as out:
            engine = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:

            def listens() -> bool:
                assert engine.poll() is None, log.read_text(encoding="utf-8")[-3000:]
                return sock.exists()

            wait_until(listens, what="the engine listens", seconds=400)
            yield sock
        finally:
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()


@contextmanager
def in_front_of(sock: Path, state: Path, **config: Any) -> Iterator[RunningGateway]:
    """A gateway in front of the engine, once that answers."""
    known = {"version": "v1", "state_dir": str(state), "models": [{"name": "chat", "endpoints": [f"unix:{sock}"]}]}
    with running_gateway(Config.model_validate(known | config)) as running:
        wait_until(lambda: running.gateway.readiness()[0], what="the engine answers", seconds=400)
        yield running


@pytest.fixture(scope="module")
def gateway(engine_socket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway that asks for no keys."""
    settings = {"listen": "127.0.0.1:0", "authentication": "none"}
    with in_front_of(engine_socket, tmp_path_factory.mktemp("state"), gateway=settings) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0, timeout=120) as made:
        yield made


def test_a_response_has_the_id_that_the_gateway_gave_it(client: openai.OpenAI) -> None:
    first = client.responses.create(model="chat", input="Say hello.", max_output_tokens=8)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(model="chat", input="Again.", previous_response_id=first.id, max_output_tokens=8)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    with client.responses.stream(model="chat", input="Say hello.", max_output_tokens=8) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert client.responses.retrieve(final.id).id == final.id
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(first.id)  # it has ended


def prompt_tokens(usage: anthropic.types.Usage) -> int:
    """Anthropic counts apart what is written to a cache or read from one."""
    return usage.input_tokens + (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)


def test_messages_in_anthropics_shape(gateway: RunningGateway) -> None:
    with anthropic.Anthropic(base_url=gateway.url, api_key="x", max_retries=0) as claude:
        whole = claude.messages.create(model="chat", max_tokens=8, messages=HELLO)
        assert whole.usage.output_tokens > 0
        with claude.messages.stream(model="chat", max_tokens=8, messages=HELLO) as stream:
            assert "".join(stream.text_stream)
            assert stream.get_final_message().usage.output_tokens > 0
        assert claude.messages.count_tokens(model="chat", messages=HELLO).input_tokens == prompt_tokens(whole.usage)
        with pytest.raises(anthropic.BadRequestError) as refused:
            claude.messages.create(model="chat", max_tokens=5000, messages=HELLO)
    body: Any = refused.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["code"] == "context_length_exceeded"


def test_streams_of_every_kind_are_metered(gateway: RunningGateway, client: openai.OpenAI) -> None:
    tokens = gateway.gateway.exchanges.stats.tokens
    before = tokens["chat", "anonymous", "completion"]
    list(client.responses.create(model="chat", input="Say hello.", max_output_tokens=6, stream=True))
    list(client.chat.completions.create(model="chat", messages=HELLO, max_tokens=6, stream=True))
    wait_until(lambda: tokens["chat", "anonymous", "completion"] > before, what="tokens are counted")
    assert not gateway.gateway.exchanges.stats.without_usage


def test_tokens_there_and_back(gateway: RunningGateway) -> None:
    told = httpx2.post(f"{gateway.url}/tokenize", json={"model": "chat", "prompt": "a fox"}, timeout=60).json()
    back = httpx2.post(f"{gateway.url}/detokenize", json={"model": "chat", "tokens": told["tokens"]}, timeout=60).json()
    assert "a fox" in back["prompt"]


def test_what_a_model_does_not_do_is_told_in_our_words(gateway: RunningGateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.audio.transcriptions.create(model="chat", file=("a.wav", b"RIFF", "audio/wav"))
    assert isinstance(refused.value.code, str)
    answer = httpx2.post(f"{gateway.url}/v1/rerank", json={"model": "chat", "query": "a", "documents": ["b"]})
    assert isinstance(answer.json()["error"]["code"], str)


def test_a_batch_is_answered_by_a_real_engine(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"n{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "chat", "messages": HELLO, "max_tokens": 4},
        }
        for i in range(6)
    ]
    source = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    made = client.batches.create(input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h")
    done = wait_until(
        lambda: (b := client.batches.retrieve(made.id)).status == "completed" and b, what="it is done", seconds=120
    )
    rows = [json.loads(row) for row in client.files.content(done.output_file_id or "").text.splitlines()]
    assert {row["custom_id"] for row in rows} == {f"n{i}" for i in range(6)}
    assert all(row["response"]["body"]["model"] for row in rows)


def test_what_one_tenant_has_asked_is_not_cached_for_another(engine_socket: Path, tmp_path: Path) -> None:
    """By the engine's own count of cached tokens. Times are logged and not judged: the machine may be busy."""
    tenants = ("acme", "beta")
    keys = {name: Keystore(tmp_path).create(name, now=1.0)[0] for name in tenants}
    text = f"{tmp_path.name} " + "the quick brown fox jumps over the lazy dog " * 60
    with in_front_of(
        engine_socket,
        tmp_path,
        tenants=[{"name": name} for name in tenants],
        gateway={"listen": "127.0.0.1:0"},
    ) as running:

        def cached(tenant: str, **fields: Any) -> int:
            body = {"model": "chat", "prompt": text, "max_tokens": 1, "temperature": 0.0} | fields
            head = {"authorization": f"Bearer {keys[tenant]}"}
            began = time.perf_counter()
            answer = httpx2.post(f"{running.url}/v1/completions", json=body, headers=head, timeout=120)
            log.info("%s waited %.4f s", tenant, time.perf_counter() - began)
            assert answer.status_code == 200, answer.text
            details = answer.json()["usage"].get("prompt_tokens_details") or {}
            return int(details.get("cached_tokens") or 0)

        assert cached("acme", cache_salt="guess") == 0
        assert cached("acme") >= 128, "its own prefix is cached, whatever salt it sent, or the test says nothing"
        assert cached("beta", cache_salt="guess") == 0
        assert cached("beta", cache_salt="guess") >= 128
