"""Which replicas serve a dedicated tenant alone, and which serve everybody else. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_PARTS = re.compile(r"(\d+)")


def owners(replicas: Iterable[str], dedicated: Sequence[str], *, named: bool = False) -> dict[str, str]:
    """Replica -> the dedicated tenant that it serves alone. Replicas that are not named serve all others.

    A planned fleet says it in the replicas' names, `MODEL@TENANT-NUMBER`. Where none is so named, each tenant of
    `dedicated` gets one replica, in the order of names and numbers; where there are fewer replicas than tenants, the last
    tenants get none, and nobody gets another's. With `named` the names alone say it, also where none of them does: replicas
    that follow demand come and go, each tenant's by itself.
    """
    names = sorted(replicas, key=_natural)
    planned = {name: name.rpartition("-")[0].partition("@")[2] for name in names}
    if named or any(planned.values()):
        return {name: tenant for name, tenant in planned.items() if tenant in dedicated}
    return dict(zip(names, dedicated, strict=False))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _PARTS.split(name)]
