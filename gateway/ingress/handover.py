"""One gateway process takes over from another without a connection being refused: the listening socket goes from hand to hand.

The process that serves answers on a Unix socket in the state directory, which only its user can reach. The one that replaces it asks there
for the listening socket and gets it as a descriptor, so both have one queue of connections and none of it is lost. Once the new
one serves it says so, and the old one retires: it accepts nothing more, answers what still comes on its open connections, each for
the last time (`connection: close`), and ends. If the new one ends before, nothing has happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("sliceway.gateway")

TAKE, WHO, SERVING = b"take", b"who?", b"over"  # of equal length
_WORD_BYTES = 4
_ANSWER_SECONDS = 5.0


def handover_path(runtime: Path, listen: str) -> Path:
    """Where the process that listens on `listen` is asked; of several on one state directory each has its own.

    The name is no longer than an engine's socket's, which `runtime` has room for (`StatePaths.runtime`).
    """
    return runtime / f"gw{hashlib.sha256(listen.encode()).hexdigest()[:10]}.sock"


@dataclass(frozen=True, slots=True)
class Taken:
    """A listening socket, and the line to the process that had it."""

    sock: socket.socket
    line: socket.socket

    def serving(self) -> None:
        """Tell the process before that it is replaced. One that has ended meanwhile needs no telling."""
        with self.line, contextlib.suppress(OSError):
            self.line.sendall(SERVING)


def take_over(path: Path) -> Taken | None:
    """The listening socket of the process that serves; None if none does."""
    line = _ask(path, TAKE)
    if line is None:
        return None
    try:
        _, descriptors, _, _ = socket.recv_fds(line, _WORD_BYTES, 1)
    except OSError:
        descriptors = []
    if not descriptors:
        line.close()
        return None
    sock = socket.socket(fileno=descriptors[0])
    sock.setblocking(False)
    return Taken(sock, line)


def serving_pid(path: Path) -> int | None:
    """The process that serves there; None if none answers."""
    line = _ask(path, WHO)
    if line is None:
        return None
    with line:
        try:
            return int(line.recv(32) or b"0") or None
        except (OSError, ValueError):
            return None


def _ask(path: Path, word: bytes) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(_ANSWER_SECONDS)
    try:
        line.connect(str(path))
        line.sendall(word)
    except OSError:
        line.close()
        return None
    return line


class Handover:
    """The side of the process that serves. `retire` is called when another one has taken `sock` over and serves."""

    def __init__(self, path: Path, sock: socket.socket, retire: Callable[[], None]) -> None:
        self._path = path
        self._sock = sock
        self._retire = retire
        self._given = False
        self._door: socket.socket | None = None
        self._lines: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Answer from here on, in the place of the process before. Raises OSError."""
        draft = self._path.with_suffix(f".{os.getpid()}")
        draft.unlink(missing_ok=True)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(draft))
        self._door.listen()
        self._door.setblocking(False)
        draft.replace(self._path)
        asyncio.get_running_loop().add_reader(self._door.fileno(), self._accept)

    def close(self) -> None:
        """Answer no longer."""
        if self._door is None:
            return
        asyncio.get_running_loop().remove_reader(self._door.fileno())
        self._door.close()
        self._door = None
        for task in self._lines:
            task.cancel()
        if not self._given:  # else another one answers there
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        if self._door is None:
            return
        with contextlib.suppress(BlockingIOError, ConnectionError):
            line, _ = self._door.accept()
            line.setblocking(False)
            task = asyncio.create_task(self._answer(line))
            self._lines.add(task)
            task.add_done_callback(self._lines.discard)

    async def _answer(self, line: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with line, contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                word = await loop.sock_recv(line, _WORD_BYTES)
            if word == WHO:
                await loop.sock_sendall(line, b"%d" % os.getpid())
            elif word == TAKE and not self._given:
                socket.send_fds(line, [TAKE], [self._sock.fileno()])
                if await loop.sock_recv(line, _WORD_BYTES) == SERVING:  # or nothing: it has ended
                    self._given = True
                    log.info("another process serves in this one's place; ending with the last open connection")
                    self._retire()
