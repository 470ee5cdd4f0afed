"""LangChain's and LiteLLM's clients. They come with the extra `clients`, which `make test` installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pydantic
import pytest

from tests.integration.surface_harness import Surface, surface

langchain = pytest.mark.skipif(find_spec("langchain_openai") is None, reason="pip install 'sliceway[clients]'")


class Fox(pydantic.BaseModel):
    """A fox."""

    name: str
    legs: int


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    with surface(tmp_path_factory.mktemp("state")) as made:
        yield made


# ---- LangChain


@pytest.fixture
def chat(system: Surface) -> Iterator[Any]:
    import httpx
    from langchain_openai import ChatOpenAI

    with httpx.Client() as http:
        yield ChatOpenAI(
            model="chat",
            base_url=f"{system.url}/v1",
            api_key=system.keys["acme"],
            max_tokens=4,
            max_retries=0,
            http_client=http,  # type: ignore[arg-type,call-arg]
        )


@langchain
def test_langchain_asks_and_streams(chat: Any) -> None:
    answer = chat.invoke("Hello there, engine")
    assert answer.content == "the quick brown fox"
    assert answer.usage_metadata["output_tokens"] == 4
    chunks = list(chat.stream("Hello there, engine"))
    assert "".join(chunk.content for chunk in chunks) == "the quick brown fox"


@langchain
def test_langchain_calls_tools_and_fills_forms(chat: Any) -> None:
    from langchain_core.tools import tool

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return "sunny"

    called = chat.bind_tools([weather]).invoke("Hello")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", {"city": "fox"})]
    assert chat.with_structured_output(Fox).invoke("Hello") == Fox(name="fox", legs=7)


@langchain
def test_langchain_embeds(system: Surface) -> None:
    import httpx
    from langchain_openai import OpenAIEmbeddings

    with httpx.Client() as http:
        embeddings = OpenAIEmbeddings(
            model="pool",
            base_url=f"{system.url}/v1",
            api_key=system.keys["acme"],  # type: ignore[arg-type]
            check_embedding_ctx_length=False,
            http_client=http,
        )
        assert [len(vector) for vector in embeddings.embed_documents(["a", "b"])] == [8, 8]


# ---- LiteLLM


@pytest.mark.skipif(find_spec("litellm") is None, reason="pip install 'sliceway[clients]'")
def test_litellms_client_asks_streams_embeds_and_understands_refusals(system: Surface) -> None:
    probe = Path(__file__).with_name("litellm_probe.py")
    ran = subprocess.run(
        [sys.executable, str(probe), system.url, system.keys["acme"]],
        capture_output=True,
        encoding="utf-8",
        timeout=55,
        check=False,
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # it would fetch its price list
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "whole": ["the quick brown fox", 4],
        "stream": "the quick brown fox",
        "embedding": [8, 8],
        "anthropic": "the quick brown fox",
        "unknown": "NotFoundError",
        "long": "ContextWindowExceededError",
    }
