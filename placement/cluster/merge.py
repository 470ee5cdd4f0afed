"""The routing table of the cluster, out of the nodes' own: values in, values out."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

from model_registry.errors import SlicewayError
from model_registry.words import sentences
from placement.cluster.members import NodeReport, Seat, slice_key
from placement.demanded import model_of
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

_NOWHERE = "unix:/dev/null"


class MergeBook:
    """The merge, which is asked for in every round: a node's rows are made anew only where something of it is another than last time."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, _Part]] = {}

    def merge(
        self,
        models: tuple[ModelRow, ...],
        reports: Mapping[str, NodeReport],
        seats: Mapping[str, Seat],
        waiting: Mapping[str, str],
        previous: RoutingTable,
        *,
        secret: str = "",
        leaving: Container[str] = (),
        unplaced: Mapping[str, str] | None = None,
    ) -> RoutingTable:
        """The table after `previous`: equal to it if nothing in it has changed, else of the next generation.

        A node's rows count for the replicas that have their seat there; what it still runs of others drains. `waiting` says
        of replicas that have a seat and no engine yet what they wait for. `secret` is what engines ask for that have none of
        their own: those of a node of an earlier version, or started by one.
        Replicas that are `leaving` get no new requests, whatever their nodes say. `unplaced` says why others have no seat.
        """
        by_node: dict[str, dict[str, Seat]] = {node: {} for node in sorted(reports)}
        for replica, seat in seats.items():
            by_node.setdefault(seat.node, {})[replica] = seat
        before, self._kept = self._kept, {}
        for node, here in by_node.items():
            report = reports.get(node)
            waits = {replica: waiting[replica] for replica in here if replica in waiting}
            leave = frozenset(replica for replica in here if replica in leaving)
            told = (report.table.replicas, report.slices, report.waiting) if report else None
            origin = (told, here, waits, leave, secret)
            known = before.get(node)
            if known is None or known[0] != origin:
                known = origin, _part(node, report, here, waits, leave, secret)
            self._kept[node] = known
        parts = [self._kept[node][1] for node in by_node]
        table = RoutingTable(
            generation=previous.generation,
            models=_with_unplaced(models, unplaced or {}),
            replicas=tuple(sorted((row for part in parts for row in part.replicas), key=lambda row: row.replica)),
            idle=tuple(row for part in parts for row in part.idle),
        )
        return table if table == previous else table.model_copy(update={"generation": previous.generation + 1})


@dataclass(frozen=True, slots=True)
class _Part:
    """One node's rows of the table."""

    replicas: tuple[ReplicaRow, ...]
    idle: tuple[SliceRow, ...]


def _part(
    node: str,
    report: NodeReport | None,
    seats: Mapping[str, Seat],
    waiting: Mapping[str, str],
    leaving: Collection[str],
    secret: str,
) -> _Part:
    """Of the node whose seats these are; `report` None: it takes no part."""
    rows: dict[str, ReplicaRow] = {}
    for row in report.table.replicas if report else ():
        seat = seats.get(row.replica)
        if seat is not None and row.slice.id == seat.slice_id:
            rows[row.replica] = _at_node(node, row, secret, leaving=row.replica in leaving)
    for replica, seat in seats.items():
        if replica not in rows:
            rows[replica] = _not_yet(seat, report, _reason(seat, report, waiting))
    taken = {seat.slice_id for seat in seats.values()}
    idle = (one for one in (report.slices if report else ()) if one.id not in taken)
    return _Part(tuple(rows.values()), tuple(_slice_row(node, one.as_public()) for one in idle))


def _with_unplaced(models: tuple[ModelRow, ...], unplaced: Mapping[str, str]) -> tuple[ModelRow, ...]:
    by_model: dict[str, dict[str, str]] = {}
    for replica, why in unplaced.items():
        by_model.setdefault(model_of(replica), {})[replica] = why
    return tuple(row.model_copy(update={"unplaced": by_model.get(row.name, {})}) for row in models)


def _at_node(node: str, row: ReplicaRow, secret: str, *, leaving: bool) -> ReplicaRow:
    there = row.slice.model_copy(update={"id": slice_key(node, row.slice.id)})
    state = ReplicaState.DRAINING if leaving and row.state is ReplicaState.READY else row.state
    return row.model_copy(update={"slice": there, "secret": row.secret or secret or None, "state": state})


def _reason(seat: Seat, report: NodeReport | None, waiting: Mapping[str, str]) -> str:
    told = report.waiting.get(seat.replica) if report else None
    return waiting.get(seat.replica) or told or "its node has not taken it up yet"


def _not_yet(seat: Seat, report: NodeReport | None, why: str) -> ReplicaRow:
    found = next((s for s in report.slices if s.id == seat.slice_id), None) if report else None
    shown = _slice_row(seat.node, found.as_public()) if found else SliceRow(id=seat.key, kind="unknown")
    return ReplicaRow(
        replica=seat.replica,
        model=seat.model,
        engine_model=seat.model,
        endpoint=_NOWHERE,
        slice=shown,
        state=ReplicaState.PENDING,
        reason=why,
    )


def _slice_row(node: str, public: Mapping[str, object]) -> SliceRow:
    row = SliceRow.model_validate(public)
    return row.model_copy(update={"id": slice_key(node, row.id)})


def reasons(unplaced: Mapping[str, SlicewayError]) -> Mapping[str, str]:
    """One line each, for people."""
    return {replica: sentences(error.message, error.remedy) for replica, error in unplaced.items()}
