"""The ASGI application: what comes in is sent to the relay or to the cold routes, and every answer gets a request id.

Hot paths are looked up in a dictionary before any framework sees the request; FastAPI's routing and middleware cost more than
the whole relay.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, quote, urlencode

from gateway.error_map import error_answer
from gateway.errors import MethodNotAllowed
from gateway.relay import Receive, Scope, Send
from gateway.request import request_id
from gateway.surface import CALL, CREATE_RESPONSE, Call, by_id

if TYPE_CHECKING:  # its protocol is built on this package
    from gateway.hotpath import HotPath

AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


_QUERY = frozenset(("stream", "starting_after"))


class Lifecycle(Protocol):
    """What runs beside the requests."""

    async def start(self) -> None:
        """Before the first request."""
        ...

    async def stop(self) -> None:
        """After the last one."""
        ...


class Lifecycles:
    """Several as one: started in order, stopped in the reverse, as far as they were started."""

    def __init__(self, parts: Sequence[Lifecycle]) -> None:
        self._parts = parts
        self._started: list[Lifecycle] = []

    async def start(self) -> None:
        """Start each. What the first that fails raises is raised."""
        for part in self._parts:
            await part.start()
            self._started.append(part)

    async def stop(self) -> None:
        """Stop each that was started."""
        while self._started:
            await self._started.pop().stop()


class Ingress:
    """See the module. `hot` maps a path to the application that serves its POST.

    `fast` is what a server may serve without calling this, if it can; None where it may not. `generation` gives the header
    that every answer has, which tells the configuration that decided on it.
    """

    def __init__(
        self,
        *,
        hot: Mapping[str, AsgiApp],
        cold: AsgiApp,
        lifecycle: Lifecycle,
        generation: Callable[[], tuple[bytes, bytes]],
        fast: HotPath | None = None,
    ) -> None:
        self.fast = fast
        self.generation = generation
        self._hot = hot
        self._stored = hot[CREATE_RESPONSE]
        self._cold = cold
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "http":
            hot = self._hot.get(scope["path"])
            if hot is None:
                await self._serve_other(scope, receive, send)
            elif scope["method"] == "POST":
                await hot(scope, receive, send)
            else:
                await self._refuse_method(scope, "POST", send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is not found by its path alone: stored responses, which the relay serves, and the cold routes."""
        found = by_id(scope["path"])
        if found is None:
            await self._serve_cold(scope, receive, send)
            return
        route, response_id = found
        if scope["method"] != route.method:
            await self._refuse_method(scope, route.method, send)
            return
        target = route.path.format(response_id=quote(response_id, safe="")) + _passed_query(scope["query_string"])
        scope[CALL] = Call(route, response_id=response_id, target=target)
        await self._stored(scope, receive, send)

    async def _serve_cold(self, scope: Scope, receive: Receive, send: Send) -> None:
        own_id = request_id(dict(scope["headers"]).get(b"x-request-id"))

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", own_id), self.generation()]
            await send(message)

        await self._cold(scope, receive, send_with_id)

    async def _refuse_method(self, scope: Scope, allowed: str, send: Send) -> None:
        error = MethodNotAllowed(f"{scope['path'][:200]} takes {allowed}, not {scope['method']}.", allowed=(allowed,))
        answer = error_answer(error)
        own_id = request_id(dict(scope["headers"]).get(b"x-request-id"))
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [*answer.headers, (b"x-request-id", own_id), self.generation()],
            }
        )
        await send({"type": "http.response.body", "body": answer.body, "more_body": False})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._lifecycle.start()
        except BaseException as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._lifecycle.stop()
        await send({"type": "lifespan.shutdown.complete"})


def _passed_query(query: bytes) -> str:
    """The parameters that the engine knows, and no others, written anew."""
    known = [(name, value) for name, value in parse_qsl(query.decode("latin-1")) if name in _QUERY]
    return f"?{urlencode(known)}" if known else ""
