"""Which nodes pass on what the head tells: in a large cluster it tells a few, and each of those tells as many more. Pure."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

RELAYED_FROM = 64
"""Nodes. Up to here the head tells each of them in less than a tenth of a second."""


def relays_of(nodes: Iterable[str]) -> tuple[str, ...]:
    """As many as each of them then has to tell; none where there are few nodes."""
    known = sorted(nodes)
    return tuple(known[: math.isqrt(len(known))]) if len(known) > RELAYED_FROM else ()


def relay_for(node: str, relays: Sequence[str]) -> str | None:
    """Whom this node asks; None: the head, as relays do. The same one as long as the relays are the same."""
    if not relays or node in relays:
        return None
    return relays[zlib.crc32(node.encode()) % len(relays)]
