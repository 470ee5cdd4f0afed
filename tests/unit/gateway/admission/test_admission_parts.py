"""The small parts of admission: estimates, the choice of a replica, affinity, domains, salts, and what refusals say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Admission, AdmissionPolicy, Ask, CacheSalts, Loads, QueueConfig, TenantLimits
from gateway.admission.affinity import home_of, prefix_key
from gateway.admission.domains import owners
from gateway.admission.estimate import TokenRatio, estimate, refers_outside
from gateway.admission.loads import choose
from gateway.admission.view import limits, pool_view, queue_of, throttled
from gateway.errors import DeadlineTooClose, EngineUnreachable, NoReadyReplica, QueueFull, RateLimited
from gateway.routes import build_routes
from gateway.testing import FakeClock, replica_row
from placement.table import ModelRow, RoutingTable


class World:
    def __init__(self, replicas: int = 2, seats: int = 2, policy: AdmissionPolicy | None = None) -> None:
        self.clock = FakeClock()
        rows = tuple(
            replica_row(f"m@{n}", "m", f"unix:/{n}").model_copy(update={"max_num_seqs": seats}) for n in range(replicas)
        )
        self.routes = build_routes(
            RoutingTable(generation=1, models=(ModelRow(name="m", max_model_len=1000),), replicas=rows), (), {}
        )
        self.loads = Loads(bound=100)
        self.admission = Admission(lambda: self.routes, self.loads, self.clock, policy)
        self.placed: list[str] = []

    def ask(self, tenant: str = "t", raw: bytes = b"{}", **fields: object) -> str | None:
        claim = self.admission.claim(Ask(tenant, "m", raw, **fields), self.routes.models["m"], self.clock())  # type: ignore[arg-type]
        self.last = claim
        row = self.admission.place(claim, lambda: self.placed.append(tenant), self.clock())
        return row.replica if row else None


# ---- estimates


@given(st.integers(0, 10**7), st.sampled_from([None, -1, 0, 5, 10**9, "many", True]), st.sampled_from([None, 1, 4096]))
def test_estimates_stay_within_the_models_length(size: int, max_tokens: object, longest: int | None) -> None:
    made = estimate(size, TokenRatio(), max_tokens=max_tokens, max_model_len=longest, sequences=1, generates=True)
    assert 0 < made.prompt <= made.prompt_bound or made.prompt_bound == 0
    assert made.likely <= made.bound
    if longest is not None:
        assert made.prompt <= longest
        assert made.output <= longest


def test_tokens_per_byte_rise_at_once_and_fall_slowly() -> None:
    ratio = TokenRatio()
    ratio.learn(1000, 900)
    assert ratio.likely(1000) >= 900
    for _ in range(1000):
        ratio.learn(1000, 250)
    assert 250 <= ratio.likely(1000) <= 320


# ---- the choice


def test_load_goes_where_least_is_and_round_among_equals() -> None:
    world = World(replicas=3, seats=4)
    assert sorted(filter(None, [world.ask() for _ in range(6)])) == ["m@0", "m@0", "m@1", "m@1", "m@2", "m@2"]


def test_a_slow_replica_gets_less() -> None:
    world = World(replicas=2, seats=50)
    for number, seconds in enumerate((1.0, 4.0)):
        load = world.loads.of(world.routes.models["m"].ready[number])
        for _ in range(100):
            load.served(seconds, 100)
    served = [world.ask() for _ in range(20)]
    assert served.count("m@0") >= 3 * served.count("m@1")


def test_long_prompts_with_one_beginning_meet_until_that_costs_too_much() -> None:
    world = World(replicas=4, seats=16)
    raw = b'{"model":"m","messages":[' + b"x" * 4000 + b"]}"
    served = [world.ask(raw=raw, max_tokens=10) for _ in range(20)]
    home = max(set(served), key=served.count)
    assert served[:4] == [home] * 4
    assert served.count(home) < 20


def test_tenants_have_homes_of_their_own() -> None:
    raw = b'{"messages":' + b"x" * 2000
    keys = {prefix_key(f"tenant-{n}", raw) for n in range(50)}
    assert len(keys) == 50
    assert prefix_key("t", b"short") is None
    world = World(replicas=4)
    world.admission.follow_routes()
    loads = world.admission.pool("m", "t").loads
    homes = [home_of(key, loads).row.replica for key in keys if key is not None]
    assert len(set(homes)) == 4


def test_no_home_is_worth_a_full_replica() -> None:
    world = World(replicas=2, seats=2)
    loads = [world.loads.of(row) for row in world.routes.models["m"].ready]
    assert choose(loads[:1], 0, home=loads[1]) is loads[0]


# ---- refusals and retries


def test_replicas_to_avoid_are_avoided_until_none_is_left() -> None:
    world = World()
    world.ask()
    claim, avoid = world.last, set()
    for _ in range(2):
        assert claim.replica is not None
        avoid.add(claim.replica.replica)
        claim.leave(world.clock())
        if len(avoid) < 2:
            world.admission.place(claim, lambda: None, world.clock(), frozenset(avoid))
    with pytest.raises(EngineUnreachable):
        world.admission.place(claim, lambda: None, world.clock(), frozenset(avoid))
    claim.refund(world.clock())
    assert world.loads.total() == 0


def test_no_replica_says_why() -> None:
    with pytest.raises(NoReadyReplica, match="it has no replica"):
        World(replicas=0).ask()


def test_a_replica_on_trial_gets_one_request() -> None:
    world = World(replicas=1, seats=8)
    world.admission.follow_routes()
    world.admission.pool("m", "t").loads[0].trial = True
    assert [world.ask(), world.ask()] == ["m@0", None]


def test_one_tenant_cannot_fill_the_queue() -> None:
    world = World(replicas=1, seats=1, policy=AdmissionPolicy(queue=QueueConfig(max_requests=8)))
    for _ in range(5):
        world.ask("flood")
    with pytest.raises(QueueFull, match="4 requests of yours wait already; 4 requests are ahead") as caught:
        world.ask("flood")
    assert caught.value.retry_after_seconds > 0
    assert world.ask("other") is None
    view = pool_view(world.admission.pool("m", "t"), world.clock())
    assert view["waiting_by_tenant"] == {"flood": 4, "other": 1}
    row = queue_of(world.admission, "m@0")
    assert row is not None
    assert (row["running_requests"], row["waiting_requests"]) == (1, 5)
    assert queue_of(world.admission, "nobody") is None


def test_a_deadline_is_weighed_by_what_runs_and_not_only_by_what_ended() -> None:
    """Requests that ended took a tenth of a second; those that run by now have taken much longer."""
    world = World(replicas=1, seats=4)
    for _ in range(4):
        world.ask("short")
        claim = world.last
        world.clock.turn(0.1)
        claim.settle(world.clock(), 10, 10, complete=True)
    for _ in range(4):
        world.ask("long")
    assert world.ask(deadline=world.clock() + 1.0) is None  # a fortieth of a second, as far as anybody knows
    world.last.leave(world.clock())
    world.clock.turn(6.0)
    with pytest.raises(DeadlineTooClose, match=r"would wait about 1\.5 s") as caught:
        world.ask(deadline=world.clock() + 1.0)
    assert caught.value.retry_after_seconds == 0.5
    assert world.ask() is None  # who has no deadline waits
    assert world.ask(deadline=world.clock() + 10.0) is None


def test_one_seat_that_is_held_for_hours_makes_nobody_late_at_the_others() -> None:
    world = World(replicas=1, seats=8)
    world.ask("background")
    world.clock.turn(3600.0)
    for _ in range(7):
        world.ask("short")
    claim = world.last
    world.clock.turn(0.1)
    claim.settle(world.clock(), 10, 10, complete=True)
    world.ask("short")
    pool = world.admission.pool("m", "t")
    assert 0.1 / 8 < pool.expected_wait_seconds("t", world.clock()) < 0.1 / 6


def test_of_many_seats_some_are_looked_at() -> None:
    world = World(replicas=2, seats=500)
    for _ in range(200):
        world.ask()
    world.clock.turn(3.0)
    assert world.admission.pool("m", "t").expected_wait_seconds("t", world.clock()) == pytest.approx(3.0 / 200)


def test_who_is_throttled_and_why() -> None:
    world = World(policy=AdmissionPolicy(limits={"t": TenantLimits(requests_per_minute=1)}))
    world.ask()
    with pytest.raises(RateLimited):
        world.ask()
    world.clock.turn(7)
    with pytest.raises(RateLimited, match="requests per minute: limit 1, used 1, requested 1") as caught:
        world.ask()
    assert caught.value.since_seconds == 7
    (row,) = throttled(world.admission)
    assert (row["tenant"], row["limit"], row["refused"], row["throttled_seconds"]) == ("t", "requests_per_minute", 2, 7)
    assert 53 <= row["retry_after_seconds"] <= 54
    world.clock.turn(120)
    assert throttled(world.admission) == []
    assert limits(world.admission)[0]["used"] == 0


# ---- the rest


@given(st.lists(st.integers(0, 40), unique=True, max_size=12), st.lists(st.sampled_from("abcdef"), unique=True))
def test_every_dedicated_tenant_has_a_replica_of_its_own(numbers: list[int], tenants: list[str]) -> None:
    owner = owners([f"m@{n}" for n in numbers], tenants)
    assert len(set(owner.values())) == len(owner) == min(len(numbers), len(tenants))
    assert set(owner) == {f"m@{n}" for n in sorted(numbers)[: len(tenants)]}


def test_salts_are_a_tenants_own_and_stay_the_same() -> None:
    salts = CacheSalts(lambda: b"secret")
    assert salts.of("a") == CacheSalts(lambda: b"secret").of("a")
    assert len({salts.of("a"), salts.of("b"), CacheSalts(lambda: b"other").of("a")}) == 3
    assert all(c.isalnum() or c in "-_" for c in salts.of("a"))


@pytest.mark.parametrize("padding", [0, 20_000])
@pytest.mark.parametrize(
    "word", [b"image_url", b"video_url", b"file_id", b"input_image", b"input_audio", b"input_file"]
)
def test_what_lies_elsewhere_is_seen_in_short_and_in_long_bodies(word: bytes, padding: int) -> None:
    assert refers_outside(b'{"model": "m", "text": "%b", "type": "%b"}' % (b"_ " * padding, word))


@pytest.mark.parametrize("padding", [0, 20_000])
def test_words_that_look_alike_lie_in_the_body(padding: int) -> None:
    alike = b'{"tool_call_id": "a", "max_tokens": 2, "input_text": "the input_ of an image_ or a _file", "id": "%b"}'
    assert not refers_outside(alike % (b"_" * padding))
