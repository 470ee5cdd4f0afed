"""What a gateway tells of demand, whom it lets wait for a sleeping model, and how configurations are numbered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway.admin.overlay import OverlayStore
from gateway.admission import Admission, Ask, Loads
from gateway.admission.policy import admission_policy
from gateway.applying import tell_gateways
from gateway.config import Config
from gateway.digests import LatencyBook
from gateway.errors import NoReadyReplica
from gateway.figures import FiguresWriter
from gateway.generations import Announcements, Generations, generation_header, served_digest
from gateway.routes import Routes, build_routes
from gateway.stats import Stats
from gateway.testing import FakeClock, replica_row
from placement.autoscale import Signals
from placement.figures import read_figures
from placement.simulate import simulated_fleet
from placement.state import StatePaths
from placement.table import ModelRow, ReplicaState, RoutingTable

WALL = 1_000_000.0


class Sight:
    """Everything of a gateway that `FiguresWriter` looks at, on a clock that stands."""

    def __init__(self, state: Path, *states: ReplicaState, **model: Any) -> None:
        raw = {"name": "m", "source": "x", "replicas": {"min": 0, "max": 2}} | model
        self.config = Config.model_validate({"version": "v1", "state_dir": str(state), "models": [raw]})
        self.directory = StatePaths(state).figures
        self.clock, self.stats, self.book = FakeClock(), Stats(), LatencyBook()
        self.admission = Admission(lambda: self.routes, Loads(bound=8), self.clock, admission_policy(self.config))
        self.show(*states)
        self.writer = FiguresWriter(
            self.config, lambda: self.routes, self.admission, self.stats, self.book, self.clock, lambda: WALL
        )

    def show(self, *states: ReplicaState) -> None:
        rows = tuple(
            replica_row(f"m-{n}", "m", f"unix:/{n}").model_copy(update={"state": state})
            for n, state in enumerate(states)
        )
        table = RoutingTable(generation=1, models=(ModelRow(name="m", max_model_len=1000),), replicas=rows)
        self.routes: Routes = build_routes(table, self.config.models, {})

    def ask(self, **fields: Any) -> str | None:
        self.stats.arrivals["m"] += 1
        claim = self.admission.claim(Ask("t", "m", b"{}", **fields), self.routes.models["m"], self.clock())
        row = self.admission.place(claim, lambda: None, self.clock())
        return row.replica if row else None

    async def told(self) -> Signals | None:
        await self.writer.tick()
        return (read_figures(self.directory, WALL) or {}).get("m")


async def test_queues_rates_and_idleness_are_told(tmp_path: Path) -> None:
    sight = Sight(tmp_path)
    assert await sight.told() == Signals()
    for _ in range(3):
        assert sight.ask() is None
    sight.clock.turn(2)
    assert await sight.told() == Signals(arrivals_per_second=1.5, queued=3)
    sight.show(ReplicaState.READY)
    sight.admission.follow_routes()
    told = await sight.told()
    assert told is not None
    assert (told.queued, told.running) == (0, 3)
    sight.clock.turn(70)
    told = await sight.told()
    assert told is not None
    assert told.arrivals_per_second < 0.05


async def test_latencies_are_told_where_an_slo_asks_for_them(tmp_path: Path) -> None:
    demand = {"requests_per_second": 1, "prompt_tokens": 10, "output_tokens": 10}
    for state, model, seen in (
        (tmp_path / "a", {"slo": {"ttft": "1s"}, "demand": demand}, pytest.approx(2.0, rel=0.02)),
        (tmp_path / "b", {}, None),
    ):
        sight = Sight(state, ReplicaState.READY, **model)
        row = next(iter(sight.routes.replicas()))
        sight.book.series(row.slice.id, "t", sight.clock()).ttft_seconds.add(2.0, sight.clock())
        told = await sight.told()
        assert told is not None
        assert told.ttft_seconds == seen


async def test_where_nothing_follows_demand_nothing_is_written(tmp_path: Path) -> None:
    sight = Sight(tmp_path, replicas=1)
    assert await sight.told() is None
    assert not sight.directory.exists()


async def test_a_model_that_is_scaled_no_longer_is_not_told_of(tmp_path: Path) -> None:
    sight = Sight(tmp_path)
    await sight.told()
    fixed = Config.model_validate({"version": "v1", "models": [{"name": "m", "source": "x"}]})
    sight.writer.configure(fixed)
    assert await sight.told() is None


async def test_a_dedicated_tenants_demand_is_told_apart(tmp_path: Path) -> None:
    sight = Sight(tmp_path)
    raw = sight.config.model_dump(mode="json") | {
        "tenants": [{"name": "acme", "isolation": "dedicated"}, {"name": "t"}],
    }
    sight.config = Config.model_validate(raw)
    sight.admission.configure(admission_policy(sight.config))
    sight.writer.configure(sight.config)
    sight.stats.tenant_arrivals["m", "acme"] += 2
    sight.stats.arrivals["m"] += 2
    for _ in range(2):
        claim = sight.admission.claim(Ask("acme", "m", b"{}"), sight.routes.models["m"], sight.clock())
        sight.admission.place(claim, lambda: None, sight.clock())
    sight.ask()
    sight.clock.turn(2)
    assert await sight.told() == Signals(arrivals_per_second=0.5, queued=1)
    assert (read_figures(sight.directory, WALL) or {})["m@acme"] == Signals(arrivals_per_second=1.0, queued=2)
    row = replica_row("m@acme-0", "m", "unix:/1")
    table = RoutingTable(generation=2, models=(ModelRow(name="m", max_model_len=1000),), replicas=(row,))
    sight.routes = build_routes(table, sight.config.models, {})
    sight.admission.follow_routes()
    assert await sight.told() == Signals(arrivals_per_second=0.5, queued=1), "they wait for a replica of their own"
    assert (read_figures(sight.directory, WALL) or {})["m@acme"].running == 2


# ---- waking


def test_requests_wait_for_a_model_that_sleeps_and_go_to_the_replica_that_comes(tmp_path: Path) -> None:
    sight = Sight(tmp_path)
    assert sight.ask() is None
    sight.show(ReplicaState.STARTING)
    assert sight.ask() is None
    sight.show(ReplicaState.READY)
    sight.admission.follow_routes()
    assert sight.admission.loads.count("m-0") == 2


def test_nobody_waits_for_engines_that_have_failed_or_for_what_one_engine_held(tmp_path: Path) -> None:
    sight = Sight(tmp_path, ReplicaState.FAILED)
    with pytest.raises(NoReadyReplica):
        sight.ask()
    asleep = Sight(tmp_path)
    with pytest.raises(NoReadyReplica):
        asleep.ask(only="m-0")


def test_a_model_that_always_has_a_replica_is_not_waited_for(tmp_path: Path) -> None:
    sight = Sight(tmp_path, replicas={"min": 1, "max": 2})
    with pytest.raises(NoReadyReplica):
        sight.ask()


def test_who_waits_is_refused_when_the_engine_that_was_to_come_fails(tmp_path: Path) -> None:
    sight = Sight(tmp_path)
    assert sight.ask() is None
    sight.show(ReplicaState.FAILED)
    sight.admission.follow_routes()
    assert sight.admission.pool("m", "t").waiting == 0


# ---- generations


def config(*names: str) -> Config:
    return Config.model_validate({"version": "v1", "models": [{"name": n, "source": "x"} for n in names]})


def test_gateways_of_one_state_directory_count_alike_and_only_upwards(tmp_path: Path) -> None:
    first, second = Generations(tmp_path / "g"), Generations(tmp_path / "g")
    assert (first.of(config("a")), second.of(config("a")), first.of(config("a"))) == (1, 1, 1)
    assert (first.of(config("a", "b")), second.of(config("a", "b"))) == (2, 2)
    assert first.of(config("a")) == 3, "what came back is a change as well"
    assert Generations(tmp_path / "g").of(config("a")) == 3, "a restart is none"
    (tmp_path / "g").write_text("{", encoding="utf-8")
    assert first.of(config("b")) == 4, "numbers do not fall where the file is damaged"


def test_without_a_state_directory_a_gateway_counts_alone(tmp_path: Path) -> None:
    alone = Generations(tmp_path / "missing" / "g")
    assert (alone.of(config("a")), alone.of(config("b"))) == (1, 2)
    assert not (tmp_path / "missing").exists()
    assert generation_header(12) == (b"x-sliceway-generation", b"12")


# ---- what gateways go by, and who waits for them


def test_apply_waits_until_every_gateway_has_taken_the_configuration_over(tmp_path: Path) -> None:
    """One that runs goes by another configuration; it reads the new one while it is waited for."""
    before, after = (config(n).model_copy(update={"state_dir": tmp_path}) for n in ("a", "b"))
    announced = Announcements(StatePaths(after.state).gateways)
    announced.write(before, 0)
    slept: list[float] = []

    def gateway_looks(seconds: float) -> None:
        slept.append(seconds)
        announced.write(after, OverlayStore(after.state).load().reloads)

    assert tell_gateways(after, monotonic=lambda: sum(slept), sleep=gateway_looks) == 1
    assert len(slept) == 1
    assert tell_gateways(after, monotonic=lambda: sum(slept), sleep=gateway_looks) == 0, "it goes by this one"
    assert OverlayStore(after.state).load().reloads == 1


def test_a_gateway_that_does_not_answer_is_not_waited_for_forever(tmp_path: Path) -> None:
    before, after = (config(n).model_copy(update={"state_dir": tmp_path}) for n in ("a", "b"))
    Announcements(StatePaths(after.state).gateways).write(before, 0)
    slept: list[float] = []
    assert tell_gateways(after, monotonic=lambda: sum(slept), sleep=slept.append) == 1
    assert 4 < sum(slept) < 6


def test_a_gateway_that_has_ended_is_forgotten(tmp_path: Path) -> None:
    announced = Announcements(tmp_path / "gateways")
    announced.write(config("a"), 3)
    (own,) = announced.read()
    assert (own.pid, own.reloads) == (os.getpid(), 3)
    gone = own.model_copy(update={"start_ticks": own.start_ticks - 1})
    (tmp_path / "gateways" / "1.json").write_text(gone.model_dump_json(), encoding="utf-8")
    (tmp_path / "gateways" / "2.json").write_text("{", encoding="utf-8")
    assert announced.read() == (own,)
    assert sorted(p.name for p in (tmp_path / "gateways").iterdir()) == sorted([f"{os.getpid()}.json", "2.json"])
    announced.remove()
    assert announced.read() == ()


def test_where_requests_go_is_the_same_whatever_this_machine_listens_on_or_simulates() -> None:
    one = config("a")
    other = one.model_copy(
        update={
            "gateway": one.gateway.model_copy(update={"listen": "127.0.0.1:9"}),
            "fleet": simulated_fleet("h100-sxm:2", one.fleet),
        }
    )
    assert served_digest(one) == served_digest(other) != served_digest(config("b"))
