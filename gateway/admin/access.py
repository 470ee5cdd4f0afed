"""Who may administer. Pure.

On a Unix socket (mode 0600) the kernel vouches for the caller: this user or root, and the audit log gets the number. A key is asked
for in addition where `gateway.admin_key` is set, and always on TCP, where every process of the machine could connect.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from gateway.errors import InvalidKey, MissingKey
from gateway.secret_values import Secret

PEER_UID = "sliceway.peer_uid"  # the key in a scope under which the listener puts the caller's user


@dataclass(frozen=True, slots=True)
class Access:
    """`key` is None where the socket's mode is enough. `own_uid` is the user that the gateway runs as."""

    key: Secret | None
    own_uid: int

    def actor(self, authorization: str | None, peer_uid: int | None) -> str:
        """Who asks, for the audit log. `peer_uid` is None on TCP.

        Raises MissingKey or InvalidKey.
        """
        if peer_uid is not None and peer_uid not in (0, self.own_uid):
            raise InvalidKey("This socket belongs to another user.")
        if self.key is None:
            if peer_uid is None:
                raise MissingKey("No admin key is configured, so nobody may administer over TCP.")
            return f"admin:uid={peer_uid}"
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise MissingKey("Send the admin key as `Authorization: Bearer ...`.")
        if not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.key.value):
            raise InvalidKey("This is not the admin key.")
        return "admin:key" if peer_uid is None else f"admin:key,uid={peer_uid}"
