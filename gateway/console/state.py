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
UNCUT = frozenset({"gpu", "mps", "time-slice"})
"""Kinds of slices that are a card, or an equal share of one."""


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
    """Cards with their slices in their places; what is no part of a card (cpu slices, engines elsewhere) is one row without a card.

    `columns` is what the whole card is in the slices' own unit (memory slices, or sharers of a card that is not cut); None where
    nobody knows.
    """
    cards: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        one = row["slice"]
        found = _IDENTITY.fullmatch(one["id"])
        card = found["gpu"] if found else one["gpu"] or ""
        shown = {
            "id": one["id"],
            "label": one["profile"] or one["kind"],
            "start": int(found["start"]) if found else None,
            "kind": one["kind"],
            "product": one.get("product"),
        }
        served = [name for name, tenant in row["tenants"].items() if tenant["windows"][WINDOW]["e2e_seconds"]["count"]]
        cards.setdefault(card, []).append(shown | {"model": row["model"], "state": row["state"], "tenants": served})
    return [
        {"gpu": card or None, "columns": _set_widths(slices), "slices": slices}
        for card, slices in sorted(cards.items())
    ]


def _set_widths(slices: list[dict[str, Any]]) -> int | None:
    """Give every slice of one card its place and width, in order; the card's own width, None where that cannot be known."""
    slices.sort(key=lambda s: (s["start"] or 0, s["id"]))
    if all(s["kind"] in UNCUT for s in slices):
        for place, one in enumerate(slices):
            one["start"], one["width"] = place, 1
        return len(slices)
    layout = frozenset((s["label"], s["start"]) for s in slices if s["start"] is not None)
    product = next((s["product"] for s in slices if s["product"]), None)
    widths, total = memory_slices(layout, product), card_memory_slices(layout, product)
    for one in slices:
        one["width"] = widths.get(one["label"], 1) if one["start"] is not None else None
    if not layout:
        return None
    return total or max([8, *(one["start"] + one["width"] for one in slices if one["start"] is not None)])


def memory_slices(layout: frozenset[tuple[str, int]], product: str | None = None) -> Mapping[str, int]:
    """How many memory slices each profile of a card's layout (profiles with starts) takes; empty where no card can be cut so."""
    return _drawn(layout, product)[0]


def card_memory_slices(layout: frozenset[tuple[str, int]], product: str | None = None) -> int | None:
    """How many memory slices the card has that is cut so: 8 mostly, 4 of an A30, 12 of an RTX PRO 6000; None where none is known."""
    return _drawn(layout, product)[1]


@lru_cache(maxsize=256)
def _drawn(layout: frozenset[tuple[str, int]], named: str | None) -> tuple[Mapping[str, int], int | None]:
    """A profile's name alone does not tell (`1g.10gb` is one slice of an H100 and two of an A100 with 40 GB). Where the product is
    not `named`, the products are asked on which all of the layout is possible, and of several the one on which it is the
    smallest part of the card: the profiles of a name that take more are those that hardly anybody cuts (more memory for the
    same compute).
    """
    possible = []
    products = load_catalogue().products
    mine = [p for p in products if p.name == named]
    for product in mine or products:
        known = {p.name: p.memory_slices or 1 for p in product.profiles if mine or p.plannable}
        starts = {p.name: p.placements for p in product.profiles}
        if product.memory_slices and all(name in known and start in starts[name] for name, start in layout):
            taken = sum(known[name] for name, _ in layout)
            possible.append((taken / product.memory_slices, {name: known[name] for name, _ in layout}, product))
    if not layout or not possible:
        return {}, None
    _, widths, product = min(possible, key=lambda one: one[0])
    return widths, product.memory_slices


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
