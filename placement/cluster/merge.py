"""The routing table of the cluster, out of the nodes' own: a pure function."""

from __future__ import annotations

from collections.abc import Container, Mapping

from model_registry.errors import SlicewayError
from placement.cluster.members import NodeReport, Seat, slice_key
from placement.demanded import model_of
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

_NOWHERE = "unix:/dev/null"


def merge_tables(
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
    rows: dict[str, ReplicaRow] = {}
    for node in sorted(reports):
        for row in reports[node].table.replicas:
            seat = seats.get(row.replica)
            if seat is not None and seat.node == node and row.slice.id == seat.slice_id:
                rows[row.replica] = _at_node(node, row, secret, leaving=row.replica in leaving)
    for replica, seat in seats.items():
        if replica not in rows:
            rows[replica] = _not_yet(seat, reports, _reason(seat, reports, waiting))
    taken = {seat.key for seat in seats.values()}
    table = RoutingTable(
        generation=previous.generation,
        models=_with_unplaced(models, unplaced or {}),
        replicas=tuple(rows[replica] for replica in sorted(rows)),
        idle=tuple(
            _slice_row(node, s.as_public())
            for node in sorted(reports)
            for s in reports[node].slices
            if slice_key(node, s.id) not in taken
        ),
    )
    return table if table == previous else table.model_copy(update={"generation": previous.generation + 1})


def _with_unplaced(models: tuple[ModelRow, ...], unplaced: Mapping[str, str]) -> tuple[ModelRow, ...]:
    by_model: dict[str, dict[str, str]] = {}
    for replica, why in unplaced.items():
        by_model.setdefault(model_of(replica), {})[replica] = why
    return tuple(row.model_copy(update={"unplaced": by_model.get(row.name, {})}) for row in models)


def _at_node(node: str, row: ReplicaRow, secret: str, *, leaving: bool) -> ReplicaRow:
    there = row.slice.model_copy(update={"id": slice_key(node, row.slice.id)})
    state = ReplicaState.DRAINING if leaving and row.state is ReplicaState.READY else row.state
    return row.model_copy(update={"slice": there, "secret": row.secret or secret or None, "state": state})


def _reason(seat: Seat, reports: Mapping[str, NodeReport], waiting: Mapping[str, str]) -> str:
    report = reports.get(seat.node)
    told = report.waiting.get(seat.replica) if report else None
    return waiting.get(seat.replica) or told or "its node has not taken it up yet"


def _not_yet(seat: Seat, reports: Mapping[str, NodeReport], why: str) -> ReplicaRow:
    report = reports.get(seat.node)
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
    return {replica: f"{error.message} {error.remedy or ''}".strip() for replica, error in unplaced.items()}
