"""The `auth:` section of the configuration."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from model_registry.schema import Name, Section

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures with a public key only: a shared secret (HS256) could be the public key itself, and `none` is nothing."""


def check_url(value: str) -> str:
    """`value` if it is https, or http to this machine itself. Raises ValueError."""
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{value!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None or parts.fragment:
        raise ValueError(f"{value!r} is no URL of the form https://host/path")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"{value!r} is not encrypted: keys from it could be anyone's. Use https")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


HttpsUrl = Annotated[str, AfterValidator(check_url)]


class OidcConfig(Section):
    """Tokens (JWT) of one issuer, beside API keys."""

    issuer: HttpsUrl = Field(description="Must equal the token's `iss`, to the letter.")
    audience: str | tuple[str, ...] = Field(min_length=1, description="One of these must be in the token's `aud`.")
    tenant_claim: str = Field(default="tenant", min_length=1, description="The claim that names the tenant.")
    tenant_map: dict[str, Name] = Field(
        default={}, description="Tenants by the claim's value, where it is not the tenant's name itself."
    )
    jwks_url: HttpsUrl | None = Field(
        default=None, description="Where the issuer's public keys are; found through its discovery document if unset."
    )
    algorithms: tuple[Algorithm, ...] = Field(
        default=("RS256", "ES256"), min_length=1, description="Signature algorithms to accept."
    )
    leeway_seconds: float = Field(default=30.0, ge=0, le=300, description="How far clocks may differ.")
    refresh_seconds: float = Field(default=300.0, ge=10, description="How often the issuer's keys are fetched again.")
    max_stale_seconds: float = Field(
        default=86400.0, ge=60, description="How long keys count while the issuer cannot be reached."
    )
    max_token_lifetime_seconds: float | None = Field(
        default=None, gt=0, description="Refuse tokens that are valid for longer from now on; no limit if unset."
    )

    @model_validator(mode="after")
    def _fresh_enough(self) -> Self:
        if self.max_stale_seconds < self.refresh_seconds:
            raise ValueError("max_stale_seconds is shorter than refresh_seconds: keys would lapse between two fetches")
        return self

    @property
    def audiences(self) -> tuple[str, ...]:
        """Always as a list."""
        return (self.audience,) if isinstance(self.audience, str) else self.audience


class AuthConfig(Section):
    """What identifies a tenant besides the gateway's own API keys."""

    oidc: OidcConfig | None = None
