from __future__ import annotations

from typing import Any

import pytest

from loadtests.bodies import Asked
from loadtests.client import Answer
from loadtests.load import Load, Places, Shard, read_places
from loadtests.problems import ScenarioError
from loadtests.scenario import TenantLoad, parse_scenario
from loadtests.streams import AnswerFailed, Timing


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class FakeConnection:
    """Answers after `takes` seconds of a fake clock, with what it was given."""

    def __init__(self, time: FakeTime, answer: Answer, takes: float) -> None:
        self._time, self._answer, self._takes = time, answer, takes
        self.due: list[float] = []

    def ask(self, path: str, body: bytes, *, key: str | None, streams: bool, due: float) -> Answer:
        self.due.append(due)
        self._time.seconds += self._takes
        return self._answer


def load_of(time: FakeTime, *tenants: dict[str, Any], places: Places | None = None, **options: Any) -> Load:
    rows = [{"name": f"t{i}", "model": "chat"} | tenant for i, tenant in enumerate(tenants)]
    scenario = parse_scenario({"warmup_seconds": 2, "duration_seconds": 10, "tenants": rows}, "test")
    return Load(scenario, environment={}, clock=time, places=places, **options)


def ask(load: Load, time: FakeTime, answer: Answer, *, due: float, takes: float = 0.5) -> FakeConnection:
    connection = FakeConnection(time, answer, takes)
    load.ask(connection, load.scenario.tenants[0], Asked("/v1/chat/completions", b"{}", "hi"), due)  # type: ignore[arg-type]
    return connection


GOOD = Answer(200, None, "req-1", Timing(0.1, (0.01,), 0.5, 2))


def test_the_warm_up_is_sent_and_not_counted() -> None:
    time = FakeTime()
    load = load_of(time, {})
    ask(load, time, GOOD, due=1.9)
    assert (load.sent, load.samples) == (1, [])
    ask(load, time, GOOD, due=2.0)
    assert [s.due_seconds for s in load.samples] == [2.0]


def test_latency_counts_from_when_a_request_was_due() -> None:
    time = FakeTime()
    load = load_of(time, {})
    time.seconds += 5.0
    connection = ask(load, time, GOOD, due=3.0)
    assert connection.due == [1003.0]
    assert (load.samples[0].sent_seconds, load.samples[0].ended_seconds) == (5.0, 5.5)


def test_the_replica_names_the_slice_before_the_model_does() -> None:
    time = FakeTime()
    load = load_of(time, {}, places=Places(by_replica={"chat-1": "cpu-1"}, by_model={"chat": "cpu-0"}))
    for replica in (None, "chat-1", "stranger"):
        ask(load, time, Answer(200, replica, None, GOOD.timing), due=2.0)
    assert [s.slice for s in load.samples] == ["cpu-0", "cpu-1", "cpu-0"]


def test_a_failure_keeps_kind_and_words_and_has_no_latency() -> None:
    time = FakeTime()
    load = load_of(time, {})
    ask(load, time, Answer(503, None, "r", failure=AnswerFailed("http_503", "no replica")), due=4.0)
    row = load.samples[0]
    assert (row.failure, row.message, row.status, row.e2e_seconds, row.itl_seconds) == (
        "http_503",
        "no replica",
        503,
        None,
        (),
    )


def test_seats_are_one_per_closed_user_and_one_per_open_tenant() -> None:
    load = load_of(
        FakeTime(), {"arrival": {"kind": "closed", "users": 3}}, {"arrival": {"kind": "open", "requests_per_second": 9}}
    )
    taken = [load.take_seat().tenant.name for _ in range(load.user_count)]
    assert taken == ["t0", "t0", "t0", "t1"]
    with pytest.raises(IndexError):
        load.take_seat()


def test_two_users_of_a_tenant_ask_different_questions() -> None:
    load = load_of(FakeTime(), {"arrival": {"kind": "closed", "users": 2}})
    assert load.take_seat().random.random() != load.take_seat().random.random()


def test_processes_share_users_and_arrivals_without_loss() -> None:
    closed = {"arrival": {"kind": "closed", "users": 5}}
    arriving = {"arrival": {"kind": "open", "requests_per_second": 9}}
    shards = [load_of(FakeTime(), closed, arriving, shard=Shard(i, 3)) for i in range(3)]
    whole = load_of(FakeTime(), closed, arriving)
    numbers, due = [], []
    for shard in shards:
        for _ in range(shard.user_count):
            seat = shard.take_seat()
            if seat.tenant.name == "t0":
                numbers.append((seat.number, seat.random.random()))
            else:
                arrivals = shard.arrivals(seat)
                due += [next(arrivals) for _ in range(4)]
    seats = [whole.take_seat() for _ in range(6)]
    assert sorted(numbers) == [(seat.number, seat.random.random()) for seat in seats[:5]]
    arrivals = whole.arrivals(seats[5])
    assert sorted(due) == [next(arrivals) for _ in range(12)]


def test_an_arrival_belongs_to_the_load_by_when_it_is_due_and_not_by_when_it_is_sent() -> None:
    time = FakeTime()
    load = load_of(time, {"arrival": {"kind": "constant", "requests_per_second": 1}}, {"background": True})
    front, back = (tenant for tenant in load.scenario.tenants)
    time.seconds += 60.0
    assert load.is_due(front, 11.9), "it was due before the end, at 12 s, and has waited in the client since"
    assert not load.is_due(front, 12.0)
    assert load.is_due(back, 59.0), "the other tenant has not left yet"
    load.stop()
    assert not load.is_due(front, 11.9)


@pytest.mark.parametrize("processes", [1, 3])
def test_what_was_due_and_never_sent_is_counted(processes: int) -> None:
    arriving = {"arrival": {"kind": "constant", "requests_per_second": 1}}
    shards = [load_of(FakeTime(), arriving, {}, shard=Shard(i, processes)) for i in range(processes)]
    assert sum(load.unsent() for load in shards) == 11, "one a second until 12 s, which is the end"
    ask(shards[0], FakeTime(), GOOD, due=1.0)
    assert sum(load.unsent() for load in shards) == 10
    for load in shards:
        load.stop()
        assert load.unsent() == 0, "it was told to leave them"


def test_the_background_goes_on_until_the_last_other_answer() -> None:
    time = FakeTime()
    load = load_of(time, {}, {"background": True})
    front, back = load.take_seat().tenant, load.take_seat().tenant
    ended: list[bool] = []
    load.on_end(lambda: ended.append(True))
    time.seconds += 60.0
    assert not load.is_open(front)
    assert load.is_open(back)
    load.leave_seat(front)
    assert not load.is_open(back)
    assert not ended
    load.leave_seat(back)
    assert ended == [True]


def test_a_run_that_would_never_end_is_refused() -> None:
    with pytest.raises(ScenarioError, match="background"):
        load_of(FakeTime(), {"background": True})


def test_a_background_of_its_own_goes_on_until_it_is_told() -> None:
    load = load_of(FakeTime(), {"background": True}, until_stopped=True)
    seat = load.take_seat()
    assert load.is_open(seat.tenant)
    load.stop()
    assert not load.is_open(seat.tenant)


def shown(model: str | None, replica: str | None, slice_id: str) -> dict[str, Any]:
    return {"model": model, "replica": replica, "slice": {"id": slice_id}}


def test_places_are_read_from_slices() -> None:
    rows = [
        shown("chat", "chat-0", "a"),
        shown("chat", "chat-1", "b"),
        shown("embed", "embed-0", "c"),
        shown(None, None, "d"),
    ]
    places = read_places(rows)
    assert places.by_replica == {"chat-0": "a", "chat-1": "b", "embed-0": "c"}
    assert places.by_model == {"embed": "c"}


@pytest.mark.parametrize("answer", [None, [], {"error": "no"}])
def test_a_gateway_that_tells_nothing_leaves_slices_unknown(answer: object) -> None:
    assert read_places(answer) == Places()


def test_tenants_without_a_key_variable_are_told_which() -> None:
    tenant = TenantLoad(name="acme", model="chat", api_key_env="NO_SUCH_KEY")
    scenario = parse_scenario({"tenants": [tenant.model_dump(exclude_none=True)]}, "test")
    with pytest.raises(ScenarioError, match="NO_SUCH_KEY"):
        Load(scenario, environment={}, clock=FakeTime())
