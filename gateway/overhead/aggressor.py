"""A tenant with bad manners, as a process: `python -m gateway.overhead.aggressor KIND PORT KEY`, until it is killed.

It runs at the lowest priority, since client and gateway would be on different machines; it still shares this one's caches and
network stack. KIND is a key of `AGGRESSORS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable

import uvloop

from gateway.giving_way import give_way
from gateway.overhead.tools import PATH, request

LIMIT_PER_MINUTE = 600
FLOODERS = 10
LARGE_BYTES = 50_000_000
LONG_TOKENS = 1_000_000


def _head(key: str, length: int) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


async def flood(port: int, key: str) -> None:
    """Ask 20 times as often as LIMIT_PER_MINUTE, with FLOODERS of these."""
    asked = request(port, stream=True, tokens=20, key=key)
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            while True:
                writer.write(asked)
                await _read_answer(reader)
                await asyncio.sleep(FLOODERS * 60 / (20 * LIMIT_PER_MINUTE))
        writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        await reader.readuntil(b"0\r\n\r\n")
    else:
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))


async def idle(port: int, key: str) -> None:
    """A connection that says nothing; opened again when it is closed."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()
        writer.close()


async def refused_bodies(port: int, key: str) -> None:
    """Bodies of 50 MB, more than is allowed by default, one after another."""
    await _send_bodies(port, key, b"x" * 2**16, LARGE_BYTES)


async def allowed_bodies(port: int, key: str) -> None:
    """The largest bodies that are allowed by default, of JSON that is a burden to read, one after another."""
    await _send_bodies(port, key, b'{"a":1},[2,3],"word ",' * 3000, 32 * 2**20)


async def _send_bodies(port: int, key: str, part: bytes, size: int) -> None:
    begin, end = b'{"model":"bench","max_tokens":1,"messages":[', b"0]}"
    count = (size - len(begin) - len(end)) // len(part)
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            writer.write(_head(key, len(begin) + count * len(part) + len(end)) + begin)
            for _ in range(count):
                writer.write(part)
                await writer.drain()
            writer.write(end)
            await reader.readuntil(b"\r\n\r\n")
        writer.close()


async def slow(port: int, key: str) -> None:
    """A stream without end that is read a byte per second."""
    asked, loop = request(port, stream=True, tokens=LONG_TOKENS, key=key), asyncio.get_running_loop()
    while True:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, asked)
            while await loop.sock_recv(sock, 1):  # noqa: ASYNC110  # a pace, no condition
                await asyncio.sleep(1)
        sock.close()


async def cancel(port: int, key: str) -> None:
    """A stream that is left when it has begun."""
    asked = request(port, stream=True, tokens=20, key=key)
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        with contextlib.suppress(OSError):
            await reader.read(1)
        writer.transport.abort()
        await asyncio.sleep(0.05)


AGGRESSORS: dict[str, tuple[Callable[[int, str], Awaitable[None]], int]] = {
    "flood at 20 x its limit": (flood, FLOODERS),
    "1,000 idle connections": (idle, 1000),
    "50 MB bodies": (refused_bodies, 4),
    "32 MiB bodies": (allowed_bodies, 2),
    "64 readers of a byte per second": (slow, 64),
    "storm of cancels": (cancel, 32),
}
"""What it does, and how often at once."""


def main() -> None:
    """Run until killed."""
    kind, port, key = sys.argv[1:]
    one, count = AGGRESSORS[kind]
    give_way(19)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(int(port), key) for _ in range(count)))

    uvloop.run(all_of_them())


if __name__ == "__main__":
    main()
