"""Tenants through a whole gateway: their limits, their replicas, their cache, and what they are told. On every relay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.admin import Operations
from gateway.config import Config
from gateway.key_uses import read_uses
from gateway.keys import Keystore
from gateway.testing import RELAYS, FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from tests.integration.gateway_harness import CHAT, chat_body

pytestmark = pytest.mark.parametrize("relay", RELAYS)


@dataclass
class House:
    """Gateways over one fleet, and tenants with keys."""

    gateways: list[RunningGateway]
    fleet: FakeFleet
    keys: dict[str, str] = field(default_factory=dict)

    def ask(self, tenant: str, *, at: int = 0, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        body = chat_body(stream=False, max_tokens=16) | fields
        head = {"authorization": f"Bearer {self.keys[tenant]}"} | (headers or {})
        return httpx2.post(self.gateways[at].url + CHAT, json=body, headers=head, timeout=30)

    def start(self, replica: str, **behaviour: Any) -> Any:
        engine = self.fleet.start(replica, "m", **behaviour)
        for gateway in self.gateways:
            gateway.look()
        return engine


@contextmanager
def house(state: Path, relay: str, *tenants: dict[str, Any], gateways: int = 1, **settings: Any) -> Iterator[House]:
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": "m", "source": "x", "replicas": 3}],
            "tenants": list(tenants),
            "gateway": {"listen": "127.0.0.1:0", "relay": relay} | settings,
        }
    )
    store = Keystore.of(config)
    keys = {tenant["name"]: store.create(tenant["name"], now=1.0)[0] for tenant in tenants}
    with ExitStack() as stack:
        fleet = stack.enter_context(fake_fleet(state))
        running = [stack.enter_context(running_gateway(config, relay=relay)) for _ in range(gateways)]
        yield House(running, fleet, keys)
        for gateway in running:
            wait_until(lambda gateway=gateway: gateway.idle, what="all counters are back at zero")  # type: ignore[misc]


def test_a_limit_on_requests_is_exact_and_says_when_to_come_back(relay: str, tmp_path: Path) -> None:
    limits = {"requests_per_minute": 3}
    with house(tmp_path, relay, {"name": "acme", "limits": limits}, {"name": "beta"}) as one:
        one.start("m@0")
        answers = [one.ask("acme") for _ in range(5)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
        assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["2", "1", "0", "0", "0"]
        refused = answers[3]
        error = refused.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
        assert "limit 3, used 3, requested 1" in error["message"]
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        assert refused.headers["x-should-retry"] == "true"
        assert 0 < int(refused.headers["retry-after"]) <= 62
        assert 0 < int(refused.headers["retry-after-ms"]) <= 61_000
        assert one.ask("beta").status_code == 200
        page = httpx2.get(one.gateways[0].url + "/metrics").text
        assert 'sliceway_throttled_requests_total{limit="requests_per_minute",model="m",tenant="acme"} 2.0' in page


def test_tokens_are_settled_with_what_was_used(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme", "limits": {"tokens_per_minute": 2000}}) as one:
        one.start("m@0", output_tokens=4)
        used = 0
        for stream in (False, True):
            answer = one.ask("acme", max_tokens=1000, stream=stream)
            assert answer.status_code == 200
            used += 5  # one token of prompt and four of answer, as the engine counts
        gauge = next(iter(one.gateways[0].gateway.admission.limits))
        wait_until(lambda: gauge.window.used <= 40, what="what was not used came back")
        assert gauge.window.used >= used
        too_many = one.ask("acme", max_tokens=5000)
        assert (too_many.status_code, too_many.headers["x-should-retry"]) == (429, "false")
        assert "retry-after" not in too_many.headers


def test_a_request_without_max_tokens_is_given_what_its_limit_leaves(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme", "limits": {"tokens_per_minute": 300}}) as one:
        engine = one.start("m@0", output_tokens=4, max_model_len=8192)
        assert [one.ask("acme", max_tokens=None).status_code for _ in range(2)] == [200, 200]
        assert 0 < engine.state.last_request["body"]["max_tokens"] < 300


def test_what_engines_fail_costs_nothing(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme", "limits": {"requests_per_minute": 2, "max_concurrent": 1}}) as one:
        one.start("m@0", error_status=500)
        assert [one.ask("acme").status_code for _ in range(4)] == [500] * 4


def test_a_client_that_leaves_frees_its_place(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme", "limits": {"max_concurrent": 1}}) as one:
        engine = one.start("m@0", itl_seconds=0.05, output_tokens=2000)
        head = {"authorization": f"Bearer {one.keys['acme']}"}
        with httpx2.stream("POST", one.gateways[0].url + CHAT, json=chat_body(), headers=head, timeout=30):
            refused = one.ask("acme")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        wait_until(lambda: engine.state.running == 0, what="the engine let go of it")
        wait_until(lambda: one.gateways[0].idle, what="its place is free")
        assert one.ask("acme", max_tokens=1).status_code == 200


def test_a_dedicated_tenants_replica_serves_nobody_else(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "own", "isolation": "dedicated"}, {"name": "other"}) as one:
        for number in range(3):
            one.start(f"m@{number}")
        served = {t: {one.ask(t).headers["x-sliceway-replica"] for _ in range(6)} for t in ("own", "other")}
        assert served == {"own": {"m@0"}, "other": {"m@1", "m@2"}}
        one.fleet.stop("m@0")
        assert one.ask("own").status_code == 503


def test_requests_wait_for_a_seat_in_the_gateway(relay: str, tmp_path: Path) -> None:
    """More than fit at once are served one after the other; the engine never has more than its seats."""
    with house(tmp_path, relay, {"name": "acme"}, max_in_flight_per_replica=2) as one:
        engine = one.start("m@0", ttft_seconds=0.01, max_concurrency=2)
        with ThreadPoolExecutor(12) as pool:
            statuses = [f.result().status_code for f in [pool.submit(one.ask, "acme") for _ in range(12)]]
        assert statuses == [200] * 12
        assert engine.state.served == 12
        row = next(r for r in httpx2.get(one.gateways[0].url + "/slices").json() if r["replica"] == "m@0")
        assert row["queue"]["waiting_requests"] == row["queue"]["running_requests"] == 0
        assert row["queue"]["max_sequences"] == 2


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme"}, max_in_flight_per_replica=1) as one:
        one.start("m@0", itl_seconds=0.02, output_tokens=1000)
        assert one.ask("acme").status_code == 200  # from here on it is known how long a request takes
        head = {"authorization": f"Bearer {one.keys['acme']}"}
        with httpx2.stream("POST", one.gateways[0].url + CHAT, json=chat_body(), headers=head, timeout=30):
            late = one.ask("acme", headers={"x-sliceway-deadline-ms": "1"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline_too_close")
        assert "retry-after" in late.headers
        wrong = one.ask("acme", headers={"x-sliceway-deadline-ms": "soon"})
        assert wrong.status_code == 400


def test_limits_hold_over_several_gateways(relay: str, tmp_path: Path) -> None:
    limits = {"requests_per_minute": 10}
    with house(tmp_path, relay, {"name": "acme", "limits": limits}, gateways=2) as one:
        one.start("m@0")
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(one.ask, "acme", at=n % 2) for n in range(30)]
            statuses = [each.result().status_code for each in asked]
        assert sorted(set(statuses)) == [200, 429]
        assert statuses.count(200) == 10
        assert one.ask("acme", at=0).status_code == one.ask("acme", at=1).status_code == 429


def test_nobody_shares_or_chooses_a_cache(relay: str, tmp_path: Path) -> None:
    """An engine with a prefix cache says of each prompt whether it was in it, as its time to the first token would."""
    with house(tmp_path, relay, {"name": "victim"}, {"name": "spy"}) as one:
        engine = one.start("m@0", prefix_cache=True)
        secret = [{"role": "user", "content": "the password is " + "swordfish " * 40}]

        def hit(tenant: str, **fields: Any) -> bool:
            before = engine.state.prefix_hits
            assert one.ask(tenant, messages=secret, **fields).status_code == 200
            return bool(engine.state.prefix_hits > before)

        def salt() -> str:
            return str(engine.state.last_request["body"]["cache_salt"])

        assert [hit("victim"), hit("victim")] == [False, True]
        victims = salt()
        assert not hit("spy"), "another tenant's prompt was found in the cache"
        for trick in (victims, "", None, 7):
            assert hit("spy", cache_salt=trick), "its own prompt, from before: whatever it sends is overwritten"
            assert salt() != victims
        written_otherwise = json.dumps(chat_body(stream=False, messages=secret, cache_salt=victims))
        head = {"authorization": f"Bearer {one.keys['spy']}", "content-type": "application/json"}
        body = written_otherwise.replace("cache_salt", "cache\\u005fsalt").encode()
        assert httpx2.post(one.gateways[0].url + CHAT, content=body, headers=head).status_code == 200
        assert salt() != victims


def test_a_key_that_was_just_made_counts_at_once_and_so_does_a_new_tenants(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme"}, gateways=2) as one:
        one.start("m@0")
        config = one.gateways[0].gateway.file_config()
        operations = Operations(lambda: config, wall=lambda: 2.0)
        one.keys["fresh"], _ = operations.create_key("acme", actor="test")
        assert one.ask("fresh", at=0).status_code == 200
        operations.add_tenant("late", {}, actor="test")
        one.keys["late"], _ = operations.create_key("late", actor="test")
        assert one.ask("late", at=1).status_code == 200


def test_when_a_key_was_last_used_survives_the_gateway(relay: str, tmp_path: Path) -> None:
    with house(tmp_path, relay, {"name": "acme"}, {"name": "idle"}) as one:
        one.start("m@0")
        assert one.ask("acme").status_code == 200
    used = read_uses(tmp_path)
    acme, idle = Keystore(tmp_path).records()
    assert set(used) == {acme.id}
    assert used[acme.id] > acme.created
    assert idle.id not in used


def test_what_was_used_of_a_limit_counts_on_in_the_next_gateway(relay: str, tmp_path: Path) -> None:
    """The height of the limit is the configuration's; what is used of it lies in the state directory."""
    acme = {"name": "acme", "limits": {"tokens_per_day": 4000}}
    large = {"max_tokens": 3000}  # 3000 of an answer, and the prompt: more than will be left, less than the limit
    with house(tmp_path, relay, acme) as one:
        one.start("m@0", output_tokens=200)
        fits = one.ask("acme", **large)
        assert fits.status_code == 200
        assert fits.headers["x-ratelimit-limit-tokens"] == "4000"
        assert [one.ask("acme", max_tokens=200).status_code for _ in range(8)] == [200] * 8
    with house(tmp_path, relay, acme) as one:
        one.start("m@0", output_tokens=200)
        refused = one.ask("acme", **large)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "on tokens per day: limit 4000" in refused.json()["error"]["message"]
        rest = one.ask("acme", max_tokens=200)
        assert rest.status_code == 200, "the rest is there"
        assert int(rest.headers["x-ratelimit-remaining-tokens"]) <= 4000 - 9 * 201, "and no more"
    with house(tmp_path, relay, acme | {"limits": {"tokens_per_day": 8000}}) as one:
        one.start("m@0", output_tokens=200)
        assert one.ask("acme", **large).status_code == 200, "a higher limit, less what was used"


def test_two_gateways_give_a_replica_no_more_than_its_seats(relay: str, tmp_path: Path) -> None:
    """The replica would take sixteen; `max_in_flight_per_replica` says four, for all gateways together."""
    with house(tmp_path, relay, {"name": "acme"}, gateways=2, max_in_flight_per_replica=4) as one:
        engine = one.start("m@0", ttft_seconds=0.02, output_tokens=4)
        rooms = [gateway.gateway.rooms for gateway in one.gateways]
        wait_until(
            lambda: all(room is not None and room.peers == 2 for room in rooms), what="the gateways know of each other"
        )
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda n: one.ask("acme", at=n % 2, max_tokens=4).status_code, range(32)))
        assert answers == [200] * 32
        assert engine.state.most_running <= 4
