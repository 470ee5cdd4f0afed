"""What admission tells others: queues, throttled tenants and limits, as plain data. Field names here are kept stable.

For `/slices`, `/metrics`, the console and the admin API. Reading costs no request anything.
"""

from __future__ import annotations

from typing import Any

from gateway.admission.admission import Admission
from gateway.admission.loads import Load
from gateway.admission.pools import Pool

RECENT_SECONDS = 60.0  # who was not refused for this long is not being throttled


def queue_of(admission: Admission, replica: str) -> dict[str, Any] | None:
    """The queue that feeds `replica`, and what the replica has from this gateway; None where it serves nobody at the moment.

    `waiting_*` are of the whole queue, which the replicas of one pool share; `running_*` and their bounds are the replica's own, a bound of
    None meaning that none is known.
    """
    load = admission.loads.get(replica)
    pool = next((pool for pool in admission.pools() if load in pool.loads), None) if load is not None else None
    if load is None or pool is None:
        return None
    return pool_view(pool, admission.now()) | load_view(load)


def load_view(load: Load) -> dict[str, Any]:
    """What one replica has: requests, sequences and KV tokens, with the most it takes."""
    return {
        "running_requests": load.requests,
        "running_sequences": load.sequences,
        "max_sequences": load.seats,
        "running_tokens": load.kv_tokens,
        "max_tokens": load.row.kv_cache_tokens,
        "on_trial": load.trial,
    }


def pool_view(pool: Pool, now: float) -> dict[str, Any]:
    """One queue: how much waits, for how long the next one has, who waits, and how long a new request would."""
    first = pool.queue.first(now)
    return {
        "dedicated_to": pool.tenant,
        "waiting_requests": pool.waiting,
        "waiting_tokens": pool.waiting_tokens,
        "waiting_bytes": pool.waiting_bytes,
        "waiting_by_tenant": pool.waiting_by_tenant(),
        "next_waited_seconds": round(now - first.since, 3) if first is not None else 0.0,
        "expected_wait_seconds": round(pool.expected_wait_seconds("", now), 3) if pool.waiting else 0.0,
    }


def throttled(admission: Admission) -> list[dict[str, Any]]:
    """Who is being throttled at the moment and why: every limit that refuses, the longest first."""
    rows = [row for row in limits(admission) if row["throttled_seconds"] is not None]
    return sorted(rows, key=lambda row: -row["throttled_seconds"])


def limits(admission: Admission) -> list[dict[str, Any]]:
    """Every limit: how much of it is used, how much of it this process holds, how often it refused, and since when it does."""
    now = admission.now()
    rows = []
    for gauge in admission.limits:
        gauge.window.advance(now)
        refuses = gauge.since is not None and now - gauge.refused_at <= RECENT_SECONDS
        rows.append(
            {
                "tenant": gauge.subject.tenant,
                "model": gauge.subject.model,
                "limit": gauge.kind,
                "full": gauge.full,
                "share": gauge.window.limit,
                "used": gauge.window.used,
                "refused": gauge.refused,
                "throttled_seconds": round(now - (gauge.since or now), 3) if refuses else None,
                "retry_after_seconds": round(gauge.window.wait_seconds(1, now), 3) if refuses else None,
            }
        )
    return rows


def queues(admission: Admission) -> list[dict[str, Any]]:
    """Every queue, with its model."""
    now = admission.now()
    return [{"model": pool.model} | pool_view(pool, now) for pool in admission.pools()]
