"""HTTPS on the public listener, for every relay: streams, a certificate that is renewed, and pairs that cannot be used."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from cryptography import x509

from gateway.config import Config, TlsConfig
from gateway.errors import SecretUnavailable, TlsError
from gateway.testing import RELAYS, FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from gateway.tls import ServerTls, loaded
from tests.integration.certificates import write_pair
from tests.integration.gateway_harness import CHAT, chat_body, events, raw_request, read_until

pytestmark = pytest.mark.integration


@dataclass
class Secure:
    """A gateway that speaks TLS, and the folder with its certificate."""

    gateway: RunningGateway
    fleet: FakeFleet
    folder: Path

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "certificate.pem"))

    @contextmanager
    def connect(self, context: ssl.SSLContext | None = None) -> Iterator[ssl.SSLSocket]:
        host, _, port = self.gateway.url.removeprefix("https://").rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=20) as plain,
            (context or self.context()).wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            yield wrapped

    def shown_name(self) -> str:
        """The subject of the certificate that a new connection gets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with self.connect(context) as wrapped:
            shown = wrapped.getpeercert(binary_form=True)
        assert shown
        return x509.load_der_x509_certificate(shown).subject.rfc4514_string()


@pytest.fixture(params=sorted(RELAYS))
def secure(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secure]:
    write_pair(tmp_path / "tls", "first")
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(tmp_path / "state"),
            "models": [{"name": "m", "source": "x"}],
            "gateway": {
                "listen": "127.0.0.1:0",
                "authentication": "none",
                "tls": {"certificate": tmp_path / "tls/certificate.pem", "key": tmp_path / "tls/key.pem"},
            },
        }
    )
    with fake_fleet(tmp_path / "state") as fleet, running_gateway(config, relay=request.param) as gateway:
        fleet.start("m-0", "m", itl_seconds=0.001, ttft_seconds=0.0)
        gateway.look()
        yield Secure(gateway, fleet, tmp_path / "tls")
        wait_until(lambda: gateway.idle, what="all counters are back at zero")


def test_answers_and_streams_come_over_tls(secure: Secure) -> None:
    with httpx2.Client(verify=secure.context(), base_url=secure.gateway.url) as client:
        whole = client.post(CHAT, json=chat_body("m", stream=False, max_tokens=3))
        assert whole.json()["choices"][0]["message"]["content"] == "the quick brown"
        streamed = client.post(CHAT, json=chat_body("m", max_tokens=200))
        assert events(streamed.text)[-1] == "[DONE]"
        assert client.get("/readyz").status_code == 200


def test_a_renewed_certificate_counts_and_open_connections_go_on(secure: Secure) -> None:
    with secure.connect() as before:
        before.sendall(raw_request(b'{"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}'))
        assert b" 200 " in read_until(before, b"\r\n")
        write_pair(secure.folder, "second")
        wait_until(lambda: secure.shown_name() == "CN=second", what="the new certificate is shown")
        before.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(before, b'{"status":"ok"}')


def test_a_wrong_pair_changes_nothing_and_a_right_one_is_taken_later(secure: Secure) -> None:
    tls = secure.gateway.gateway.tls
    assert tls is not None
    right = (secure.folder / "key.pem").read_bytes()
    (secure.folder / "key.pem").write_bytes(b"rubbish")
    wait_until(lambda: tls.problem is not None, what="the wrong key is noticed")
    assert secure.shown_name() == "CN=first"
    (secure.folder / "key.pem").write_bytes(right)
    wait_until(lambda: tls.problem is None, what="the right key is taken")
    assert secure.shown_name() == "CN=first"


def test_old_versions_are_refused(secure: Secure) -> None:
    context = secure.context()
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)), secure.connect(context):
        pass


def test_plain_http_to_the_tls_port_gets_nothing(secure: Secure) -> None:
    host, _, port = secure.gateway.url.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        try:
            got = sock.recv(4096)
        except ConnectionResetError:
            got = b""
    assert b"HTTP/1.1 200" not in got


# ---- pairs that cannot be used, told in words


def config(folder: Path, **fields: object) -> TlsConfig:
    return TlsConfig.model_validate({"certificate": folder / "certificate.pem", "key": folder / "key.pem"} | fields)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"certificate\.pem: the TLS certificate cannot be read: No such file"):
        loaded(config(tmp_path))


def test_a_key_of_another_certificate_is_told(tmp_path: Path) -> None:
    write_pair(tmp_path / "other", "other")
    write_pair(tmp_path, "this")
    (tmp_path / "other" / "key.pem").replace(tmp_path / "key.pem")
    with pytest.raises(TlsError, match="does not belong to the certificate"):
        loaded(config(tmp_path))


@pytest.mark.parametrize("name", ["certificate.pem", "key.pem"])
def test_rubbish_is_told(tmp_path: Path, name: str) -> None:
    write_pair(tmp_path, "this")
    (tmp_path / name).write_text("-----BEGIN NOTHING-----\n", encoding="utf-8")
    with pytest.raises(TlsError, match="no PEM that OpenSSL can use"):
        loaded(config(tmp_path))


def test_an_encrypted_key_needs_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, "this", password=b"planted-password")
    with pytest.raises(TlsError, match="encrypted and no password is configured"):
        loaded(config(tmp_path))
    named = config(tmp_path, key_password="${ENV:TLS_PASSWORD}")
    with pytest.raises(SecretUnavailable, match="TLS_PASSWORD"):
        loaded(named)
    monkeypatch.setenv("TLS_PASSWORD", "wrong")
    with pytest.raises(TlsError, match="its password is wrong"):
        loaded(named)
    monkeypatch.setenv("TLS_PASSWORD", "planted-password")
    assert loaded(named).minimum_version is ssl.TLSVersion.TLSv1_2
    assert ServerTls(named).poll() is False


def test_a_password_that_goes_away_later_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLS_PASSWORD", "planted-password")
    write_pair(tmp_path, "first", password=b"planted-password")
    tls = ServerTls(config(tmp_path, key_password="${ENV:TLS_PASSWORD}"))
    monkeypatch.delenv("TLS_PASSWORD")
    write_pair(tmp_path, "second", password=b"planted-password")
    assert tls.poll() is False
    assert isinstance(tls.problem, SecretUnavailable)
    monkeypatch.setenv("TLS_PASSWORD", "planted-password")
    assert tls.poll() is True


def test_tls_1_3_may_be_demanded(tmp_path: Path) -> None:
    write_pair(tmp_path, "this")
    assert loaded(config(tmp_path, min_version="1.3")).minimum_version is ssl.TLSVersion.TLSv1_3
