"""Between gateway and engine on TCP: the engine's secret on every route, and TLS that is right or is told to be wrong."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import pytest

from gateway.config import Config
from gateway.health import FAILURES_TO_LEAVE
from gateway.testing import RELAYS, FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from placement.engine_tls import server_context
from placement.fake_engine import Behaviour, FakeEngine
from placement.guarding import new_secret
from placement.table import ReplicaState
from tests.integration.certificates import Authority
from tests.integration.gateway_harness import CHAT, chat_body, events

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SECRET = new_secret()


@dataclass
class Site:
    """A gateway that trusts one authority, and engines that show certificates."""

    gateway: RunningGateway
    fleet: FakeFleet
    authority: Authority
    folder: Path
    shown: ssl.SSLContext | None = None

    def engine(self, *, by: Authority | None = None, secret: str | None = SECRET, **pair: Any) -> FakeEngine:
        """An engine over TLS, with a certificate of its own for 127.0.0.1 from `by`."""
        self.shown = server_context(*(by or self.authority).issue(self.folder / "engine", **pair))
        engine = self.fleet.start("m-0", "m", tls=self.shown, secret=secret)
        self.show(secret)
        return engine

    def show(self, secret: str | None) -> None:
        """Have the table say that the engine wants to be shown this."""
        self.fleet.rows["m-0"] = self.fleet.rows["m-0"].model_copy(update={"secret": secret})
        self.fleet.publish()
        self.know()

    def know(self) -> None:
        """Have the gateway read the last table."""
        self.gateway.look()
        wanted = self.fleet.generation
        wait_until(lambda: self.gateway.gateway.routes().generation == wanted, what="the gateway has read the table")

    def out(self) -> httpx2.Response:
        """Ask until the replica is out; the last answer."""
        return [self.ask(stream=False) for _ in range(FAILURES_TO_LEAVE)][-1]

    def back(self) -> None:
        """Another start of the engine, with the right certificate."""
        self.fleet.stop("m-0")
        self.fleet.mark("m-0", ReplicaState.STARTING)
        self.know()
        self.engine()

    def ask(self, **fields: Any) -> httpx2.Response:
        return httpx2.post(self.gateway.url + CHAT, json=chat_body("m", **fields), timeout=30)

    def why_out(self) -> str:
        """Why the replica is out, as `/readyz` tells operators."""
        return str(httpx2.get(self.gateway.url + "/readyz", timeout=30).json())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("the cluster's")


@pytest.fixture(params=sorted(RELAYS))
def site(request: pytest.FixtureRequest, tmp_path: Path, authority: Authority) -> Iterator[Site]:
    certificate, key = authority.issue(tmp_path / "node")
    tls = {"certificate": certificate, "key": key, "authority": authority.write(tmp_path)}
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(tmp_path / "state"),
            "models": [{"name": "m", "source": "x"}],
            "engine": {"tls": tls},
            "gateway": {"listen": "127.0.0.1:0", "authentication": "none"},
        }
    )
    with fake_fleet(tmp_path / "state") as fleet, running_gateway(config, relay=request.param) as gateway:
        yield Site(gateway, fleet, authority, tmp_path)
        wait_until(lambda: gateway.idle, what="all counters are back at zero")


# ---- TLS


def test_answers_streams_and_large_bodies_come_over_tls(site: Site) -> None:
    engine = site.engine()
    assert site.fleet.rows["m-0"].endpoint.startswith("https://127.0.0.1:")
    whole = site.ask(stream=False, max_tokens=3)
    assert whole.json()["choices"][0]["message"]["content"] == "the quick brown"
    assert events(site.ask(max_tokens=200).text)[-1] == "[DONE]"
    long = [{"role": "user", "content": "word " * 200_000}]
    assert site.ask(stream=False, messages=long, max_tokens=2).status_code in (200, 400), "a megabyte arrives"
    assert engine.state.served >= 2
    metrics = httpx2.get(site.gateway.url + "/metrics/engines", timeout=30)
    assert 'model="m"' in metrics.text, "the engine's own metrics come the same way"


def test_connections_are_kept_and_used_again_over_tls(site: Site) -> None:
    site.engine()
    assert {site.ask(stream=False, max_tokens=2).status_code for _ in range(8)} == {200}
    assert site.shown is not None
    # As the engine counts them. One, unless this machine is so busy that a kept connection is too old for the next request.
    assert site.shown.session_stats()["accept_good"] < 8


NOW = datetime.now(UTC)
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "authority": ({"by": Authority("a stranger's")}, "not from the authority that engine.tls names", "Sign it with"),
    "expired": (
        {"begins": NOW - timedelta(days=9), "ends": NOW - timedelta(days=1)},
        "the certificate has expired",
        "Renew it in place",
    ),
    "address": ({"address": "10.0.0.1"}, "the certificate is for another address", "subjectAltName=IP:127.0.0.1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_certificate_that_is_wrong_gets_no_request_and_is_told(
    site: Site, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair, words, remedy = WRONG[wrong]
    with caplog.at_level(logging.WARNING):
        engine = site.engine(**pair)
        refused = site.out()
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert engine.state.started == 0
    told = [r.getMessage() for r in caplog.records if "m-0" in r.getMessage()]
    parts = (words, remedy, site.fleet.rows["m-0"].slice.id)
    assert any(all(part in message for part in parts) for message in told), told
    assert words in site.why_out()
    site.back()
    assert site.ask(stream=False).status_code == 200, "with a right one it serves"


def test_an_engine_that_speaks_no_tls_is_told(site: Site) -> None:
    site.fleet.start("m-0", "m", tcp=True)
    plain = site.fleet.rows["m-0"]
    site.fleet.rows["m-0"] = plain.model_copy(update={"endpoint": plain.endpoint.replace("http:", "https:")})
    site.fleet.publish()
    site.know()
    assert site.out().status_code == 503
    assert "does not answer" in site.why_out()


# ---- the secret


def test_without_the_secret_every_route_of_the_engine_is_401(site: Site) -> None:
    engine = site.fleet.start("m-0", "m", tcp=True, secret=SECRET, sleep_mode=True)
    base = site.fleet.rows["m-0"].endpoint
    routes = {
        (method, re.sub(r"{[^}]*}", "x", route.resource.canonical))
        for route in FakeEngine(engine.behaviour).app().router.routes()
        if route.resource is not None
        for method in [route.method if route.method != "*" else "POST"]
    }
    wrong = [{}, *({"authorization": v} for v in (SECRET, f"Basic {SECRET}", f"Bearer {SECRET[:-1]}", "Bearer "))]

    async def statuses(headers: list[dict[str, str]]) -> dict[tuple[str, str], set[int]]:
        async with aiohttp.ClientSession() as session:
            found: dict[tuple[str, str], set[int]] = {}
            for method, path in sorted({*routes, ("GET", "/nowhere"), ("OPTIONS", "/v1/models")}):
                for shown in headers:
                    async with session.request(method, base + path, headers=shown) as answer:
                        found.setdefault((method, path), set()).add(answer.status)
            return found

    refused = site.fleet.thread.call(statuses(wrong))
    assert len(refused) > 20
    assert {code for codes in refused.values() for code in codes} == {401}
    assert engine.state.started == 0
    allowed = site.fleet.thread.call(statuses([{"authorization": f"Bearer {SECRET}"}]))
    assert 401 not in {code for codes in allowed.values() for code in codes}


def test_a_gateway_with_another_secret_says_so_and_not_that_the_clients_key_is_wrong(site: Site) -> None:
    site.engine()
    site.show(new_secret())
    refused = site.ask(stream=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "engine_unauthorized")
    site.show(SECRET)
    assert site.ask(stream=False).status_code == 200


def test_an_engine_from_before_there_were_secrets_is_served(site: Site) -> None:
    site.engine(secret=None)
    assert site.ask(stream=False).status_code == 200


def test_the_clients_credential_does_not_reach_the_engine_nor_the_engines_the_client(site: Site) -> None:
    """The engine refuses two credentials and any but its own, so that an answer proves what it was shown."""
    site.engine()
    for name in ("Authorization", "AUTHORIZATION", "authorization"):
        answer = httpx2.post(
            site.gateway.url + CHAT,
            json=chat_body("m", stream=False),
            headers={name: "Bearer sk-of-the-client", "proxy-authorization": "Basic eA=="},
            timeout=30,
        )
        assert answer.status_code == 200
        assert SECRET not in f"{answer.headers} {answer.text}"


def test_no_page_of_the_gateway_shows_the_secret(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.engine()
    with caplog.at_level(logging.DEBUG):
        assert site.ask(stream=False).status_code == 200
        paths = ("/readyz", "/slices", "/metrics", "/metrics/engines", "/v1/models", "/openapi.json", "/console/state")
        shown = [httpx2.get(site.gateway.url + path, timeout=30).text for path in paths]
    assert "m-0" in shown[1]
    assert SECRET not in "".join((*shown, caplog.text, repr(site.fleet.rows["m-0"])))


def test_behaviours_are_shown_without_their_secret() -> None:
    assert SECRET not in repr(Behaviour(names=("m",), secret=SECRET))
