"""What a replica bears on the slices of a cluster: measured where some node's load test counts there, else estimated. Pure.

A card is the same on every node, so what was measured on one counts on slices of its product and profile everywhere. A number of
cores says nothing about how fast they are: what was measured on cores counts on their own node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from placement.assign import stem_of
from placement.autoscale.capacity import UNKNOWN, Capacity
from placement.cluster.members import NodeReport, Seat
from placement.demanded import model_of
from placement.slices import Slice, SliceKind
from placement.workload.measured import Measured

CapacityOn = Callable[[str, Slice, Measured], Capacity | None]
"""Model name, slice, and what was measured -> what a replica of it bears there; None where it does not fit."""


def nobody_knows(_model: str, _slice: Slice, _measured: Measured) -> Capacity | None:
    """Without estimates requests at once and latencies decide alone."""
    return UNKNOWN


@dataclass(slots=True)
class Borne:
    """By the reports of one moment, and where replicas are then. Slices of one shape are worked out once."""

    capacity_on: CapacityOn
    reports: Mapping[str, NodeReport]
    current: Mapping[str, Seat]
    _known: dict[object, Capacity | None] = field(default_factory=dict)

    def here(self, pool: str, replica: str) -> Capacity | None:
        """Where that replica of the pool is; None where that slice is gone."""
        seat = self.current[replica]
        slices = self.reports[seat.node].slices if seat.node in self.reports else ()
        there = next((one for one in slices if one.id == seat.slice_id), None)
        return self._on(pool, seat.node, there) if there is not None else None

    def could(self, pool: str) -> Iterator[Capacity]:
        """On every slice that it fits, the smallest first."""
        everywhere = ((node, one) for node in sorted(self.reports) for one in self.reports[node].slices)
        for node, one in sorted(everywhere, key=lambda place: place[1].memory_bytes):
            if (bears := self._on(pool, node, one)) is not None:
                yield bears

    def _on(self, pool: str, node: str, there: Slice) -> Capacity | None:
        product = there.gpu.product if there.gpu else None
        where = node if there.kind is SliceKind.CPU else ""
        cores, simulated = len(there.cores), there.simulated
        key = pool, there.kind, there.profile, there.memory_bytes, cores, product, where, simulated
        if key not in self._known:
            self._known[key] = self.capacity_on(model_of(f"{pool}-0"), there, self._measured(pool, node, there))
        return self._known[key]

    def _measured(self, pool: str, node: str, there: Slice) -> Measured:
        nodes = [node] if there.kind is SliceKind.CPU else sorted(self.reports)
        records = (r for name in nodes for r in self.reports[name].measured if r.simulated == there.simulated)
        return Measured(throughput=tuple(records), engine_version=self._version(pool))

    def _version(self, pool: str) -> str | None:
        """Of the engine that the pool's replicas start, as on one machine; None where nobody knows."""
        mine = (
            (replica, self.reports.get(seat.node)) for replica, seat in self.current.items() if stem_of(replica) == pool
        )
        told = (report.engines.get(replica) for replica, report in mine if report is not None)
        return next(filter(None, told), None)
