"""A transition of a cluster on its way: which seats, which replicas that leave, and which cuts it asks for in a round of the head.

Nothing here waits or calls anybody. Each round it looks at what nodes report, notes the steps that are done, and begins those that may be
taken: so a head that is killed at any moment needs nothing but the record to go on. What a step asks for stands until it is done: an engine
that is to start has a seat, one that leaves gets no new requests before it loses its own.

While it is under way nothing else changes seats. Where a step fails, a node is lost or the configuration is another one, it is over: the head
seats replicas as always, by what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model_registry.errors import SlicewayError
from placement.cluster.cutting import CutOrder
from placement.cluster.errors import NodeLost
from placement.cluster.members import NodeReport, Seat
from placement.cluster.retiring import PATIENCE_SECONDS
from placement.errors import NotCarriedOut, StalePlan
from placement.table import ReplicaRow, ReplicaState, RoutingTable
from placement.transition.journal import Record
from placement.transition.steps import Step

CUT_SECONDS = 180.0
CHECK_SECONDS = 60.0
AWAY_SECONDS = 30.0
"""How long a node without replicas is waited for that does not answer; one with replicas as long as the head waits for any."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine may take to start, and to end, in seconds."""

    start: float = 600.0
    stop: float = 120.0


@dataclass(frozen=True, slots=True)
class Round:
    """What the head sees in one round. `reports` are those of nodes that take orders, `alive` all nodes that answer, `held` the
    slices in Ray's books, `now` monotonic seconds.
    """

    reports: Mapping[str, NodeReport]
    alive: frozenset[str]
    held: Mapping[str, Seat]
    config: str
    now: float


class Carrying:
    """One transition. `look` is a round; `record` is what has to be written down."""

    def __init__(self, record: Record, patience: Patience, *, allow_mode_change: bool = False) -> None:
        self.record = record
        self._patience = patience
        self._allow_mode_change = allow_mode_change
        self._since: dict[int, float] = {}
        self._told: dict[int, int] = {}
        self._cut: set[int] = set()
        self._errors: dict[int, SlicewayError] = {}
        self._unanswered: dict[int, SlicewayError] = {}
        self._away: dict[str, float] = {}

    @property
    def over(self) -> bool:
        """Whether nothing of it goes on: it is finished, or has failed."""
        return self.record.finished or self.record.failed is not None

    @property
    def leaving(self) -> frozenset[str]:
        """Replicas that get no new requests, because their turn to end has come."""
        if self.over:
            return frozenset()
        begun = {*self.record.done, *self._since}
        return frozenset(
            str(s.replica) for s in self.record.transition.steps if s.kind == "drain" and s.number in begun
        )

    @property
    def reserved(self) -> dict[str, str]:
        """Notes of the slices that it has made for other work so far, and of those that a node may have been told to make, be it by a head
        before this one.
        """
        made = {*self.record.done, *(s.number for s in self._ready())}
        return {
            s.place.slice_id: s.reserved
            for s in self.record.transition.steps
            if s.kind == "create" and s.reserved is not None and s.number in made
        }

    @property
    def begun(self) -> list[int]:
        """Numbers of the steps that are being taken."""
        return [] if self.over else [s.number for s in self._ready() if s.number in self._since]

    def look(self, seats: Mapping[str, Seat], seen: Round) -> dict[str, Seat]:
        """Note what is done, begin what may begin. Gives the seats from here on; `seats` are those so far."""
        now = dict(seats)
        if (trouble := self._trouble(now, seen)) is not None:
            self._fail(self.record.left[0], trouble)
            return now
        if self._away:
            return now
        while done := [s for s in self._ready() if self._is_done(s, now, seen)]:
            for step in done:
                self.record = self.record.with_done(step.number)
        for step in self._ready():
            if (error := self._obstacle(step, seen)) is not None:
                self._fail(step, error)
                break
            self._since.setdefault(step.number, seen.now)
            self._seat(step, now)
        return now

    def cuts(self, asked: frozenset[int]) -> list[tuple[Step, str, CutOrder]]:
        """The cuts that nodes are to be told, but for those that they are `asked` for already."""
        if self.over:
            return []
        return [
            (step, node_of(step), self._order(step))
            for step in self._ready()
            if step.kind in ("create", "destroy")
            and step.number not in asked | self._cut
            and step.number in self._since
        ]

    def answered(self, step: Step, error: SlicewayError | None) -> None:
        """What a node said to a cut."""
        if error is None:
            self._cut.add(step.number)
        else:
            self._errors[step.number] = error

    def unanswered(self, step: Step, error: SlicewayError) -> None:
        """A node was told to cut and said nothing."""
        self._unanswered[step.number] = error

    def told(self, table: RoutingTable) -> None:
        """`table` is what gateways are told: who leaves, and who serves."""
        ready = {row.replica for row in table.replicas if row.state is ReplicaState.READY}
        for step in self._ready():
            if step.number in self._since and (step.replica in ready) is (step.kind == "check"):
                self._told.setdefault(step.number, table.generation)

    # ---- what is done

    def _ready(self) -> list[Step]:
        return [s for s in self.record.left if all(n in self.record.done for n in s.after)]

    def _is_done(self, step: Step, seats: Mapping[str, Seat], seen: Round) -> bool:
        report = seen.reports[node_of(step)]
        begun = step.number in self._since
        there = any(one.id == slice_of(step) for one in report.slices)
        runs = report.running.get(str(step.replica)) == slice_of(step)
        row = _row(step, report)
        ready = row is not None and row.state is ReplicaState.READY
        match step.kind:
            case "create":
                return step.number in self._cut and there
            case "destroy":
                return step.number in self._cut and not there
            case "drain":
                return begun and (not runs or self._everybody_knows(step, seen))
            case "stop":
                held = seen.held.get(str(step.replica))
                return begun and step.replica not in seats and not runs and (held is None or held != seat_of(step))
            case "start":
                return begun and ready
            case "check":
                return begun and ready and self._everybody_knows(step, seen)
            case _:
                return begun

    def _everybody_knows(self, step: Step, seen: Round) -> bool:
        told = self._told.get(step.number)
        if told is None:
            return False
        late = seen.now - self._since[step.number] >= PATIENCE_SECONDS
        return late or all(report.generation >= told for report in seen.reports.values())

    # ---- what is asked for

    def _seat(self, step: Step, seats: dict[str, Seat]) -> None:
        if step.kind == "start":
            seats[str(step.replica)] = seat_of(step)
        elif step.kind == "stop" and seats.get(str(step.replica)) == seat_of(step):
            del seats[str(step.replica)]

    def _order(self, step: Step) -> CutOrder:
        return CutOrder(
            gpu=step.place.gpu.partition("/")[2],
            slice=str(step.place.placement),
            there=step.kind == "create",
            allow_mode_change=self._allow_mode_change,
        )

    # ---- what goes wrong

    def _trouble(self, seats: Mapping[str, Seat], seen: Round) -> SlicewayError | None:
        """What ends it whatever step it is at."""
        needed = {node_of(step) for step in self.record.left}
        self._away = {node: self._away.get(node, seen.now) for node in needed - seen.alive}
        gone = {node for node, since in self._away.items() if seen.now - since > AWAY_SECONDS}
        disobedient = (needed & seen.alive) - seen.reports.keys()
        lost = sorted(gone | disobedient | {s.node for s in seats.values() if s.node not in seen.alive})
        if lost:
            return NodeLost(
                f"node {lost[0]!r} does not take part any more",
                where=lost[0],
                remedy="Its replicas are seated elsewhere where there is room. Plan again with what is there.",
            )
        if seen.config != self.record.transition.wanted:
            return StalePlan(
                "the cluster was given another configuration meanwhile",
                remedy="Plan again: sliceway plan CONFIG --ray; then apply.",
            )
        return None

    def _obstacle(self, step: Step, seen: Round) -> SlicewayError | None:
        """Why this step cannot be taken, or is taken for too long."""
        if (error := self._errors.get(step.number)) is not None:
            return error
        report = seen.reports[node_of(step)]
        row = _row(step, report)
        if step.kind in ("start", "check") and row is not None and row.state is ReplicaState.FAILED:
            return NotCarriedOut(f"{step.replica} failed: {row.reason}", where=str(step.place))
        if step.kind == "start" and not any(one.id == slice_of(step) for one in report.slices):
            return StalePlan(f"{step}: there is no such slice", remedy="Plan again: sliceway plan CONFIG --ray.")
        waited = seen.now - self._since.get(step.number, seen.now)
        if waited > self._most_seconds(step):
            silence = self._unanswered.get(step.number)
            why = report.waiting.get(str(step.replica), silence or "`sliceway node list` shows what it does")
            return NotCarriedOut(f"{step}: not done after {waited:.0f} s: {why}", where=str(step.place))
        return None

    def _most_seconds(self, step: Step) -> float:
        match step.kind:
            case "start":
                return self._patience.start
            case "stop":
                return self._patience.stop
            case "create" | "destroy":
                return CUT_SECONDS
            case _:
                return CHECK_SECONDS

    def _fail(self, step: Step, error: SlicewayError) -> None:
        self.record = self.record.with_failure(step.number, error)


def node_of(step: Step) -> str:
    """The node that a step is about."""
    return step.place.gpu.partition("/")[0]


def slice_of(step: Step) -> str:
    """Its slice, as the node knows it."""
    return step.place.slice_id.partition("/")[2]


def seat_of(step: Step) -> Seat:
    """The seat that its replica gets, or gives up."""
    model = str(step.demand).partition("@")[0]
    return Seat(replica=str(step.replica), model=model, node=node_of(step), slice_id=slice_of(step))


def _row(step: Step, report: NodeReport) -> ReplicaRow | None:
    rows = report.table.replicas
    return next((r for r in rows if r.replica == step.replica and r.slice.id == slice_of(step)), None)


def outcome_of(record: Record) -> dict[str, object]:
    """How far it came: the stable JSON shape, as of `sliceway apply` on one machine."""
    steps = record.transition.steps
    failed, error = record.failed or (None, None)
    return {
        "ok": record.finished,
        "done": [s.as_public() for s in steps if s.number in record.done],
        "not_done": [s.as_public() for s in record.left],
        "failed": steps[failed].as_public() if failed is not None else None,
        "error": dict(error) if error is not None else None,
    }
