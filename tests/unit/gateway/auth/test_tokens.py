from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.auth.schema import OidcConfig
from gateway.auth.testing import FakeIssuer
from gateway.auth.tokens import UnknownSigner, Verifier, prepared
from gateway.errors import InvalidToken

NOW = 1_700_000_000.0


def oidc(**fields: Any) -> OidcConfig:
    given = {"issuer": "https://issuer.test", "audience": "sliceway", "jwks_url": "https://issuer.test/keys"}
    return OidcConfig.model_validate(given | fields)


@pytest.fixture(scope="module")
def issuer() -> FakeIssuer:
    made = FakeIssuer()
    made.add("ec")
    made.add("rsa", "RS256")
    return made


def verifier(issuer: FakeIssuer, **fields: Any) -> Verifier:
    config = oidc(**fields)
    return Verifier(config, prepared(issuer.published, config))


@pytest.mark.parametrize("algorithm", ["RS256", "PS384", "ES256", "ES384", "ES512", "EdDSA"])
def test_a_good_token_names_its_tenant(algorithm: str) -> None:
    issuer = FakeIssuer()
    issuer.add("k", algorithm)
    bearer = verifier(issuer, algorithms=(algorithm,)).verify(issuer.token("k", now=NOW), NOW)
    assert (bearer.tenant, bearer.until) == ("acme", NOW + 330)


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"iss": "https://other.test"}, "another issuer"),
        ({"iss": "https://issuer.test/"}, "another issuer"),
        ({"aud": "someone-else"}, "another audience"),
        ({"aud": None}, "lacks the claim 'aud'"),
        ({"iss": None}, "lacks the claim 'iss'"),
        ({"exp": None}, "lacks the claim 'exp'"),
        ({"exp": NOW - 31}, "expired"),
        ({"nbf": NOW + 31}, "not valid yet"),
        ({"iat": NOW + 31}, "not valid yet"),
        ({"exp": "tomorrow"}, "is no time"),
        ({"exp": True}, "is no time"),
        ({"exp": float("nan")}, "is no time"),
        ({"exp": float("inf")}, "is no time"),
        ({"tenant": None}, "names no tenant"),
        ({"tenant": ["acme"]}, "names no tenant"),
        ({"tenant": ""}, "names no tenant"),
    ],
)
def test_what_a_token_lacks_is_said(issuer: FakeIssuer, claims: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidToken, match=says):
        verifier(issuer).verify(issuer.token("ec", now=NOW, **claims), NOW)


def test_clocks_may_differ_by_the_leeway(issuer: FakeIssuer) -> None:
    check = verifier(issuer)
    assert check.verify(issuer.token("ec", now=NOW, exp=NOW - 29, nbf=NOW + 29, iat=NOW + 29), NOW).tenant == "acme"


def test_one_of_several_audiences_is_enough(issuer: FakeIssuer) -> None:
    check = verifier(issuer, audience=["a", "sliceway"])
    assert check.verify(issuer.token("ec", now=NOW, aud=["x", "a"]), NOW).tenant == "acme"


def test_claims_may_be_mapped_to_tenants(issuer: FakeIssuer) -> None:
    check = verifier(issuer, tenant_claim="https://acme.test/group", tenant_map={"engineering": "acme"})
    token = issuer.token("ec", now=NOW, tenant="x", **{"https://acme.test/group": "engineering"})
    assert check.verify(token, NOW).tenant == "acme"


def test_tokens_for_ever_may_be_refused(issuer: FakeIssuer) -> None:
    check = verifier(issuer, max_token_lifetime_seconds=3600)
    with pytest.raises(InvalidToken, match="longer than 3600 s"):
        check.verify(issuer.token("ec", now=NOW, exp=NOW + 1e9), NOW)


# ---- algorithm confusion (RFC 8725, 2.1)


def encoded(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims() -> dict[str, Any]:
    return {"iss": "https://issuer.test", "aud": "sliceway", "iat": NOW, "exp": NOW + 300, "tenant": "acme"}


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", None, 0, [], {"a": 1}])
def test_unsigned_tokens_are_refused(issuer: FakeIssuer, name: Any) -> None:
    for signature in ("", encoded(b"x" * 64)):
        token = f"{encoded({'alg': name, 'kid': 'ec'})}.{encoded(claims())}.{signature}"
        with pytest.raises(InvalidToken):
            verifier(issuer).verify(token, NOW)


def test_a_public_key_is_no_shared_secret(issuer: FakeIssuer) -> None:
    """The classic: signed with HMAC, the published RSA key as its secret, in every form that a library might take it."""
    public = issuer.keys["rsa"][1].public_key()
    forms = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        json.dumps(issuer.published[1]).encode(),
        base64.urlsafe_b64decode(issuer.published[1]["n"] + "=="),
    ]
    for secret in forms:
        for name in ("HS256", "RS256"):
            signed = f"{encoded({'alg': name, 'kid': 'rsa'})}.{encoded(claims())}"
            mac = hmac.digest(secret, signed.encode(), hashlib.sha256)
            with pytest.raises(InvalidToken):
                verifier(issuer).verify(f"{signed}.{encoded(mac)}", NOW)


def test_shared_secrets_cannot_be_configured() -> None:
    for name in ("HS256", "none"):
        with pytest.raises(ValueError, match="Input should be"):
            oidc(algorithms=[name])


def test_an_oct_key_in_the_set_is_not_taken() -> None:
    assert prepared([{"kty": "oct", "k": encoded(b"s" * 32), "kid": "a", "alg": "HS256"}], oidc()) == {}
    assert prepared([{"kty": "oct", "k": encoded(b"s" * 32), "kid": "a"}], oidc()) == {}


def test_a_key_is_for_the_algorithm_it_names(issuer: FakeIssuer) -> None:
    issuer_of_two = FakeIssuer()
    issuer_of_two.add("k", "PS256")
    check = verifier(issuer_of_two, algorithms=("RS256",))
    assert check.keys == {}


def test_keys_for_encryption_short_keys_and_rubbish_are_left_out() -> None:
    issuer = FakeIssuer()
    issuer.add("short", "RS256", bits=1024)
    issuer.add("enc")
    issuer.published[1]["use"] = "enc"
    rubbish = [None, 1, "x", {}, {"kty": "RSA"}, {"kty": "EC", "crv": "P-256", "x": "!", "y": "!"}, {"kid": 1}]
    assert prepared([*issuer.published, *rubbish], oidc()) == {}


@pytest.mark.parametrize("header", [{"crit": ["exp"]}, {"b64": False}])
def test_extensions_are_refused(issuer: FakeIssuer, header: dict[str, Any]) -> None:
    head = {"alg": "ES256", "kid": "ec"} | header
    with pytest.raises(InvalidToken, match=r"extensions|malformed"):
        verifier(issuer).verify(f"{encoded(head)}.{encoded(claims())}.{encoded(b'x')}", NOW)


def test_a_key_that_the_token_brings_along_is_not_looked_at(issuer: FakeIssuer) -> None:
    other = FakeIssuer()
    other.add("ec")
    token = other.token("ec", now=NOW, headers={"jwk": other.published[0], "jku": "https://evil.test/keys"})
    with pytest.raises(InvalidToken, match="signature is wrong"):
        verifier(issuer).verify(token, NOW)


def test_an_unknown_key_id_is_told_apart(issuer: FakeIssuer) -> None:
    def signed_by(**head: str) -> str:
        return f"{encoded({'alg': 'ES256'} | head)}.{encoded(claims())}.{encoded(b'x' * 64)}"

    with pytest.raises(UnknownSigner):
        verifier(issuer).verify(signed_by(kid="new"), NOW)
    with pytest.raises(InvalidToken, match="signature is wrong"):  # one key fits the algorithm, so it is tried
        verifier(issuer).verify(signed_by(), NOW)


def test_a_changed_token_is_refused(issuer: FakeIssuer) -> None:
    head, body, signature = issuer.token("ec", now=NOW).split(".")
    other = encoded(claims() | {"tenant": "beta"})
    for token in (f"{head}.{other}.{signature}", f"{head}.{body}.", f"{head}.{body}.{signature[:-4]}AAAA"):
        with pytest.raises(InvalidToken):
            verifier(issuer).verify(token, NOW)


def test_no_error_repeats_the_token(issuer: FakeIssuer) -> None:
    token = issuer.token("ec", now=NOW, secret_claim="planted-secret", exp=NOW - 99)
    with pytest.raises(InvalidToken) as caught:
        verifier(issuer).verify(token, NOW)
    assert token not in str(caught.value)
    assert "planted" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(max_size=200),
        st.tuples(
            st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit"]), json_values), json_values, st.binary()
        ).map(lambda parts: f"{encoded(parts[0])}.{encoded(parts[1])}.{encoded(parts[2])}"),
    )
)
def test_no_text_is_more_than_refused(issuer: FakeIssuer, token: str) -> None:
    with pytest.raises(InvalidToken):
        verifier(issuer).verify(token, NOW)


def test_deep_nesting_is_refused(issuer: FakeIssuer) -> None:
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=")
    for token in (f"{deep}.{deep}.x", f"{encoded({'alg': 'ES256', 'kid': 'ec'})}.{deep}.x", "a" * 20_000 + ".b.c"):
        with pytest.raises(InvalidToken):
            verifier(issuer).verify(token, NOW)
