"""The cache salt of each tenant: what keeps the prefix caches of the engines apart.

vLLM hashes a prompt's blocks together with the request's `cache_salt`, so that a prefix that one tenant has sent is found in the cache by that
tenant alone, and the time to a first token tells nobody what others have asked (CVE-2025-46570, vllm#16016). The gateway
sets the salt of every request, whatever the client sent: a client that could choose it could choose another's.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Callable

_PURPOSE = b"prefix cache of "


class CacheSalts:
    """Salts made of a secret that no client knows and every gateway of the fleet shares; the same for a tenant at all times."""

    def __init__(self, secret: Callable[[], bytes]) -> None:
        self._secret = secret
        self._known: dict[str, str] = {}

    def of(self, tenant: str) -> str:
        """The salt of `tenant`: 32 letters, digits, `-` and `_`."""
        salt = self._known.get(tenant)
        if salt is None:
            digest = hmac.digest(self._secret(), _PURPOSE + tenant.encode(), "sha256")
            salt = self._known[tenant] = urlsafe_b64encode(digest[:24]).decode()
        return salt
