"""Requests of a batch, sent to the relay as if they came from outside: the same limits, routing, retries and error shapes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from gateway.surface import CALL, Call, Route
from gateway.tenants import Tenant

PRIORITY = -100  # below every tenant's (-10 to 10); ageing makes up for it when a request has waited for long
AsgiApp = Callable[..., Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. `retry_after_seconds` is None where it says nothing of it."""

    status: int
    body: bytes
    retry_after_seconds: float | None = None


class InProcess:
    """Asks `relay`, an ASGI application, on behalf of a tenant whose key was seen when the batch was made."""

    def __init__(self, relay: AsgiApp) -> None:
        self._relay = relay

    async def post(self, route: Route, tenant: Tenant, request_id: str, body: bytes) -> Reply:
        """Send one request and wait for its whole answer. Cancelling it ends the request in the engine."""
        exchange = _Conversation(body)
        scope = {
            "type": "http",
            "method": "POST",
            "path": route.path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
            CALL: Call(route, tenant=tenant, priority=PRIORITY, batch=True),
        }
        await self._relay(scope, exchange.receive, exchange.send)
        return exchange.reply()


class _Conversation:
    """The two ASGI channels of one request."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 500
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is None:
            await asyncio.get_running_loop().create_future()  # this client never leaves by itself
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = dict(message["headers"])
        else:
            self._parts.append(message.get("body", b""))

    def reply(self) -> Reply:
        wait = self._headers.get(b"retry-after-ms")
        return Reply(self._status, b"".join(self._parts), int(wait) / 1000 if wait else None)
