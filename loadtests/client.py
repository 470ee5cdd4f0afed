"""One HTTP/1.1 connection that notes when bytes came. Plain `http.client`, so that nothing stands between socket and clock.

Under gevent (Locust) the socket is gevent's and the calls here yield; without it they block. The code is the same.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loadtests.streams import AnswerFailed, Timing, measure_stream, measure_whole, refusal

READ_BYTES = 65536
Clock = Callable[[], float]
"""Seconds on a monotonic clock with a resolution far below a millisecond (`time.perf_counter`)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request: either `timing` or `failure` is set."""

    status: int | None
    replica: str | None
    request_id: str | None
    timing: Timing | None = None
    failure: AnswerFailed | None = None


class Connection:
    """A keep-alive connection to the gateway. Not for two requests at once."""

    def __init__(self, base_url: str, *, timeout_seconds: float, clock: Clock) -> None:
        parts = urlsplit(base_url)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_seconds)
        self._clock = clock
        self._used = False
        self._leave_at: float | None = None

    def ask(
        self, path: str, body: bytes, *, key: str | None, streams: bool, due: float, leave_at: float | None = None
    ) -> Answer:
        """Send one request and read its answer to the end; times count from `due` on this connection's clock.

        At `leave_at` the answer is given up as a timeout, however much of it has come. Never raises for what the network or
        the server does: every such fault is a failure with a kind, and closes the connection.
        """
        status = replica = request_id = None
        try:
            self._leave_at = leave_at
            response = self._send(path, body, key)
            status, replica, request_id = (
                response.status,
                response.getheader("x-sliceway-replica"),
                response.getheader("x-request-id"),
            )
            timing = self._measure(response, streams, due)
        except AnswerFailed as failure:
            if failure.kind in ("truncated", "error_event", "bad_event"):
                self.close()
            return Answer(status, replica, request_id, failure=failure)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Answer(status, replica, request_id, failure=_broken(error, answered=status is not None))
        return Answer(status, replica, request_id, timing=timing)

    def get_json(self, path: str, *, key: str | None = None) -> Any:
        """The JSON at `path`, or None where the server has nothing there. Raises OSError where nobody answers."""
        return self._whole("GET", path, None, key)

    def post_json(self, path: str, body: object, *, key: str | None = None) -> Any:
        """The JSON that `body` is answered with, or None where the answer is not 200. Raises OSError where nobody answers."""
        return self._whole("POST", path, json.dumps(body).encode(), key)

    def _whole(self, method: str, path: str, body: bytes | None, key: str | None) -> Any:
        headers = _authorization(key) | ({"content-type": "application/json"} if body is not None else {})
        try:
            self._http.request(method, path, body, headers)
            response = self._http.getresponse()
            data = response.read()
            return json.loads(data) if response.status == 200 else None
        except ValueError:
            return None
        except http.client.HTTPException as error:
            self.close()
            raise OSError(f"no HTTP answer from {self._http.host}:{self._http.port}: {error!r}") from error

    def close(self) -> None:
        """Close the socket; the next request opens another."""
        self._http.close()
        self._used = False

    def _send(self, path: str, body: bytes, key: str | None) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json"} | _authorization(key)
        again = self._used
        self._used = True
        try:
            self._http.request("POST", path, body, headers)
            return self._http.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # A server may close an idle connection at the moment it is used again; nothing was answered, so asking once
            # more is safe, and the clock keeps running from when the request was due.
            self.close()
            if not again:
                raise
        self._used = True
        self._http.request("POST", path, body, headers)
        return self._http.getresponse()

    def _measure(self, response: http.client.HTTPResponse, streams: bool, due: float) -> Timing:
        with response:  # `read1` leaves it open at its last byte, and the connection counts as busy until it is closed
            if response.status != 200:
                raise refusal(response.status, list(self._reads(response)))
            # Parsing waits until the last byte is in: what it costs cannot shift a time that was already taken.
            reads = list(self._reads(response))
        return measure_stream(reads, due) if streams else measure_whole(reads, due)

    def _reads(self, response: http.client.HTTPResponse) -> Iterator[tuple[float, bytes]]:
        while True:
            if self._leave_at is not None and self._http.sock is not None:
                remaining = self._leave_at - self._clock()
                if remaining <= 0:
                    raise TimeoutError("left")
                self._http.sock.settimeout(remaining)
            chunk = response.read1(READ_BYTES)
            at = self._clock()
            yield at, chunk
            if not chunk:
                return


def _authorization(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _broken(error: OSError | http.client.HTTPException, *, answered: bool) -> AnswerFailed:
    if isinstance(error, TimeoutError):
        kind = "timeout"
    elif isinstance(error, ConnectionRefusedError):
        kind = "refused"
    else:
        kind = "disconnected" if answered else "no_answer"
    return AnswerFailed(kind, f"{type(error).__name__}: {error}")
