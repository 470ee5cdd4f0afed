"""The client of the measurement: one connection per request in flight, kept and used again, and a note of when bytes came.

It checks every answer (status, length, the last word of a stream), since an answer that is wrong is fast as well.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from urllib.parse import urlsplit

from gateway.overhead.pairs import Arrival, Pair, Run, Timing

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_OWN = re.compile(rb"\r\nx-sliceway-overhead-ms: *([\d.]+)", re.IGNORECASE)
_ANSWER_SECONDS = 60.0
_CONTENT = (b'"content":"', b'"text":"')


class WrongAnswer(Exception):
    """An answer that is not what was asked for."""


@dataclass
class Target:
    """Where requests go: `http(s)://host:port` or `unix:/path`, with the headers they need (lower case) and their JSON body."""

    endpoint: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None  # for `https:`
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    def request(self) -> bytes:
        """The bytes of one request."""
        host = "engine" if self.endpoint.startswith("unix:") else urlsplit(self.endpoint).netloc
        lines = [f"POST {self.path} HTTP/1.1", f"host: {host}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [f"content-length: {len(self.body)}", "", ""]
        return "\r\n".join(lines).encode() + self.body

    async def connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A kept connection, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        if self.endpoint.startswith("unix:"):
            return await asyncio.open_unix_connection(self.endpoint[5:])
        url = urlsplit(self.endpoint)
        return await asyncio.open_connection(url.hostname, url.port or 80, ssl=self.tls)

    def keep(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        """Use it again."""
        self._idle.append(connection)

    async def close(self) -> None:
        """Close what is kept."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def run_pairs(direct: Target, through: Target, plan: Sequence[Arrival], *, stream: bool) -> Run:
    """Carry out a plan. Pairs of which one half failed are left out, and counted in `errors`."""
    run, halves, start = Run(), dict[tuple[int, bool], Timing](), perf_counter() + 0.1

    async def one(arrival: Arrival) -> None:
        due = start + arrival.at
        run.lag_seconds.append(perf_counter() - due)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                halves[arrival.pair, arrival.through] = await _ask(through if arrival.through else direct, due, stream)
        except (WrongAnswer, OSError, asyncio.IncompleteReadError) as error:
            run.errors[f"{'gateway' if arrival.through else 'direct'}: {error or type(error).__name__}"] += 1

    async with asyncio.TaskGroup() as tasks:
        for arrival in plan:
            await asyncio.sleep(max(0.0, start + arrival.at - perf_counter()))
            tasks.create_task(one(arrival))
    await direct.close()
    await through.close()
    for number in sorted({number for number, _ in halves}):
        if (number, True) in halves and (number, False) in halves:
            run.pairs.append(Pair(halves[number, False], halves[number, True]))
    return run


async def _ask(target: Target, due: float, stream: bool) -> Timing:
    connection = await target.connection()
    reader, writer = connection
    try:
        writer.write(target.request())
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswer(head.split(b"\r\n", 1)[0].decode("latin-1"))
        own = _OWN.search(head)
        says = float(own.group(1)) / 1000 if own else None
        timing = await (_read_stream(reader, due, says) if stream else _read_whole(reader, head, due, says))
    except BaseException:
        writer.close()
        raise
    target.keep(connection)
    return timing


async def _read_whole(reader: asyncio.StreamReader, head: bytes, due: float, says: float | None) -> Timing:
    length = _LENGTH.search(head)
    if length is None:
        raise WrongAnswer("an answer without a length")
    body = await reader.readexactly(int(length.group(1)))
    now = perf_counter() - due
    if b'"choices"' not in body:
        raise WrongAnswer("an answer without choices")
    return Timing(now, now, gateway_says=says)


async def _read_stream(reader: asyncio.StreamReader, due: float, says: float | None) -> Timing:
    times: list[float] = []
    tail = b""
    while (size := int((await reader.readline()).partition(b";")[0], 16)) > 0:
        data = await reader.readexactly(size + 2)
        if any(mark in data for mark in _CONTENT):
            times.append(perf_counter())
        tail = (tail + data[:-2])[-64:]
    await reader.readexactly(2)
    if not tail.endswith(b"data: [DONE]\n\n") or not times:
        raise WrongAnswer("a stream without content or without its end")
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Timing(times[0] - due, times[-1] - due, gaps, says)
