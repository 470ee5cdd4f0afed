"""An engine that can be put to sleep is so by its controller alone: what else vLLM's development mode opens is out of clients' reach."""

from __future__ import annotations

from collections.abc import Iterator

import aiohttp
import httpx2
import pytest

from gateway.testing import RELAYS
from tests.integration.gateway_harness import Bench, bench, chat_body

pytestmark = pytest.mark.integration

# vLLM 0.33.0 with VLLM_SERVER_DEV_MODE=1, and the operations that are open without it.
OPERATIONS = [
    "/sleep",
    "/sleep?level=1",
    "/wake_up",
    "/wake_up?tags=weights",
    "/is_sleeping",
    "/release_kv_cache_memory",
    "/pause",
    "/resume",
    "/is_paused",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/collective_rpc",
    "/server_info",
    "/abort_requests",
    "/update_weights",
    "/init_weight_transfer_engine",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/scale_elastic_ep",
    "/kv_event_sources",
    "/start_profile",
    "/stop_profile",
    "/load",
    "/invocations",
    "/v1/sleep",
    "/engine/sleep",
    "//sleep",
    "/./sleep",
    "/v1/../sleep",
    "/%73leep",
    "/sleep/",
    "/SLEEP",
]


@pytest.fixture(params=sorted(RELAYS), scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), request.param) as made:
        made.fleet.start("m-0", "m", sleep_mode=True)
        made.know()
        yield made


def asked_directly(served: Bench, path: str) -> int:
    """What the engine itself answers to a GET on its own socket."""
    socket = served.fleet.rows["m-0"].endpoint.removeprefix("unix:")

    async def ask() -> int:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=socket)) as session,
            session.get(f"http://engine{path}") as answer,
        ):
            return answer.status

    return served.fleet.thread.call(ask())


def test_what_puts_engines_to_sleep_is_not_reached_from_outside(served: Bench) -> None:
    with httpx2.Client(timeout=30) as client:
        for path in OPERATIONS:
            for method in ("GET", "POST", "PUT", "DELETE"):
                answer = client.request(method, served.url + path, json=chat_body())
                assert answer.status_code in (404, 405), (method, path)
    assert not served.fleet.engines["m-0"].state.asleep


def test_the_engine_behind_could_have_been_put_to_sleep(served: Bench) -> None:
    assert asked_directly(served, "/is_sleeping") == 200
    assert served.ask(chat_body(stream=False)).status_code == 200
