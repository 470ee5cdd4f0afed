"""What the controller tells others: the routing table for gateways, the status for people. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from model_registry.errors import SlicewayError
from model_registry.words import sentences
from placement.assign import stem_of
from placement.cores import format_cores
from placement.goals import Goals
from placement.replicas.parts import Goal, View
from placement.slices import Slice
from placement.status import ControllerStatus, ErrorRow, Refusal, RepartitionStatus, ReplicaStatus, ScalingRow
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

Seen = tuple[Goal, View]
"""A replica's goal and what it is at the moment."""

# No engine listens here; rows of replicas that were never started need some endpoint.
_NOWHERE = "unix:/dev/null"


def routing_table(goals: Goals, replicas: Iterable[Seen], previous: RoutingTable, now: datetime) -> RoutingTable:
    """The table after `previous`: equal to it if nothing in it has changed, else of the next generation."""
    seen = [(goal, view) for goal, view in replicas if view.state is not ReplicaState.STOPPED]
    made = {row.name: row.created for row in previous.models}
    taken = {goal.slice.id for goal, _ in seen}
    unplaced = _unplaced(goals, {goal.replica for goal, _ in seen})
    table = RoutingTable(
        generation=previous.generation,
        models=tuple(
            ModelRow(
                name=name,
                task=sized.task,
                max_model_len=sized.max_model_len,
                created=made.get(name) or int(now.timestamp()),
                unplaced=unplaced.get(name, {}),
            )
            for name, sized in goals.models.items()
        ),
        replicas=tuple(_row(goal, view) for goal, view in seen),
        idle=tuple(slice_row(s) for s in goals.inventory.slices if s.id not in taken),
    )
    return table if table == previous else table.model_copy(update={"generation": previous.generation + 1})


def _unplaced(goals: Goals, running: Container[str]) -> dict[str, dict[str, str]]:
    """Why replicas have no slice, by replica and model."""
    found: dict[str, dict[str, str]] = {}
    for replica, error in goals.unplaced.items():
        if replica not in running:
            why = sentences(error.message, error.remedy)
            found.setdefault(stem_of(replica).partition("@")[0], {})[replica] = why
    return found


def slice_row(one: Slice) -> SliceRow:
    """The slice as the outside sees it."""
    return SliceRow.model_validate(one.as_public())


def replica_status(
    goal: Goal,
    view: View,
    *,
    log: Path,
    memory_used_bytes: int | None,
    outdated: bool = False,
    engine_version: str | None = None,
) -> ReplicaStatus:
    """One replica for people."""
    return ReplicaStatus(
        replica=goal.replica,
        model=goal.model,
        slice=slice_row(goal.slice),
        cores=format_cores(goal.slice.cores),
        memory_bytes=goal.slice.memory_bytes,
        memory_used_bytes=memory_used_bytes,
        engine_version=engine_version,
        state=view.state,
        stage=view.stage,
        reason=view.reason,
        remedy=view.remedy or None,
        since=view.since,
        retry_at=view.retry_at,
        restarts=view.restarts.total,
        engine_pid=view.engine_pid,
        adopted=view.adopted,
        outdated=outdated,
        endpoint=view.endpoint,
        log=str(log),
        placement=view.proof.as_public() if view.proof else None,
    )


def controller_status(
    *,
    pid: int,
    started_at: datetime,
    now: datetime,
    state: Literal["starting", "running", "stopping"],
    config: str,
    generation: int,
    replicas: Sequence[ReplicaStatus] = (),
    unplaced: Mapping[str, SlicewayError] | None = None,
    refused: Refusal | None = None,
    orders: int = 0,
    notes: Sequence[str] = (),
    scaling: Mapping[str, ScalingRow] | None = None,
    repartition: RepartitionStatus | None = None,
) -> ControllerStatus:
    """The whole status."""
    return ControllerStatus(
        pid=pid,
        started_at=started_at,
        updated_at=now,
        state=state,
        config=config,
        generation=generation,
        replicas=tuple(replicas),
        unplaced={replica: error_row(error) for replica, error in (unplaced or {}).items()},
        refused=refused,
        orders=orders,
        notes=tuple(notes),
        scaling=dict(scaling or {}),
        repartition=repartition or RepartitionStatus(),
    )


def error_row(error: SlicewayError) -> ErrorRow:
    """An error as data."""
    return ErrorRow.model_validate(error.as_dict())


def _row(goal: Goal, view: View) -> ReplicaRow:
    return ReplicaRow(
        replica=goal.replica,
        model=goal.model,
        engine_model=goal.model,
        endpoint=view.endpoint or _NOWHERE,
        secret=view.secret or None,
        slice=slice_row(goal.slice),
        state=view.state,
        reason=view.reason,
        max_num_seqs=goal.max_num_seqs,
        kv_cache_tokens=goal.kv_cache_tokens,
    )
