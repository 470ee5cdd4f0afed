"""Whatever is sent as a credential is answered with one of the refusals there are for it; only the key itself opens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.auth.jwks import Tokens
from gateway.auth.schema import OidcConfig
from gateway.errors import InvalidKey, InvalidToken, KeystoreError, MissingKey, TokenKeysUnavailable
from gateway.keys import KeyRecord, Keyring, Keystore, digest_of, key_id_of
from gateway.tenants import Directory, Tenant
from gateway.testing import FakeClock

NOW = 1_700_000_000.0
PEPPER = b"p" * 32
KEY = "sk-sliceway-abcdefgh-" + "A" * 43
RING = Keyring({"abcdefgh": KeyRecord("abcdefgh", "acme", digest_of(KEY, PEPPER), NOW)}, PEPPER)


def directory(*, tokens: bool) -> Directory:
    if not tokens:
        return Directory({"acme": Tenant("acme")})
    config = OidcConfig.model_validate({"issuer": "https://a.test", "audience": "x"})
    return Directory({"acme": Tenant("acme")}, tokens=Tokens(config, clock=FakeClock()))


near_keys = st.builds(
    lambda index, letter: KEY[:index] + letter + KEY[index + 1 :],
    st.integers(0, len(KEY) - 1),
    st.characters(max_codepoint=255),
)
credentials = st.one_of(
    st.text(st.characters(max_codepoint=255)),
    near_keys,
    st.text("sk-liceway0123456789ABCabc_.", max_size=80),
    st.lists(st.text("ABCabc-_", max_size=30), min_size=3, max_size=3).map(".".join),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["Bearer ", "bearer  ", "Basic ", "", "Bearer\t"]), credentials, st.booleans())
def test_only_the_key_itself_opens(scheme: str, credential: str, tokens: bool) -> None:
    header = (scheme + credential).encode("latin-1")
    try:
        tenant = directory(tokens=tokens).authenticate(header, RING, NOW)
    except (InvalidKey, MissingKey, InvalidToken, TokenKeysUnavailable) as error:
        refusal = error.message
    else:
        assert credential.strip() == KEY
        assert tenant.name == "acme"
        return
    if len(credential) > 24:
        assert credential not in refusal


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_an_id_is_read_from_a_key_and_from_nothing_else(text: str) -> None:
    assert key_id_of(text) == (text if text != KEY else "abcdefgh")
    assert key_id_of(KEY) == "abcdefgh"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_file_breaks_the_store_other_than_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root: Path = tmp_path_factory.mktemp("state")
    store = Keystore(root)
    store.path.write_bytes(data)
    with pytest.raises(KeystoreError, match=r"keys\.json"):
        store.load()
