"""How far a cluster's head is with the steps of a plan, as somebody who waits for it follows: step by step, also over a head that is killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from model_registry.errors import SlicewayError
from placement.cluster.errors import ClusterUnreachable, NodeLost
from placement.errors import PlacementError, StalePlan
from placement.transition import Outcome, Step

LOOK_SECONDS = 0.5
_SILENT_SECONDS = 120.0

Watch = Callable[[Step, Literal["begun", "done", "failed"]], None]


def follow(
    told: Iterator[Mapping[str, Any] | None], watch: Watch, *, monotonic: Callable[[], float] = time.monotonic
) -> Outcome:
    """Show every step as it begins, and give what came of all. `told` is what the head tells of its transition, again and again; None
    where there is no head. Raises ClusterUnreachable where no head tells anything for too long.
    """
    seen: set[int] = set()
    heard = monotonic()
    for transition in told:
        if transition is None:
            if monotonic() - heard > _SILENT_SECONDS:
                break
            continue
        heard = monotonic()
        for raw in (*transition["done"], *(s for s in transition["not_done"] if s["step"] in transition["begun"])):
            if raw["step"] not in seen:
                seen.add(raw["step"])
                watch(Step.of_public(raw), "begun")
        if not transition["under_way"]:
            outcome = _outcome(transition)
            if outcome.failed is not None:
                watch(outcome.failed, "failed")
            return outcome
    raise ClusterUnreachable(
        "the cluster's head does not tell how far it is",
        remedy="What serves goes on, and the head that starts next goes on with the steps. `sliceway node list` shows how far it is.",
    )


def _outcome(raw: Mapping[str, Any]) -> Outcome:
    error: SlicewayError | None = None
    if raw["error"] is not None:
        why = raw["error"]
        kind = next((known for known in (StalePlan, NodeLost) if known.code == why.get("code")), PlacementError)
        error = kind(why["message"], where=why["where"], remedy=why["remedy"])
    return Outcome(
        tuple(Step.of_public(s) for s in raw["done"]),
        tuple(Step.of_public(s) for s in raw["not_done"]),
        Step.of_public(raw["failed"]) if raw["failed"] is not None else None,
        error,
    )
