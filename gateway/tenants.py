"""Whose request this is, and what they may use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gateway.config import Config, TenantConfig
from gateway.errors import InvalidKey, MissingKey
from gateway.keys import Keyring

ANONYMOUS = "anonymous"
UNKNOWN = "unknown"  # the label of requests that never got as far as a tenant


@dataclass(frozen=True, slots=True)
class Tenant:
    """Someone who sends requests. `models` is None where they may use every model."""

    name: str
    models: frozenset[str] | None = None

    def may_use(self, model: str) -> bool:
        """Whether `model` exists for this tenant."""
        return self.models is None or model in self.models


def tenant_of(config: TenantConfig) -> Tenant:
    """The tenant as the configuration describes it."""
    return Tenant(config.name, None if config.models == "all" else frozenset(config.models))


@dataclass(frozen=True, slots=True)
class Directory:
    """Every tenant, and whether keys are asked for. Immutable; a reload makes a new one."""

    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys_required: bool = True

    @classmethod
    def of(cls, config: Config) -> Directory:
        """From the configuration."""
        listed = {tenant.name: tenant_of(tenant) for tenant in config.tenants}
        return cls(listed, keys_required=config.gateway.authentication == "keys")

    def authenticate(self, authorization: bytes | None, keyring: Keyring, now: float) -> Tenant:
        """The tenant behind the value of an `Authorization` header (None: there was none). `now` is seconds since 1970.

        Raises MissingKey or InvalidKey.
        """
        if not self.keys_required:
            return _EVERYONE
        if not authorization:
            raise MissingKey("No API key was sent. Send it as `Authorization: Bearer sk-sliceway-...`.")
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise MissingKey("The Authorization header holds no API key. Send `Authorization: Bearer sk-sliceway-...`.")
        name = keyring.tenant_of(key.strip().decode("latin-1"), now)
        if (tenant := self.tenants.get(name)) is None:
            raise InvalidKey("The API key belongs to a tenant that no longer exists here.")
        return tenant

    def labels(self) -> Iterable[str]:
        """The tenants that metrics may name."""
        return self.tenants.keys() if self.keys_required else (ANONYMOUS,)


_EVERYONE = Tenant(ANONYMOUS)
