"""What a token (JWT, RFC 7519) says about its bearer, once its signature is verified. Pure: keys and time come in.

PyJWT checks the signature, issuer and audience. Against algorithm confusion (RFC 8725, 3.1) a key is prepared for the
algorithms that its type and the configuration allow, at the moment the issuer's keys are read; a token only picks one
of those by key id and algorithm. Whatever else its header offers (`jku`, `jwk`, `x5u`) is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
from jwt import PyJWK

from gateway.auth.schema import OidcConfig
from gateway.errors import InvalidToken

MAX_TOKEN_BYTES = 16 * 2**10
MIN_RSA_BITS = 2048  # RFC 7518, 3.3
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}  # RFC 7518, 3.4
_EDWARDS = ("Ed25519", "Ed448")  # RFC 8037


class UnknownSigner(InvalidToken):
    """The issuer's keys, as they are known here, hold none for this token. It may have a new one."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who sent a token, and until when it says so (seconds since 1970, leeway included)."""

    tenant: str
    until: float


@dataclass(frozen=True, slots=True)
class Verifier:
    """The issuer's keys at one moment. Immutable; a refreshed key set makes a new one."""

    config: OidcConfig
    keys: Mapping[tuple[str | None, str], PyJWK] = field(default_factory=dict)

    def verify(self, token: str, now: float) -> Bearer:
        """Whose token this is. `now` is seconds since 1970.

        Raises UnknownSigner where no key fits, InvalidToken for everything else that is wrong with it.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidToken("The token is too long.")
        key = self._key_for(_header(token))
        try:
            claims = jwt.decode(
                token,
                key=key,
                algorithms=[key.algorithm_name],
                audience=list(self.config.audiences),
                issuer=self.config.issuer,
                options={
                    "require": ["exp", "iss", "aud"],
                    # Checked below, against the time that is handed in.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError) as error:
            raise InvalidToken(f"The token is not valid: {_reason(error)}.") from error
        return Bearer(self._tenant(claims), self._valid_until(claims, now))

    def _key_for(self, header: Mapping[str, Any]) -> PyJWK:
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in self.config.algorithms:
            raise InvalidToken(f"Tokens must be signed with one of {', '.join(self.config.algorithms)}.")
        if "crit" in header or "b64" in header:
            raise InvalidToken("The token's header asks for extensions that this gateway does not have.")
        if key_id is not None and not isinstance(key_id, str):
            raise InvalidToken("The token's key id is not text.")
        if key_id is None and len(fitting := [k for (_, name), k in self.keys.items() if name == algorithm]) == 1:
            return fitting[0]
        if (key := self.keys.get((key_id, algorithm))) is None:
            raise UnknownSigner("The token is signed with a key that its issuer does not publish.")
        return key

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        name = claims.get(self.config.tenant_claim)
        if not isinstance(name, str) or not name:
            raise InvalidToken(f"The token's claim {self.config.tenant_claim!r} names no tenant.")
        return self.config.tenant_map.get(name, name)

    def _valid_until(self, claims: Mapping[str, Any], now: float) -> float:
        leeway, longest = self.config.leeway_seconds, self.config.max_token_lifetime_seconds
        expires = _time(claims, "exp")
        assert expires is not None, "required above"
        if now >= expires + leeway:
            raise InvalidToken("The token is expired.")
        for name in ("nbf", "iat"):
            if (since := _time(claims, name)) is not None and since > now + leeway:
                raise InvalidToken("The token is not valid yet; its issuer's clock and this one may differ.")
        if longest is not None and expires - now > longest:
            raise InvalidToken(f"The token is valid for longer than {longest:g} s, which is not accepted here.")
        return expires + leeway


def prepared(keys: Iterable[object], config: OidcConfig) -> dict[tuple[str | None, str], PyJWK]:
    """The usable keys of a JWK set (RFC 7517), by key id and algorithm. Keys for other purposes are left out, like damaged ones."""
    found: dict[tuple[str | None, str], PyJWK] = {}
    for key in keys:
        if not isinstance(key, dict) or key.get("use", "sig") != "sig":
            continue
        key_id = key.get("kid")
        if key_id is not None and not isinstance(key_id, str):
            continue
        for algorithm in config.algorithms:
            if _fits(key, algorithm) and (made := _made(key, algorithm)) is not None:
                found[key_id, algorithm] = made
    return found


def _fits(key: Mapping[str, Any], algorithm: str) -> bool:
    if key.get("alg", algorithm) != algorithm or "k" in key:
        return False
    kind = key.get("kty")
    if algorithm in _CURVES:
        return kind == "EC" and key.get("crv") == _CURVES[algorithm]
    if algorithm == "EdDSA":
        return kind == "OKP" and key.get("crv") in _EDWARDS
    return kind == "RSA"


def _made(key: dict[str, Any], algorithm: str) -> PyJWK | None:
    try:
        made = PyJWK(key, algorithm=algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    bits = getattr(made.key, "key_size", None)
    return None if key.get("kty") == "RSA" and (bits is None or bits < MIN_RSA_BITS) else made


def _header(token: str) -> Mapping[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError) as error:
        raise InvalidToken("The token is malformed.") from error


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None and name != "exp":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidToken(f"The token's claim {name!r} is no time.")
    return float(value)


def _reason(error: Exception) -> str:
    """In words that hold nothing of the token."""
    if isinstance(error, jwt.InvalidSignatureError):
        return "its signature is wrong"
    if isinstance(error, jwt.InvalidAudienceError):
        return "it was issued for another audience"
    if isinstance(error, jwt.InvalidIssuerError):
        return "it is from another issuer"
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it lacks the claim {error.claim!r}"
    return "it is malformed"
