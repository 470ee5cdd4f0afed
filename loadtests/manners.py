"""Clients that misbehave on purpose: they leave early, read slowly, or hold connections open. What they did is counted, never timed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from loadtests.client import Answer, Clock, Connection
from loadtests.scenario import Cancel, HoldOpen, Manner, SlowReader
from loadtests.streams import AnswerFailed

LEFT = "left"
HELD = "held"
INTENDED = frozenset({LEFT, HELD})
"""Kinds of a request's end that its own client brought about as it was told to; they speak against nobody."""

SMALL_BUFFER_BYTES = 2048
READS_PER_SECOND = 4


class Misbehaving:
    """One client that does what `manner` says, once per call. `pause` sleeps so many seconds."""

    def __init__(self, base_url: str, manner: Manner, *, clock: Clock, pause: Callable[[float], None]) -> None:
        self._base_url = base_url
        self._manner = manner
        self._clock = clock
        self._pause = pause

    def ask(self, path: str, body: bytes, *, key: str | None, streams: bool, due: float) -> Answer:
        """What `Connection.ask` does, with the manner's own end. Never raises for what the network or the server does."""
        try:
            match self._manner:
                case Cancel(after=after):
                    return self._leave_after(after, path, body, key, streams, due)
                case SlowReader():
                    return self._read_slowly(self._manner, path, body, key)
                case HoldOpen(hold=hold):
                    return self._hold_open(hold, path)
        except OSError as error:
            kind = "refused" if isinstance(error, ConnectionRefusedError) else "disconnected"
            return Answer(None, None, None, failure=AnswerFailed(kind, f"{type(error).__name__}: {error}"))
        raise TypeError(f"{self._manner!r} is no misbehaviour")

    def close(self) -> None:
        """Nothing is kept between requests."""

    def _leave_after(self, after: float, path: str, body: bytes, key: str | None, streams: bool, due: float) -> Answer:
        connection = Connection(self._base_url, timeout_seconds=after, clock=self._clock)
        try:
            answer = connection.ask(path, body, key=key, streams=streams, due=due, leave_at=self._clock() + after)
        finally:
            connection.close()
        if answer.failure is not None and answer.failure.kind == "timeout":
            return Answer(answer.status, answer.replica, answer.request_id, failure=AnswerFailed(LEFT, "left early"))
        return answer

    def _read_slowly(self, manner: SlowReader, path: str, body: bytes, key: str | None) -> Answer:
        read = 0
        with self._connected(SMALL_BUFFER_BYTES) as sock:
            sock.sendall(_head("POST", path, key, len(body)) + body)
            leave_at = self._clock() + manner.hold
            sock.settimeout(1 / READS_PER_SECOND)
            while self._clock() < leave_at:
                with suppress(TimeoutError):
                    part = sock.recv(max(1, manner.bytes_per_second // READS_PER_SECOND))
                    if not part:
                        break
                    read += len(part)
                self._pause(1 / READS_PER_SECOND)
        return Answer(None, None, None, failure=AnswerFailed(LEFT, f"read {read} bytes slowly and left"))

    def _hold_open(self, hold: float, path: str) -> Answer:
        with self._connected(None) as sock:
            sock.sendall(_head("POST", path, None, 10)[:-20])
            sock.settimeout(hold)
            try:
                data = sock.recv(4096)
            except TimeoutError:
                return Answer(None, None, None, failure=AnswerFailed(HELD, "held half a request open"))
        status = int(data.split()[1]) if data[:5] == b"HTTP/" else None
        kind = f"http_{status}" if status else "closed_by_server"
        return Answer(status, None, None, failure=AnswerFailed(kind, "the server did not wait for the rest"))

    def _connected(self, receive_buffer_bytes: int | None) -> socket.socket:
        parts = urlsplit(self._base_url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            if receive_buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            sock.settimeout(10)
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock


def _head(method: str, path: str, key: str | None, length: int) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: loadtest", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()
