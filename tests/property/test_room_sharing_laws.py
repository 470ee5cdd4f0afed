"""Several gateways, one replica: together they never give it more than it has, and whoever waits gets its turn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.admission import Admission, Ask, Claim, Loads
from gateway.admission.sharing import RoomShares, Sharing
from gateway.routes import build_routes
from gateway.testing import replica_row
from placement.table import ModelRow, RoutingTable
from tests.property.test_sharing_laws import LEASE, MemoryStore, step

SEATS, KV_TOKENS, LONGEST = 4, 4000, 3000
ROW = replica_row("m@0", "m", "unix:/0").model_copy(update={"max_num_seqs": SEATS, "kv_cache_tokens": KV_TOKENS})
TABLE = RoutingTable(generation=1, models=(ModelRow(name="m", max_model_len=LONGEST),), replicas=(ROW,))
ROUTES = build_routes(TABLE, (), {})


class Gateway:
    def __init__(self, world: Any, name: str) -> None:
        self.world = world
        self.admission = Admission(lambda: ROUTES, Loads(bound=100), lambda: world.now)
        self.admission.follow_routes()
        self.claims: list[Claim] = []
        self.sharing = Sharing(
            RoomShares(self.admission), world.store, lambda: world.now, process=name, lease_seconds=LEASE
        )
        self.sync()

    @property
    def load(self) -> Any:
        return self.admission.loads.get("m@0")

    def sync(self) -> None:
        step(self.sharing.sync())

    def ask(self, answer: int) -> None:
        claim = self.admission.claim(Ask("t", "m", b"{}", max_tokens=answer), ROUTES.models["m"], self.world.now)
        self.admission.place(claim, lambda: None, self.world.now)
        self.claims.append(claim)

    def end(self, pick: int) -> None:
        running = [claim for claim in self.claims if claim.load is not None]
        if running:
            claim = running[pick % len(running)]
            self.claims.remove(claim)
            claim.settle(self.world.now, 1, 1, complete=True)

    @property
    def waiting(self) -> int:
        return sum(claim.load is None for claim in self.claims)


class Fleet(RuleBasedStateMachine):
    """Gateways that come, ask, end requests, tell the store, and leave or die."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.store = MemoryStore(self)
        self.gateways: dict[str, Gateway] = {}
        self.names = 0
        self.start()

    @rule()
    def start(self) -> None:
        if len(self.gateways) < 3:
            self.names += 1
            self.gateways[f"g{self.names}"] = Gateway(self, f"g{self.names}")

    @rule(pick=st.integers(0, 9), answer=st.sampled_from([10, 100, 500, 1200]))
    def ask(self, pick: int, answer: int) -> None:
        self.picked(pick).ask(answer)

    @rule(pick=st.integers(0, 9), which=st.integers(0, 9))
    def end(self, pick: int, which: int) -> None:
        self.picked(pick).end(which)

    @rule(rounds=st.integers(1, 12))
    def keep_in_touch(self, rounds: int) -> None:
        for _ in range(rounds):
            self.now += 0.25
            for gateway in self.gateways.values():
                gateway.sync()

    @precondition(lambda self: len(self.gateways) > 1)
    @rule(pick=st.integers(0, 9))
    def die(self, pick: int) -> None:
        """Its connections end with it, and with them its requests."""
        name = sorted(self.gateways)[pick % len(self.gateways)]
        del self.gateways[name]

    @precondition(lambda self: len(self.gateways) > 1)
    @rule(pick=st.integers(0, 9))
    def leave(self, pick: int) -> None:
        gateway = self.picked(pick)
        while any(claim.load for claim in gateway.claims):
            gateway.end(0)
        step(gateway.sharing.leave())
        self.gateways = {name: one for name, one in self.gateways.items() if one is not gateway}

    def picked(self, pick: int) -> Gateway:
        return self.gateways[sorted(self.gateways)[pick % len(self.gateways)]]

    @invariant()
    def the_replica_never_has_more_than_it_holds(self) -> None:
        """Requests of more than a fair part may run as the only one of their gateway; all others fit together."""
        loads = [gateway.load for gateway in self.gateways.values()]
        assert sum(load.sequences for load in loads) <= SEATS
        fair = KV_TOKENS // 3
        large = max(
            (c.estimate.prompt + c.estimate.output for g in self.gateways.values() for c in g.claims), default=0
        )
        if large <= fair:
            assert sum(load.kv_tokens for load in loads) <= KV_TOKENS

    def teardown(self) -> None:
        """Whoever waits is served while the others go on asking, and at the end nothing is held."""
        for _ in range(200):
            if not any(gateway.claims for gateway in self.gateways.values()):
                break
            self.keep_in_touch(1)
            for gateway in self.gateways.values():
                gateway.end(0)
        assert not any(gateway.claims for gateway in self.gateways.values())
        assert all((g.load.requests, g.load.sequences, g.load.kv_tokens) == (0, 0, 0) for g in self.gateways.values())


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.store = MemoryStore(self)

    def rounds(self, gateways: list[Gateway], count: int) -> None:
        for _ in range(count):
            self.now += 0.25
            for gateway in gateways:
                gateway.sync()


def test_a_gateway_alone_has_the_whole_replica_at_once() -> None:
    gateway = Gateway(World(), "a")
    assert (gateway.load.seat_share, gateway.load.kv_share) == (SEATS, KV_TOKENS)
    for _ in range(SEATS + 1):
        gateway.ask(10)
    assert (gateway.load.sequences, gateway.waiting) == (SEATS, 1)


def test_an_idle_gateway_leaves_its_part_to_a_busy_one_and_the_other_way_round() -> None:
    world = World()
    first, second = Gateway(world, "a"), Gateway(world, "b")
    for busy in (second, first):
        for _ in range(SEATS):
            busy.ask(10)
        world.rounds([first, second], 40)
        assert (busy.load.sequences, busy.waiting) == (SEATS, 0)
        for _ in range(SEATS):
            busy.end(0)


def test_two_busy_gateways_share_alike() -> None:
    world = World()
    first, second = Gateway(world, "a"), Gateway(world, "b")
    served = [0, 0]
    for _ in range(200):
        for number, gateway in enumerate((first, second)):
            while gateway.waiting < SEATS:
                gateway.ask(10)
            before = len(gateway.claims)
            gateway.end(0)
            served[number] += before - len(gateway.claims)
        world.rounds([first, second], 1)
    assert min(served) > 0.8 * max(served)


def test_one_seat_goes_to_and_fro() -> None:
    row = ROW.model_copy(update={"max_num_seqs": 1})
    routes = build_routes(TABLE.model_copy(update={"replicas": (row,)}), (), {})
    world = World()
    first, second = Gateway(world, "a"), Gateway(world, "b")
    for gateway in (first, second):
        gateway.admission._routes = lambda: routes
        gateway.admission.follow_routes()
    served = [0, 0]
    for _ in range(60):
        for number, gateway in enumerate((first, second)):
            if not gateway.waiting:
                gateway.ask(10)
            assert first.load.sequences + second.load.sequences <= 1
            before = len(gateway.claims)
            gateway.end(0)
            served[number] += before - len(gateway.claims)
            world.rounds([first, second], 1)
    assert min(served) >= 10


def test_a_replica_that_is_gone_for_one_gateway_is_free_for_the_other() -> None:
    world = World()
    first, second = Gateway(world, "a"), Gateway(world, "b")
    gone = build_routes(TABLE.model_copy(update={"replicas": ()}), (), {})
    first.admission._routes = lambda: gone
    first.admission.follow_routes()
    world.rounds([first, second], 8)
    for _ in range(SEATS):
        second.ask(10)
    world.rounds([first, second], 40)
    assert (second.load.sequences, second.waiting) == (SEATS, 0)


@pytest.mark.parametrize("others", [0, 1])
def test_a_replica_that_came_back_between_two_rounds_is_used_again(others: int) -> None:
    world = World()
    gateways = [Gateway(world, name) for name in "ab"[: 1 + others]]
    world.rounds(gateways, 8)
    first = gateways[0]
    gone = build_routes(TABLE.model_copy(update={"replicas": ()}), (), {})
    for routes in (gone, ROUTES):
        first.admission._routes = lambda routes=routes: routes  # type: ignore[misc]
        first.admission.follow_routes()
    world.rounds(gateways, 8)
    for _ in range(SEATS):
        first.ask(10)
    world.rounds(gateways, 40)
    assert (first.load.sequences, first.waiting) == (SEATS, 0)


def test_where_the_store_is_away_each_goes_on_with_its_fair_part() -> None:
    world = World()
    first, second = Gateway(world, "a"), Gateway(world, "b")
    world.rounds([first, second], 8)
    world.store.mute = True
    world.rounds([first, second], 100)
    for gateway in (first, second):
        for _ in range(SEATS):
            gateway.ask(10)
        assert gateway.load.sequences == SEATS // 2
        assert gateway.sharing.problem is not None
