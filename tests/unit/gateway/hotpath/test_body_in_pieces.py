"""A large body on its way to an engine, and what becomes of its connection when the body is given back meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from gateway.config import GatewayConfig
from gateway.hotpath.engines import EngineConnection
from gateway.large_bodies import LargeBodies, LargeBody
from gateway.large_bodies.testing import InlineReader
from gateway.surface import ROUTES


class Transport:
    """Counts what an engine would get."""

    def __init__(self) -> None:
        self.written = 0
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


def ready_body() -> LargeBody:
    body = LargeBodies(InlineReader()).open("a", ROUTES["/v1/chat/completions"], GatewayConfig())
    body.append(b'{"model":"m","messages":[]}' + b" " * 300_000)
    body.read(None, lambda: None)
    body.result()
    return body


@pytest.mark.parametrize("whole", [True, False])
async def test_an_answer_takes_the_connection_along_only_before_the_end_of_the_body(whole: bool) -> None:
    body, transport = ready_body(), Transport()
    connection = EngineConnection(cast(Any, None))
    connection.transport = cast(Any, transport)
    pieces = body.pieces("m", {}, ask_usage=True)
    connection.ask_in_pieces(cast(Any, None), "m-0", b"", pieces)
    while whole and not body.sent:  # noqa: ASYNC110  # what is sent is sent by the loop
        await asyncio.sleep(0)
    body.close()  # as the beginning of an answer does, before the connection has looked for another piece
    await asyncio.sleep(0)
    assert transport.aborted is not whole
    assert (transport.written == pieces.length) is whole
