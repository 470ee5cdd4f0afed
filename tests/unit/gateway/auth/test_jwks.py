from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.auth.jwks import COOLDOWN_SECONDS, RETRY_SECONDS, IssuerUnreachable, Tokens
from gateway.auth.schema import AuthConfig, OidcConfig
from gateway.auth.testing import FakeIssuer
from gateway.config import TenantConfig
from gateway.errors import InvalidToken, TokenKeysUnavailable
from gateway.keys import Keyring
from gateway.tenants import Directory, tenant_of
from gateway.testing import FakeClock

NOW = 1_700_000_000.0


class Web:
    """What a fetch of a URL gives; counts."""

    def __init__(self, pages: dict[str, Any]) -> None:
        self.pages = pages
        self.fetched: list[str] = []

    async def __call__(self, url: str) -> bytes:
        self.fetched.append(url)
        page = self.pages.get(url)
        if page is None:
            raise IssuerUnreachable("the issuer answers 404", where=url)
        return bytes(page() if callable(page) else page)


@pytest.fixture
def issuer() -> FakeIssuer:
    made = FakeIssuer()
    made.add("first")
    return made


def made(issuer: FakeIssuer, **fields: Any) -> tuple[Tokens, Web, FakeClock]:
    url = "https://issuer.test/keys"
    config = OidcConfig.model_validate({"issuer": issuer.issuer, "audience": "sliceway", "jwks_url": url} | fields)
    web, clock = Web({url: issuer.key_set}), FakeClock()
    return Tokens(config, clock=clock, fetch=web), web, clock


async def test_before_the_first_fetch_clients_are_told_to_come_back(issuer: FakeIssuer) -> None:
    tokens, _, _ = made(issuer)
    token = issuer.token("first", now=NOW)
    with pytest.raises(TokenKeysUnavailable) as caught:
        tokens.bearer(token, NOW)
    assert caught.value.retry_after_seconds == 1.0
    await tokens.tick()
    assert tokens.bearer(token, NOW).tenant == "acme"


async def test_keys_are_fetched_again_when_it_is_time_and_not_before(issuer: FakeIssuer) -> None:
    tokens, web, clock = made(issuer, refresh_seconds=300)
    for _ in range(5):
        await tokens.tick()
    assert len(web.fetched) == 1
    clock.turn(301)
    await tokens.tick()
    assert len(web.fetched) == 2


async def test_a_new_key_counts_after_one_retry_of_the_client(issuer: FakeIssuer) -> None:
    tokens, web, clock = made(issuer)
    await tokens.tick()
    issuer.add("second")
    clock.turn(COOLDOWN_SECONDS + 1)
    token = issuer.token("second", now=NOW)
    with pytest.raises(TokenKeysUnavailable):
        tokens.bearer(token, NOW)
    await tokens.tick()
    assert tokens.bearer(token, NOW).tenant == "acme"
    assert len(web.fetched) == 2


async def test_made_up_key_ids_cause_few_fetches(issuer: FakeIssuer) -> None:
    tokens, web, clock = made(issuer)
    await tokens.tick()
    refused = 0
    for number in range(200):
        issuer.keys[f"made-up-{number}"] = issuer.keys["first"]
        try:
            tokens.bearer(issuer.token(f"made-up-{number}", now=NOW), NOW)
        except (InvalidToken, TokenKeysUnavailable):
            refused += 1
        clock.turn(0.5)
        await tokens.tick()
    assert refused == 200
    assert len(web.fetched) <= 100 / COOLDOWN_SECONDS + 2


async def test_a_withdrawn_key_opens_nothing_even_where_it_was_verified(issuer: FakeIssuer) -> None:
    issuer.add("second")
    tokens, _, clock = made(issuer)
    await tokens.tick()
    known = Directory({"acme": tenant_of(TenantConfig(name="acme"))}, tokens=tokens)
    header, ring = f"Bearer {issuer.token('first', now=NOW)}".encode(), Keyring({}, b"")
    assert known.authenticate(header, ring, NOW).name == "acme"
    issuer.withdraw("first")
    clock.turn(301)
    await tokens.tick()
    with pytest.raises((InvalidToken, TokenKeysUnavailable)):
        known.authenticate(header, ring, NOW)


async def test_a_verified_token_is_looked_up_until_it_expires(
    issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _, _ = made(issuer)
    await tokens.tick()
    known = Directory({"acme": tenant_of(TenantConfig(name="acme"))}, tokens=tokens)
    header, ring = f"Bearer {issuer.token('first', now=NOW)}".encode(), Keyring({}, b"")
    known.authenticate(header, ring, NOW)
    asked: list[str] = []
    monkeypatch.setattr(Tokens, "bearer", lambda self, token, now: asked.append(token))
    assert known.authenticate(header, ring, NOW + 329).name == "acme"
    assert asked == []
    with pytest.raises(AttributeError):
        known.authenticate(header, ring, NOW + 330)
    assert len(asked) == 1


async def test_a_token_for_nobody_is_refused(issuer: FakeIssuer) -> None:
    tokens, _, _ = made(issuer)
    await tokens.tick()
    header = f"Bearer {issuer.token('first', now=NOW, tenant='ghost')}".encode()
    with pytest.raises(InvalidToken, match="tenant that is not known"):
        Directory({}, tokens=tokens).authenticate(header, Keyring({}, b""), NOW)


async def test_keys_outlive_an_outage_but_not_for_ever(issuer: FakeIssuer) -> None:
    tokens, web, clock = made(issuer, max_stale_seconds=3600)
    await tokens.tick()
    web.pages.clear()
    clock.turn(3000)
    await tokens.tick()
    assert tokens.problem is not None
    token = issuer.token("first", now=NOW)
    assert tokens.bearer(token, NOW).tenant == "acme"
    clock.turn(700)
    await tokens.tick()
    with pytest.raises((InvalidToken, TokenKeysUnavailable)):
        tokens.bearer(token, NOW)
    web.pages["https://issuer.test/keys"] = issuer.key_set
    clock.turn(RETRY_SECONDS)
    await tokens.tick()
    assert tokens.problem is None
    assert tokens.bearer(token, NOW).tenant == "acme"


@pytest.mark.parametrize(
    "page", [b"", b"<html>", b"[]", b'{"keys": 1}', b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "AA"}]}']
)
async def test_a_key_set_that_is_none_changes_nothing(issuer: FakeIssuer, page: bytes) -> None:
    tokens, web, clock = made(issuer)
    await tokens.tick()
    web.pages["https://issuer.test/keys"] = page
    clock.turn(301)
    await tokens.tick()
    assert tokens.problem is not None
    assert tokens.bearer(issuer.token("first", now=NOW), NOW).tenant == "acme"


async def test_the_key_set_is_found_by_discovery(issuer: FakeIssuer) -> None:
    tokens, web, _ = made(issuer, jwks_url=None)
    well_known = "https://issuer.test/.well-known/openid-configuration"
    web.pages[well_known] = json.dumps({"issuer": issuer.issuer, "jwks_uri": "https://issuer.test/keys"}).encode()
    await tokens.tick()
    assert web.fetched == [well_known, "https://issuer.test/keys"]
    assert tokens.bearer(issuer.token("first", now=NOW), NOW).tenant == "acme"


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://other.test", "jwks_uri": "https://issuer.test/keys"},
        {"issuer": "https://issuer.test", "jwks_uri": "http://issuer.test/keys"},
    ],
)
async def test_a_discovery_document_of_another_or_without_encryption_is_refused(
    issuer: FakeIssuer, document: dict[str, str]
) -> None:
    tokens, web, _ = made(issuer, jwks_url=None)
    web.pages["https://issuer.test/.well-known/openid-configuration"] = json.dumps(document).encode()
    await tokens.tick()
    assert tokens.problem is not None
    assert tokens.verifier.keys == {}


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.test/",
        "ftp://x",
        "issuer.test",
        "https://",
        "https://u:p@issuer.test",
        "http://[::1",
        "https://x:y",
    ],
)
def test_urls_that_are_not_encrypted_or_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is no URL|not encrypted"):
        AuthConfig.model_validate({"oidc": {"issuer": url, "audience": "x"}})


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9000/keys", "http://localhost/keys", "http://[::1]:80/x", "https://issuer.test"]
)
def test_this_machine_needs_no_encryption(url: str) -> None:
    assert AuthConfig.model_validate({"oidc": {"issuer": url, "audience": "x"}}).oidc
