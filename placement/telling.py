"""A controller's words, on disk: the routing table for gateways, written when it changes, and the status for people."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Literal

from model_registry.errors import SlicewayError
from placement.clock import Clock
from placement.errors import TableUnreadable
from placement.goals import Goals
from placement.publish import controller_status, error_row, replica_status, routing_table
from placement.replicas.parts import Goal
from placement.replicas.replica import Replica
from placement.state import StatePaths
from placement.status import Refusal, RepartitionStatus, ScalingRow, write_status
from placement.table import RoutingTable, publish, read

State = Literal["starting", "running", "stopping"]


class Teller:
    """Writes table and status of one state directory. `config` is the name of the configuration's file."""

    def __init__(self, paths: StatePaths, clock: Clock, config: str) -> None:
        self._paths = paths
        self._clock = clock
        self._config = config
        self._started_at = clock.now()
        self._table = RoutingTable(generation=0)
        self._refused: Refusal | None = None

    def begin(self) -> None:
        """Go on from the last controller's table, so that generations go on growing."""
        try:
            self._table = read(self._paths.routing_table)
        except TableUnreadable:
            # A damaged table may have been of any generation that time allows: start above what could have been reached.
            seconds = self._clock.now().timestamp() if self._paths.routing_table.exists() else 0
            self._table = RoutingTable(generation=int(seconds))

    def refuse(self, error: SlicewayError) -> None:
        """A configuration was not taken over."""
        self._refused = Refusal(at=self._clock.now(), error=error_row(error))

    def accept(self) -> None:
        """The configuration on disk is the one in force."""
        self._refused = None

    def tell(
        self,
        state: State,
        goals: Goals,
        replicas: Iterable[Replica],
        *,
        orders: int,
        scaling: Mapping[str, ScalingRow],
        repartition: RepartitionStatus,
        used_bytes: Callable[[int | None], int | None],
        versions: Callable[[Goal], str | None],
        outdated: Container[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Write what has changed. `used_bytes` tells a session's memory, `versions` of which vLLM the engine is, `outdated` replicas of
        an earlier configuration.

        Raises OSError.
        """
        rows = sorted(replicas, key=lambda r: r.goal.replica)
        table = routing_table(goals, [(r.goal, r.view) for r in rows], self._table, self._clock.now())
        if table != self._table:
            publish(table, self._paths.routing_table)
            self._table = table
        names = {r.goal.replica for r in rows}
        status = controller_status(
            pid=os.getpid(),
            started_at=self._started_at,
            now=self._clock.now(),
            state=state,
            config=self._config,
            generation=table.generation,
            replicas=[
                replica_status(
                    r.goal,
                    r.view,
                    log=self._paths.log(r.goal.replica),
                    memory_used_bytes=used_bytes(r.view.session),
                    outdated=r.goal.replica in outdated,
                    engine_version=versions(r.goal),
                )
                for r in rows
            ],
            unplaced={name: error for name, error in goals.unplaced.items() if name not in names},
            refused=self._refused,
            orders=orders,
            notes=notes,
            scaling=scaling,
            repartition=repartition,
        )
        write_status(status, self._paths.controller_status)
