"""What an engine that listens on TCP asks every caller for: the secret that it was started with.

ASGI middleware for vLLM's `--middleware`. vLLM's own `--api-key` asks below a few prefixes only and never for `OPTIONS` (0.32.0,
`entrypoints/serve/middleware/authenticate.py`); `/tokenize`, `/metrics`, `/score`, `/pause` and the like stay open to whoever reaches
the port. Here nothing is answered without the secret, whatever its path or method.

Self-contained (standard library only): `placement.guarding` copies this file to where the engine's interpreter finds it.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

VARIABLE = "ENGINE_API_KEY"
"""The environment variable that holds the secret: of the engine's environment, which only its own user can read."""

LEAST_CHARACTERS = 32
"""128 bits in hexadecimal digits."""

UNAUTHORIZED = b'{"error": "Unauthorized"}'
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class Guard:
    """Passes on what shows the secret; everything else is answered 401, and a WebSocket is not accepted."""

    def __init__(self, app: App) -> None:
        """Raises RuntimeError where the environment has no secret: an engine does not start open by mistake."""
        secret = os.environ.get(VARIABLE, "")
        if len(secret) < LEAST_CHARACTERS:
            raise RuntimeError(f"{VARIABLE} holds no secret of at least {LEAST_CHARACTERS} characters")
        self._app = app
        self._wanted = credential(secret)

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """One connection, request or the server's own start and end."""
        kind = scope["type"]
        if kind == "lifespan" or shows(_credentials(scope["headers"]), self._wanted):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            length = str(len(UNAUTHORIZED)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", length)]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": UNAUTHORIZED})


def credential(secret: str) -> bytes:
    """What `authorization` has to be."""
    return b"Bearer " + secret.encode()


def shows(credentials: Iterable[bytes], wanted: bytes) -> bool:
    """Whether there is exactly one value and it is `wanted`, compared in a time that tells nothing of how much of it is right."""
    found = list(credentials)
    return len(found) == 1 and hmac.compare_digest(found[0], wanted)


def _credentials(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    return (value for name, value in headers if name.lower() == b"authorization")
