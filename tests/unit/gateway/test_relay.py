"""The relay as any ASGI server would call it, with engines that are a few lines of Python."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config
from gateway.error_map import Headers
from gateway.service import Gateway
from gateway.testing import replica_row
from gateway.wiring import create_gateway
from placement.state import StatePaths
from placement.table import ModelRow, ReplicaRow, RoutingTable, publish

BODY = b'{"model": "m", "messages": []}'


class Answer:
    """An engine's answer from a list; a future in it is waited for."""

    def __init__(self, parts: Iterable[Any], status: int = 200, content_type: bytes = b"application/json") -> None:
        self.status, self.headers = (
            status,
            [(b"content-type", content_type), (b"connection", b"close"), (b"server", b"x")],
        )
        self._parts = iter(parts)
        self.closed = 0

    async def read_some(self) -> bytes:
        part = next(self._parts, b"")
        return bytes(await part if isinstance(part, asyncio.Future) else part)

    def close(self) -> None:
        self.closed += 1


class OneEngine:
    """`gateway.upstream.Engines` over one answer, or one error, per request."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, bytes]] = []

    async def post(
        self, replica: ReplicaRow, path: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST"
    ) -> Answer:
        self.asked.append((replica.replica, path, body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        return 200, b"{}"

    async def retain(self, endpoints: Iterable[str]) -> None: ...

    async def close(self) -> None: ...


class Call:
    """One HTTP request through an ASGI application; the client can leave."""

    def __init__(self, app: Any, body: bytes = BODY, *, parts: int = 1) -> None:
        size = max(1, len(body) // parts)
        pieces = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        self._messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": p, "more_body": i < len(pieces) - 1} for i, p in enumerate(pieces)
        ]
        self._left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> Headers:
        return list(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


def system(tmp_path: Path, *answers: Answer | Exception) -> tuple[Gateway, Any, OneEngine]:
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(tmp_path),
            "models": [{"name": "m", "source": "x"}],
            "gateway": {"authentication": "none"},
        }
    )
    publish(
        RoutingTable(generation=1, models=(ModelRow(name="m"),), replicas=(replica_row("m-0", "m", "unix:/x"),)),
        StatePaths(tmp_path).routing_table,
    )
    engine = OneEngine(*answers)
    gateway, app = create_gateway(config, engines=engine)
    return gateway, app, engine


async def test_headers_of_one_hop_stay_there(tmp_path: Path) -> None:
    answer = Answer([b'{"a": 1}'])
    _, app, _ = system(tmp_path, answer)
    call = Call(app, parts=5)
    await call.task
    assert call.status == 200
    assert call.body == b'{"a": 1}'
    assert {name for name, _ in call.headers} == {
        b"content-type",
        b"content-length",
        b"x-request-id",
        b"x-sliceway-generation",
        b"x-sliceway-replica",
    }
    assert answer.closed == 1


@pytest.mark.parametrize("when", ["asked", "reading"])
async def test_a_server_without_watchable_connections_is_asked_by_receive(tmp_path: Path, when: str) -> None:
    never: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    answer = Answer(
        [b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', never] if when == "reading" else [never],
        content_type=b"text/event-stream",
    )
    gateway, app, _ = system(tmp_path, answer)
    call = Call(app)
    for _ in range(5):
        await asyncio.sleep(0)
    assert gateway.exchanges.router.in_flight == 1
    call.leave()
    await call.task
    assert answer.closed == 1
    assert gateway.exchanges.router.in_flight == 0
    assert gateway.exchanges.active == set()
    assert gateway.exchanges.stats.disconnects["m"] == 1
    assert len(call.sent) == (2 if when == "reading" else 0)


async def test_a_fault_of_our_own_is_a_500_that_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gateway, app, _ = system(tmp_path, RuntimeError("/etc/secret"))
    call = Call(app)
    await call.task
    assert call.status == 500
    assert b"internal_error" in call.body
    assert b"secret" not in call.body
    assert dict(call.headers)[b"x-request-id"].decode() in caplog.text
    assert gateway.exchanges.router.in_flight == 0


async def test_what_the_server_cancels_ends_and_leaves_nothing(tmp_path: Path) -> None:
    never: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    answer = Answer([never])
    gateway, app, _ = system(tmp_path, answer)
    call = Call(app)
    for _ in range(5):
        await asyncio.sleep(0)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert answer.closed == 1
    assert gateway.exchanges.router.in_flight == 0
    assert gateway.exchanges.active == set()
