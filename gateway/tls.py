"""HTTPS on the public listener: one context for its whole life, whose certificate is replaced when the files change.

New handshakes get the new certificate; connections that there are keep theirs and are not disturbed. A pair that cannot be used
is refused with its reason and changes nothing: it is loaded into a context of its own first, because one that has loaded half
of a pair answers nobody. Versions below TLS 1.2 are refused, compression and renegotiation are off.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from pathlib import Path

from gateway.config import TlsConfig
from gateway.errors import GatewayError, SecretUnavailable, TlsError
from gateway.secret_values import fetch

log = logging.getLogger("sliceway.tls")

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_WRONG_PASSWORD = ("BAD_DECRYPT", "BAD_PASSWORD_READ", "PKCS12_PASSWORD_INCORRECT")

_Signature = tuple[tuple[int, int, int], ...]


class ServerTls:
    """The context to serve with, and what keeps it fresh. `poll` is to be called now and then."""

    def __init__(self, config: TlsConfig) -> None:
        """Raises TlsError where certificate or key cannot be used, and SecretUnavailable where the key's password cannot."""
        self._config = config
        self._seen = self._signature()
        self.problem: GatewayError | None = None
        self.context = loaded(config)

    def poll(self) -> bool:
        """Take a certificate that was renewed. True if it was; what is wrong with a new one stands in `problem`."""
        signature = self._signature()
        if signature == self._seen and self.problem is None:
            return False
        self._seen = signature
        try:
            loaded(self._config)
            _load(self.context, self._config)
        except (TlsError, SecretUnavailable) as error:
            if str(error) != str(self.problem):
                log.error("the new certificate is not taken, the one before stays in use: %s", error)
            self.problem = error
            return False
        self.problem = None
        log.info("the certificate in %s counts from now on", self._config.certificate)
        return True

    def _signature(self) -> _Signature:
        found = []
        for path in (self._config.certificate, self._config.key):
            try:
                status = path.stat()  # of what a symbolic link leads to: renewals by link are seen
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return tuple(found)


def loaded(config: TlsConfig) -> ssl.SSLContext:
    """A context with the certificate and key of `config`. Raises TlsError, SecretUnavailable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[config.min_version]
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    _load(context, config)
    return context


def _load(context: ssl.SSLContext, config: TlsConfig) -> None:
    for field, path in (("certificate", config.certificate), ("key", config.key)):
        _check_readable(field, path)
    password = fetch(config.key_password, field_name="gateway.tls.key_password").value if config.key_password else b""
    try:
        # Without a password OpenSSL would ask for one on the terminal; an empty one is wrong instead.
        context.load_cert_chain(config.certificate, config.key, password=lambda: password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise _told(error, config) from error


def _check_readable(field: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            file.read(1)
    except OSError as error:
        raise TlsError(
            f"the TLS {field} cannot be read: {error.strerror}",
            where=str(path),
            remedy=f"Check gateway.tls.{field}, and that the user who runs the gateway may read it.",
        ) from error
    if field == "key" and mode & stat.S_IROTH:
        log.warning("everyone on this machine can read the TLS key; close it with: chmod o-rwx %s", path)


def _is_encrypted(key: Path) -> bool:
    # OpenSSL says of a wrong password only that something was wrong, and not the same in every version.
    return b"ENCRYPTED" in key.read_bytes()


def _told(error: Exception, config: TlsConfig) -> TlsError:
    reason = getattr(error, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return TlsError(
            "the TLS key does not belong to the certificate",
            where=str(config.key),
            remedy=f"They must be a pair, the server's own certificate first in {config.certificate}.",
        )
    if reason in _WRONG_PASSWORD or _is_encrypted(config.key):
        what = "its password is wrong" if config.key_password else "it is encrypted and no password is configured"
        return TlsError(
            f"the TLS key cannot be opened: {what}", where=str(config.key), remedy="Set gateway.tls.key_password."
        )
    return TlsError(
        f"the TLS certificate or key is no PEM that OpenSSL can use ({reason or 'unreadable'})",
        where=f"{config.certificate}, {config.key}",
        remedy="Look at them with: openssl x509 -noout -text -in CERTIFICATE; openssl pkey -noout -in KEY",
    )
