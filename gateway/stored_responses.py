"""Which engine holds a stored response, and whose it is: both stand in the response's id.

vLLM keeps responses in the memory of the engine that made them (0.32.0, `openai/responses/serving.py`), so a request that names one
must go back there. vLLM takes the id from the request (`request_id`), and the gateway chooses it:

    resp_ <replica: 8> <random: 32> <seal: 24>          hexadecimal digits

The seal is an HMAC over tenant, replica and the random part. Any gateway with the same secret (one state directory) reads the replica out
of an id, after a restart too, with nothing to remember and nothing to share; and an id opens nothing for another tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from gateway.errors import GatewayError
from model_registry.atomic import write_atomically
from placement.table import ReplicaRow

_ID = re.compile(r"resp_([0-9a-f]{8})([0-9a-f]{32})([0-9a-f]{24})")
_SECRET_BYTES = 32


class ResponseIds:
    """Makes and reads the ids of stored responses. `secret` is asked for once, when the first id is made or read."""

    def __init__(self, secret: Callable[[], bytes]) -> None:
        self._load = secret
        self._secret: bytes | None = None

    def make(self, tenant: str, replica: str) -> str:
        """A new id for a response that `replica` is going to hold for `tenant`."""
        nonce = secrets.token_hex(16)
        return f"resp_{_mark(replica)}{nonce}{self._seal(tenant, replica, nonce)}"

    def holder(self, response_id: str, tenant: str, replicas: Iterable[ReplicaRow]) -> ReplicaRow | None:
        """The one of `replicas` that holds the response; None if none does, or if it is another tenant's."""
        if (match := _ID.fullmatch(response_id)) is None:
            return None
        mark, nonce, seal = match.groups()
        for row in replicas:
            if _mark(row.replica) == mark and hmac.compare_digest(self._seal(tenant, row.replica, nonce), seal):
                return row
        return None

    def _seal(self, tenant: str, replica: str, nonce: str) -> str:
        if self._secret is None:
            self._secret = self._load()
        told = "\0".join((tenant, replica, nonce)).encode()
        return hmac.digest(self._secret, told, "sha256").hex()[:24]


def _mark(replica: str) -> str:
    return hashlib.sha256(replica.encode()).hexdigest()[:8]


def secret_in(path: Path) -> bytes:
    """The secret in the file at `path`, made if there is none yet (0600). Two that make it at once end with the same one.

    Raises GatewayError where it cannot be read or made.
    """
    try:
        if not path.exists():
            _offer(path)
        secret = path.read_bytes()
    except OSError as error:
        raise GatewayError(
            f"the secret of stored responses cannot be read: {error.strerror}",
            where=str(path),
            remedy="Give the gateway's user access to its state directory.",
        ) from error
    if len(secret) != _SECRET_BYTES:
        raise GatewayError(
            f"the secret of stored responses must have {_SECRET_BYTES} bytes, not {len(secret)}",
            where=str(path),
            remedy="Remove the file: a new one is made, and responses that are stored now are no longer found.",
        )
    return secret


def _offer(path: Path) -> None:
    """Put a secret there unless somebody else is faster: a link fails where a rename would replace."""
    mine = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    write_atomically(mine, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    finally:
        mine.unlink()
