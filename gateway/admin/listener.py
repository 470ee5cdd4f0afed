"""The admin API's own listener: a Unix socket of mode 0600, or a loopback port.

Of several gateway processes on one state directory one answers here: who holds the lock. When it ends, another one takes over.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import uvicorn
from uvicorn.server import ServerState

from gateway.admin.access import PEER_UID, Access
from gateway.config import Config
from gateway.errors import AddressInUse
from gateway.ingress.app import AsgiApp
from gateway.ingress.protocol import BoundedHttpProtocol, HeadLimits
from gateway.ingress.server import listening_socket
from gateway.relay import Receive, Scope, Send
from gateway.secret_values import Secret, fetch
from model_registry.atomic import write_atomically
from model_registry.errors import SlicewayError
from placement.state import StatePaths

log = logging.getLogger("sliceway.admin")

_HEAD_LIMITS = HeadLimits(max_bytes=16 * 2**10, timeout_seconds=10.0)
_KEEP_ALIVE_SECONDS = 5
_LEAST_KEY_BYTES = 16


def address_of(config: Config) -> str | None:
    """Where the admin API listens under `config`: `unix:PATH`, `host:port`, or None for nowhere."""
    chosen = config.gateway.admin_listen
    if chosen == "none":
        return None
    return chosen or f"unix:{StatePaths(config.state).runtime(os.environ) / 'admin.sock'}"


def access_of(config: Config) -> Access:
    """Who may administer under `config`; a key for TCP is made where none is configured.

    Raises SecretUnavailable, or AddressInUse where the key could be guessed.
    """
    reference, address = config.gateway.admin_key, address_of(config) or ""
    if reference is None:
        return Access(None if address.startswith("unix:") else _own_key(config.state / "admin.key"), os.getuid())
    key = fetch(reference, field_name="gateway.admin_key")
    if len(key.value) < _LEAST_KEY_BYTES:
        raise AddressInUse(
            f"the admin key is shorter than {_LEAST_KEY_BYTES} bytes",
            where="gateway.admin_key",
            remedy="Make a better one: openssl rand -hex 32",
        )
    return Access(key, os.getuid())


def console_access(config: Config) -> Access:
    """Who may see the console, which anybody can reach: who has the admin key. One is made where none is configured.

    Raises SecretUnavailable, or AddressInUse where the key could be guessed.
    """
    found = access_of(config)
    return found if found.key is not None else Access(_own_key(config.state / "admin.key"), found.own_uid)


class AdminListener:
    """Serves the app that `make_app` gives, from the first connection on. `tick` is to be called about once a second."""

    def __init__(self, config: Config, make_app: Callable[[Access], AsgiApp]) -> None:
        self._address = address_of(config)
        self._lock_path = config.state / "admin.lock"
        self._config = config
        self._make_app = make_app
        self._app: AsgiApp | None = None
        self._lock: int | None = None
        self._server: asyncio.Server | None = None
        self._connections = ServerState()
        self._told = False

    @property
    def serving(self) -> str | None:
        """The address it answers at; a port 0 in it is the one that was found. None while it does not."""
        if self._server is None or self._address is None:
            return None
        if self._address.startswith("unix:"):
            return self._address
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def tick(self) -> None:
        """Begin to serve if nobody does, and close connections whose head does not come."""
        if self._server is None and self._address is not None and self._locked():
            try:
                await self._begin(self._address)
            except (SlicewayError, OSError) as error:
                self._unlock()
                if not self._told:
                    self._told = True
                    log.error("the admin API cannot be served: %s", error)
        now = asyncio.get_running_loop().time()
        for connection in [c for c in self._connections.connections if isinstance(c, AdminProtocol)]:
            connection.expire(now)

    async def stop(self) -> None:
        """Close the listener and what is connected."""
        if self._server is None:
            return
        self._server.close()
        for connection in [c for c in self._connections.connections if isinstance(c, AdminProtocol)]:
            connection.transport.abort()
        if self._address is not None and self._address.startswith("unix:"):
            Path(self._address.removeprefix("unix:")).unlink(missing_ok=True)
        self._server = None
        self._unlock()

    async def _begin(self, address: str) -> None:
        access, loop = access_of(self._config), asyncio.get_running_loop()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if self._app is None:  # made when first needed, and beside the requests: it takes a tenth of a second
                self._app = await asyncio.to_thread(self._make_app, access)
            await self._app(scope, receive, send)

        config = uvicorn.Config(
            app,
            loop="none",
            http=AdminProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        config.load()

        def connection() -> asyncio.Protocol:
            return AdminProtocol(config, self._connections, {}, loop)

        if address.startswith("unix:"):
            sock = _unix_socket(Path(address.removeprefix("unix:")))
            self._server = await loop.create_unix_server(connection, sock=sock)
        else:
            self._server = await loop.create_server(connection, sock=listening_socket(address))
        log.info("the admin API answers at %s", self.serving)

    def _locked(self) -> bool:
        if self._lock is None:
            self._lock_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._unlock()
        return self._lock is not None

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class AdminProtocol(BoundedHttpProtocol):
    """One administrator's connection. The scope says which user is behind a Unix socket."""

    limits = _HEAD_LIMITS

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self.scope[PEER_UID] = _peer_uid(self.transport)  # type: ignore[literal-required]  # an extension of our own


def _peer_uid(transport: asyncio.Transport) -> int | None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    # struct ucred (unix(7)): pid, uid, gid of who connected, as the kernel knows them.
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


def _unix_socket(path: Path) -> socket.socket:
    """A socket that nobody else can open, not even between its making and a chmod.

    Raises AddressInUse where something else than a socket stands there.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise AddressInUse(
            "there is a file that is no socket", where=str(path), remedy="Choose another gateway.admin_listen."
        )
    path.unlink(missing_ok=True)  # the lock is held, so nobody listens on it
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise AddressInUse(
            f"cannot listen there: {error.strerror or error}",
            where=str(path),
            remedy="Set gateway.admin_listen to `unix:` and a short path in a directory of yours.",
        ) from error
    finally:
        os.umask(before)
    sock.setblocking(False)
    return sock


def _own_key(path: Path) -> Secret:
    try:
        return Secret(path.read_bytes().strip())
    except FileNotFoundError:
        key = b"sk-sliceway-admin-" + secrets.token_urlsafe(32).encode()
        write_atomically(path, key + b"\n", mode=0o600)
        log.info("made an admin key in %s", path)
        return Secret(key)
