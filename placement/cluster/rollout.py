"""An upgrade over a whole cluster: one replica at a time, and only after every gateway has been told to ask another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from placement.cluster.members import NodeReport, Seat
from placement.cluster.retiring import PATIENCE_SECONDS
from placement.rolling import Standing, next_turn
from placement.table import ReplicaState


class Rollout:
    """Whose turn it is (`placement.rolling`), in two steps: `leaving` in the table that gateways follow, then `turns` for its node.

    Whoever another one starts beside (`placement.cluster.renewing`) has its turn and goes on meanwhile. Nothing of it is written down: a head that starts finds in the nodes' reports who is outdated and who is being started.
    """

    def __init__(self) -> None:
        self._in_turn: str | None = None
        self._new = True
        self._waits = False
        self._stay: Collection[str] = ()
        self._told_at: int | None = None
        self._waits_since: float | None = None
        self._everybody_knows = False

    @property
    def leaving(self) -> frozenset[str]:
        """The replica that gets no new requests, because it is about to be replaced."""
        waits = self._in_turn is not None and self._waits and self._in_turn not in self._stay
        return frozenset({self._in_turn}) if waits and self._in_turn is not None else frozenset()

    @property
    def begins(self) -> str | None:
        """The replica that is to be replaced, as long as nobody has been told that it is leaving."""
        return next(iter(self.leaving), None) if self._told_at is None else None

    @property
    def turns(self) -> frozenset[str]:
        """The replica that its node is to replace now."""
        return self.leaving if self._everybody_knows else frozenset()

    def stay(self, replicas: Collection[str]) -> None:
        """These are left when another one has their place, and not before."""
        self._stay = replicas

    def look(
        self,
        reports: Mapping[str, NodeReport],
        seats: Mapping[str, Seat],
        *,
        now_seconds: float = 0.0,
        pause: bool = False,
        serving_on: Collection[str] = (),
    ) -> None:
        """See how far it is. `reports` are those of the nodes that take orders, `now_seconds` is monotonic. With `pause` it is nobody else's
        turn yet; it is never that of one that is `serving_on`.
        """
        states = _states(reports, {replica: seat for replica, seat in seats.items() if replica not in serving_on})
        standings = [_standing(seats[r], state, r in reports[seats[r].node].outdated) for r, state in states.items()]
        before, turn = self._in_turn, next_turn(standings, self._before(states, standings))
        self._in_turn = None if pause and turn != before else turn
        self._waits = any(one.replica == self._in_turn and one.outdated for one in standings)
        if self._in_turn != before:
            self._told_at, self._waits_since, self._everybody_knows = None, None, False
        if self._told_at is not None:
            self._waits_since = now_seconds if self._waits_since is None else self._waits_since
            late = (
                now_seconds - self._waits_since >= PATIENCE_SECONDS
            )  # a node that cannot write a table keeps nobody from its turn
            self._everybody_knows = late or all(report.generation >= self._told_at for report in reports.values())

    def told(self, generation: int) -> None:
        """The table of `generation` says who is leaving."""
        if self.leaving and self._told_at is None:
            self._told_at = generation

    def _before(self, states: Mapping[str, ReplicaState | None], standings: Sequence[Standing]) -> str | None:
        """Who was in turn. For a head that has just begun that is who stays until another one has its place, else who is being
        started, where others are outdated.
        """
        if self._new and standings:
            self._new = False
            if self._stay:
                return min(self._stay)
            if any(one.outdated for one in standings):
                starting = (one.replica for one in standings if one.under_way)
                return min((r for r in starting if states[r] is ReplicaState.STARTING), default=None)
        return self._in_turn


def _states(reports: Mapping[str, NodeReport], seats: Mapping[str, Seat]) -> Mapping[str, ReplicaState | None]:
    """Of every replica that is seated on a node that has reported; None where the node does not run it there."""
    found = {(r.node, row.replica, row.slice.id): row.state for r in reports.values() for row in r.table.replicas}
    return {
        replica: found.get((seat.node, replica, seat.slice_id))
        for replica, seat in seats.items()
        if seat.node in reports
    }


def _standing(seat: Seat, state: ReplicaState | None, outdated: bool) -> Standing:
    return Standing(
        seat.replica,
        seat.model,
        outdated=outdated,
        serves=state is ReplicaState.READY,
        failed=state is ReplicaState.FAILED,
    )
