"""uvicorn as this gateway runs it: its sockets, its signals, and an end that lets streams finish.

SIGTERM or SIGINT begins a drain: `/readyz` says 503, new requests are refused with Retry-After, and the process ends when the
last one is answered or the drain timeout is over. A second one ends the timeout, a third one the process. A process that another
one has replaced (`gateway.ingress.handover`) retires: it serves its open connections, each for one more request, and then drains.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from uvicorn.server import ServerState

from gateway.errors import AddressInUse
from gateway.ingress.protocol import UNSENT_BYTES, BoundedHttpProtocol

BACKLOG = 4096
_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; Python names it from 3.12 on


class Drainable(Protocol):
    """What the server asks before it ends."""

    def begin_drain(self) -> None:
        """A stop was asked for."""
        ...

    def hurry(self) -> None:
        """It was asked for again."""
        ...

    def drained(self) -> bool:
        """Whether the process may end."""
        ...


class Connections(ServerState):
    """What all connections of a server know of it. `last` is whether the request that comes is to be a connection's last one."""

    last = False


class DrainingServer(uvicorn.Server):
    """See the module. `on_started` is called once it accepts connections."""

    def __init__(
        self, config: uvicorn.Config, gateway: Drainable, *, on_started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self.server_state: Connections = Connections()
        self._gateway = gateway
        self._signals = 0
        self._on_started = on_started
        self._retired_by: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def retire(self) -> None:
        """Another process accepts the connections from here on."""
        for server in self.servers:
            server.close()
        self.server_state.last = True
        # Until then every idle connection has been used once more, or was closed for being idle.
        self._retired_by = asyncio.get_running_loop().time() + self.config.timeout_keep_alive + 1

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends what is left in words, the third one ends."""
        self._signals += 1
        if self._signals == 1:
            self._gateway.begin_drain()
        elif self._signals == 2:
            self._gateway.hurry()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: close connections whose head does not come, and see whether a drain is over."""
        now = asyncio.get_running_loop().time()
        if self._retired_by is not None and (not self.server_state.connections or now > self._retired_by):
            self._gateway.begin_drain()
        if counter % 5 == 0:
            for connection in [c for c in self.server_state.connections if isinstance(c, BoundedHttpProtocol)]:
                connection.expire(now)
        if self._gateway.drained():
            self.should_exit = True
        return await super().on_tick(counter)


def listening_socket(listen: str) -> socket.socket:
    """A bound TCP socket for `host:port` (`[::1]:8080` for IPv6; port 0 takes a free one). Not shared: no SO_REUSEPORT.

    Raises AddressInUse, also where the address is not this machine's or the port is privileged.
    """
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise AddressInUse(
            f"cannot listen on {listen}: {error}",
            where="gateway.listen",
            remedy="Write an address of this machine, like 127.0.0.1:8080.",
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # connections inherit it
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise AddressInUse(
            f"cannot listen on {listen}: {_why(error)}", where="gateway.listen", remedy=_remedy(error, port)
        ) from error
    sock.setblocking(False)
    return sock


def _why(error: OSError) -> str:
    return (
        "another process listens there" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
    )


def _remedy(error: OSError, port: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"See which one with `ss -ltnp 'sport = :{port}'` and stop it, or set gateway.listen to another port."
    if error.errno == errno.EACCES:
        return "Ports below 1024 need privileges; set gateway.listen to a port above."
    return "Write an address of this machine, like 127.0.0.1:8080."
