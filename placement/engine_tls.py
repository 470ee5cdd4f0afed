"""TLS between gateways and engines: what a gateway trusts, what an engine shows, and why the two do not come together.

TLS 1.2 and newer. A gateway takes a certificate only from the configured authority and only for the very address that it connects
to. Before an engine is started its files go through a handshake in memory, so that what is wrong with them is told then and there.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from placement.errors import EngineTlsError
from placement.schema import EngineTlsConfig

_RENEW = "Renew it in place: new connections get the new one, and nothing has to be restarted."
# X509_verify_cert's codes (OpenSSL, x509_vfy.h).
_EXPIRED, _NOT_YET, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64
_UNTRUSTED = (2, 18, 19, 20, 21, 27)


class EngineTrust:
    """The context that connections to engines are made with; another one when the authority's file or the configuration changes."""

    def __init__(self, tls: EngineTlsConfig | None = None) -> None:
        self._tls = tls
        self._seen: tuple[int, int, int] | None = None
        self._context: ssl.SSLContext | None = None

    def configure(self, tls: EngineTlsConfig | None) -> None:
        """Go by another configuration for connections that are made from here on."""
        if tls != self._tls:
            self._tls, self._seen, self._context = tls, None, None

    def context(self) -> ssl.SSLContext:
        """For one more connection. A file that cannot be used changes nothing while there is a context from before.

        Raises EngineTlsError where there is none.
        """
        if self._tls is None:
            raise EngineTlsError(
                "the engine speaks TLS and no authority is configured",
                where="engine.tls",
                remedy="Give this gateway the `engine.tls` that the engine was started with.",
            )
        seen = _signature(self._tls.authority)
        if self._context is None or seen != self._seen:
            try:
                self._context = client_context(self._tls.authority)
            except EngineTlsError:
                if self._context is None:
                    raise
            self._seen = seen
        return self._context


def client_context(authority: Path) -> ssl.SSLContext:
    """Trusts what `authority` has signed, and nothing else. Raises EngineTlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise EngineTlsError(
            f"the engines' authority cannot be used: {_why(error)}",
            where=str(authority),
            remedy="engine.tls.authority is a PEM file with the certificate of whoever signs the engines' certificates.",
        ) from error
    return context


def own_context() -> ssl.SSLContext:
    """For questions of a controller to the engines of its own machine, at the machine's own address.

    It knows them by their processes, and their certificate was proven when they were started. One that expires under an
    engine must not look like an engine that hangs: that would end it, and a renewal would come too late.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """What an engine shows. Raises EngineTlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Engines take no password, and OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise EngineTlsError(
            f"the engines' certificate or key cannot be used: {_why(error)}",
            where=f"{certificate}, {key}",
            remedy="Both are PEM files and a pair, the certificate first in its file, the key not encrypted (engines take no password).",
        ) from error
    return context


def check(tls: EngineTlsConfig, address: str) -> None:
    """Would a gateway take what an engine at `address` is going to show? Raises EngineTlsError, which says why not."""
    client = client_context(tls.authority)
    server = server_context(tls.certificate, tls.key)
    try:
        _shake_hands(client, server, address)
    except ssl.SSLError as error:
        raise EngineTlsError(
            f"gateways would refuse this node's engines: {told(error)}",
            where=str(tls.certificate),
            remedy=remedy(error, address),
        ) from error


def told(error: ssl.SSLError) -> str:
    """What is wrong with an engine's TLS, in words."""
    code = _code(error)
    if code is None:
        return f"the TLS handshake failed ({getattr(error, 'reason', None) or error})"
    if code == _EXPIRED:
        return "the certificate has expired"
    if code == _NOT_YET:
        return "the certificate is not valid yet"
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        return "the certificate is for another address"
    if code in _UNTRUSTED:
        return "the certificate is not from the authority that engine.tls names"
    return f"the certificate is refused ({getattr(error, 'verify_message', code)})"


def remedy(error: ssl.SSLError, address: str) -> str:
    """What to do about it. `address` is where the engine listens."""
    code = _code(error)
    if code in (_EXPIRED, _NOT_YET):
        return f"{_RENEW} The machine's clock counts, too."
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        return f"Make one with subjectAltName=IP:{address}: that is where this node's engines listen."
    if code in _UNTRUSTED:
        return "Sign it with the key of engine.tls.authority, or name the authority that has signed it (intermediates go into the certificate's file)."
    return "Look at it with: openssl x509 -noout -text -in CERTIFICATE"


def _code(error: ssl.SSLError) -> int | None:
    """Of X509_verify_cert; errors that Python itself raises have none."""
    code: int | None = getattr(error, "verify_code", None)
    return code


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, address: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=address).do_handshake,
        server.wrap_bio(to_server, to_client, server_side=True).do_handshake,
    ]
    while ends:
        ends = [step for step in ends if not _done(step)]


def _done(step: Callable[[], None]) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_ino, status.st_size)


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        words = {"KEY_VALUES_MISMATCH": "the key does not belong to the certificate"}
        return words.get(error.reason or "", f"no PEM that OpenSSL can use ({error.reason or 'unreadable'})")
    return getattr(error, "strerror", None) or str(error)
