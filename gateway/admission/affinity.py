"""Which replica most likely has the beginning of a prompt in its prefix cache. Pure.

The first kilobyte of the conversation and the tenant's name are hashed together: tenants never share cached prefixes (the gateway
salts them), so their prompts need not meet on one replica. Rendezvous hashing keeps the answer when other replicas come and go,
and is the same in every gateway process.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from gateway.admission.loads import Load

PAYS_FROM_BYTES = 1024  # shorter prompts are computed faster than they are worth a detour
_PREFIX_BYTES = 1024
_BEGINNINGS = (b'"messages"', b'"prompt"', b'"input"')


def prefix_key(tenant: str, raw: bytes) -> int | None:
    """A hash over tenant and beginning of the prompt in the body `raw`; None where affinity does not pay."""
    if len(raw) < PAYS_FROM_BYTES:
        return None
    for word in _BEGINNINGS:
        at = raw.find(word)
        if at >= 0:
            return crc32(raw[at : at + _PREFIX_BYTES], crc32(tenant.encode()))
    return None


def beginning_of(raw: bytes) -> bytes:
    """What `prefix_key` hashes of the body `raw`; nothing where affinity does not pay."""
    if len(raw) < PAYS_FROM_BYTES:
        return b""
    found = next((at for word in _BEGINNINGS if (at := raw.find(word)) >= 0), None)
    return b"" if found is None else raw[found : found + _PREFIX_BYTES]


def key_of(tenant: str, beginning: bytes) -> int | None:
    """`prefix_key` of a body of which only the beginning of the prompt is at hand."""
    return crc32(beginning, crc32(tenant.encode())) if beginning else None


def home_of(key: int, replicas: Sequence[Load]) -> Load:
    """The replica where prompts of this `key` go."""
    return max(replicas, key=lambda load: crc32(load.row.replica.encode(), key) * 2654435761 % 2**32)
