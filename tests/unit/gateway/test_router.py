from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import EngineUnreachable, NoReadyReplica, UnknownModel
from gateway.router import InFlight, Router, least_loaded
from gateway.routes import build_routes
from gateway.testing import replica_row
from placement.table import ModelRow, ReplicaState, RoutingTable


def router(*states: ReplicaState, bound: int = 100) -> tuple[Router, InFlight]:
    rows = tuple(replica_row(f"m-{n}", "m", f"unix:/{n}", state=state) for n, state in enumerate(states))
    routes = build_routes(RoutingTable(generation=1, models=(ModelRow(name="m"),), replicas=rows), (), {})
    in_flight = InFlight()
    return Router(lambda: routes, in_flight, max_in_flight_per_replica=bound), in_flight


READY, STARTING, FAILED = ReplicaState.READY, ReplicaState.STARTING, ReplicaState.FAILED


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 100))
def test_the_least_loaded_is_chosen(loads: list[int], turn: int) -> None:
    assert loads[least_loaded(loads, turn)] == min(loads)


@given(st.integers(1, 8), st.integers(0, 100))
def test_equal_loads_are_taken_in_turn(count: int, start: int) -> None:
    chosen = [least_loaded([0] * count, start + turn) for turn in range(count)]
    assert sorted(chosen) == list(range(count))


@given(st.lists(st.integers(0, 6), max_size=60))
def test_loads_stay_within_one_of_each_other_while_nothing_ends(ends: list[int]) -> None:
    """Whatever leases end in between, a new request never goes to a replica that has more than another."""
    chooser, in_flight = router(READY, READY, READY)
    open_leases = []
    for end in ends:
        if end < len(open_leases):
            open_leases.pop(end).close()
        before = [in_flight.count(f"m-{n}") for n in range(3)]
        lease = chooser.lease("m")
        assert before[int(lease.replica.replica[2:])] == min(before)
        open_leases.append(lease)
    for lease in open_leases:
        lease.close()
        lease.close()
    assert in_flight.total() == 0


def test_idle_replicas_share_requests_that_come_one_by_one() -> None:
    chooser, _ = router(READY, READY, READY)
    served: Counter[str] = Counter()
    for _ in range(30):
        with chooser.lease("m") as lease:
            served[lease.replica.replica] += 1
    assert set(served.values()) == {10}


def test_only_ready_replicas_are_chosen() -> None:
    chooser, _ = router(STARTING, READY, FAILED)
    assert {chooser.lease("m").replica.replica for _ in range(5)} == {"m-1"}


@pytest.mark.parametrize(
    ("states", "said", "wait"),
    [
        ((), "it has no replica", 30),
        ((STARTING, FAILED, STARTING), "1 failed, 2 starting", 5),
        ((ReplicaState.BACKOFF, STARTING), "1 backoff, 1 starting", 2),
        ((FAILED,), "1 failed", 30),
        ((ReplicaState.STOPPED,), "1 stopped", 30),
        ((ReplicaState.PENDING,), "1 pending", 5),
    ],
)
def test_none_ready_tells_the_states_and_a_time(states: tuple[ReplicaState, ...], said: str, wait: float) -> None:
    with pytest.raises(NoReadyReplica, match=said) as caught:
        router(*states)[0].lease("m")
    assert caught.value.retry_after_seconds == wait


def test_replicas_to_avoid_are_avoided_until_none_is_left() -> None:
    chooser, _ = router(READY, READY)
    assert chooser.lease("m", avoid=frozenset({"m-0"})).replica.replica == "m-1"
    with pytest.raises(EngineUnreachable):
        chooser.lease("m", avoid=frozenset({"m-0", "m-1"}))


def test_a_full_model_is_refused_and_not_counted() -> None:
    chooser, in_flight = router(READY, READY, bound=2)
    for _ in range(4):
        chooser.lease("m")
    with pytest.raises(NoReadyReplica, match="limit"):
        chooser.lease("m")
    assert in_flight.total() == 4


def test_an_unknown_model_is_told_shortly() -> None:
    with pytest.raises(UnknownModel) as caught:
        router(READY)[0].lease("x" * 5000)
    assert len(str(caught.value)) < 400
