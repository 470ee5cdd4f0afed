"""An upgrade over a whole cluster: one replica at a time, and only after every gateway has been told to ask another one."""

from __future__ import annotations

from collections.abc import Mapping

from placement.cluster.members import NodeReport, Seat
from placement.rolling import Standing, next_turn
from placement.table import ReplicaState, RoutingTable


class Rollout:
    """Whose turn it is (`placement.rolling`), in two steps: `leaving` in the table that gateways follow, then `turns` for its node.

    Nothing of it is written down: a head that starts finds in the nodes' reports who is outdated and who is being started.
    """

    def __init__(self) -> None:
        self._in_turn: str | None = None
        self._waits = False
        self._told_at: int | None = None
        self._everybody_knows = False

    @property
    def leaving(self) -> frozenset[str]:
        """The replica that gets no new requests, because it is about to be replaced."""
        return frozenset({self._in_turn}) if self._in_turn is not None and self._waits else frozenset()

    @property
    def turns(self) -> frozenset[str]:
        """The replica that its node is to replace now."""
        return self.leaving if self._everybody_knows else frozenset()

    def look(self, reports: Mapping[str, NodeReport], seats: Mapping[str, Seat]) -> None:
        """See how far it is. `reports` are those of the nodes that take orders."""
        standings = [standing for r, s in seats.items() if (standing := _standing(r, s, reports)) is not None]
        before, self._in_turn = self._in_turn, next_turn(standings, self._in_turn)
        self._waits = any(one.replica == self._in_turn and one.outdated for one in standings)
        if self._in_turn != before:
            self._told_at, self._everybody_knows = None, False
        if self._told_at is not None:
            self._everybody_knows = all(report.generation >= self._told_at for report in reports.values())

    def told(self, generation: int) -> None:
        """The table of `generation` says who is leaving."""
        if self.leaving and self._told_at is None:
            self._told_at = generation


def _standing(replica: str, seat: Seat, reports: Mapping[str, NodeReport]) -> Standing | None:
    report = reports.get(seat.node)
    if report is None:
        return None
    state = _state(report.table, replica, seat)
    return Standing(
        replica,
        seat.model,
        outdated=replica in report.outdated,
        serves=state is ReplicaState.READY,
        failed=state is ReplicaState.FAILED,
    )


def _state(table: RoutingTable, replica: str, seat: Seat) -> ReplicaState | None:
    return next((r.state for r in table.replicas if (r.replica, r.slice.id) == (replica, seat.slice_id)), None)
