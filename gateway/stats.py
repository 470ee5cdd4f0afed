"""What the gateway counts: plain numbers, which `gateway.metrics` turns into Prometheus' format when it is asked.

Every label is bounded: models and replicas are those of the routes, tenants those of the configuration, codes those of
`gateway.error_map`; what is outside counts as `unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

CLIENT_LEFT = 499  # nginx's word for it; never on the wire

K = TypeVar("K")


class Counts(dict[K, int]):
    """Numbers by a key; what was never counted is zero, and asking does not make it a key.

    As `collections.Counter`, whose items are set at twice the cost, since it has a `__delitem__` in Python.
    """

    def __missing__(self, key: K) -> int:
        return 0


@dataclass(slots=True)
class Stats:
    """Totals since the start.

    `arrivals` by model, of those that were let in by head and body, and `tenant_arrivals` of the same by (model, tenant). `requests` by (model, tenant, status): the status as sent, 499 where the client left, and the error's own where a stream ended in
    one. `tokens` by (model, tenant, kind) with the engine's own counts, kind being prompt or completion.
    """

    arrivals: Counts[str] = field(default_factory=Counts)
    tenant_arrivals: Counts[tuple[str, str]] = field(default_factory=Counts)
    requests: Counts[tuple[str, str, int]] = field(default_factory=Counts)
    errors: Counts[str] = field(default_factory=Counts)
    tokens: Counts[tuple[str, str, str]] = field(default_factory=Counts)
    stream_events: Counts[str] = field(default_factory=Counts)
    disconnects: Counts[str] = field(default_factory=Counts)
    connect_failures: Counts[str] = field(default_factory=Counts)
    without_usage: Counts[str] = field(default_factory=Counts)
    config_reloads: Counts[str] = field(default_factory=Counts)
