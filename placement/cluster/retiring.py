"""Replicas that are not needed any more: gateways are told to ask others first, and when all of them know, the seat is given up."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from placement.cluster.members import NodeReport, Seat

PATIENCE_SECONDS = 6.0
"""So long at the most: the node's controller lets requests finish in any case."""


class Retiring:
    """Who is on the way out. Nothing of it is written down: for a head that starts they are in their seats, and it begins anew."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._told: dict[str, int] = {}
        self._kept: frozenset[str] = frozenset()

    @property
    def leaving(self) -> frozenset[str]:
        """Replicas that keep their seats for a moment and get no new requests."""
        return self._kept

    def keep(
        self,
        seats: Mapping[str, Seat],
        before: Mapping[str, Seat],
        models: Collection[str],
        reports: Mapping[str, NodeReport],
        now_seconds: float,
    ) -> dict[str, Seat]:
        """The seats of `before` that are in `seats` no more, and are kept until every gateway knows.

        Only of replicas of `models` that run, and whose slice nobody else has by now. `reports` are those of the nodes that take
        orders, `now_seconds` is monotonic.
        """
        taken = {seat.key for seat in seats.values()}
        going = {
            replica: seat
            for replica, seat in before.items()
            if replica not in seats and seat.key not in taken and seat.model in models and _runs(seat, reports)
        }
        self._since = {replica: self._since.get(replica, now_seconds) for replica in going}
        self._told = {replica: told for replica, told in self._told.items() if replica in going}
        kept = {r: s for r, s in going.items() if not self._may_go(r, reports, now_seconds)}
        self._kept = frozenset(kept)
        return kept

    def _may_go(self, replica: str, reports: Mapping[str, NodeReport], now_seconds: float) -> bool:
        if now_seconds - self._since[replica] >= PATIENCE_SECONDS:
            return True
        told = self._told.get(replica)
        return told is not None and all(report.generation >= told for report in reports.values())

    def told(self, generation: int) -> None:
        """The table of `generation` says who is leaving."""
        for replica in self._kept:
            self._told.setdefault(replica, generation)


def _runs(seat: Seat, reports: Mapping[str, NodeReport]) -> bool:
    report = reports.get(seat.node)
    return report is not None and report.running.get(seat.replica) == seat.slice_id
