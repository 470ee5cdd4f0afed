"""Engines of a cluster replaced beside themselves: on nodes whose engines take rounds to start and to finish, by heads that are killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.schema import DemandConfig, ModelConfig
from placement.autoscale.capacity import Capacity
from placement.cluster.cutting import CutOrder
from placement.cluster.errors import NodeLost
from placement.cluster.failed_starts import FIRST_SECONDS
from placement.cluster.head import ClusterGoal, Head, HeadJournal
from placement.cluster.members import NodeOrder, NodeReport, Seat, Word
from placement.cluster.nodes import Hold
from placement.cluster.renewing import Renewing, place_beside
from placement.cluster.testing import GIB, VERSIONS, FakeBooks, fits_anywhere, node_table
from placement.demanded import model_of
from placement.slices import Gpu, Slice, SliceKind
from placement.table import ModelRow, ReplicaState, RoutingTable
from placement.workload.measured import Measured

START_ROUNDS, END_ROUNDS = 2, 2


class Rounds:
    """A clock that rounds of the test move on, and nobody waits by."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Killed(Exception):
    """The head has been, in the middle of what it did."""


@dataclass
class Engine:
    slice_id: str
    config: str
    starting: int = START_ROUNDS
    ending: int | None = None

    def state(self, broken: frozenset[str]) -> ReplicaState:
        if self.ending is not None:
            return ReplicaState.DRAINING
        if self.config in broken:
            return ReplicaState.FAILED
        return ReplicaState.STARTING if self.starting > 0 else ReplicaState.READY


@dataclass
class Node:
    slices: tuple[Slice, ...]
    cordoned: tuple[str, ...] = ()
    up: bool = True
    engines: dict[str, list[Engine]] = field(default_factory=dict)
    order: NodeOrder | None = None
    heard: RoutingTable = field(default_factory=lambda: RoutingTable(generation=0))
    broken: frozenset[str] = frozenset()  # configurations by which nothing starts
    stuck: frozenset[str] = frozenset()  # configurations by which nothing gets anywhere
    old_only: frozenset[str] = frozenset()  # models that start by `old` only
    replaced: list[str] = field(default_factory=list)  # in their places

    def obey(self, gateways: Sequence[RoutingTable], lost: list[str]) -> None:
        """As a controller does, a round of it. What is ended while a gateway still sends requests to it is noted in `lost`."""
        assert self.order is not None
        for replica, engines in self.engines.items():
            for engine in engines:
                self._see_to(replica, engine, gateways, lost)
        self.engines = {r: left for r, es in self.engines.items() if (left := [e for e in es if e.ending != 0])}
        taken = {e.slice_id for es in self.engines.values() for e in es}
        for replica, slice_id in self.order.seats.items():
            if slice_id not in taken and replica not in self.engines:
                self.engines[replica] = [Engine(slice_id, self.order.config)]
                taken.add(slice_id)

    def _see_to(self, replica: str, engine: Engine, gateways: Sequence[RoutingTable], lost: list[str]) -> None:
        assert self.order is not None
        turn = replica in self.order.turns and engine.config != self.order.config
        if engine.ending is not None:
            engine.ending -= 1
        elif turn or self.order.seats.get(replica) != engine.slice_id:
            served = engine.state(self.broken) is ReplicaState.READY
            if served and any(row.replica == replica for t in gateways for row in t.ready(model_of(replica))):
                lost.append(replica)
            engine.ending = END_ROUNDS
            self.replaced += [replica] if turn else []
        else:
            engine.starting = max(0, engine.starting - 1)

    def now(self) -> Mapping[str, Engine]:
        return {replica: engines[0] for replica, engines in self.engines.items()}

    def serving(self) -> set[str]:
        return {r for r in self.now() if self.state(r) is ReplicaState.READY}

    def outdated(self) -> tuple[str, ...]:
        config = self.order.config if self.order else ""
        return tuple(r for r, e in self.now().items() if e.config != config)

    def table(self) -> RoutingTable:
        now = self.now()
        return node_table({r: e.slice_id for r, e in now.items()}, self.state)

    def state(self, replica: str) -> ReplicaState:
        engine = self.now()[replica]
        if engine.ending is None and engine.config in self.stuck:
            return ReplicaState.STARTING
        fails = model_of(replica) in self.old_only and engine.config != "old" and engine.ending is None
        return ReplicaState.FAILED if fails else engine.state(self.broken)


@dataclass
class World(FakeBooks):
    """The nodes, Ray's books and the store in one; after as many of the head's doings as `kills` says the head is killed."""

    nodes: dict[str, Node]
    kills: frozenset[int] = frozenset()
    journal: bytes | None = None
    done: int = 0

    def _did(self) -> None:
        """Before it is done and after it, so that a head may be killed on either side of each write."""
        self.done += 1
        if self.done in self.kills:
            raise Killed

    async def load(self) -> bytes | None:
        return self.journal

    async def save(self, journal: bytes) -> None:
        self._did()
        self.journal = journal
        self._did()

    async def names(self) -> Sequence[str]:
        return sorted(self.nodes)

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        its = self.nodes[node]
        if not its.up:
            raise NodeLost(node)
        report = NodeReport(
            node=node,
            address="10.0.0.1",
            versions=VERSIONS,
            boot="b",
            slices=its.slices,
            cordoned=its.cordoned,
            table=its.table(),
            running={replica: engine.slice_id for replica, engine in its.now().items()},
            outdated=its.outdated(),
            generation=its.heard.generation,
        )
        return Word(report=report)

    async def order(self, node: str, order: NodeOrder) -> None:
        if not self.nodes[node].up:
            raise NodeLost(node)
        self.nodes[node].order = order

    async def gpus(self, node: str) -> Any:
        raise NodeLost(node)

    async def cut(self, node: str, order: CutOrder) -> None:
        raise NodeLost(node)

    async def hold(self, seat: Seat) -> Hold:
        self._did()
        if (rival := self.rival(seat)) is not None and rival in self.nodes[seat.node].engines:
            return Hold(seat, waits_for=rival)  # Ray gives the slice when the other one has ended
        return await super().hold(seat)

    async def let_go(self, replica: str) -> None:
        self._did()
        await super().let_go(replica)


def cpu(i: int) -> Slice:
    return Slice(f"cpu-{i}", SliceKind.CPU, None, 8 * GIB, cores=(i,))


def one_each(_: str, __: Slice, ___: Measured) -> Capacity:
    return Capacity(1.0, "estimated", "for a test")


def model(name: str, replicas: int, *, spread: str = "none", priority: int = 0) -> ModelConfig:
    return ModelConfig.model_validate(
        {"name": name, "source": "org/x", "replicas": replicas, "spread": spread, "priority": priority}
    )


@dataclass
class Cluster:
    world: World
    models: Sequence[ModelConfig] = ()
    config: str = ""
    clock: Rounds = field(default_factory=Rounds)
    head: Head | None = None
    deaf: frozenset[str] = frozenset()
    lost: list[str] = field(default_factory=list)  # ended while gateways sent requests to them
    fewest: dict[str, int] = field(default_factory=dict)

    def goal(self) -> ClusterGoal:
        rows = tuple(ModelRow(name=m.name) for m in self.models)
        return ClusterGoal(self.config, self.models, rows, fits_anywhere, capacity_on=one_each)

    async def aim(self, config: str, *models: ModelConfig) -> None:
        self.config, self.models = config, models or self.models
        if self.head is not None:
            self.head.aim(self.goal())

    async def rounds(self, count: int) -> None:
        self.fewest = {}
        for _ in range(count):
            await self._step()
            await self._hear()
            nodes = [node for node in self.world.nodes.values() if node.up]
            for node in nodes:
                if node.order is not None:
                    node.obey([n.heard for n in nodes], self.lost)
            for one in self.models:
                self.fewest[one.name] = min(self.fewest.get(one.name, 10**6), len(self.served(one.name)))
            await self.clock.sleep(0.5)

    async def _step(self) -> None:
        try:
            if self.head is None:
                self.head = Head(self.world, self.world, self.clock, VERSIONS, secret="s")
                await self.head.restore()
                self.head.aim(self.goal())
            await self.head.step()
        except Killed:
            self.head = None

    async def _hear(self) -> None:
        if self.head is None:
            return
        news = await self.head.next_broadcast("", 0, timeout_seconds=0.001)
        for name, node in self.world.nodes.items():
            if news is not None and name not in self.deaf and news.table.generation > node.heard.generation:
                node.heard = news.table

    def served(self, name: str) -> set[str]:
        """Replicas that serve and that every gateway knows."""
        nodes = [node for node in self.world.nodes.values() if node.up]
        known = set.intersection(*({row.replica for row in n.heard.ready(name)} for n in nodes))
        return known & {r for node in nodes for r in node.serving()}

    def running(self) -> dict[str, str]:
        """Where each replica runs, and by which configuration."""
        return {
            replica: f"{node}/{engine.slice_id} {engine.config}"
            for node, known in self.world.nodes.items()
            for replica, engine in known.now().items()
            if known.up
        }

    def journal(self) -> HeadJournal:
        assert self.world.journal is not None
        return HeadJournal.model_validate_json(self.world.journal)

    def replaced(self) -> list[str]:
        return sorted(r for node in self.world.nodes.values() for r in node.replaced)


def cluster_of(*counts: int, kills: frozenset[int] = frozenset(), models: Sequence[ModelConfig]) -> Cluster:
    """Nodes with so many equal slices each."""
    nodes = {f"n{i}": Node(tuple(cpu(j) for j in range(count))) for i, count in enumerate(counts)}
    return Cluster(World(nodes, kills), models, "old")


async def started(*counts: int, models: Sequence[ModelConfig]) -> Cluster:
    cluster = cluster_of(*counts, models=models)
    await cluster.rounds(8)
    assert all(len(cluster.served(m.name)) == m.least_replicas for m in models)
    return cluster


async def test_a_model_with_one_replica_is_served_all_the_while_where_a_slice_is_free() -> None:
    cluster = await started(1, 1, models=[model("chat", 1)])
    await cluster.aim("new")
    await cluster.rounds(20)
    assert cluster.running() == {"chat-1": "n1/cpu-0 new"}
    assert cluster.fewest == {"chat": 1}
    assert (cluster.lost, cluster.replaced()) == ([], [])
    assert cluster.journal().names == ("chat-1",)
    assert cluster.journal().successors == {}


async def test_the_next_upgrade_goes_back() -> None:
    cluster = await started(2, models=[model("chat", 1)])
    for config, runs in (("b", {"chat-1": "n0/cpu-1 b"}), ("c", {"chat-0": "n0/cpu-0 c"})):
        await cluster.aim(config)
        await cluster.rounds(20)
        assert cluster.running() == runs
    assert cluster.journal().names == ()


async def test_the_slice_that_one_has_left_is_the_next_ones() -> None:
    cluster = await started(2, 2, models=[model("chat", 2), model("embed", 1)])
    await cluster.aim("new")
    await cluster.rounds(60)
    assert cluster.fewest == {"chat": 2, "embed": 1}
    assert sorted(r.rpartition("-")[0] for r in cluster.running()) == ["chat", "chat", "embed"]
    assert {where.rpartition(" ")[2] for where in cluster.running().values()} == {"new"}
    assert (cluster.lost, cluster.replaced()) == ([], [])


async def test_where_no_slice_is_free_each_is_replaced_in_its_place() -> None:
    cluster = await started(1, 1, models=[model("chat", 2)])
    await cluster.aim("new")
    await cluster.rounds(40)
    assert cluster.replaced() == ["chat-0", "chat-1"]
    assert cluster.fewest == {"chat": 1}
    assert cluster.lost == []


@pytest.mark.parametrize(("spread", "beside"), [("nodes", False), ("none", True)])
async def test_spread_is_kept_while_one_stands_beside_the_other(spread: str, beside: bool) -> None:
    cluster = await started(1, 2, models=[model("chat", 2, spread=spread)])
    await cluster.aim("new")
    await cluster.rounds(50)
    assert ("chat-0" not in cluster.replaced()) == beside
    assert spread == "none" or {where.partition("/")[0] for where in cluster.running().values()} == {"n0", "n1"}
    assert cluster.lost == []


async def test_nothing_starts_on_a_slice_that_is_cordoned() -> None:
    cluster = await started(1, 1, models=[model("chat", 1)])
    cluster.world.nodes["n1"].cordoned = ("cpu-0",)
    await cluster.aim("new")
    await cluster.rounds(20)
    assert cluster.running() == {"chat-0": "n0/cpu-0 new"}


def broken(cluster: Cluster, *configs: str) -> None:
    """Nothing starts by these from here on."""
    for node in cluster.world.nodes.values():
        node.broken = frozenset(configs)


def failed_starts(cluster: Cluster) -> dict[str, Any]:
    assert cluster.head is not None
    found: dict[str, Any] = cluster.head.status()["failed_starts"]  # type: ignore[assignment]
    return found


async def test_one_that_does_not_start_costs_nothing() -> None:
    cluster = await started(2, 2, models=[model("chat", 2)])
    broken(cluster, "bad")
    await cluster.aim("bad")
    await cluster.rounds(30)
    assert cluster.fewest == {"chat": 2}
    assert cluster.journal().successors == {}, "it is let go, so that a plan can be carried out"
    told = failed_starts(cluster)["chat"]
    assert (told["replica"], told["of"], told["count"]) == ("chat-2", "chat-0", 1)
    assert set(cluster.running()) == {"chat-0", "chat-1"} == set(cluster.world.holders)
    await cluster.aim("good")
    await cluster.rounds(60)
    assert cluster.fewest == {"chat": 2}
    assert {where.rpartition(" ")[2] for where in cluster.running().values()} == {"good"}
    assert len(cluster.running()) == 2
    assert failed_starts(cluster) == {}


async def test_one_that_did_not_start_is_tried_again_later_and_each_time_later_still() -> None:
    cluster = await started(1, 1, 1, models=[model("chat", 1)])
    broken(cluster, "bad")
    await cluster.aim("bad")
    await cluster.rounds(20)
    first = failed_starts(cluster)["chat"]
    await cluster.clock.sleep(FIRST_SECONDS)
    await cluster.rounds(20)
    second = failed_starts(cluster)["chat"]
    assert (first["count"], second["count"]) == (1, 2)
    assert first["slice"] != second["slice"], "on another slice, where there is one"
    await cluster.clock.sleep(FIRST_SECONDS)
    await cluster.rounds(20)
    assert failed_starts(cluster)["chat"] == second, "not yet"
    broken(cluster)
    await cluster.clock.sleep(FIRST_SECONDS)
    await cluster.rounds(20)
    assert {where.rpartition(" ")[2] for where in cluster.running().values()} == {"bad"}
    assert (cluster.fewest, failed_starts(cluster), cluster.lost) == ({"chat": 1}, {}, [])


async def test_nobody_is_ended_for_one_that_did_not_start_where_nothing_is_free_by_then() -> None:
    cluster = await started(1, 1, models=[model("chat", 1)])
    broken(cluster, "bad")
    await cluster.aim("bad")
    await cluster.rounds(20)
    assert failed_starts(cluster)
    cluster.world.nodes["n1"].cordoned = ("cpu-0",)
    await cluster.clock.sleep(FIRST_SECONDS)
    await cluster.rounds(20)
    assert (cluster.fewest, cluster.replaced()) == ({"chat": 1}, [])


async def test_where_none_starts_each_is_tried_beside_the_one_that_serves() -> None:
    cluster = await started(1, 2, models=[model("chat", 1), model("embed", 1)])
    broken(cluster, "bad")
    await cluster.aim("bad")
    await cluster.rounds(60)
    assert cluster.fewest == {"chat": 1, "embed": 1}
    assert set(failed_starts(cluster)) == {"chat", "embed"}


async def test_other_models_are_replaced_while_one_does_not_start() -> None:
    cluster = await started(2, 2, models=[model("chat", 1), model("embed", 1)])
    for node in cluster.world.nodes.values():
        node.old_only = frozenset({"chat"})
    await cluster.aim("new")
    await cluster.rounds(60)
    assert cluster.fewest == {"chat": 1, "embed": 1}
    assert {r.rpartition("-")[0]: where.rpartition(" ")[2] for r, where in cluster.running().items()} == {
        "chat": "old",
        "embed": "new",
    }


@settings(max_examples=15, deadline=None)
@given(kills=st.frozensets(st.integers(1, 60), max_size=6), replicas=st.integers(1, 2))
async def test_whenever_heads_are_killed_nobody_is_missed_for_those_that_do_not_start(
    kills: frozenset[int], replicas: int
) -> None:
    cluster = await started(1, 2, models=[model("chat", replicas)])
    cluster.world.kills = frozenset(cluster.world.done + n for n in kills)
    broken(cluster, "bad")
    await cluster.aim("bad")
    for _ in range(4):
        await cluster.rounds(15)
        assert (cluster.fewest, cluster.lost) == ({"chat": replicas}, [])
        await cluster.clock.sleep(FIRST_SECONDS)
    assert failed_starts(cluster)["chat"]["count"] >= 2
    assert cluster.journal().failed_starts.keys() == {"chat"}


async def test_one_that_starts_is_given_up_where_its_configuration_is_taken_back() -> None:
    cluster = await started(2, models=[model("chat", 1)])
    await cluster.aim("new")
    await cluster.rounds(2)
    assert cluster.journal().successors
    await cluster.aim("old")
    await cluster.rounds(15)
    assert cluster.running() == {"chat-0": "n0/cpu-0 old"}
    assert (cluster.fewest, cluster.journal().successors) == ({"chat": 1}, {})


async def test_whoever_waits_for_the_slice_gets_it() -> None:
    """One that starts beside another one gives way to replicas without a slice: those of a lost node."""
    cluster = await started(1, 2, models=[model("chat", 1), model("embed", 1)])
    sits = {r: where.partition("/")[0] for r, where in cluster.running().items()}
    alone = next(r for r, node in sits.items() if node == "n0")
    other = next(r for r in sits if r != alone)
    for node in cluster.world.nodes.values():
        node.stuck = frozenset({"stuck"})
    await cluster.aim("stuck")
    await cluster.rounds(14)
    assert len(cluster.journal().successors) == 1
    cluster.world.nodes["n0"].up = False
    await cluster.aim("old")
    await cluster.rounds(40)
    assert set(cluster.running()) >= {other}
    assert {model_of(r) for r in cluster.running()} == {"chat", "embed"}


async def test_one_that_is_left_alone_has_the_place() -> None:
    cluster = await started(1, 1, models=[model("chat", 1)])
    await cluster.aim("new")
    await cluster.rounds(2)
    assert cluster.journal().successors
    cluster.world.nodes["n0"].up = False
    await cluster.rounds(20)
    assert cluster.running() == {"chat-1": "n1/cpu-0 new"}
    assert cluster.journal().names == ("chat-1",)


async def test_replicas_that_demand_has_brought_are_replaced_beside_themselves_too() -> None:
    demanded = ModelConfig(
        name="chat",
        source="org/x",
        demand=DemandConfig(requests_per_second=2.0, prompt_tokens=10, output_tokens=10),
    )
    cluster = cluster_of(2, 1, models=[demanded])
    await cluster.rounds(10)
    assert len(cluster.served("chat")) == 2
    await cluster.aim("new")
    await cluster.rounds(60)
    assert cluster.fewest == {"chat": 2}
    assert {where.rpartition(" ")[2] for where in cluster.running().values()} == {"new"}
    assert len(cluster.running()) == 2
    assert (cluster.lost, cluster.replaced()) == ([], [])


async def test_a_head_that_has_lost_its_journal_keeps_who_has_taken_a_place() -> None:
    cluster = await started(1, 1, models=[model("chat", 1)])
    await cluster.aim("new")
    await cluster.rounds(20)
    cluster.world.journal, cluster.head = None, None
    await cluster.rounds(20)
    assert cluster.running() == {"chat-1": "n1/cpu-0 new"}
    assert cluster.fewest == {"chat": 1}


async def test_a_gateway_that_hears_of_it_late_is_waited_for() -> None:
    cluster = await started(1, 1, models=[model("chat", 1)])
    cluster.deaf = frozenset({"n0"})
    await cluster.aim("new")
    await cluster.rounds(8)
    assert set(cluster.running()) == {"chat-0", "chat-1"}
    cluster.deaf = frozenset()
    await cluster.rounds(20)
    assert (set(cluster.running()), cluster.lost) == ({"chat-1"}, [])


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    asked=st.tuples(st.integers(1, 3), st.integers(0, 2)),
    kills=st.frozensets(st.integers(1, 120), max_size=5),
)
async def test_nothing_that_serves_is_missed_whenever_heads_are_killed(
    counts: list[int], asked: tuple[int, int], kills: frozenset[int]
) -> None:
    models = [model(name, count) for name, count in zip(("chat", "embed"), asked, strict=True) if count]
    if sum(counts) < sum(asked):
        return
    spare = sum(counts) > sum(asked)
    cluster = await started(*counts, models=models)
    cluster.world.kills = frozenset(cluster.world.done + n for n in kills)
    await cluster.aim("new")
    await cluster.rounds(40 + 14 * sum(asked))
    assert cluster.lost == [], "what is ended gets no requests"
    for one in models:
        assert cluster.fewest[one.name] >= one.least_replicas - (0 if spare else 1)
    assert {where.rpartition(" ")[2] for where in cluster.running().values()} == {"new"}
    assert {m.name: len(cluster.served(m.name)) for m in models} == {m.name: m.least_replicas for m in models}
    assert len(cluster.running()) == sum(asked)
    assert cluster.journal().successors == {}
    assert set(cluster.journal().seats) == set(cluster.running())
    assert spare == (cluster.replaced() == [])


async def test_every_single_write_may_be_the_last_one() -> None:
    """Killed before and after each of them: always one of the two serves, and in the end one is left."""
    for kill in range(1, 26):
        cluster = await started(1, 1, models=[model("chat", 1)])
        cluster.world.kills = frozenset({cluster.world.done + kill})
        await cluster.aim("new")
        await cluster.rounds(30)
        assert cluster.running() == {"chat-1": "n1/cpu-0 new"}, kill
        assert (cluster.fewest, cluster.lost) == ({"chat": 1}, []), kill
        assert set(cluster.world.holders) == {"chat-1"}, kill


# ---- where


def on_gpu(name: str, gpu: str, size: int) -> Slice:
    return Slice(name, SliceKind.MIG, f"{size}g", size * GIB, uuid=name, gpu=Gpu(gpu, 0, "H100", 80 * GIB))


def reported(node: str, *slices: Slice, cordoned: tuple[str, ...] = ()) -> NodeReport:
    return NodeReport(node=node, address="x", versions=VERSIONS, boot="b", slices=slices, cordoned=cordoned)


def seat(replica: str, node: str, slice_id: str) -> Seat:
    return Seat(replica=replica, model=model_of(replica), node=node, slice_id=slice_id)


def place(one: ModelConfig, reports: Sequence[NodeReport], *seats: Seat) -> str | None:
    by_name = {report.node: report for report in reports}
    found = place_beside(one, seats[0].replica, by_name, fits_anywhere, {s.replica: s for s in seats}, {})
    return f"{found[0]}/{found[1].id}" if found else None


def test_a_slice_like_its_own_is_taken_first_and_then_a_larger_one() -> None:
    mine = seat("chat-0", "a", "s1")
    small, like, large = on_gpu("s2", "g1", 1), on_gpu("s3", "g2", 2), on_gpu("s4", "g3", 4)
    own = on_gpu("s1", "g0", 2)
    a = reported("a", own, small, large)
    assert place(model("chat", 1), [a, reported("b", like)], mine) == "b/s3"
    assert place(model("chat", 1), [a, reported("b")], mine) == "a/s4"
    assert place(model("chat", 1), [reported("a", own, small)], mine) == "a/s2"
    assert place(model("chat", 1), [reported("a", own, like), reported("b", like)], mine) == "a/s3"


def test_gpus_are_kept_apart_but_for_the_one_that_is_left() -> None:
    mine, other = seat("chat-0", "a", "s1"), seat("chat-1", "a", "s2")
    slices = (on_gpu("s1", "g0", 1), on_gpu("s2", "g1", 1), on_gpu("s3", "g1", 1))
    spread = model("chat", 2, spread="gpus")
    assert place(spread, [reported("a", *slices)], mine, other) is None
    assert place(spread, [reported("a", *slices, on_gpu("s4", "g0", 1))], mine, other) == "a/s4"


def test_pinned_replicas_and_those_whose_slice_is_gone_have_none() -> None:
    pinned = ModelConfig(name="chat", source="org/x", slices=("a/s1",))
    a = reported("a", on_gpu("s1", "g0", 1), on_gpu("s2", "g0", 1))
    assert place(pinned, [a], seat("chat-0", "a", "s1")) is None
    assert place(model("chat", 1), [a], seat("chat-0", "a", "s9")) is None


def test_names_that_tell_nothing_are_forgotten() -> None:
    renewing = Renewing()
    renewing.restore(("chat-0", "gone-1", "embed-1"), {})
    renewing.look([model("chat", 1), model("embed", 1)], {}, {}, {})
    assert renewing.names == ("embed-1",)
