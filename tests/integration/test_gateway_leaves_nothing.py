"""What a request leaves behind is freed when it is over. Anything that only a garbage collection finds makes all tenants wait for it."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from gateway.exchange import Exchange
from gateway.hotpath.engines import EngineConnection
from gateway.hotpath.relayed import HotRequest
from gateway.ingress.protocol import BoundedHttpProtocol
from gateway.sse import StreamMeter
from gateway.testing import RELAYS, wait_until
from tests.integration.gateway_harness import Bench, bench, chat_body, raw_request, read_all, read_until

pytestmark = pytest.mark.integration

LAST = b"connection: close\r\n"
WHOLE = json.dumps(chat_body(stream=False, max_tokens=2)).encode()
STREAM = json.dumps(chat_body(max_tokens=2)).encode()
LONG = json.dumps(chat_body(max_tokens=1000)).encode()
KINDS = (Exchange, HotRequest, StreamMeter, BoundedHttpProtocol, EngineConnection)


@pytest.fixture(params=RELAYS, scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), request.param) as made:
        made.fleet.start("m-0", "m", itl_seconds=0.01, output_tokens=1000)
        made.know()
        yield made


@pytest.fixture
def _uncollected() -> Iterator[None]:
    """Nothing is collected, so that a cycle stays."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    yield
    if was_on:
        gc.enable()


def whole(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(WHOLE, head=LAST))
        read_all(sock)


def streamed(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(STREAM, head=LAST))
        read_all(sock)


def refused(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(b"{", head=LAST))
        read_all(sock)


def left(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(raw_request(LONG))
        read_until(sock, b"data: ")


def health(served: Bench) -> None:
    with served.connect() as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        read_all(sock)


def alive() -> Counter[str]:
    """What is there of each kind. An engine's connection that is kept for the next request is no leftover."""
    found = [thing for thing in gc.get_objects() if isinstance(thing, KINDS)]
    over = [thing for thing in found if not isinstance(thing, EngineConnection) or thing.lost.is_set()]
    return Counter(type(thing).__name__ for thing in over)


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("ask", [whole, streamed, refused, left, health])
def test_a_request_that_is_over_is_freed_without_a_garbage_collection(
    served: Bench, ask: Callable[[Bench], None]
) -> None:
    def settled() -> bool:
        return served.gateway.idle and not served.gateway.gateway.exchanges.active

    ask(served)
    wait_until(settled, what="the first one is over")
    before = alive()
    for _ in range(4):
        ask(served)
    wait_until(lambda: settled() and alive() <= before, what=f"no more is alive than {before}")
