"""The head on nodes that are dictionaries: seats, losses, returns, and heads that die."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from model_registry.schema import DemandConfig, ModelConfig, ReplicaRange
from placement.autoscale import Signals
from placement.autoscale.capacity import Capacity
from placement.cluster.errors import NodeLost
from placement.cluster.head import LOST_AFTER_SECONDS, ClusterGoal, Head, HeadJournal
from placement.cluster.members import Broadcast, NodeOrder, NodeReport, Versions, Word
from placement.cluster.testing import GIB, VERSIONS, FakeBooks, FakeStore, fits_anywhere, node_table
from placement.policy import AutoscalePolicy
from placement.slices import Slice, SliceKind
from placement.table import ModelRow, ReplicaState, RoutingTable
from placement.testing import FakeClock


def cpu(i: int) -> Slice:
    return Slice(f"cpu-{i}", SliceKind.CPU, None, 8 * GIB, cores=(i,))


def mig(uuid: str) -> Slice:
    return Slice(f"GPU-a/{uuid}", SliceKind.MIG, "1g.10gb", 8 * GIB, uuid=uuid)


@dataclass
class FakeNode:
    slices: tuple[Slice, ...]
    versions: Versions = VERSIONS
    boot: str = "b0"
    up: bool = True
    running: dict[str, str] = field(default_factory=dict)
    orders: list[NodeOrder] = field(default_factory=list)
    belongs: list[NodeOrder] = field(default_factory=list)
    generation: int = 0
    ended: list[str] = field(default_factory=list)
    runs_by: dict[str, str] = field(default_factory=dict)
    starting: set[str] = field(default_factory=set)
    broken: frozenset[str] = frozenset()  # configurations by which nothing starts
    replaced: list[str] = field(default_factory=list)
    demand: dict[str, Signals] | None = None
    cutting: tuple[str, ...] = ()

    def obey(self) -> None:
        """As a controller does: run the seats, end the rest."""
        if self.orders:
            seats = dict(self.orders[-1].seats)
            self.ended += [replica for replica in self.running if replica not in seats]
            self.running = seats
            self._start_what_is_due(self.orders[-1])

    def _start_what_is_due(self, order: NodeOrder) -> None:
        self.starting.clear()
        due = [replica for replica in self.outdated() if replica in order.turns]
        self.replaced += due
        self.starting.update(due)
        self.runs_by |= {r: order.config for r in self.running if r not in self.runs_by or r in due}

    def outdated(self) -> tuple[str, ...]:
        known = self.orders[-1].config if self.orders else ""
        return tuple(r for r in self.running if self.runs_by.get(r, known) != known)

    def state(self, replica: str) -> ReplicaState:
        if replica in self.starting:
            return ReplicaState.STARTING
        return ReplicaState.FAILED if self.runs_by.get(replica) in self.broken else ReplicaState.READY

    def table(self) -> RoutingTable:
        return node_table(self.running, self.state)


@dataclass
class FakeNodes(FakeBooks):
    nodes: dict[str, FakeNode]
    hangs: str | None = None  # where an order gets no answer

    async def names(self) -> Sequence[str]:
        return sorted(self.nodes)

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        """Never waits, as an agent of an earlier version does not."""
        its = self.nodes[node]
        if not its.up:
            raise NodeLost(node)
        return Word(
            report=NodeReport(
                node=node,
                address="10.0.0.1",
                versions=its.versions,
                boot=its.boot,
                slices=its.slices,
                table=its.table(),
                running=its.running,
                outdated=its.outdated(),
                generation=its.generation,
                demand=its.demand,
                cutting=its.cutting,
            )
        )

    async def order(self, node: str, order: NodeOrder) -> None:
        if not self.nodes[node].up:
            raise NodeLost(node)
        if node == self.hangs:
            await asyncio.Event().wait()
        self.nodes[node].orders.append(order)

    async def belong(self, node: str, order: NodeOrder) -> None:
        self.nodes[node].belongs.append(order)


def goal(config: str = "{}", **replicas: int | tuple[int, int]) -> ClusterGoal:
    """Models with so many replicas, or (replicas, priority)."""
    models = []
    for name, asked in replicas.items():
        count, priority = asked if isinstance(asked, tuple) else (asked, 0)
        models.append(ModelConfig(name=name, source="org/x", replicas=count, priority=priority))

    return ClusterGoal(config, models, tuple(ModelRow(name=m.name) for m in models), fits_anywhere)


@dataclass
class Cluster:
    nodes: FakeNodes
    store: FakeStore = field(default_factory=FakeStore)
    clock: FakeClock = field(default_factory=FakeClock)
    head: Head = field(init=False)

    def __post_init__(self) -> None:
        self.new_head()

    def new_head(self) -> None:
        self.head = Head(self.nodes, self.store, self.clock, VERSIONS, secret="s3")

    async def rounds(self, count: int = 3) -> None:
        for _ in range(count):
            await self.head.step()
            for node in self.nodes.nodes.values():
                if node.up:
                    node.obey()
            await self.clock.sleep(0.5)

    async def table(self) -> RoutingTable:
        news = await self.head.next_broadcast("", 0, timeout_seconds=0.001)
        assert news is not None
        return news.table

    async def states(self) -> dict[str, str]:
        return {row.replica: row.state.value for row in (await self.table()).replicas}

    def lose(self, node: str) -> None:
        self.nodes.nodes[node].up = False

    async def pass_seconds(self, seconds: float) -> None:
        """With a question to everybody at the beginning: only who is asked is silent."""
        await self.head.step()
        await self.clock.sleep(seconds)


def two_nodes(**more: FakeNode) -> Cluster:
    return Cluster(FakeNodes({"a": FakeNode((cpu(0), cpu(1))), "b": FakeNode((cpu(0), cpu(1))), **more}))


async def test_replicas_are_seated_on_every_node_and_routed() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=3, embed=1))
    await cluster.rounds()
    table = await cluster.table()
    assert {row.replica for row in table.ready("chat")} == {"chat-0", "chat-1", "chat-2"}
    assert len({row.slice.id for row in table.replicas}) == 4
    assert {row.secret for row in table.replicas} == {"s3"}
    assert {row.slice.id.partition("/")[0] for row in table.replicas} == {"a", "b"}


async def test_nothing_new_is_no_new_generation() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    before = await cluster.table()
    orders = [len(node.orders) for node in cluster.nodes.nodes.values()]
    await cluster.rounds(5)
    assert await cluster.table() == before
    assert [len(node.orders) for node in cluster.nodes.nodes.values()] == orders


async def test_a_lost_nodes_replicas_are_seated_on_what_is_left_the_important_ones_first() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(batch=(2, 0), chat=(2, 10)))
    await cluster.rounds()
    cluster.lose("a")
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    await cluster.rounds(6)
    assert await cluster.states() == {"chat-0": "ready", "chat-1": "ready"}
    status = cluster.head.status()
    assert set(status["unplaced"]) == {"batch-0", "batch-1"}  # type: ignore[call-overload]
    assert all(status["unplaced"].values())  # type: ignore[attr-defined]


async def test_without_its_store_a_head_changes_nothing_and_goes_on_when_it_is_back() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    before = await cluster.table()
    orders = [len(node.orders) for node in cluster.nodes.nodes.values()]
    cluster.store.reachable = False
    cluster.head.aim(goal(chat=4))
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await cluster.head.step()
    assert await cluster.table() == before
    assert [len(node.orders) for node in cluster.nodes.nodes.values()] == orders
    cluster.store.reachable = True
    await cluster.rounds(6)
    assert set((await cluster.states()).values()) == {"ready"}
    assert len(await cluster.states()) == 4


async def test_a_lost_nodes_replicas_end_nobody_who_is_as_important() -> None:
    cluster = Cluster(FakeNodes({"a": FakeNode((cpu(0),)), "b": FakeNode((cpu(0),))}))
    cluster.head.aim(goal(chat=1, embed=1))
    await cluster.rounds()
    lost = next(r.slice.id.partition("/")[0] for r in (await cluster.table()).replicas if r.replica == "chat-0")
    cluster.lose(lost)
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    await cluster.rounds(6)
    assert await cluster.states() == {"embed-0": "ready"}
    assert set(cluster.head.status()["unplaced"]) == {"chat-0"}  # type: ignore[call-overload]


async def test_a_node_that_is_slow_for_a_moment_loses_nothing() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    before = await cluster.table()
    cluster.lose("a")
    await cluster.rounds(2)
    cluster.nodes.nodes["a"].up = True
    await cluster.rounds(2)
    assert await cluster.table() == before


async def test_nodes_are_told_at_the_same_time() -> None:
    class Together(FakeNodes):
        """Answers no order before everybody has one."""

        everybody = asyncio.Barrier(2)

        async def order(self, node: str, order: NodeOrder) -> None:
            await self.everybody.wait()
            await super().order(node, order)

    cluster = Cluster(Together({"a": FakeNode((cpu(0),)), "b": FakeNode((cpu(0),))}))
    cluster.head.aim(goal(chat=2))
    await cluster.head.step()
    assert [len(node.orders) for node in cluster.nodes.nodes.values()] == [1, 1]


async def test_a_node_that_comes_back_is_taken_in_and_gives_up_what_was_seated_elsewhere() -> None:
    cluster = two_nodes(c=FakeNode((cpu(0), cpu(1))))
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    cluster.lose("a")
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    await cluster.rounds(6)
    assert set((await cluster.states()).values()) == {"ready"}
    back = cluster.nodes.nodes["a"]
    assert back.running, "its engines went on while nobody could see them"
    back.up, back.boot = True, "b1"
    await cluster.rounds(6)
    assert back.running == {}, "they are another node's replicas by now"
    assert set((await cluster.states()).values()) == {"ready"}


async def test_the_next_head_changes_nothing() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=3))
    await cluster.rounds()
    before = await cluster.table()
    running = {name: dict(node.running) for name, node in cluster.nodes.nodes.items()}
    ended: list[str] = []
    for node in cluster.nodes.nodes.values():
        node.ended = ended
    cluster.new_head()
    cluster.nodes.slow = 4  # holders that a new head asks do not answer at once
    await cluster.head.restore()
    cluster.head.aim(goal(chat=3))
    await cluster.rounds(6)
    assert ended == []
    after = await cluster.table()
    assert after.replicas == before.replicas
    assert after.generation > before.generation, "gateways take no table that is as old as theirs"
    assert {name: dict(node.running) for name, node in cluster.nodes.nodes.items()} == running


async def test_a_configuration_that_was_taken_over_is_the_next_heads_too_and_nothing_else_is_lost() -> None:
    cluster = two_nodes()
    await cluster.head.take_over(goal(chat=2))
    await cluster.rounds()
    await cluster.head.take_over(goal('{"another": 1}', chat=2))
    before = HeadJournal.model_validate_json(cluster.store.journal or b"")
    assert (before.config, set(before.seats)) == ('{"another": 1}', {"chat-0", "chat-1"})
    cluster.new_head()
    assert await cluster.head.restore() == before, "killed before its next round"
    cluster.store.reachable = False
    with pytest.raises(ConnectionError):
        await cluster.head.take_over(goal('{"third": 1}', chat=2))
    assert HeadJournal.model_validate_json(cluster.store.journal or b"") == before


async def test_a_head_that_has_lost_its_journal_finds_the_engines() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=3))
    await cluster.rounds()
    running = {name: dict(node.running) for name, node in cluster.nodes.nodes.items()}
    for node in cluster.nodes.nodes.values():
        node.generation = 41
    cluster.store.journal = None
    cluster.nodes.holders.clear()
    cluster.new_head()
    await cluster.head.restore()
    cluster.head.aim(goal(chat=3))
    await cluster.rounds()
    assert {name: dict(node.running) for name, node in cluster.nodes.nodes.items()} == running
    assert (await cluster.table()).generation > 41


async def test_a_new_head_waits_for_nodes_that_it_has_not_heard_of_yet() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    cluster.lose("a")
    cluster.new_head()
    await cluster.head.restore()
    cluster.head.aim(goal(chat=4))
    await cluster.rounds(2)
    assert await cluster.head.next_broadcast("", 0, timeout_seconds=0.001) is None, "the last head's table still counts"
    cluster.nodes.nodes["a"].up = True
    await cluster.rounds(3)
    assert len(await cluster.states()) == 4


async def test_a_head_that_takes_long_to_read_its_configuration_waits_from_its_first_round_on() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    seats = dict(cluster.nodes.holders)
    (away, *_) = sorted(seat.node for seat in seats.values())
    cluster.lose(away)
    cluster.new_head()
    await cluster.head.restore()
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    cluster.head.aim(goal(chat=2))
    await cluster.rounds(1)
    cluster.nodes.nodes[away].up = True
    await cluster.rounds(3)
    assert cluster.nodes.holders == seats, "a node that is slow in the first round is not lost"


async def test_a_node_that_hangs_while_it_is_told_keeps_no_news_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("placement.cluster.head.ORDER_SECONDS", 0.01)
    cluster = two_nodes()
    cluster.nodes.hangs = "a"
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    assert sorted((await cluster.states()).values()) == ["pending", "pending", "ready", "ready"]
    cluster.nodes.hangs = None
    await cluster.rounds()
    assert set((await cluster.states()).values()) == {"ready"}, "it is told again"


async def test_an_order_whose_answer_is_lost_is_taken_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    tell = cluster.nodes.order

    async def tell_and_hear_nothing(node: str, order: NodeOrder) -> None:
        await tell(node, order)
        raise NodeLost(node)

    monkeypatch.setattr(cluster.nodes, "order", tell_and_hear_nothing)
    cluster.head.aim(goal('{"another": 1}', chat=2))
    await cluster.head.step()
    monkeypatch.setattr(cluster.nodes, "order", tell)
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    assert {node.orders[-1].config for node in cluster.nodes.nodes.values()} == {"{}"}


async def test_a_node_of_another_version_takes_no_part_and_says_why() -> None:
    other = FakeNode((cpu(0),), versions=VERSIONS.model_copy(update={"python": "3.12"}))
    cluster = Cluster(FakeNodes({"a": FakeNode((cpu(0),)), "b": other}))
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    assert other.orders == []
    (problem,) = [n["problem"] for n in cluster.head.status()["nodes"] if n["node"] == "b"]  # type: ignore[attr-defined]
    assert "python 3.11 here, 3.12 there" in problem
    assert set(cluster.head.status()["unplaced"]) == {"chat-1"}  # type: ignore[call-overload]


async def test_a_slice_that_another_node_offers_already_is_refused() -> None:
    cluster = Cluster(FakeNodes({"a": FakeNode((mig("MIG-1"),)), "b": FakeNode((mig("MIG-1"), cpu(0)))}))
    cluster.head.aim(goal(chat=2))
    await cluster.rounds()
    assert cluster.nodes.nodes["b"].orders == []
    (problem,) = [n["problem"] for n in cluster.head.status()["nodes"] if n["node"] == "b"]  # type: ignore[attr-defined]
    assert "MIG-1" in problem
    assert "'a'" in problem


async def test_nobody_is_seated_where_a_node_still_cuts_for_a_head_before_this_one() -> None:
    cluster = two_nodes()
    cluster.nodes.nodes["a"].cutting = ("cpu-0",)
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    assert {row.slice.id for row in (await cluster.table()).ready("chat")} == {"a/cpu-1", "b/cpu-0", "b/cpu-1"}
    cluster.nodes.nodes["a"].cutting = ()
    await cluster.rounds()
    assert len((await cluster.table()).ready("chat")) == 4


async def test_what_waits_for_its_slice_says_so() -> None:
    cluster = two_nodes()
    cluster.nodes.never = frozenset({"a/cpu-0", "a/cpu-1"})
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    waiting = {row.replica: row.reason for row in (await cluster.table()).replicas if row.state == "pending"}
    assert len(waiting) == 2
    assert set(waiting.values()) == {"a miracle"}


async def test_a_replica_that_moves_is_ended_before_it_starts_elsewhere() -> None:
    cluster = Cluster(FakeNodes({"a": FakeNode((cpu(0),))}))
    cluster.head.aim(goal(chat=1))
    await cluster.rounds()
    first = cluster.nodes.nodes["a"]
    cluster.nodes.nodes["b"] = FakeNode((cpu(0),))
    first.slices = (cpu(7),)  # its slice was cut away; the engine on it still runs
    await cluster.head.step()
    assert cluster.nodes.holders["chat-0"].key == "a/cpu-0", "held until no engine is on it"
    await cluster.rounds(4)
    assert cluster.nodes.holders["chat-0"].key in ("a/cpu-7", "b/cpu-0")
    assert set((await cluster.states()).values()) == {"ready"}


async def test_a_gateway_hears_of_a_change_as_soon_as_it_is_there() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=1))
    asked = asyncio.create_task(cluster.head.next_broadcast("", 0, timeout_seconds=20))
    await asyncio.sleep(0)
    await cluster.rounds(1)
    news: Broadcast | None = await asked
    assert news is not None
    again = asyncio.create_task(cluster.head.next_broadcast(news.head, news.sequence, timeout_seconds=20))
    await asyncio.sleep(0)
    assert not again.done()
    await cluster.head.share({"keys.json": "{}"})
    assert (await again).files == {"keys.json": "{}"}  # type: ignore[union-attr]


@pytest.mark.parametrize("journal", [b"", b"{", b'{"seats": 3}'])
async def test_a_journal_that_makes_no_sense_is_not_used(journal: bytes) -> None:
    cluster = two_nodes()
    cluster.store.journal = journal
    assert (await cluster.head.restore()).config == ""
    cluster.head.aim(goal(chat=1))
    await cluster.rounds()
    assert await cluster.states() == {"chat-0": "ready"}


# ---- upgrades


async def upgraded(cluster: Cluster, rounds: int, *, deaf: str | None = None) -> list[RoutingTable]:
    """Rounds in which every node but `deaf` hears of each table; the tables that there were."""
    tables = []
    for _ in range(rounds):
        await cluster.rounds(1)
        tables.append(await cluster.table())
        for name, node in cluster.nodes.nodes.items():
            if name != deaf:
                node.generation = tables[-1].generation
    return tables


def replaced(cluster: Cluster) -> list[str]:
    return sorted(r for node in cluster.nodes.nodes.values() for r in node.replaced)


async def test_an_upgrade_replaces_one_replica_of_the_cluster_after_another() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal("old", chat=3, embed=1))
    await upgraded(cluster, 3)
    cluster.head.aim(goal("new", chat=3, embed=1))
    tables = await upgraded(cluster, 40)
    assert replaced(cluster) == ["chat-0", "chat-1", "chat-2", "embed-0"]
    assert all(len(table.ready("chat")) >= 2 for table in tables)
    assert all(sum(row.state != "ready" for row in table.replicas) <= 1 for table in tables)
    assert await cluster.states() == dict.fromkeys(replaced(cluster), "ready")


async def test_a_replica_is_replaced_only_when_every_gateway_has_been_told() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal("old", chat=4))
    await upgraded(cluster, 3)
    cluster.head.aim(goal("new", chat=4))
    tables = await upgraded(cluster, 10, deaf="b")
    assert replaced(cluster) == []
    assert [row.state.value for row in tables[-1].replicas].count("draining") == 1, "told, and not yet begun"
    await upgraded(cluster, 40)
    assert len(replaced(cluster)) == 4


async def test_an_upgrade_that_does_not_start_costs_one_replica() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal("old", chat=4))
    await upgraded(cluster, 3)
    for node in cluster.nodes.nodes.values():
        node.broken = frozenset({"bad"})
    cluster.head.aim(goal("bad", chat=4))
    await upgraded(cluster, 20)
    assert len(replaced(cluster)) == 1
    assert sorted((await cluster.states()).values()) == ["failed", "ready", "ready", "ready"]


async def test_another_head_goes_on_with_an_upgrade() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal("old", chat=4))
    await upgraded(cluster, 3)
    cluster.head.aim(goal("new", chat=4))
    await upgraded(cluster, 5)
    assert 0 < len(replaced(cluster)) < 4
    cluster.new_head()
    await cluster.head.restore()
    cluster.head.aim(goal("new", chat=4))
    tables = await upgraded(cluster, 40)
    assert replaced(cluster) == ["chat-0", "chat-1", "chat-2", "chat-3"]
    assert all(len(table.ready("chat")) >= 3 for table in tables)


async def test_a_node_of_another_version_goes_on_with_what_it_runs() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal("old", chat=3))
    await cluster.rounds()
    before = await cluster.table()
    node = cluster.nodes.nodes["a"]
    orders = len(node.orders)
    node.versions = VERSIONS.model_copy(update={"sliceway": "0"})
    cluster.head.aim(goal("new", chat=4))
    await upgraded(cluster, 20)
    after = await cluster.table()
    assert {row.replica: row.slice.id for row in before.replicas}.items() <= {
        row.replica: row.slice.id for row in after.replicas
    }.items()
    assert len(node.orders) == orders, "it is told nothing new"
    assert not set(node.replaced)
    node.versions = VERSIONS
    await upgraded(cluster, 20)
    assert set((await cluster.states()).values()) == {"ready"}
    assert not node.outdated()


async def test_a_node_of_another_version_is_told_to_whom_its_engines_belong_when_its_machine_has_joined_again() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal(chat=4))
    await cluster.rounds()
    node = cluster.nodes.nodes["a"]
    node.versions, node.boot = VERSIONS.model_copy(update={"sliceway": "0"}), "b1"
    told, running = len(node.orders), dict(node.running)
    await cluster.rounds(5)
    assert (len(node.orders), node.running) == (told, running), "it is ordered nothing"
    (only,) = node.belongs
    assert only.seats == running
    assert only.owners.keys() == running.keys()
    assert not cluster.nodes.nodes["b"].belongs
    node.versions = VERSIONS
    await cluster.rounds()
    assert len(node.orders) == told + 1, "what it was told while it took no orders is no order"


async def test_who_asks_for_the_next_table_has_the_last_one() -> None:
    cluster = two_nodes()
    cluster.head.aim(goal("old", chat=4))
    await cluster.rounds()
    cluster.head.aim(goal("new", chat=4))
    await cluster.rounds(6)
    assert replaced(cluster) == [], "no node has said that its gateways know"
    for name, node in cluster.nodes.nodes.items():
        node.boot = f"boot of {name}"
    for _ in range(60):
        await cluster.rounds(1)
        told = await cluster.head.next_news("", 0, timeout_seconds=0.001)
        assert told is not None
        assert told.whole is not None
        for node in cluster.nodes.nodes.values():
            await cluster.head.next_news(told.whole.head, told.whole.sequence, timeout_seconds=0, boot=node.boot)
    assert len(replaced(cluster)) == 4


# ---- apart


async def test_a_replica_that_would_be_too_close_to_another_waits_with_that_reason() -> None:
    cluster = two_nodes()
    aimed = goal(chat=3, code=1)
    cluster.head.aim(replace(aimed, models=[m.model_copy(update={"spread": "nodes"}) for m in aimed.models]))
    await cluster.rounds()
    table = await cluster.table()
    assert {row.slice.id.partition("/")[0] for row in table.ready("chat")} == {"a", "b"}
    unplaced = cluster.head.status()["unplaced"]
    assert list(unplaced) == ["chat-2"]  # type: ignore[call-overload]
    assert "no node is left for 'chat-2'" in unplaced["chat-2"]  # type: ignore[index]
    assert {row.name: dict(row.unplaced) for row in table.models} == {"chat": unplaced, "code": {}}
    before = table.generation
    await cluster.rounds()
    assert (await cluster.table()).generation == before


# ---- as demand asks

QUICK = AutoscalePolicy.model_validate(
    {"look_every": "500ms", "scale_up_after": "2s", "scale_down_after": "4s", "cool_down": "2s", "sleep_after": "1s"}
)


def following(least: int = 1, most: int = 3, **others: int) -> ClusterGoal:
    """One model whose replicas, of 16 requests each, follow demand, beside others that do not."""
    aimed = goal(chat=1, **others)
    asked = ReplicaRange(min=least, max=most)
    return replace(
        aimed, models=[m.model_copy(update={"replicas": asked}) if m.name == "chat" else m for m in aimed.models]
    )


def seen(running: int = 0, queued: int = 0, pool: str = "chat") -> dict[str, Signals]:
    idle = 0.0 if running or queued else 60.0
    return {pool: Signals(running=running, queued=queued, idle_seconds=idle)}


async def scaled_to_three(cluster: Cluster) -> None:
    cluster.head.aim(replace(following(), policy=QUICK))
    cluster.nodes.nodes["a"].demand = seen(running=14)
    cluster.nodes.nodes["b"].demand = seen(running=14)
    await upgraded(cluster, 20)
    assert await cluster.states() == {"chat-0": "ready", "chat-1": "ready", "chat-2": "ready"}


async def test_replicas_come_when_the_gateways_of_all_nodes_together_see_enough() -> None:
    cluster = two_nodes()
    cluster.head.aim(replace(following(), policy=QUICK))
    cluster.nodes.nodes["a"].demand = seen(running=9)
    await upgraded(cluster, 20)
    assert set(await cluster.states()) == {"chat-0"}, "nine requests are for one replica"
    cluster.nodes.nodes["b"].demand = seen(running=9)
    await upgraded(cluster, 20)
    assert set(await cluster.states()) == {"chat-0", "chat-1"}, "eighteen are for two"
    row = cluster.head.status()["scaling"]["chat"]  # type: ignore[index]
    assert (row["replicas"], row["placed"], row["least"], row["most"], row["short"]) == (2, 2, 1, 3, 0)


async def test_every_gateway_is_told_the_numbers_and_not_each_look() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    told = await cluster.head.next_broadcast("", 0, timeout_seconds=0.001)
    assert told is not None
    row = told.scaling.scaling["chat"]
    assert (row.replicas, row.placed) == (3, 3)
    cluster.nodes.nodes["a"].demand = seen(running=13)
    await upgraded(cluster, 3)
    assert await cluster.head.next_broadcast(told.head, told.sequence, timeout_seconds=0.001) is None
    cluster.nodes.nodes["b"].demand = seen(running=60)
    cluster.lose("b")
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    await upgraded(cluster, 3)
    told = await cluster.head.next_broadcast("", 0, timeout_seconds=0.001)
    assert told is not None
    assert (told.scaling.scaling["chat"].placed, len(told.scaling.unplaced)) == (2, 1)


async def test_without_a_gateway_that_tells_anything_nothing_changes() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    for node in cluster.nodes.nodes.values():
        node.demand = None
    await upgraded(cluster, 40)
    assert len(await cluster.states()) == 3


async def test_a_replica_that_goes_is_left_by_every_gateway_before_its_node_ends_it() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    for node in cluster.nodes.nodes.values():
        node.demand = seen()
    tables = await upgraded(cluster, 60)
    drained = [t for t in tables if any(r.state is ReplicaState.DRAINING for r in t.replicas)]
    assert {r.replica for t in drained for r in t.replicas if r.state is ReplicaState.DRAINING} == {"chat-1", "chat-2"}
    assert await cluster.states() == {"chat-0": "ready"}
    assert sorted(r for node in cluster.nodes.nodes.values() for r in node.ended) == ["chat-1", "chat-2"]
    assert set(cluster.nodes.holders) == {"chat-0"}, "their slices are given back"


async def test_a_gateway_that_does_not_hear_of_it_keeps_nobody_for_ever() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    for node in cluster.nodes.nodes.values():
        node.demand = seen()
    tables = await upgraded(cluster, 60, deaf="a")
    assert any(row.state is ReplicaState.DRAINING for table in tables for row in table.replicas)
    assert await cluster.states() == {"chat-0": "ready"}


async def test_the_next_head_goes_on_with_the_number_that_was_decided_on() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    ended = [list(node.ended) for node in cluster.nodes.nodes.values()]
    for node in cluster.nodes.nodes.values():
        node.demand = None  # its gateways have not told it anything yet
    cluster.new_head()
    assert (await cluster.head.restore()).numbers == {"chat": 3}
    cluster.head.aim(replace(following(), policy=QUICK))
    await upgraded(cluster, 10)
    assert len(await cluster.states()) == 3
    assert [node.ended for node in cluster.nodes.nodes.values()] == ended


async def test_a_head_that_has_lost_its_journal_stops_nothing_that_demand_brought() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    cluster.store.journal = None
    cluster.nodes.holders.clear()
    cluster.new_head()
    await cluster.head.restore()
    cluster.head.aim(replace(following(), policy=QUICK))
    for node in cluster.nodes.nodes.values():
        node.demand = None
    await upgraded(cluster, 10)
    assert len(await cluster.states()) == 3


async def test_a_node_that_is_heard_of_late_by_such_a_head_keeps_what_demand_brought() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    there = {name: dict(node.running) for name, node in cluster.nodes.nodes.items()}
    assert all(there.values()), "on both nodes"
    cluster.store.journal = None
    cluster.nodes.holders.clear()
    late = next(name for name, running in there.items() if "chat-0" not in running)
    cluster.lose(late)
    cluster.new_head()
    await cluster.head.restore()
    cluster.head.aim(replace(following(), policy=QUICK))
    await cluster.rounds(4)
    cluster.nodes.nodes[late].up = True
    await upgraded(cluster, 20)
    assert {name: dict(node.running) for name, node in cluster.nodes.nodes.items()} == there
    assert [node.ended for node in cluster.nodes.nodes.values()] == [[], []]


@pytest.mark.parametrize("between", [0, 1, 4])
async def test_a_head_that_is_lost_again_at_once_counts_nothing_that_was_not_heard_of_yet(between: int) -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    there = {name: dict(node.running) for name, node in cluster.nodes.nodes.items()}
    cluster.store.journal = None
    cluster.nodes.holders.clear()
    late = next(name for name, running in there.items() if "chat-0" not in running)
    cluster.lose(late)
    for again in range(2):
        cluster.new_head()
        await cluster.head.restore()
        await cluster.head.take_over(replace(following(), policy=QUICK))
        await cluster.rounds(0 if again else between)
    cluster.nodes.nodes[late].up = True
    await upgraded(cluster, 20)
    assert {name: dict(node.running) for name, node in cluster.nodes.nodes.items()} == there
    assert [node.ended for node in cluster.nodes.nodes.values()] == [[], []]
    assert HeadJournal.model_validate_json(cluster.store.journal or b"").settled


async def test_a_model_sleeps_without_requests_and_the_first_one_wakes_it() -> None:
    cluster = two_nodes()
    cluster.head.aim(replace(following(least=0), policy=QUICK))
    await upgraded(cluster, 3)
    assert await cluster.states() == {}
    cluster.nodes.nodes["b"].demand = seen(queued=1)
    await upgraded(cluster, 15)
    assert await cluster.states() == {"chat-0": "ready"}
    cluster.nodes.nodes["b"].demand = seen()
    await upgraded(cluster, 60)
    assert await cluster.states() == {}
    assert cluster.nodes.holders == {}


async def test_who_is_configured_takes_the_slice_of_who_is_there_for_demand() -> None:
    cluster = two_nodes()
    aimed = replace(following(most=4, code=1), policy=QUICK)
    cluster.head.aim(aimed)
    cluster.nodes.nodes["a"].demand = seen(running=40)
    await upgraded(cluster, 20)
    assert len(await cluster.states()) == 4, "one of code and three for demand"
    unplaced = cluster.head.status()["unplaced"]
    assert "no slice that it fits is free" in unplaced["chat-3"]  # type: ignore[index]
    cluster.lose("b")
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    await upgraded(cluster, 10)
    assert await cluster.states() == {"chat-0": "ready", "code-0": "ready"}


async def test_a_dedicated_tenant_has_replicas_by_its_own_demand() -> None:
    cluster = two_nodes()
    cluster.head.aim(replace(following(), policy=QUICK, pools={"chat": (None, "acme")}))
    cluster.nodes.nodes["a"].demand = seen() | seen(running=18, pool="chat@acme")
    await upgraded(cluster, 20)
    assert await cluster.states() == {"chat-0": "ready", "chat@acme-0": "ready", "chat@acme-1": "ready"}
    cluster.new_head()
    assert (await cluster.head.restore()).pools == {"chat": (None, "acme")}


async def test_numbers_keep_within_a_new_configuration() -> None:
    cluster = two_nodes()
    await scaled_to_three(cluster)
    cluster.head.aim(replace(following(most=2), policy=QUICK))
    await upgraded(cluster, 10)
    assert set(await cluster.states()) == {"chat-0", "chat-1"}
    cluster.head.aim(goal(chat=1))
    await upgraded(cluster, 10)
    assert set(await cluster.states()) == {"chat-0"}
    assert cluster.head.status()["scaling"] == {}


async def test_a_demand_without_a_number_has_as_many_replicas_as_bear_it() -> None:
    cluster = two_nodes()
    aimed = goal(chat=1)
    demand = DemandConfig(requests_per_second=6.0, prompt_tokens=100, output_tokens=10)
    models = [m.model_copy(update={"replicas": None, "demand": demand}) for m in aimed.models]
    cluster.head.aim(
        replace(aimed, models=models, capacity_on=lambda _m, _s, _measured: Capacity(2.0, "estimated", "made up"))
    )
    await cluster.rounds(5)
    assert await cluster.states() == {f"chat-{i}": "ready" for i in range(3)}
    planned = cluster.head.status()["planned"]
    assert planned["chat"]["replicas"] == 3  # type: ignore[index]
    cluster.lose("a")
    await cluster.pass_seconds(LOST_AFTER_SECONDS + 1)
    await cluster.rounds(6)
    assert len(await cluster.states()) == 2
    assert "every slice" in cluster.head.status()["planned"]["chat"]["reason"]  # type: ignore[index]
