"""The head's part in carrying out a plan: one transition at a time, what has to be written down of it, and what is left of it afterwards.

What is left are the slices that were made for other work, which no replica gets, and the numbers of replicas that the plan has found
for configured demands, which count for as long as the configuration is the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from model_registry.errors import SlicewayError
from placement.assign import stem_of
from placement.cluster.carrying import Carrying, Patience, Round, node_of, outcome_of
from placement.cluster.cutting import CutOrder
from placement.cluster.errors import NodeLost
from placement.cluster.members import Seat
from placement.errors import StalePlan
from placement.schema import EngineConfig
from placement.table import RoutingTable
from placement.transition.journal import Record, public_record, record_of
from placement.transition.steps import Step, Transition

log = logging.getLogger(__name__)

Cut = Callable[[str, CutOrder], Awaitable[None]]
"""Node and order; returns when it is done, and raises where it cannot be."""

_SLACK_SECONDS = 60.0


Why = Literal["apply", "configuration", "demand"]
"""For what a transition is carried out: an operator's `sliceway apply`, what the configuration wants, or what demand asks for."""


class TransitionsJournal(BaseModel):
    """What the next head has to know. `record` is a transition, the last one also when it is over; `counts` are replicas by pool, and
    `counts_else` what they are, as before it, where it is not carried out to its end.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    record: str = ""
    why: Why = "apply"
    allow_mode_change: bool = False
    reserved: Mapping[str, str] = {}
    counts: Mapping[str, int] = {}
    counts_for: str = ""
    counts_else: Mapping[str, int] = {}


class Transitions:
    """At most one is under way. `cut` tells a node to cut a GPU."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._carrying: Carrying | None = None
        self._journal = TransitionsJournal()
        self._written: Record | None = None
        self._asked: dict[int, tuple[Step, asyncio.Task[None]]] = {}

    @property
    def under_way(self) -> bool:
        """Whether steps are being taken."""
        return self._carrying is not None and not self._carrying.over

    @property
    def leaving(self) -> frozenset[str]:
        """Replicas that get no new requests, because their turn to end has come."""
        return self._carrying.leaving if self._carrying is not None else frozenset()

    @property
    def reserved(self) -> Mapping[str, str]:
        """Notes of the slices for other work, by their names in the cluster."""
        made = self._carrying.reserved if self._carrying is not None else {}
        return {**self._journal.reserved, **made}

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes that the steps are about which are left."""
        return frozenset(map(node_of, self._carrying.record.left)) if self.under_way and self._carrying else frozenset()

    @property
    def going(self) -> frozenset[str]:
        """Slices that a node is destroying, as far as it has not answered, by their names in the cluster: also when the rest is over."""
        return frozenset(
            step.place.slice_id for step, task in self._asked.values() if step.kind == "destroy" and not task.done()
        )

    def counts(self, config: str) -> Mapping[str, int]:
        """How many replicas pools have by the plan that was carried out for `config`; empty where none was."""
        return self._journal.counts if self._journal.counts_for == digest(config) else {}

    @property
    def journal(self) -> TransitionsJournal:
        """What is to be written down."""
        record = self._carrying.record if self._carrying is not None else None
        if record is not None and record is not self._written:
            self._written = record
            self._journal = self._journal.model_copy(
                update={"record": json.dumps(public_record(record)), "reserved": dict(self.reserved)}
            )
        return self._journal

    def restore(self, journal: TransitionsJournal, config: str) -> None:
        """Go on where a head before this one was."""
        self._journal, self._carrying = journal, None
        if journal.record:
            try:
                record = record_of(json.loads(journal.record))
            except (KeyError, TypeError, ValueError, SlicewayError) as error:
                log.error("the record of a transition makes no sense, and is not gone on with: %s", error)
                return
            self._carrying = Carrying(record, _patience(config), allow_mode_change=journal.allow_mode_change)

    def begin(
        self,
        transition: Transition,
        at: datetime,
        config: str,
        reserved: Mapping[str, str],
        *,
        allow_mode_change: bool,
        why: Why = "apply",
        following: Collection[str] = (),
    ) -> None:
        """From the next round on. `reserved` are the slices for other work that there are. Raises StalePlan while another one is under way.

        An operator's plan says the number of every pool. What is carried out unasked says it of those alone that have more or fewer replicas
        by its steps, and what is for demand not of pools whose numbers are `following` it; the others keep theirs, and so do all
        where it is not carried out to its end.
        """
        if self._carrying is not None and self.under_way:
            left, all_ = len(self._carrying.record.left), len(self._carrying.record.transition.steps)
            raise StalePlan(
                f"another transition is under way, {left} of {all_} steps are left",
                remedy="Wait until it is over: sliceway node list shows how far it is; then plan again.",
            )
        if busy := sorted({step.place.gpu for step, task in self._asked.values() if not task.done()}):
            raise StalePlan(
                f"{', '.join(busy)}: still being cut for a plan that was stopped",
                remedy="Wait a moment; then plan again: sliceway plan CONFIG --ray.",
            )
        before = self.counts(config)
        if why == "apply":
            counts: Mapping[str, int] = Counter(map(stem_of, transition.seats))
        else:  # what demand has brought is to go when demand does
            counts = _changed(before, transition, without=following if why == "demand" else ())
        self._journal = TransitionsJournal(
            why=why,
            allow_mode_change=allow_mode_change,
            reserved=reserved,
            counts=dict(sorted(counts.items())),
            counts_for=transition.wanted,
            counts_else=before,
        )
        self._asked = {}
        self._carrying = Carrying(Record(transition, at), _patience(config), allow_mode_change=allow_mode_change)

    def look(self, seats: Mapping[str, Seat], seen: Round) -> dict[str, Seat] | None:
        """One round: the seats from here on; None where nothing is under way, from the round on in which it ends."""
        if self._carrying is None or self._carrying.over:
            return None
        found = self._carrying.look(seats, seen)
        if self._carrying.over:
            record = self._carrying.record
            log.info("a transition is over: %d of %d steps done", len(record.done), len(record.transition.steps))
            if (
                not record.finished
            ):  # the numbers of a plan that has not come true are not those of anything that serves
                self._journal = self._journal.model_copy(update={"counts": self._journal.counts_else})
                self._written = None
            return None
        for step, node, order in self._carrying.cuts(frozenset(self._asked)):
            self._asked[step.number] = step, asyncio.create_task(self._tell(self._carrying, step, node, order))
        return found

    async def _tell(self, carrying: Carrying, step: Step, node: str, order: CutOrder) -> None:
        try:
            await self._cut(node, order)
        except NodeLost as error:
            # Its agent may have been started again, and may have done it or not: it looks at its driver when it is asked again.
            log.info("%s: %s; it is asked again", step, error)
            carrying.unanswered(step, error)
            if self._carrying is carrying:
                self._asked.pop(step.number, None)
        except SlicewayError as error:
            carrying.answered(step, error)
        except Exception as error:  # noqa: BLE001 - whatever keeps the node from it, it is not done
            carrying.answered(step, NodeLost(f"{step}: {error or type(error).__name__}", where=node))
        else:
            carrying.answered(step, None)

    def told(self, table: RoutingTable) -> None:
        """`table` is what gateways are told."""
        if self._carrying is not None and self.under_way:
            self._carrying.told(table)

    def in_short(self) -> dict[str, object] | None:
        """As `as_public`, with numbers of steps in the place of steps: what everybody asks for all the time."""
        if self._carrying is None:
            return None
        record = self._carrying.record
        return {
            "under_way": self.under_way,
            "why": self._journal.why,
            "steps": len(record.transition.steps),
            "done": len(record.done),
            "error": dict(record.failed[1]) if record.failed is not None else None,
        }

    def as_public(self) -> dict[str, object] | None:
        """How far the transition is, or how the last one ended; None if there was none."""
        if self._carrying is None:
            return None
        carrying = self._carrying
        told = {"under_way": self.under_way, "why": self._journal.why, "begun": carrying.begun}
        return outcome_of(carrying.record) | told

    @property
    def for_demand(self) -> bool:
        """Whether GPUs are being cut anew for demand."""
        return self.under_way and self._journal.why == "demand"


def _changed(before: Mapping[str, int], transition: Transition, without: Collection[str]) -> dict[str, int]:
    """The numbers after `transition`, by pool: as `before`, but for pools that its steps give more replicas, or fewer.

    Replicas that wait for a slice have none of its seats, and are counted in `before`.
    """
    change = Counter(stem_of(str(step.replica)) for step in transition.steps if step.kind == "start")
    change.subtract(stem_of(str(step.replica)) for step in transition.steps if step.kind == "stop")
    seated = Counter(map(stem_of, transition.seats))
    counts = dict(before)
    for pool in change.keys() - set(without):
        if change[pool] > 0:
            counts[pool] = max(seated[pool], before.get(pool, 0))
        elif change[pool] < 0 and pool in before:
            counts[pool] = min(seated[pool], before[pool])
    return counts


def digest(config: str) -> str:
    """What tells one configuration from another."""
    return hashlib.sha256(config.encode()).hexdigest()[:16]


def kept(reserved: Mapping[str, str], slices: Collection[str], nodes: Collection[str]) -> dict[str, str]:
    """The reservations whose `slices` are there, or on none of `nodes`, which have told theirs."""
    return {key: note for key, note in reserved.items() if key in slices or key.partition("/")[0] not in nodes}


def _patience(config: str) -> Patience:
    """As the configuration's engines are given."""
    try:
        engine = EngineConfig.model_validate(json.loads(config).get("engine", {}))
    except (ValueError, ValidationError):
        return Patience()
    ending = engine.drain_timeout_seconds + engine.stop_timeout_seconds
    return Patience(engine.start_timeout_seconds + _SLACK_SECONDS, ending + _SLACK_SECONDS)
