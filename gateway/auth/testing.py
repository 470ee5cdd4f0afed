"""An issuer of tokens in this process, for tests: real keys, real signatures, a key set that changes when it is told to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(slots=True)
class FakeIssuer:
    """Signs tokens and publishes keys. `published` is the JWK set; `keys` holds the private keys by id."""

    issuer: str = "https://issuer.test"
    audience: str = "sliceway"
    keys: dict[str, tuple[str, PrivateKey]] = field(default_factory=dict)
    published: list[dict[str, Any]] = field(default_factory=list)

    def add(self, key_id: str, algorithm: str = "ES256", *, bits: int = 2048) -> None:
        """Make a key and publish its public half."""
        key: PrivateKey
        if algorithm.startswith(("RS", "PS")):
            key = rsa.generate_private_key(65537, bits)
            jwk = RSAAlgorithm.to_jwk(key.public_key())
        elif algorithm == "EdDSA":
            key = ed25519.Ed25519PrivateKey.generate()
            jwk = OKPAlgorithm.to_jwk(key.public_key())
        else:
            curve = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}[algorithm]
            key = ec.generate_private_key(curve)
            jwk = ECAlgorithm.to_jwk(key.public_key())
        self.keys[key_id] = algorithm, key
        self.published.append(json.loads(jwk) | {"kid": key_id, "use": "sig", "alg": algorithm})

    def withdraw(self, key_id: str) -> None:
        """Publish it no longer."""
        self.published = [key for key in self.published if key["kid"] != key_id]

    def token(self, key_id: str, *, now: float, headers: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """A token for tenant `acme`, good for five minutes, with these claims and headers in addition; None takes one out."""
        algorithm, key = self.keys[key_id]
        said = {"iss": self.issuer, "aud": self.audience, "iat": now, "exp": now + 300, "tenant": "acme"} | claims
        kept = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(kept, key, algorithm=algorithm, headers={"kid": key_id} | dict(headers or {}))

    def key_set(self) -> bytes:
        """The document behind `jwks_url`."""
        return json.dumps({"keys": self.published}).encode()
