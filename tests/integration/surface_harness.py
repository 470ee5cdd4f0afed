"""A gateway with keys for two tenants, two chat replicas and a pooling model behind it, and clients that are closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

from gateway.config import Config
from gateway.keys import Keystore
from gateway.testing import FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from gateway.wiring import wall_clock

TENANTS = ("acme", "beta")
MODELS = ("chat", "pool")


class Surface:
    def __init__(self, gateway: RunningGateway, fleet: FakeFleet, keys: dict[str, str], config: Config) -> None:
        self.gateway, self.fleet, self.keys, self.config = gateway, fleet, keys, config
        self._open = ExitStack()
        self._http = self._open.enter_context(httpx2.Client(timeout=30))

    @property
    def url(self) -> str:
        return self.gateway.url

    def client(self, tenant: str = "acme", **options: Any) -> openai.OpenAI:
        """An official client of `tenant`, closed with the rest."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], **{"max_retries": 0} | options)
        return self._open.enter_context(made)

    def send(self, method: str, path: str, *, tenant: str | None = "acme", **options: Any) -> httpx2.Response:
        """One raw request; with a key unless `tenant` is None."""
        headers = ({"authorization": f"Bearer {self.keys[tenant]}"} if tenant else {}) | options.pop("headers", {})
        return self._http.request(method, self.url + path, headers=headers, **options)

    def seen(self, replica: str) -> dict[str, Any]:
        """The last inference request that an engine had."""
        return self.fleet.engines[replica].state.last_request

    def served(self) -> dict[str, int]:
        """How many requests each engine has taken up."""
        return {name: engine.state.started for name, engine in self.fleet.engines.items()}

    def close(self) -> None:
        self._open.close()


def surface_config(state: Path, *, batches: dict[str, Any] | None = None, **gateway: Any) -> Config:
    return Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "tenants": [{"name": name} for name in TENANTS],
            "models": [{"name": name, "source": "x"} for name in MODELS],
            "batches": batches or {},
            "gateway": {"listen": "127.0.0.1:0"} | gateway,
        }
    )


@contextmanager
def surface_fleet(state: Path, chat: dict[str, Any] | None = None) -> Iterator[FakeFleet]:
    """Two chat engines and one that pools. `chat` is the chat engines' behaviour."""
    with fake_fleet(state) as fleet:
        for number in range(2):
            fleet.start(f"chat-{number}", "chat", engine_model="engine-name", **(chat or {}))
        fleet.start("pool-0", "pool", task="embed")
        yield fleet


@contextmanager
def served(config: Config, fleet: FakeFleet, *, relay: str = "asgi") -> Iterator[Surface]:
    """A gateway in front of `fleet`, with a key for each tenant; at the end every counter must be back at zero."""
    keystore = Keystore(config.state)
    keys = {tenant: keystore.create(tenant, now=wall_clock())[0] for tenant in TENANTS}
    with running_gateway(config, relay=relay) as running:
        made = Surface(running, fleet, keys, config)
        try:
            yield made
        finally:
            made.close()
        wait_until(lambda: running.idle, what="all counters are back at zero")


@contextmanager
def surface(
    state: Path, *, relay: str = "asgi", chat: dict[str, Any] | None = None, **config: Any
) -> Iterator[Surface]:
    """The whole system."""
    with surface_fleet(state, chat) as fleet, served(surface_config(state, **config), fleet, relay=relay) as made:
        yield made
