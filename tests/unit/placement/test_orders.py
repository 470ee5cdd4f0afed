"""What is asked of single replicas: kept in a file, carried out by whoever controls, waited for by whoever asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from placement.errors import NotCarriedOut
from placement.foreman import Foreman
from placement.locks import exclusive
from placement.orders import Orders, read_orders, write_orders
from placement.replicas.replica import DRAINED
from placement.schema import EngineConfig
from placement.state import StatePaths
from placement.status import ControllerStatus, ErrorRow, ReplicaStatus, write_status
from placement.table import ReplicaState, SliceRow

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def test_orders_say_of_each_replica_one_thing() -> None:
    orders = Orders().drain(["a", "b"]).stop(["b", "c"])
    assert (orders.drained, orders.stopped, orders.number) == ({"a"}, {"b", "c"}, 2)
    started = orders.start(["b", "a"], {"b": "GPU-1/1g.10gb@0"})
    assert (started.drained, started.stopped, started.seats) == (frozenset(), {"c"}, {"b": "GPU-1/1g.10gb@0"})
    assert started.start(["b"]).seats == {}, "the controller chooses again"
    assert started.any
    assert not started.none().any
    assert started.none().number == 4


def test_orders_outlive_the_process_and_a_damaged_file_orders_nothing(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path)
    orders = Orders().start(["a-0"], {"a-0": "GPU-1/1g.10gb@0"})
    write_orders(paths, orders, verb="start", replicas=["a-0"], at=NOW)
    assert read_orders(paths) == orders
    (line,) = paths.orders_log.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "at": "2026-11-21T00:00:00+00:00",
        "number": 1,
        "verb": "start",
        "replicas": ["a-0"],
        "seats": {"a-0": "GPU-1/1g.10gb@0"},
    }
    for damaged in ("", "{", "[]", '{"stopped": 3}'):
        paths.orders.write_text(damaged, encoding="utf-8")
        assert read_orders(paths) == Orders()


class Pretender:
    """In the place of a controller: `react` changes its status at every look, as one would over time."""

    def __init__(self, paths: StatePaths) -> None:
        self.paths = paths
        self.react: Callable[[int], dict[str, object]] = lambda _: {}
        self.looks = 0
        self.elapsed = 0.0

    def foreman(self) -> Foreman:
        self.sleep(0.0)
        return Foreman(self.paths, EngineConfig(), monotonic=lambda: self.elapsed, sleep=self.sleep, now=lambda: NOW)

    def sleep(self, seconds: float) -> None:
        self.looks += 1
        self.elapsed += max(seconds, 1.0)
        told = {"replicas": (row("a-0"),), "orders": read_orders(self.paths).number, **self.react(self.looks)}
        status = ControllerStatus.model_validate(
            {
                "pid": 1,
                "started_at": NOW,
                "updated_at": NOW,
                "state": "running",
                "config": "c",
                "generation": 1,
                **told,
            }
        )
        write_status(status, self.paths.controller_status)


def row(
    name: str, state: ReplicaState = ReplicaState.READY, stage: str | None = None, on: str = "GPU-1/1g.10gb@0"
) -> ReplicaStatus:
    where = SliceRow(id=on, kind="mig", profile="1g.10gb", uuid="MIG-1", gpu="GPU-1")
    return ReplicaStatus(
        replica=name, model="a", slice=where, memory_bytes=1, state=state, stage=stage, since=NOW, log="a.log"
    )


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretender]:
    paths = StatePaths(tmp_path)
    monkeypatch.setattr("os.kill", lambda *_: None)  # the lock is held by this process
    with exclusive(paths.controller_lock, what="controller", remedy=""):
        yield Pretender(paths)


def test_a_drain_returns_when_nothing_runs_any_more(pretender: Pretender) -> None:
    stages = {1: None, 2: None, 3: "finishing requests", 4: "finishing requests", 5: DRAINED}

    def react(look: int) -> dict[str, object]:
        stage = stages[min(look, 5)]
        return {"replicas": (row("a-0", ReplicaState.DRAINING if stage else ReplicaState.READY, stage),)}

    pretender.react = react
    pretender.foreman().drain(["a-0"])
    assert pretender.looks == 5
    assert read_orders(pretender.paths).drained == {"a-0"}


def test_a_stop_returns_when_the_engine_is_gone_and_a_start_when_it_serves_where_it_should(
    pretender: Pretender,
) -> None:
    pretender.react = lambda look: {"replicas": (row("a-0"),) if look < 4 else ()}
    pretender.foreman().stop(["a-0"])
    assert pretender.looks == 4
    there = "GPU-1/2g.20gb@2"
    begun = pretender.looks

    def react(look: int) -> dict[str, object]:
        if look < begun + 3:
            return {"replicas": (row("a-0", ReplicaState.STARTING, on=there),) if look > begun + 1 else ()}
        return {"replicas": (row("a-0", on=there),)}

    pretender.react = react
    foreman = pretender.foreman()
    foreman.start(["a-0"], on={"a-0": there})
    assert foreman.check("a-0").slice.id == there
    foreman.forget()
    assert not read_orders(pretender.paths).any


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"replicas": (row("a-0", ReplicaState.BACKOFF, "waiting"),)}, "a-0 on GPU-1/1g.10gb@0 is backoff (waiting)"),
        ({"replicas": (row("a-0", ReplicaState.FAILED),)}, "a-0 on GPU-1/1g.10gb@0"),
        ({"unplaced": {"a-0": ErrorRow(code="no_free_slice", message="no slice is left")}}, "no slice is left"),
        ({"orders": 0}, "has not taken the order over"),
    ],
)
def test_an_order_that_does_not_come_about_says_what_is_there_and_stays(
    told: dict[str, object], words: str, pretender: Pretender
) -> None:
    foreman = pretender.foreman()
    pretender.react = lambda _: told
    with pytest.raises(NotCarriedOut) as error:
        foreman.start(["a-0"])
    assert words in error.value.message
    assert read_orders(pretender.paths).number == 1


def test_unknown_replicas_and_absent_controllers_are_told(pretender: Pretender, tmp_path: Path) -> None:
    with pytest.raises(NotCarriedOut) as unknown:
        pretender.foreman().drain(["b-7"])
    assert unknown.value.message == "there is no replica 'b-7'"
    assert "a-0" in (unknown.value.remedy or "")
    with pytest.raises(NotCarriedOut, match="no controller runs here"):
        Foreman(StatePaths(tmp_path / "elsewhere"), EngineConfig()).stop(["a-0"])
    pretender.react = lambda _: {"replicas": (row("a-0", ReplicaState.STARTING),)}
    with pytest.raises(NotCarriedOut, match=r"a-0 on GPU-1/1g\.10gb@0 is starting"):
        pretender.foreman().check("a-0")
