"""A cluster in memory whose laws are looked at in every round: nodes are dictionaries with drivers, and the head is a real one, which may be
killed.

Gateways hear of a table late, each in its own round; an engine that is ended while any of them still sends requests to it would fail some.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from placement.autoscale import Signals
from placement.cluster.cutting import CutOrder, cut
from placement.cluster.errors import NodeLost
from placement.cluster.head import ClusterGoal, Head
from placement.cluster.members import NodeOrder, NodeReport, Seat, Word, slice_key
from placement.cluster.nodes import Hold
from placement.cluster.survey import NodeGpus
from placement.cluster.testing import VERSIONS, FakeBooks, FakeDriver, FakeStore, node_table
from placement.gpu_slices import slices_of
from placement.slices import Slice
from placement.table import ReplicaState, RoutingTable
from placement.testing import FakeClock


@dataclass
class FakeNode:
    """A node whose controller takes a round to have an engine serve."""

    driver: FakeDriver
    up: bool = True
    seats: dict[str, str] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    broken: frozenset[str] = frozenset()
    cutting: asyncio.Lock = field(default_factory=asyncio.Lock)
    table: RoutingTable = field(default_factory=lambda: RoutingTable(generation=0))  # as its gateway knows it
    demand: Mapping[str, Signals] | None = None  # that its gateway sees

    @property
    def slices(self) -> tuple[Slice, ...]:
        """As its driver has them."""
        return tuple(s for gpu in self.driver.gpus for s in slices_of(gpu))

    def obey(self) -> None:
        """Run the seats, end the rest."""
        self.ready |= {r for r in self.running if r in self.seats}
        self.running = {r: s for r, s in self.seats.items() if s in {one.id for one in self.slices}}
        self.ready &= set(self.running)

    def state(self, replica: str) -> ReplicaState:
        """What its controller tells of it."""
        if replica in self.broken:
            return ReplicaState.FAILED
        return ReplicaState.READY if replica in self.ready else ReplicaState.STARTING


@dataclass
class FakeNodes(FakeBooks):
    """The `Nodes` of a head, as they answer while they are up. As many answers to cuts as `restarts` are lost, because the node's agent is
    started again before the cut or after it.
    """

    nodes: dict[str, FakeNode]
    random: Random = field(default_factory=lambda: Random(0))
    restarts: int = 0
    cutting: int = 0
    cuts: list[CutOrder] = field(default_factory=list)
    generation: int = 0

    def _up(self, node: str) -> FakeNode:
        if not self.nodes[node].up:
            raise NodeLost(node)
        return self.nodes[node]

    async def names(self) -> Sequence[str]:
        """All that have joined."""
        return sorted(self.nodes)

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        """As it is at the moment. Raises NodeLost."""
        its = self._up(node)
        report = NodeReport(
            node=node,
            address="10.0.0.1",
            versions=VERSIONS,
            boot="b",
            slices=its.slices,
            table=node_table(its.running, its.state),
            running=its.running,
            generation=its.table.generation,
            demand=its.demand,
        )
        return Word(report=report)

    async def order(self, node: str, order: NodeOrder) -> None:
        """Its seats from here on. Raises NodeLost."""
        self._up(node).seats = dict(order.seats)

    async def gpus(self, node: str) -> NodeGpus:
        """What its driver shows. Raises NodeLost."""
        return NodeGpus(gpus=self._up(node).driver.observe())

    async def cut(self, node: str, order: CutOrder) -> None:
        """As an agent does it. Raises PartitionError, NodeLost."""
        known = self._up(node)
        lost = self.restarts > 0 and self.random.random() < 0.7
        self.restarts -= lost
        if lost and self.random.random() < 0.5:
            raise NodeLost(node)
        self.cutting += 1
        self.cuts.append(order)
        try:
            async with known.cutting:  # as an agent does: the head that is killed may have asked for the same
                taken = {*known.seats.values(), *known.running.values()}
                with tempfile.TemporaryDirectory() as directory:
                    await cut(known.driver, order, taken, Path(directory))
        finally:
            self.cutting -= 1
        if lost:
            raise NodeLost(node)

    async def hold(self, seat: Seat) -> Hold:
        """Ray gives it when the other one has let go."""
        rival = self.rival(seat)
        return Hold(seat, waits_for=rival) if rival else await super().hold(seat)


class LawfulCluster:
    """See the module. While `carrying` no model serves less than is `guaranteed`, in replicas; `seed` is of gateways' delays."""

    def __init__(self, nodes: Mapping[str, FakeNode], goal: ClusterGoal, seed: int) -> None:
        self.store, self.clock, self.random = FakeStore(), FakeClock(), Random(seed)
        self.nodes = FakeNodes(dict(nodes), self.random)
        self.goal = goal
        self.head = self._new()
        self.told: list[RoutingTable] = []
        self.guaranteed: Mapping[str, float] = {}
        self.carrying = False

    def _new(self) -> Head:
        return Head(self.nodes, self.store, self.clock, VERSIONS, secret="s")

    async def kill(self) -> None:
        """Another head has to go on from the journal."""
        self.head = self._new()
        if (await self.head.restore()).config:
            self.head.aim(self.goal)

    async def round(self) -> None:
        """One of the head's, of every controller and gateway, and a look at the laws."""
        await self.head.step()
        while self.nodes.cutting:  # noqa: ASYNC110 - a driver's calls are in threads
            await asyncio.sleep(0)
        news = await self.head.next_broadcast("", 0, timeout_seconds=0.001)
        if news is not None:
            self.told.append(news.table)
        self._controllers()
        for node in self.nodes.nodes.values():  # gateways hear of it some time
            if self.told and self.random.random() < 0.6:
                node.table = self.told[-1]
        self._look()
        await self.clock.sleep(0.5)

    def _controllers(self) -> None:
        """Every controller does as it was told. Nothing is ended that a gateway sends requests to."""
        for name, node in self.nodes.nodes.items():
            before = {r: s for r, s in node.running.items() if r in node.ready}
            if node.up:
                node.obey()
            for replica, slice_id in before.items():
                if self.carrying and node.running.get(replica) != slice_id:
                    assert not self._asked(replica, slice_key(name, slice_id)), (
                        f"{replica} was ended while it was asked"
                    )
            starting = [s.rpartition("/")[0] for r, s in node.running.items() if r not in node.ready]
            assert not self.carrying or len(starting) == len(set(starting)), "two engines start on one GPU"

    def _asked(self, replica: str, key: str) -> bool:
        tables = [n.table for n in self.nodes.nodes.values() if n.up]
        return any(
            row.replica == replica and row.slice.id == key and row.state is ReplicaState.READY
            for table in tables
            for row in table.replicas
        )

    def _look(self) -> None:
        """What gateways may ask and what serves is never less than what is guaranteed."""
        if not self.carrying or not self.told:
            return
        serves: dict[str, float] = {}
        for row in self.told[-1].replicas:
            node, _, slice_id = row.slice.id.partition("/")
            there = self.nodes.nodes[node]
            if (
                row.state is ReplicaState.READY
                and row.replica in there.ready
                and there.running[row.replica] == slice_id
            ):
                serves[row.model] = serves.get(row.model, 0.0) + 1.0
        for model, least in self.guaranteed.items():
            assert serves.get(model, 0.0) >= least - 1e-9, f"{model} serves {serves.get(model, 0.0)} of {least}"

    async def settle(self) -> None:
        """Until nothing changes any more."""
        for _ in range(60):
            await self.round()
            status = self.head.status()
            states = {r["state"] for r in status["replicas"]}  # type: ignore[attr-defined]
            known = {n.table.generation for n in self.nodes.nodes.values() if n.up}
            if states <= {"ready"} and known == {self.told[-1].generation if self.told else 0} and self._quiet():
                return

    def _quiet(self) -> bool:
        return all(n.seats == n.running and set(n.running) == n.ready for n in self.nodes.nodes.values() if n.up)
