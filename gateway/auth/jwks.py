"""The issuer's public keys: fetched beside the requests, never by one.

They are fetched again every `refresh_seconds`, and sooner (at most every `COOLDOWN_SECONDS`) when a token came that none of
them fits: its issuer may have changed its keys. That token's client is told to ask again, which official clients do by
themselves. While the issuer is out of reach the keys stay, up to `max_stale_seconds`: a key that was taken back must not count for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
import msgspec

from gateway.auth.schema import OidcConfig, check_url
from gateway.auth.tokens import Bearer, UnknownSigner, Verifier, prepared
from gateway.errors import GatewayError, InvalidToken, TokenKeysUnavailable

T = TypeVar("T")

COOLDOWN_SECONDS = 10.0
RETRY_SECONDS = 5.0
FETCH_TIMEOUT_SECONDS = 5.0
MAX_DOCUMENT_BYTES = 2**20

Fetch = Callable[[str], Awaitable[bytes]]
"""The body of a GET, or IssuerUnreachable."""

log = logging.getLogger("sliceway.auth")


class IssuerUnreachable(GatewayError):
    """The issuer's keys could not be fetched."""

    code = "issuer_unreachable"


class _Discovery(msgspec.Struct):
    issuer: str
    jwks_uri: str


class _KeySet(msgspec.Struct):
    keys: list[object]


class Tokens:
    """The tokens of one issuer. `verifier` is replaced when the keys change; `tick` is to be called about once a second.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, config: OidcConfig, *, clock: Callable[[], float], fetch: Fetch | None = None) -> None:
        self.config = config
        self.verifier = Verifier(config)
        self.problem: GatewayError | None = None
        self._clock = clock
        self._fetch = fetch or fetch_over_http
        self._fetched_at: float | None = None
        self._tried_at = float("-inf")
        self._wanted = True
        self._published: list[object] = []

    def bearer(self, token: str, now: float) -> Bearer:
        """Who sent `token`; `now` is seconds since 1970.

        Raises InvalidToken, or TokenKeysUnavailable where the keys are about to be fetched.
        """
        try:
            return self.verifier.verify(token, now)
        except UnknownSigner as error:
            if self._fetched_at is not None and self._clock() - self._tried_at < COOLDOWN_SECONDS:
                raise InvalidToken(error.message) from error
            self._wanted = True
            raise TokenKeysUnavailable(
                "The issuer's keys are being fetched; ask again.", retry_after_seconds=1.0
            ) from error

    async def tick(self) -> None:
        """Fetch the keys if it is time, and drop those that are too old to be believed."""
        if self._due():
            self._tried_at = self._clock()
            try:
                self._take(await self._key_set())
            except IssuerUnreachable as error:
                self._missed(error)
        stale = self._fetched_at is not None and self._clock() - self._fetched_at > self.config.max_stale_seconds
        if stale and self.verifier.keys:
            log.error(
                "the issuer's keys are older than max_stale_seconds: no token is accepted until they can be fetched"
            )
            self._published, self.verifier = [], Verifier(self.config)

    def _due(self) -> bool:
        since_try = self._clock() - self._tried_at
        if self.problem is not None or self._fetched_at is None:
            return since_try >= RETRY_SECONDS
        return since_try >= (COOLDOWN_SECONDS if self._wanted else self.config.refresh_seconds)

    def _take(self, keys: list[object]) -> None:
        usable = prepared(keys, self.config)
        if not usable:
            raise IssuerUnreachable(
                f"none of the {len(keys)} keys that the issuer publishes fits auth.oidc.algorithms",
                where=self.config.jwks_url or self.config.issuer,
                remedy=f"Allowed are {', '.join(self.config.algorithms)}.",
            )
        if self.problem is not None:
            log.info("the issuer's keys can be fetched again")
        self.problem, self._wanted, self._fetched_at = None, False, self._clock()
        if keys != self._published:
            self._published, self.verifier = keys, Verifier(self.config, usable)

    def _missed(self, error: IssuerUnreachable) -> None:
        if self.problem is None:
            log.warning("%s", error)
        self.problem = error

    async def _key_set(self) -> list[object]:
        url = self.config.jwks_url or await self._discovered()
        return _decoded(await self._fetch(url), _KeySet, url).keys

    async def _discovered(self) -> str:
        url = self.config.issuer.rstrip("/") + "/.well-known/openid-configuration"
        found = _decoded(await self._fetch(url), _Discovery, url)
        if found.issuer != self.config.issuer:
            raise IssuerUnreachable(
                "the discovery document is another issuer's",
                where=url,
                remedy=f"auth.oidc.issuer is {self.config.issuer!r}.",
            )
        try:
            return check_url(found.jwks_uri)
        except ValueError as error:
            raise IssuerUnreachable(f"the discovery document's jwks_uri: {error}", where=url) from error


async def fetch_over_http(url: str) -> bytes:
    """The body of `url`. Redirects are not followed: they could lead off https.

    Raises IssuerUnreachable.
    """
    timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
            session.get(url, allow_redirects=False, headers={"accept": "application/json"}) as response,
        ):
            if response.status != 200:
                raise IssuerUnreachable(f"the issuer answers {response.status}", where=url)
            body = await response.content.read(MAX_DOCUMENT_BYTES + 1)
            while len(body) <= MAX_DOCUMENT_BYTES and (more := await response.content.read(MAX_DOCUMENT_BYTES)):
                body += more
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        raise IssuerUnreachable(
            f"the issuer cannot be reached: {error or type(error).__name__}",
            where=url,
            remedy="Check auth.oidc and the network; tokens are accepted with the keys there are until they are too old.",
        ) from error
    if len(body) > MAX_DOCUMENT_BYTES:
        raise IssuerUnreachable(f"the issuer's answer is larger than {MAX_DOCUMENT_BYTES} bytes", where=url)
    return body


def _decoded(body: bytes, kind: type[T], url: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise IssuerUnreachable(f"the issuer's answer makes no sense: {error}", where=url) from error
