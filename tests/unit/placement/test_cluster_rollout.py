"""The upgrade of a whole cluster, on a clock that is only added to: 224 slices on four nodes with 167 replicas, as in the drill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest

from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.retiring import PATIENCE_SECONDS
from placement.cluster.rollout import Rollout
from placement.table import ReplicaRow, ReplicaState, RoutingTable, SliceRow

NODES, SLICES, ROUND_SECONDS, START_SECONDS = 4, 56, 0.5, 10.0
MODELS = {f"model-{i:02}": 7 for i in range(23)} | {"small": 5, "alone": 1}  # 167 replicas
FEW = {name: MODELS[name] for name in ("model-00", "model-01", "model-02", "model-03", "small")}
VERSIONS = Versions(sliceway="2", python="3.11", ray="2.60.0")


def seats_of(models: Mapping[str, int]) -> dict[str, Seat]:
    """Every replica on a slice of its own, the nodes in turn, so that neighbours in the order are on different nodes."""
    names = [(model, f"{model}-{i}") for model, count in models.items() for i in range(count)]
    return {
        replica: Seat(replica=replica, model=model, node=f"node-{i % NODES}", slice_id=f"gpu/{i // NODES}")
        for i, (model, replica) in enumerate(names)
    }


@dataclass
class Cluster:
    """Nodes that do as the rollout says: gateways hear of a table a round later, engines take `START_SECONDS`."""

    seats: Mapping[str, Seat] = field(default_factory=lambda: seats_of(MODELS))
    broken: frozenset[str] = frozenset()  # replicas whose new engine does not start
    now: float = 0.0
    generation: int = 1
    heard: int = 1
    rollout: Rollout = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        assert len(self.seats) <= NODES * SLICES
        self.outdated = set(self.seats)
        self.starting: dict[str, float] = {}
        self.failed: set[str] = set()
        self.replaced: list[str] = []
        self.left_at: dict[str, int] = {}
        self.away: list[frozenset[str]] = []
        self._stale = {f"node-{i}" for i in range(NODES)}
        self._tables: dict[str, RoutingTable] = {}

    def run(self, rounds: int = 10**6) -> None:
        """Rounds until nothing happens any more. Where engines only start, the clock goes to when the first one serves."""
        for _ in range(rounds):
            before = (self.rollout.leaving, self.rollout.turns, self.generation, self.heard, len(self.replaced))
            self._finish()
            leaving = self.rollout.leaving
            self.rollout.look(self._reports(), self.seats)
            self.heard = self.generation
            if self.rollout.leaving != leaving:
                self.generation += 1
            self.rollout.told(self.generation)
            for replica in self.rollout.turns & self.outdated:
                self._replace(replica)
            self.away.append(frozenset(self.seats) - self.serving())
            after = (self.rollout.leaving, self.rollout.turns, self.generation, self.heard, len(self.replaced))
            if before == after and not self.starting:
                return
            wait = min(self.starting.values(), default=0.0) - self.now if before == after else 0.0
            self.now += max(ROUND_SECONDS, wait)

    def serving(self) -> frozenset[str]:
        """Replicas that gateways send new requests to."""
        return frozenset(self.seats) - self.rollout.leaving - self.starting.keys() - self.failed

    def _replace(self, replica: str) -> None:
        assert self.heard >= self.left_at.setdefault(replica, self.generation), "every gateway was told before"
        self.outdated.discard(replica)
        self.starting[replica] = self.now + START_SECONDS
        self.replaced.append(replica)
        self._stale.add(self.seats[replica].node)

    def _finish(self) -> None:
        for replica in [r for r, at in self.starting.items() if at <= self.now]:
            del self.starting[replica]
            if replica in self.broken:
                self.failed.add(replica)
            self._stale.add(self.seats[replica].node)

    def _reports(self) -> dict[str, NodeReport]:
        for node in self._stale:
            mine = [seat for seat in self.seats.values() if seat.node == node]
            self._tables[node] = RoutingTable(generation=1, replicas=tuple(map(self._row, mine)))
        self._stale.clear()
        return {node: self._report(node, table) for node, table in self._tables.items()}

    def _report(self, node: str, table: RoutingTable) -> NodeReport:
        outdated = tuple(r for r in self.outdated if self.seats[r].node == node)
        return NodeReport.model_construct(
            node=node,
            address="10.0.0.1",
            versions=VERSIONS,
            boot="b",
            table=table,
            outdated=outdated,
            generation=self.heard,
        )

    def _row(self, seat: Seat) -> ReplicaRow:
        state = ReplicaState.FAILED if seat.replica in self.failed else ReplicaState.READY
        return ReplicaRow(
            replica=seat.replica,
            model=seat.model,
            engine_model="m",
            endpoint="http://10.0.0.1:1",
            slice=SliceRow(id=seat.slice_id, kind="mig"),
            state=ReplicaState.STARTING if seat.replica in self.starting else state,
        )


def in_order(replicas: Iterable[str]) -> list[str]:
    return sorted(replicas, key=lambda r: (r.rpartition("-")[0], int(r.rpartition("-")[2])))


@pytest.fixture(scope="module")
def upgraded() -> Cluster:
    cluster = Cluster()
    assert len(cluster.seats) == 167
    cluster.run()
    return cluster


def test_all_are_replaced_each_once_in_the_order_of_their_names(upgraded: Cluster) -> None:
    assert upgraded.replaced == in_order(upgraded.seats)
    assert upgraded.outdated == set()
    assert upgraded.serving() == set(upgraded.seats)


def test_one_at_a_time_in_the_whole_cluster(upgraded: Cluster) -> None:
    assert max(map(len, upgraded.away)) == 1


def test_a_model_with_a_second_replica_is_served_all_the_while(upgraded: Cluster) -> None:
    for model, count in MODELS.items():
        mine = {r for r, seat in upgraded.seats.items() if seat.model == model}
        fewest = min(len(mine - away) for away in upgraded.away)
        assert fewest == count - 1


def test_it_takes_as_long_as_the_engines_take_one_after_another(upgraded: Cluster) -> None:
    """The drill's 11 s each: what an engine takes, and the rounds in which gateways are told and the node is."""
    each = upgraded.now / len(upgraded.seats)
    assert START_SECONDS <= each <= START_SECONDS + 3 * ROUND_SECONDS
    assert 28 * 60 <= upgraded.now <= 33 * 60


def test_a_replacement_that_fails_costs_itself_and_its_model_stays_as_it_is() -> None:
    broken = Cluster(seats_of(FEW), broken=frozenset({"model-03-1"}))
    broken.run()
    stayed = {f"model-03-{i}" for i in range(2, 7)}
    assert broken.outdated == stayed, "the model's others go on with what they run"
    assert broken.replaced == in_order(broken.seats.keys() - stayed), "every other model is upgraded"
    assert frozenset(broken.seats) - broken.serving() == {"model-03-1"}
    assert max(map(len, broken.away)) == 2, "the one that failed, and whose turn it is"


def test_where_every_model_fails_each_loses_one_replica() -> None:
    models = {name: count for name, count in MODELS.items() if count > 1}
    broken = Cluster(seats_of(models), broken=frozenset(seats_of(models)))
    broken.run()
    assert broken.replaced == [f"{model}-0" for model in sorted(models)]
    assert {r for r in broken.seats if r not in broken.serving()} == set(broken.replaced)


def test_what_serves_nobody_is_replaced_before_what_does() -> None:
    """A slice whose engine is away already is the spare: beginning there costs nothing."""
    cluster = Cluster()
    cluster.failed.add("small-4")
    cluster.run(rounds=8)
    assert cluster.replaced[0] == "small-4"
    assert cluster.away[0] == {"small-4"}


def test_a_gateway_that_never_hears_of_it_delays_a_turn_and_does_not_keep_it() -> None:
    cluster = Cluster(seats_of(FEW))
    rollout, reports = cluster.rollout, cluster._reports()
    rollout.look(reports, cluster.seats, now_seconds=100.0)
    rollout.told(generation=2)
    assert rollout.leaving == {"model-00-0"}
    for now in (101.0, 101.0 + PATIENCE_SECONDS - 0.5):
        rollout.look(reports, cluster.seats, now_seconds=now)
        assert rollout.turns == frozenset()
    rollout.look(reports, cluster.seats, now_seconds=101.0 + PATIENCE_SECONDS)
    assert rollout.turns == {"model-00-0"}


def test_another_head_goes_on_where_the_last_one_was() -> None:
    cluster = Cluster(seats_of(FEW))
    cluster.run(rounds=40)
    begun = list(cluster.replaced)
    assert begun
    cluster.rollout = Rollout()
    cluster.run()
    assert cluster.replaced == in_order(cluster.seats)
    assert cluster.replaced[: len(begun)] == begun
    assert max(map(len, cluster.away)) == 1
