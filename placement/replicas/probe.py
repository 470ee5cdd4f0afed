"""Asking an engine whether it serves, over the socket that its requests come through.

Ready is an engine that has answered a real request; `/health` alone is answered by engines that never will (vLLM answers it
as long as its engine process exists, also when that hangs).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from model_registry.model import Task
from placement.engine_tls import own_context
from placement.launch import Endpoint

# One engine step, in the words of several versions of vLLM; whichever is there counts.
_STEPS = ("vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
_RUNNING = ("vllm:num_requests_running",)
_WAITING = ("vllm:num_requests_waiting",)
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Activity:
    """What an engine says it is doing. `steps` only grows while it works."""

    running: int
    waiting: int
    steps: float


class Probe:
    """Requests to one engine. Every call makes its own connection, so that a dead one is never taken for the engine."""

    def __init__(self, endpoint: Endpoint, model: str, task: Task) -> None:
        self._endpoint = endpoint
        self._base = "https://engine" if endpoint.tls else "http://engine"
        self._headers = {"authorization": f"Bearer {endpoint.secret}"} if endpoint.secret else {}
        self._model = model
        self._task = task

    async def healthy(self, *, timeout_seconds: float) -> bool:
        """Whether the engine's server says that its engine is alive."""
        return await self._status("GET", "/health", timeout_seconds=timeout_seconds) == 200

    async def answers(self, *, timeout_seconds: float) -> bool:
        """Whether the engine answers one real request: one token, or one embedding."""
        if self._task == "embed":
            body: dict[str, Any] = {"model": self._model, "input": "ready?"}
            return await self._status("POST", "/v1/embeddings", body, timeout_seconds=timeout_seconds) == 200
        body = {"model": self._model, "prompt": "ready?", "max_tokens": 1, "temperature": 0}
        status = await self._status("POST", "/v1/completions", body, timeout_seconds=timeout_seconds)
        if status in (404, 405, 501):  # an engine that has chat only
            del body["prompt"]
            body["messages"] = [{"role": "user", "content": "ready?"}]
            status = await self._status("POST", "/v1/chat/completions", body, timeout_seconds=timeout_seconds)
        return status == 200

    async def activity(self, *, timeout_seconds: float) -> Activity | None:
        """What the engine's metrics tell; None where it has none."""
        metrics = await self.text("/metrics", timeout_seconds=timeout_seconds)
        return parse_activity(metrics) if metrics is not None else None

    async def asleep(self, *, timeout_seconds: float) -> bool | None:
        """Whether the engine sleeps (vLLM's `/is_sleeping`); None where it has no such endpoint, or does not answer."""
        text = await self.text("/is_sleeping", timeout_seconds=timeout_seconds)
        try:
            told = json.loads(text or "")["is_sleeping"]
        except (ValueError, KeyError, TypeError):
            return None
        return told if isinstance(told, bool) else None

    async def sleep(self, *, timeout_seconds: float) -> bool:
        """Put the engine to sleep at level 1: weights to the host's memory, KV cache dropped. Whether it sleeps then."""
        status = await self._status("POST", "/sleep?level=1", timeout_seconds=timeout_seconds)
        return status == 200 and await self.asleep(timeout_seconds=timeout_seconds) is True

    async def wake(self, *, timeout_seconds: float) -> bool:
        """Bring weights and KV cache back. Whether it is awake then."""
        status = await self._status("POST", "/wake_up", timeout_seconds=timeout_seconds)
        return status == 200 and await self.asleep(timeout_seconds=timeout_seconds) is False

    async def text(self, path: str, *, timeout_seconds: float) -> str | None:
        """What the engine answers there; None where it answers nothing, or an error."""
        try:
            async with self._session(timeout_seconds) as session, session.get(f"{self._base}{path}") as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError):
            return None

    async def _status(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_seconds: float
    ) -> int | None:
        """The status of the answer, read to its end; None if there is none."""
        try:
            async with (
                self._session(timeout_seconds) as session,
                session.request(method, f"{self._base}{path}", json=body) as response,
            ):
                await response.read()
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    @contextlib.asynccontextmanager
    async def _session(self, timeout_seconds: float) -> AsyncIterator[aiohttp.ClientSession]:
        connector: aiohttp.BaseConnector
        if self._endpoint.uds:
            connector = aiohttp.UnixConnector(path=str(self._endpoint.uds))
        else:
            connector = aiohttp.TCPConnector(
                resolver=_Engine(self._endpoint.host, self._endpoint.port or 0),
                ssl=own_context() if self._endpoint.tls else True,
            )
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers) as session:
            yield session


class _Engine(aiohttp.abc.AbstractResolver):
    """Every name is the engine's address; no name service is asked."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[aiohttp.abc.ResolveResult]:
        await asyncio.sleep(0)
        return [
            aiohttp.abc.ResolveResult(
                hostname=host, host=self._host, port=self._port, family=self._family, proto=0, flags=0
            )
        ]

    async def close(self) -> None:
        """Nothing to close."""


def parse_activity(metrics: str) -> Activity | None:
    """Requests and steps from a Prometheus page; None where it does not tell them."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(metrics):
        if name.startswith("vllm:"):
            with contextlib.suppress(ValueError):
                sums[name] = sums.get(name, 0.0) + float(value)
    running = _first(sums, _RUNNING)
    if running is None:
        return None
    return Activity(int(running), int(_first(sums, _WAITING) or 0), _first(sums, _STEPS) or 0.0)


def _first(sums: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    return next((sums[name] for name in names if name in sums), None)
