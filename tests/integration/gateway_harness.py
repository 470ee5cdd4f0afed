"""What the gateway's fault tests share: a gateway without keys in front of engines that a test starts, and raw requests."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from gateway.config import Config
from gateway.stats import Stats
from gateway.testing import FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until

CHAT = "/v1/chat/completions"


def chat_body(model: str = "m", *, stream: bool = True, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": stream} | fields


@dataclass
class Bench:
    """One gateway and its fleet."""

    gateway: RunningGateway
    fleet: FakeFleet
    config: Config

    @property
    def url(self) -> str:
        return self.gateway.url

    def ask(self, body: Any = None, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + CHAT, json=chat_body() if body is None else body, timeout=30, **options)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=30)

    def know(self, generation: int | None = None) -> None:
        """Have the gateway read the fleet's last routing table."""
        self.gateway.look()
        wanted = self.fleet.generation if generation is None else generation
        wait_until(lambda: self.gateway.gateway.routes().generation == wanted, what="the gateway has read the table")

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def reset(self) -> None:
        """Without engines, and with nothing counted."""
        wait_until(lambda: self.gateway.idle, what="all counters are back at zero")
        self.fleet.clear()
        self.know()
        for name in Stats.__slots__:
            getattr(self.gateway.gateway.exchanges.stats, name).clear()

    def errors(self) -> dict[str, int]:
        return dict(self.gateway.gateway.exchanges.stats.errors)


@contextmanager
def bench(state: Path, relay: str, **gateway: Any) -> Iterator[Bench]:
    """A bench whose gateway has these settings; at the end every counter must be back at zero."""
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": "m", "source": "x"}],
            "gateway": {"listen": "127.0.0.1:0", "authentication": "none"} | gateway,
        }
    )
    with fake_fleet(state) as fleet, running_gateway(config, relay=relay) as running:
        yield Bench(running, fleet, config)
        wait_until(lambda: running.idle, what="all counters are back at zero")


def raw_request(body: bytes, *, path: str = CHAT, head: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%s\r\n%s" % (path.encode(), len(body), head, body)


def read_all(sock: socket.socket) -> bytes:
    """Until the gateway closes."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        part = sock.recv(65536)
        assert part, f"closed before {mark!r}: {data[-300:]!r}"
        data += part
    return data


def events(body: bytes | str) -> list[Any]:
    """The payloads of a stream; `[DONE]` as a string."""
    text = body.decode() if isinstance(body, bytes) else body
    payloads = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [p if p == "[DONE]" else json.loads(p) for p in payloads]
