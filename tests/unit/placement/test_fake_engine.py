"""The simulated engine says what vLLM says, and counts what it is asked."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from placement.evidence import read_metrics, read_models
from placement.fake_engine import Behaviour, FakeEngine, listening
from placement.fake_engine.__main__ import parse

Start = Callable[..., AbstractAsyncContextManager[tuple[FakeEngine, aiohttp.ClientSession]]]


@asynccontextmanager
async def running(**behaviour: Any) -> AsyncIterator[tuple[FakeEngine, aiohttp.ClientSession]]:
    engine = FakeEngine(Behaviour(**{"names": ("m",)} | behaviour))
    async with listening(engine) as url, aiohttp.ClientSession(url) as session:
        yield engine, session


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(45):
        while not condition():  # noqa: ASYNC110 - the engine counts, it does not signal
            await asyncio.sleep(0.001)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 3} | fields


async def payloads(answer: aiohttp.ClientResponse) -> list[Any]:
    lines = (await answer.text()).split("\n\n")
    return [line[6:] if line.endswith("[DONE]") else json.loads(line[6:]) for line in lines if line]


async def test_a_stream_opens_with_the_role_and_closes_with_the_usage() -> None:
    async with (
        running() as (_, session),
        session.post("/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True})) as answer,
    ):
        got = await payloads(answer)
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"]["content"] for e in got[1:4]) == "the quick brown"
    assert [e["choices"][0]["finish_reason"] for e in got[:4]] == [None, None, None, "length"]
    assert got[4]["choices"] == []
    assert got[4]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert got[5:] == ["[DONE]"]


async def test_usage_comes_only_when_asked_for() -> None:
    async with (
        running() as (_, session),
        session.post("/v1/completions", json={"model": "m", "prompt": "a", "stream": True}) as answer,
    ):
        got = await payloads(answer)
    assert all(e["choices"] for e in got[:-1])
    assert len(got) == 17


async def test_answers_have_ids_of_their_own_also_at_once() -> None:
    async with running(ttft_seconds=0.01, max_concurrency=2) as (_, session):
        answers = await asyncio.gather(*(session.post("/v1/chat/completions", json=chat()) for _ in range(6)))
        ids = {(await a.json())["id"] for a in answers}
    assert len(ids) == 6


async def test_one_at_a_time_means_the_others_wait() -> None:
    async with running(itl_seconds=0.05, max_concurrency=1) as (engine, session):
        asked = [asyncio.create_task(session.post("/v1/chat/completions", json=chat())) for _ in range(3)]
        await until(lambda: engine.state.running + engine.state.waiting == 3)
        assert (engine.state.running, engine.state.waiting) == (1, 2)
        for task in asked:
            assert (await task).status == 200
        assert (engine.state.running, engine.state.waiting, engine.state.served) == (0, 0, 3)


async def test_a_client_that_leaves_is_an_abort() -> None:
    async with running(itl_seconds=30) as (engine, session):
        answer = await session.post("/v1/chat/completions", json=chat(stream=True))
        answer.close()
        await until(lambda: engine.state.aborted)
        assert (engine.state.running, engine.state.served) == (0, 0)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (chat(model="x"), 404, "The model `x` does not exist."),
        (chat(max_tokens=9000), 400, "This model's maximum context length is 8192 tokens."),
        ([1], 400, "1 validation error"),
    ],
)
async def test_refusals_have_vllms_words_and_an_int_code(body: Any, status: int, said: str) -> None:
    async with running() as (_, session), session.post("/v1/chat/completions", json=body) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (status, status)
    assert error["message"].startswith(said)


async def test_embeddings_depend_on_the_text_alone_and_have_length_one() -> None:
    async with running(task="embed") as (_, session):
        async with session.post("/v1/embeddings", json={"model": "m", "input": ["a b", "c", "a b"]}) as answer:
            got = await answer.json()
        vectors = [item["embedding"] for item in got["data"]]
        assert vectors[0] == vectors[2] != vectors[1]
        assert all(abs(sum(x * x for x in v) - 1) < 1e-9 for v in vectors)
        assert got["usage"]["prompt_tokens"] == 5
        async with session.post("/v1/chat/completions", json=chat()) as answer:
            assert answer.status == 404


async def test_a_hung_engine_stays_healthy() -> None:
    async with running(hang_after=0) as (engine, session):
        asked = asyncio.create_task(session.post("/v1/chat/completions", json=chat()))
        await until(lambda: engine.state.running)
        async with session.get("/health") as answer:
            assert answer.status == 200
        assert not asked.done()
        asked.cancel()


async def test_it_says_that_it_is_simulated() -> None:
    async with running() as (_, session):
        for path in ("/version", "/fake/state"):
            async with session.get(path) as answer:
                assert (await answer.json())["simulated"] is True
        async with session.get("/metrics") as answer:
            assert 'vllm:num_requests_running{model_name="m",engine="0"} 0' in await answer.text()


async def test_it_tells_its_limits_where_vllm_does() -> None:
    async with running(max_model_len=2048, gpu_memory_utilization=0.9) as (_, session):
        async with session.get("/metrics") as answer:
            metrics = await answer.text()
        async with session.get("/v1/models") as answer:
            models = await answer.text()
    told = {f.name: f.value for f in (*read_metrics(metrics).limits, *read_models(models).limits)}
    assert told == {"gpu_memory_utilization": 0.9, "max_model_len": 2048}


def test_vllms_own_flags_are_taken_and_left_aside(tmp_path: Path) -> None:
    behaviour, start = parse(
        [
            "--uds",
            str(tmp_path / "s"),
            "--model",
            "/a/b",
            "--served-model-name",
            "m",
            "alias",
            "--max-num-seqs",
            "4",
            "--enforce-eager",
            "--runner",
            "pooling",
        ]
    )
    assert behaviour.names == ("m", "alias")
    assert behaviour.task == "embed"
    assert start.uds == tmp_path / "s"


def test_a_start_that_fails_says_what_it_was_told_to_say() -> None:
    command = [
        sys.executable,
        "-m",
        "placement.fake_engine",
        "--port",
        "0",
        "--model",
        "m",
        "--fail-at-start",
        "ValueError: too small",
        "--exit-code",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30, check=False)
    assert done.returncode == 3
    assert "ValueError: too small" in done.stderr
    assert "simulated" in done.stderr
