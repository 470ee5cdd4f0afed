"""What the gateway counts: plain numbers, which `gateway.metrics` turns into Prometheus' format when it is asked.

Every label is bounded: models and replicas are those of the routes, tenants those of the configuration, codes those of
`gateway.error_map`; what is outside counts as `unknown`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

CLIENT_LEFT = 499  # nginx's word for it; never on the wire


@dataclass(slots=True)
class Stats:
    """Totals since the start.

    `arrivals` by model, of those that were let in by head and body, and `tenant_arrivals` of the same by (model, tenant). `requests` by (model, tenant, status): the status as sent, 499 where the client left, and the error's own where a stream ended in
    one. `tokens` by (model, tenant, kind) with the engine's own counts, kind being prompt or completion.
    """

    arrivals: Counter[str] = field(default_factory=Counter)
    tenant_arrivals: Counter[tuple[str, str]] = field(default_factory=Counter)
    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    tokens: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    stream_events: Counter[str] = field(default_factory=Counter)
    disconnects: Counter[str] = field(default_factory=Counter)
    connect_failures: Counter[str] = field(default_factory=Counter)
    without_usage: Counter[str] = field(default_factory=Counter)
    config_reloads: Counter[str] = field(default_factory=Counter)
