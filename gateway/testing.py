"""What tests and quick starts need in place of a fleet: a clock to turn, simulated engines, and a real gateway in a thread.

Everything between the client's socket and the engine's is the code that serves in production; only the engines are simulated.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import uvloop

from gateway.config import Config
from gateway.errors import Draining
from gateway.ingress.server import DrainingServer, listening_socket
from gateway.service import Gateway
from gateway.wiring import create_gateway, server_config
from placement.fake_engine import Behaviour, FakeEngine, listening
from placement.state import StatePaths
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow, publish

T = TypeVar("T")

RELAYS: tuple[Literal["asgi", "fast"], ...] = ("asgi", "fast")
"""Every relay there is; the suite of the gateway runs on each."""

WAIT_SECONDS = 45.0


@dataclass(slots=True)
class FakeClock:
    """A clock that stands still until it is turned."""

    now: float = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def turn(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def wait_until(condition: Callable[[], T], *, what: str, seconds: float = WAIT_SECONDS) -> T:
    """Ask until the answer is true, and give it. Raises AssertionError after `seconds`; ask for what must come, not for how fast."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds:g} s: {what}")
        time.sleep(0.01)
    return answer


def replica_row(
    replica: str,
    model: str,
    endpoint: str,
    *,
    state: ReplicaState = ReplicaState.READY,
    engine_model: str | None = None,
) -> ReplicaRow:
    """A replica on a `cpu` slice of its own, named after it."""
    return ReplicaRow(
        replica=replica,
        model=model,
        engine_model=engine_model or model,
        endpoint=endpoint,
        slice=SliceRow(id=f"slice-of-{replica}", kind="cpu"),
        state=state,
        max_num_seqs=16,
    )


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""What a scripted engine does with one request whose head and body have been read; it writes its answer, or does not."""


@asynccontextmanager
async def _scripted(path: Path, answer: Script) -> AsyncIterator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length.group(1)) if length else 0)
            await answer(reader, writer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the gateway closed; that is often what is tested
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        with self._runner:
            self.loop = self._runner.get_loop()
            self._stop = asyncio.Event()
            self._runner.run(self._live())

    async def _live(self) -> None:
        self._ready.set()
        await self._stop.wait()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_SECONDS)

    def stop(self) -> None:
        """End the loop and the thread."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)


@dataclass(slots=True)
class FakeFleet:
    """Simulated engines on Unix sockets, in one thread, and the routing table that names them."""

    state: StatePaths
    thread: LoopThread
    directory: Path
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    rows: dict[str, ReplicaRow] = field(default_factory=dict)
    cards: dict[str, ModelRow] = field(default_factory=dict)
    generation: int = 0
    _stacks: dict[str, AsyncExitStack] = field(default_factory=dict)
    _sockets: int = 0

    def start(
        self,
        replica: str,
        model: str,
        *,
        engine_model: str | None = None,
        tcp: bool = False,
        tls: ssl.SSLContext | None = None,
        **behaviour: Any,
    ) -> FakeEngine:
        """Start an engine on a socket, on loopback (`tcp`) or there over `tls`, and publish it as ready."""
        engine = FakeEngine(Behaviour(names=(engine_model or model,), **behaviour))
        self._stacks[replica] = stack = AsyncExitStack()
        socket = None if tcp or tls else self._socket()
        endpoint = self.thread.call(stack.enter_async_context(listening(engine, uds=socket, tls=tls)))
        self.engines[replica] = engine
        self.rows[replica] = replica_row(replica, model, endpoint, engine_model=engine_model)
        self.cards[model] = ModelRow(
            name=model, task=engine.behaviour.task, max_model_len=engine.behaviour.max_model_len, created=1
        )
        self.publish()
        return engine

    def _socket(self) -> Path:
        self._sockets += 1
        return self.directory / f"{self._sockets}.sock"

    def script(self, replica: str, model: str, answer: Script) -> None:
        """Publish an engine that answers every request with what `answer` writes, to the byte; it may break HTTP."""
        self._stacks[replica] = stack = AsyncExitStack()
        path = self._socket()
        self.thread.call(stack.enter_async_context(_scripted(path, answer)))
        self.adopt(replica, model, f"unix:{path}")

    def adopt(self, replica: str, model: str, endpoint: str) -> None:
        """Publish an engine that runs elsewhere, or nowhere."""
        self.rows[replica] = replica_row(replica, model, endpoint)
        self.cards.setdefault(model, ModelRow(name=model))
        self.publish()

    def stop(self, replica: str) -> None:
        """Stop an engine at once, and leave the table as it is."""
        self.thread.call(self._stacks.pop(replica).aclose())

    def mark(self, replica: str, state: ReplicaState, reason: str | None = None) -> None:
        """Publish another state of a replica."""
        self.rows[replica] = self.rows[replica].model_copy(update={"state": state, "reason": reason})
        self.publish()

    def publish(self) -> None:
        """Write the routing table."""
        self.generation += 1
        publish(
            RoutingTable(
                generation=self.generation, models=tuple(self.cards.values()), replicas=tuple(self.rows.values())
            ),
            self.state.routing_table,
        )

    def clear(self) -> None:
        """Stop every engine and publish a table without any."""
        self.close()
        for known in (self.engines, self.rows, self.cards):
            known.clear()
        self.publish()

    def close(self) -> None:
        """Stop every engine."""
        for replica in list(self._stacks):
            self.stop(replica)


@contextmanager
def fake_fleet(state: Path) -> Iterator[FakeFleet]:
    """A fleet that publishes into the state directory `state`."""
    thread = LoopThread()
    try:
        with tempfile.TemporaryDirectory(prefix="sliceway-") as directory:  # short: a socket's path has 107 bytes
            fleet = FakeFleet(StatePaths(state), thread, Path(directory))
            try:
                yield fleet
            finally:
                fleet.close()
    finally:
        thread.stop()


@dataclass(slots=True)
class RunningGateway:
    """A gateway that serves at `url`; `gateway` may be looked into."""

    url: str
    gateway: Gateway
    server: DrainingServer
    thread: LoopThread

    @property
    def idle(self) -> bool:
        """No request is in it, and every counter is back at zero."""
        exchanges = self.gateway.exchanges
        return not exchanges.active and exchanges.router.in_flight == 0

    def look(self) -> None:
        """Have the gateway look at its files now, without waiting for its next look."""
        self.on_loop(self.gateway.follow_files)

    def on_loop(self, work: Callable[[], T]) -> T:
        """Call `work` on the gateway's own thread."""

        async def call() -> T:
            return work()

        return self.thread.call(call())


@contextmanager
def running_gateway(
    config: Config, *, config_path: Path | None = None, relay: str | None = None
) -> Iterator[RunningGateway]:
    """Serve `config` in a thread, on the port it names (0: a free one), until the block ends. `relay` is used instead of the configured one."""
    if relay is not None:
        config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"relay": relay})})
    sock = listening_socket(config.gateway.listen)
    gateway, app = create_gateway(config, config_path=config_path)
    server = DrainingServer(server_config(config, app, gateway.tls), gateway)
    thread = LoopThread()
    serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[sock]), thread.loop)
    try:
        wait_until(lambda: server.started or serving.done(), what="the gateway serves")
        yield RunningGateway(f"{config.gateway.scheme}://127.0.0.1:{sock.getsockname()[1]}", gateway, server, thread)
    finally:
        thread.loop.call_soon_threadsafe(_end, server, gateway)
        serving.result(WAIT_SECONDS)
        thread.stop()


def _end(server: DrainingServer, gateway: Gateway) -> None:
    gateway.exchanges.draining = True
    gateway.exchanges.interrupt_all(Draining("The test is over.", retry_after_seconds=1.0))
    server.should_exit = True
