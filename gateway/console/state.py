"""What the console shows, as one value: the fleet to scale, who is slow, who is refused and why, and what is being changed. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from model_registry.catalogue import load_catalogue
from placement.assign import stem_of
from placement.status import ControllerStatus, ScalingRow
from placement.table import ReplicaState
from placement.transition.journal import Record

_IDENTITY = re.compile(r"(?:.*/)?(?P<gpu>GPU-[^/]+)/(?P<profile>[^@#]+)@(?P<start>\d+)")
WINDOW = "1m"


def console_state(
    rows: Sequence[Mapping[str, Any]],
    readiness: Mapping[str, Any],
    limits: Iterable[Mapping[str, Any]],
    reasons: Mapping[str, str | None],
    transition: Record | None,
    controller: ControllerStatus | None = None,
) -> dict[str, Any]:
    """`rows` are those of `/slices`, `limits` those of `gateway.admission.view`; `reasons` say why a replica is not ready.

    `controller` is what the one that runs tells of itself; None where there is none.
    """
    return {
        "ready": readiness["ready"],
        "draining": readiness["draining"],
        "generation": readiness["generation"],
        "problems": list(readiness["problems"]),
        "gpus": _gpus(rows),
        "slices": [_row(row, reasons) for row in rows],
        "throttled": _throttled(limits),
        "plan": _plan(controller),
        "transition": _transition(transition),
    }


def _row(row: Mapping[str, Any], reasons: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "slice": row["slice"],
        "model": row["model"],
        "replica": row["replica"],
        "state": row["state"],
        "reason": reasons.get(row["replica"] or ""),
        "queue": row.get("queue"),
        "window": row["windows"][WINDOW],
        "tenants": {name: tenant["windows"][WINDOW] for name, tenant in row["tenants"].items()},
    }


def _gpus(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cards with their slices in their places; what is no part of a card (cpu slices, engines elsewhere) is one row without a card."""
    cards: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        one = row["slice"]
        found = _IDENTITY.fullmatch(one["id"])
        card = found["gpu"] if found else one["gpu"] or ""
        shown = {
            "id": one["id"],
            "label": one["profile"] or one["kind"],
            "start": int(found["start"]) if found else None,
        }
        served = [name for name, tenant in row["tenants"].items() if tenant["windows"][WINDOW]["e2e_seconds"]["count"]]
        cards.setdefault(card, []).append(shown | {"model": row["model"], "state": row["state"], "tenants": served})
    for slices in cards.values():
        slices.sort(key=lambda s: (s["start"] or 0, s["id"]))
        widths = memory_slices(frozenset((s["label"], s["start"]) for s in slices if s["start"] is not None))
        for one in slices:
            one["width"] = widths.get(one["label"], 1) if one["start"] is not None else None
    return [{"gpu": card or None, "slices": slices} for card, slices in sorted(cards.items())]


@lru_cache(maxsize=256)
def memory_slices(layout: frozenset[tuple[str, int]]) -> Mapping[str, int]:
    """How many memory slices each profile of a card's layout (profiles with starts) takes.

    A name alone does not tell (`1g.10gb` is one slice of an H100 and two of an A100 with 40 GB), so the products are
    asked on which all of the layout is possible. Empty where there is none.
    """
    for product in load_catalogue().products:
        known = {p.name: p for p in product.profiles if p.plannable}
        if all(name in known and start in known[name].placements for name, start in layout):
            return {name: known[name].memory_slices or 1 for name, _ in layout}
    return {}


def _throttled(limits: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Limits that refuse at the moment, the longest first; then those that are half used, the fullest first."""
    shown = [_limit(one) for one in limits if one["throttled_seconds"] is not None or 2 * one["used"] >= one["full"]]
    return sorted(shown, key=lambda one: (-(one["throttled_seconds"] or -1.0), -one["share"], one["tenant"]))


def _limit(limit: Mapping[str, Any]) -> dict[str, Any]:
    where = f" on {limit['model']}" if limit["model"] else ""
    kind = str(limit["limit"]).replace("_", " ")
    share = limit["used"] / limit["full"] if limit["full"] else 1.0
    return {
        "tenant": limit["tenant"],
        "limit": f"{kind}{where}",
        "used": limit["used"],
        "full": limit["full"],
        "share": round(min(1.0, share), 3),
        "refused": limit["refused"],
        "throttled_seconds": limit["throttled_seconds"],
        "retry_after_seconds": limit["retry_after_seconds"],
    }


def _plan(status: ControllerStatus | None) -> dict[str, Any] | None:
    """What is to run, by model (`model@tenant` for a dedicated tenant's), how much of it does, and what has no slice."""
    if status is None:
        return None
    planned = Counter([stem_of(row.replica) for row in status.replicas] + list(map(stem_of, status.unplaced)))
    ready = Counter(stem_of(row.replica) for row in status.replicas if row.state is ReplicaState.READY)
    return {
        "models": [
            {"model": name, "planned": planned[name], "ready": ready[name], "demand": _demand(status.scaling.get(name))}
            for name in sorted(planned.keys() | status.scaling.keys())
        ],
        "unplaced": [
            {"replica": replica, "message": error.message, "remedy": error.remedy}
            for replica, error in sorted(status.unplaced.items())
        ],
        "refused": status.refused.error.message if status.refused else None,
        "repartition": status.repartition.step if status.repartition.running else None,
    }


def _demand(row: ScalingRow | None) -> str | None:
    """Of a model whose replicas follow demand: how many are asked for, within which bounds, and why."""
    if row is None:
        return None
    short = f", {row.short} without a slice" if row.short else ""
    return f"{row.replicas} of {row.least} to {row.most}{short} ({row.reason})"


def _transition(record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    failed = record.failed
    return {
        "started_at": record.started_at.isoformat(),
        "steps": [
            {
                "number": step.number,
                "what": str(step),
                "state": "done"
                if step.number in record.done
                else "failed"
                if failed is not None and failed[0] == step.number
                else "to do",
            }
            for step in record.transition.steps
        ],
        "error": dict(failed[1]) if failed is not None else None,
    }
