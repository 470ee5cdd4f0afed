"""TLS between gateway and engine: what goes together, and what is told of what does not."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from placement.engine_tls import EngineTrust, check, client_context, own_context, remedy, server_context, told
from placement.errors import EngineTlsError
from placement.schema import EngineTlsConfig
from tests.integration.certificates import Authority

NODE = "10.0.0.5"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("the cluster's")


@pytest.fixture
def tls(tmp_path: Path, authority: Authority) -> EngineTlsConfig:
    """A pair for NODE, and who signed it."""
    return files(tmp_path, authority)


def files(folder: Path, authority: Authority, *, trusted: Authority | None = None, **pair: object) -> EngineTlsConfig:
    certificate, key = authority.issue(folder, **{"address": NODE, **pair})  # type: ignore[arg-type]
    return EngineTlsConfig(certificate=certificate, key=key, authority=(trusted or authority).write(folder))


def test_what_goes_together_is_fine(tls: EngineTlsConfig) -> None:
    check(tls, NODE)


def test_an_ipv6_address_is_one_too(tmp_path: Path, authority: Authority) -> None:
    check(files(tmp_path, authority, address="fd00::5"), "fd00::5")


def refused(tls: EngineTlsConfig, address: str = NODE) -> EngineTlsError:
    with pytest.raises(EngineTlsError) as caught:
        check(tls, address)
    assert caught.value.remedy
    return caught.value


def test_another_authoritys_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    error = refused(files(tmp_path, Authority("a stranger's"), trusted=authority))
    assert "not from the authority that engine.tls names" in error.message
    assert error.where == str(tmp_path / "certificate.pem")


def test_one_that_nobody_else_signed_is_refused_where_it_is_not_the_authority(tmp_path: Path) -> None:
    alone = Authority("alone")
    pair = EngineTlsConfig(
        certificate=alone.write(tmp_path / "a"),
        key=alone.write_key(tmp_path / "a"),
        authority=Authority("other").write(tmp_path / "b"),
    )
    assert "not from the authority" in refused(pair).message


@pytest.mark.parametrize(("begins", "ends", "words"), [(-9, -1, "has expired"), (1, 9, "not valid yet")])
def test_out_of_its_time_it_is_refused(
    tmp_path: Path, authority: Authority, begins: int, ends: int, words: str
) -> None:
    now = datetime.now(UTC)
    times = {"begins": now + timedelta(days=begins), "ends": now + timedelta(days=ends)}
    error = refused(files(tmp_path, authority, **times))
    assert words in error.message
    assert "Renew" in str(error.remedy)


def test_another_nodes_certificate_is_refused(tls: EngineTlsConfig) -> None:
    error = refused(tls, "10.0.0.6")
    assert "for another address" in error.message
    assert "subjectAltName=IP:10.0.0.6" in str(error.remedy)


def test_a_name_is_no_address(tmp_path: Path, authority: Authority) -> None:
    """The subject's own name counts for nothing (RFC 6125), nor does an address that is written as a name."""
    assert "for another address" in refused(files(tmp_path, authority, address=None, names=[NODE])).message


def test_a_key_of_another_certificate_is_told(tls: EngineTlsConfig, tmp_path: Path, authority: Authority) -> None:
    _, other = authority.issue(tmp_path / "other", address=NODE)
    error = refused(tls.model_copy(update={"key": other}))
    assert "does not belong to the certificate" in error.message


def test_an_encrypted_key_is_told_and_no_password_is_asked_for(tmp_path: Path, authority: Authority) -> None:
    error = refused(files(tmp_path, authority, password=b"x"))
    assert "engines take no password" in str(error.remedy)


@pytest.mark.parametrize("which", ["certificate", "key", "authority"])
@pytest.mark.parametrize("damage", ["gone", "rubbish", "empty"])
def test_files_that_cannot_be_used_are_told_with_their_names(tls: EngineTlsConfig, which: str, damage: str) -> None:
    path: Path = getattr(tls, which)
    path.unlink() if damage == "gone" else path.write_text("rubbish" if damage == "rubbish" else "", encoding="ascii")
    assert str(path) in str(refused(tls).where)


def test_old_versions_are_refused(tls: EngineTlsConfig) -> None:
    for context in (client_context(tls.authority), server_context(tls.certificate, tls.key), own_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    context = client_context(tls.authority)
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


def test_other_failures_of_tls_have_words_too() -> None:
    error = ssl.SSLError(1, "x")
    assert "handshake failed" in told(error)
    assert remedy(error, NODE)


# ---- what a gateway trusts


def test_without_an_authority_nothing_is_trusted() -> None:
    with pytest.raises(EngineTlsError, match="no authority is configured"):
        EngineTrust().context()


def test_another_authority_counts_for_the_next_connection(tls: EngineTlsConfig) -> None:
    trust = EngineTrust(tls)
    first = trust.context()
    assert trust.context() is first
    Authority("the next").write(tls.authority.parent)
    touch(tls.authority, 1)
    assert trust.context() is not first


def test_a_damaged_authority_changes_nothing_while_there_is_one(tls: EngineTlsConfig) -> None:
    trust = EngineTrust(tls)
    first = trust.context()
    tls.authority.write_text("half writ", encoding="ascii")
    touch(tls.authority, 2)
    assert trust.context() is first
    with pytest.raises(EngineTlsError, match="authority cannot be used"):
        EngineTrust(tls).context()


def test_another_configuration_is_another_trust(tls: EngineTlsConfig) -> None:
    trust = EngineTrust(tls)
    first = trust.context()
    trust.configure(tls.model_copy())
    assert trust.context() is first
    trust.configure(None)
    with pytest.raises(EngineTlsError):
        trust.context()
    trust.configure(tls)
    assert trust.context() is not first


def touch(path: Path, seconds: int) -> None:
    """As if it had been written so much later."""
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + seconds * 10**9))
