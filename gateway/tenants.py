"""Whose request this is, and what they may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.config import Config, TenantConfig
from gateway.errors import InvalidKey, InvalidToken, MissingKey
from gateway.key_uses import USE_SECONDS
from gateway.keys import PREFIX, Keyring

ANONYMOUS = "anonymous"
UNKNOWN = "unknown"  # the label of requests that never got as far as a tenant

MEMO_ENTRIES = 4096


def _nobody(key_id: str, now: float) -> None:
    """Keeps no record of which keys are used."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Someone who sends requests. `models` is None where they may use every model; `aliases` leads from names to models."""

    name: str
    models: frozenset[str] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    priority: int = 0
    default_deadline_seconds: float | None = None

    def may_use(self, model: str) -> bool:
        """Whether `model` exists for this tenant. An alias is none; see `resolve`."""
        return self.models is None or model in self.models

    def resolve(self, name: str) -> str:
        """The model that this tenant means by `name`."""
        return self.aliases.get(name, name)


def tenant_of(config: TenantConfig, aliases: Mapping[str, str] | None = None) -> Tenant:
    """The tenant as the configuration describes it; `aliases` are everyone's, the tenant's own go before them."""
    return Tenant(
        name=config.name,
        models=None if config.models == "all" else frozenset(config.models),
        aliases={**(aliases or {}), **config.aliases},
        weight=config.weight,
        priority=config.priority,
        default_deadline_seconds=config.default_deadline_seconds,
    )


class Bearer(Protocol):
    """Who sent a token, and until when it says so, in seconds since 1970."""

    @property
    def tenant(self) -> str:
        """The tenant's name."""
        ...

    @property
    def until(self) -> float:
        """When it ends."""
        ...


class Tokens(Protocol):
    """What `gateway.auth.jwks.Tokens` is here. `verifier` is another object once what is accepted may have changed."""

    @property
    def verifier(self) -> object:
        """The keys that tokens are checked against."""
        ...

    def bearer(self, token: str, now: float) -> Bearer:
        """Who sent `token`. Raises InvalidToken, TokenKeysUnavailable."""
        ...


@dataclass(slots=True)
class _Memo:
    """Credentials that were verified, with their tenant and the end of their validity.

    It holds for one keyring and one verifier: a revoked key or a changed key set empties it. Found by hash, whose seed is the
    process's own, so that the time of a look-up tells nothing about how much of a guess was right.
    """

    keyring: object = None
    verifier: object = None
    found: dict[bytes, tuple[Tenant, float]] = field(default_factory=dict)

    def remember(self, credential: bytes, tenant: Tenant, until: float) -> None:
        if len(self.found) >= MEMO_ENTRIES:
            self.found.pop(next(iter(self.found)))
        self.found[credential] = tenant, until


@dataclass(frozen=True, slots=True)
class Directory:
    """Every tenant, and whether keys are asked for. A reload makes a new one."""

    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys_required: bool = True
    tokens: Tokens | None = None
    everyone: Tenant = Tenant(ANONYMOUS)  # whose requests are all where no keys are asked for
    note_use: Callable[[str, float], None] = (
        _nobody  # told of a key's id when it is verified: once in USE_SECONDS of its use
    )
    _memo: _Memo = field(default_factory=_Memo, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, config: Config, tokens: Tokens | None = None, note_use: Callable[[str, float], None] = _nobody
    ) -> Directory:
        """From the configuration. `tokens` are accepted beside keys; `note_use` is told of keys that are used."""
        return cls(
            {tenant.name: tenant_of(tenant, config.aliases) for tenant in config.tenants},
            keys_required=config.gateway.authentication == "keys",
            tokens=tokens,
            everyone=Tenant(ANONYMOUS, aliases=config.aliases),
            note_use=note_use,
        )

    def authenticate(self, authorization: bytes | None, keyring: Keyring, now: float) -> Tenant:
        """The tenant behind the value of an `Authorization` header (None: there was none). `now` is seconds since 1970.

        Raises MissingKey, InvalidKey, InvalidToken or TokenKeysUnavailable.
        """
        if not self.keys_required:
            return self.everyone
        if not authorization:
            raise MissingKey("No API key was sent. Send it as `Authorization: Bearer sk-sliceway-...`.")
        memo, verifier = self._memo, self.tokens.verifier if self.tokens else None
        if memo.keyring is keyring and memo.verifier is verifier:
            known = memo.found.get(authorization)
            if known is not None and now < known[1]:
                return known[0]
        else:
            memo.keyring, memo.verifier, memo.found = keyring, verifier, {}
        tenant, until = self._verified(authorization, keyring, now)
        memo.remember(authorization, tenant, until)
        return tenant

    def _verified(self, authorization: bytes, keyring: Keyring, now: float) -> tuple[Tenant, float]:
        scheme, _, rest = authorization.partition(b" ")
        credential = rest.strip().decode("latin-1")
        if scheme.lower() != b"bearer" or not credential:
            raise MissingKey("The Authorization header holds no API key. Send `Authorization: Bearer sk-sliceway-...`.")
        if self.tokens is not None and not credential.startswith(PREFIX) and credential.count(".") == 2:
            bearer = self.tokens.bearer(credential, now)
            if (tenant := self.tenants.get(bearer.tenant)) is None:
                raise InvalidToken("The token names a tenant that is not known here.")
            return tenant, bearer.until
        record = keyring.record_of(credential, now)
        if (tenant := self.tenants.get(record.tenant)) is None:
            raise InvalidKey("The API key belongs to a tenant that no longer exists here.")
        self.note_use(record.id, now)
        again = now + USE_SECONDS  # verified anew, so that its use is noted
        return tenant, again if record.expires is None else min(again, record.expires)

    def labels(self) -> Iterable[str]:
        """The tenants that metrics may name."""
        return self.tenants.keys() if self.keys_required else (ANONYMOUS,)
