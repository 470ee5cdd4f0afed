"""A node's agent on files and processes that are noted down: what it writes when it is ordered, and what it reports."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from model_registry.sizing.throughput import THROUGHPUT_FILE, Throughput, ThroughputKey, ThroughputStore
from placement.autoscale import Signals
from placement.cluster.members import Broadcast, BroadcastChange, News, NodeOrder, Owner, TableChange, Versions, Word
from placement.cluster.node import NodeAgent, NodePaths, NodeSettings
from placement.cluster.seats import SeatKeeper, read_seats, this_process
from placement.figures import FRESH_SECONDS, FiguresFile, GatewayFigures, ModelFigures
from placement.gpus import GpuState
from placement.replicas.journal import Journal, JournalEntry
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.status import (
    ClusterScaling,
    ControllerStatus,
    ErrorRow,
    Refusal,
    ReplicaStatus,
    ScalingRow,
    read_cluster_scaling,
    write_status,
)
from placement.table import ReplicaRow, ReplicaState, RoutingTable, SliceRow, publish, read
from placement.testing import FakeClock

NOW = datetime(2026, 11, 21, tzinfo=UTC)
ME = Owner(pid=1, start_ticks=2, boot_id="b")
CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,))


@dataclass
class NotedProcesses:
    said: list[str] = field(default_factory=list)

    def ensure_controller(self, config: Path, seats: Path) -> None:
        self.said.append("controller")

    def reload_controller(self) -> None:
        self.said.append("controller again")

    def ensure_gateway(self, config: Path) -> None:
        self.said.append("gateway")

    def reload_gateway(self) -> None:
        self.said.append("gateway again")


@pytest.fixture
def processes() -> NotedProcesses:
    return NotedProcesses()


def settings(paths: NodePaths, fleet: Mapping[str, object]) -> NodeSettings:
    return NodeSettings(
        name="n",
        address="10.0.0.7",
        paths=paths,
        versions=Versions(sliceway="1", python="3.11", ray="2"),
        fleet=fleet,
        listen="0.0.0.0:80",
    )


@pytest.fixture
def agent(tmp_path: Path, processes: NotedProcesses) -> NodeAgent:
    return NodeAgent(settings(NodePaths(tmp_path), {"discover": "cpu"}), processes, lambda: Inventory((CPU,)))


def order(**changes: object) -> NodeOrder:
    told = {"generation": 3, "config": '{"version": "v1"}', "seats": {"chat-0": "cpu-0"}, "owners": {"chat-0": ME}}
    return NodeOrder.model_validate(told | {"secret": "s3cret"} | changes)


def tell(agent: NodeAgent, **status: object) -> None:
    """As the node's controller does."""
    path = agent.settings.paths.engines
    path.root.mkdir(parents=True, exist_ok=True)
    values = {"pid": os.getpid(), "started_at": NOW, "updated_at": NOW, "state": "running", "config": "c"}
    write_status(ControllerStatus.model_validate(values | {"generation": 1} | status), path.controller_status)


async def test_an_order_becomes_seats_and_a_configuration_of_this_node(
    agent: NodeAgent, processes: NotedProcesses
) -> None:
    await agent.order(order(turns=["chat-0"]))
    paths = agent.settings.paths
    seats = read_seats(paths.seats)
    assert seats is not None
    assert {replica: row.slice_id for replica, row in seats.seats.items()} == {"chat-0": "cpu-0"}
    assert seats.turns == ("chat-0",)
    config = json.loads(paths.controller_config.read_bytes())
    assert config["fleet"] == {"discover": "cpu"}
    assert config["engine"]["network"]["address"] == "10.0.0.7"
    assert paths.secret.read_text(encoding="utf-8") == "s3cret"
    assert paths.secret.stat().st_mode & 0o777 == 0o600
    assert processes.said == ["controller again", "controller"]
    await agent.order(order(turns=["chat-0"]))
    assert processes.said[2:] == ["controller"], "nothing is read again for the same order"


async def test_engines_get_other_owners_and_nothing_else_is_another(
    agent: NodeAgent, processes: NotedProcesses
) -> None:
    paths = agent.settings.paths
    other = ME.model_copy(update={"pid": 12345})
    asked = order(config="{}", seats={"chat-0": "cpu-0", "chat-1": "cpu-9"}, owners={"chat-0": other, "chat-1": other})
    agent.belong(asked)
    assert read_seats(paths.seats) is None, "nothing was ordered yet"
    both = {"chat-0": "cpu-0", "chat-1": "cpu-1", "chat-2": "cpu-2"}
    await agent.order(order(turns=["chat-0"], seats=both, owners=dict.fromkeys(both, ME)))
    before, config, said = read_seats(paths.seats), paths.controller_config.read_bytes(), list(processes.said)
    agent.belong(asked)
    found = read_seats(paths.seats)
    assert found is not None
    assert before is not None
    assert {replica: row.owner.pid for replica, row in found.seats.items()} == {
        "chat-0": 12345,
        "chat-1": ME.pid,  # that is another slice
        "chat-2": ME.pid,
    }
    assert {replica: row.slice_id for replica, row in found.seats.items()} == both
    assert (found.turns, found.orphan_seconds) == (before.turns, before.orphan_seconds)
    assert (paths.controller_config.read_bytes(), processes.said) == (config, said)


async def test_a_turn_is_news_for_the_controller(agent: NodeAgent) -> None:
    await agent.order(order(owners={"chat-0": this_process()}))
    keeper = SeatKeeper(agent.settings.paths.seats, lambda: 0.0)
    assert not keeper.look()
    await agent.order(order(owners={"chat-0": this_process()}, turns=["chat-0"]))
    assert keeper.look()
    assert keeper.turns == ("chat-0",)
    assert not keeper.look()


async def test_why_replicas_do_not_run_is_reported(agent: NodeAgent) -> None:
    await agent.order(order(seats={"chat-0": "cpu-0", "chat-1": "cpu-1"}, owners={"chat-0": ME, "chat-1": ME}))
    error = ErrorRow(code="config_error", message="engine.command is wrong.", remedy="Write it anew.")
    tell(agent, refused=Refusal(at=NOW, error=error), unplaced={"chat-1": ErrorRow(code="x", message="It is small.")})
    waiting = (await agent.report()).waiting
    assert waiting == {"chat-0": "engine.command is wrong. Write it anew.", "chat-1": "It is small."}


async def test_who_runs_by_an_earlier_configuration_is_reported(agent: NodeAgent) -> None:
    rows = [
        ReplicaStatus(
            replica=f"chat-{i}",
            model="chat",
            slice=SliceRow(id=f"cpu-{i}", kind="cpu"),
            memory_bytes=1,
            state=ReplicaState.READY,
            since=NOW,
            log="",
            outdated=i == 1,
            engine_version="0.32.0" if i else None,
        )
        for i in range(2)
    ]
    tell(agent, replicas=rows)
    report = await agent.report()
    assert report.engines == {"chat-1": "0.32.0"}
    assert report.outdated == ("chat-1",)
    assert report.slices == (CPU,)


def test_what_the_head_makes_of_demand_is_written_for_the_gateway(agent: NodeAgent) -> None:
    row = ScalingRow(replicas=2, placed=1, least=1, most=3, reason="")
    told = ClusterScaling(unplaced=("chat-1",), scaling={"chat": row})
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=5), config="{}", sequence=1, scaling=told))
    assert read_cluster_scaling(agent.settings.paths.gateway.cluster_scaling) == told


def test_gateways_follow_newer_tables_only(agent: NodeAgent, processes: NotedProcesses) -> None:
    table = agent.settings.paths.gateway.routing_table
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=5), config="{}", sequence=1))
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=4), config="{}", sequence=2))
    assert read(table).generation == 5
    config = json.loads(agent.settings.paths.gateway_config.read_bytes())
    assert config["gateway"]["listen"] == "0.0.0.0:80"
    assert processes.said == ["gateway again", "gateway", "gateway"]


async def test_news_that_cannot_be_written_are_asked_for_again(
    agent: NodeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("placement.cluster.node._RETRY_SECONDS", 0.0)
    root = agent.settings.paths.gateway.root
    root.write_bytes(b"")  # in the way, as a full disk is
    asked: list[tuple[str, int]] = []

    async def next_news(relay: str | None, head: str, after: int, timeout_seconds: float) -> News:
        asked.append((head, after))
        if len(asked) == 2:
            root.unlink()
        if len(asked) == 3:
            raise asyncio.CancelledError
        return News(whole=Broadcast(head="h", table=RoutingTable(generation=5), config="{}", sequence=1))

    with pytest.raises(asyncio.CancelledError):
        await agent.follow(next_news)
    assert asked == [("", 0), ("", 0), ("h", 1)]
    assert read(agent.settings.paths.gateway.routing_table).generation == 5


async def test_a_change_that_does_not_make_the_heads_table_has_the_whole_asked_for(agent: NodeAgent) -> None:
    first, second = (Broadcast(head="h", table=RoutingTable(generation=i), config="{}", sequence=i) for i in (1, 2))
    wrong = BroadcastChange(head="h", sequence=2, after=1, table=TableChange(generation=2, digest="of another"))
    asked: list[tuple[str, int]] = []

    async def next_news(relay: str | None, head: str, after: int, timeout_seconds: float) -> News:
        asked.append((head, after))
        if len(asked) == 4:
            raise asyncio.CancelledError
        return (News(whole=first), News(change=wrong), News(whole=second))[len(asked) - 1]

    with pytest.raises(asyncio.CancelledError):
        await agent.follow(next_news)
    assert asked == [("", 0), ("h", 1), ("", 0), ("h", 2)]
    assert read(agent.settings.paths.gateway.routing_table).generation == 2


async def test_an_agent_that_ends_its_processes_starts_none_again(agent: NodeAgent, processes: NotedProcesses) -> None:
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=5), config="{}", sequence=1))
    await agent.order(order())
    processes.said.clear()
    await agent.report()
    assert processes.said == ["controller", "gateway"]
    processes.said.clear()
    agent.end()
    await agent.report()
    await agent.order(order())
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=6), config="{}", sequence=2))
    assert processes.said == []


async def test_what_its_gateways_see_of_demand_is_reported_while_it_is_fresh(tmp_path: Path) -> None:
    clock = FakeClock(start=NOW)
    paths = NodePaths(tmp_path)
    agent = NodeAgent(settings(paths, {"discover": "cpu"}), NotedProcesses(), lambda: Inventory((CPU,)), clock.now)
    assert (await agent.report()).demand is None
    for process, waiting in (("1", 2), ("2", 3)):
        figures = ModelFigures(model="chat", arrivals_per_second=0.5, waiting=waiting)
        FiguresFile(paths.gateway.figures, process).write(GatewayFigures(at=NOW.timestamp(), models=(figures,)))
    assert (await agent.report()).demand == {"chat": Signals(arrivals_per_second=1.0, queued=5)}
    await clock.sleep(FRESH_SECONDS + 1)
    assert (await agent.report()).demand is None, "a gateway that hangs sees nothing"
    slowly = json.dumps({"version": "v1", "fleet": {"autoscale": {"look_every": "10s"}}})
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=5), config=slowly, sequence=1))
    assert (await agent.report()).demand is not None, "one that tells so seldom is not stale yet"
    gateway = json.loads(paths.gateway_config.read_bytes())
    assert gateway["fleet"] == {"discover": "none", "autoscale": {"look_every": "10s"}}


async def test_what_load_tests_have_measured_is_reported_as_soon_as_it_is_kept(
    tmp_path: Path, processes: NotedProcesses
) -> None:
    paths = NodePaths(tmp_path / "nodes" / "n1")
    agent = NodeAgent(settings(paths, {"discover": "cpu"}), processes, lambda: Inventory((CPU,)))
    assert (await agent.report()).measured == ()
    key = ThroughputKey("org/x", "cpu", None, None, 1, 100, 10, {"ttft_seconds": 1.0})
    kept = Throughput(key, "chat", 2.0, None, 20.0, 200.0, 1.0, None, None, "2026-11-20T00:00:00+00:00")
    ThroughputStore(tmp_path / THROUGHPUT_FILE).put(kept)
    assert (await agent.report()).measured == (kept,)
    (tmp_path / THROUGHPUT_FILE).write_bytes(b"{")
    assert (await agent.report()).measured == ()


async def test_the_head_is_told_of_what_it_acts_upon_and_of_nothing_else(tmp_path: Path) -> None:
    clock, paths = FakeClock(start=NOW), NodePaths(tmp_path)
    agent = NodeAgent(settings(paths, {"discover": "cpu"}), NotedProcesses(), lambda: Inventory((CPU,)), clock.now)

    def see(**figures: float) -> None:
        row = ModelFigures.model_validate({"model": "chat"} | figures)
        FiguresFile(paths.gateway.figures, "1").write(GatewayFigures(at=NOW.timestamp(), models=(row,)))

    see(idle_seconds=1)
    first = (await agent.word("", 0.0)).report
    assert first is not None
    see(idle_seconds=2)
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=5), config="{}", sequence=1))
    word = await agent.word(first.digest, 0.0)
    assert word == Word(demand={"chat": Signals(idle_seconds=2)}, generation=5)
    assert (await agent.report()).generation == 5
    see(waiting=1)
    asked = (await agent.word(first.digest, 3600.0)).report
    assert asked is not None, "a model that slept is asked for"
    see(waiting=2, in_flight=16)
    assert (await agent.word(asked.digest, 0.0)).report is None, "how much it is asked for is another matter"
    await agent.order(order())
    tell(agent, unplaced={"chat-0": ErrorRow(code="x", message="It is small.")})
    assert (await agent.word(asked.digest, 3600.0)).report is not None
    again = NodeAgent(settings(paths, {"discover": "cpu"}), NotedProcesses(), lambda: Inventory((CPU,)), clock.now)
    assert (await again.report()).digest != (await agent.report()).digest, "another start is another agent"


async def test_a_change_is_told_while_the_head_waits_for_it(agent: NodeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placement.cluster.node.CHECK_SECONDS", 0.0)
    known = (await agent.report()).digest
    asked = asyncio.create_task(agent.word(known, 3600.0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not asked.done()
    await agent.order(order())
    tell(agent, unplaced={"chat-0": ErrorRow(code="x", message="It is small.")})
    report = (await asked).report
    assert report is not None
    assert report.waiting == {"chat-0": "It is small."}


def test_a_table_that_somebody_has_removed_is_known_no_more(agent: NodeAgent) -> None:
    path = agent.settings.paths.gateway.routing_table
    for generation in (5, 6):
        agent.take_over(Broadcast(head="h", table=RoutingTable(generation=generation), config="{}", sequence=1))
        assert agent._known_generation() == generation
    path.write_bytes(b"{")
    assert agent._known_generation() == -1
    path.unlink()
    agent.take_over(Broadcast(head="h", table=RoutingTable(generation=4), config="{}", sequence=2))
    assert read(path).generation == 4


async def test_a_driver_that_takes_its_time_silences_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placement.cluster.node.OBSERVE_SECONDS", -1.0)
    monkeypatch.setattr("placement.cluster.node.DRIVER_SECONDS", 0.01)
    cut = threading.Event()
    looks = []

    def observe() -> Inventory:
        looks.append(1)
        if len(looks) == 1:
            return Inventory((CPU,))
        assert cut.wait(60)
        return Inventory(())

    agent = NodeAgent(settings(NodePaths(tmp_path), {"discover": "cpu"}), NotedProcesses(), observe)
    assert (await agent.report()).slices == (CPU,)
    reports = await asyncio.gather(agent.report(), agent.report())
    assert [one.slices for one in reports] == [(CPU,), (CPU,)], "what was seen last"
    assert len(looks) == 2, "one look at a time"
    cut.set()
    async with asyncio.timeout(60):
        while (await agent.report()).slices:
            pass


async def test_slices_of_a_cordoned_gpu_are_reported(tmp_path: Path) -> None:
    gpu = Gpu("GPU-7", 0, "H100-SXM5-80GB", 80 * 2**30)
    state = GpuState("GPU-7", 0, "NVIDIA H100", "h100-sxm", 80 * 2**30, 80 * 2**30, "580.95.05")
    there = Slice("GPU-7/1g.10gb@0", SliceKind.MIG, "1g.10gb", 2**30, uuid="MIG-1", gpu=gpu)
    fleet = {"discover": "auto", "cordon": ["GPU-7"]}
    inventory = Inventory((CPU, there), gpus=(state,))
    agent = NodeAgent(settings(NodePaths(tmp_path), fleet), NotedProcesses(), lambda: inventory)
    assert (await agent.report()).cordoned == (there.id,)


async def test_a_table_that_a_dead_controller_has_left_speaks_for_no_engine_that_is_gone(agent: NodeAgent) -> None:
    engines = agent.settings.paths.engines
    engines.root.mkdir(parents=True, exist_ok=True)
    rows = [row("chat-0", ReplicaState.READY), row("chat-1", ReplicaState.READY), row("chat-2", ReplicaState.BACKOFF)]
    publish(RoutingTable(generation=4, replicas=tuple(rows)), engines.routing_table)
    me = this_process()
    for replica, pid in (("chat-0", me.pid), ("chat-1", 0)):
        entry = JournalEntry(
            replica=replica,
            model="chat",
            task="generate",
            slice_id="cpu-0",
            spec_hash="",
            endpoint="http://10.0.0.7:1",
            log_offset=0,
            started_at=NOW,
            shim_pid=pid,
            shim_start_ticks=me.start_ticks,
            boot_id=me.boot_id,
        )
        Journal(engines).write(entry)
    report = await agent.report()
    assert {r.replica for r in report.table.replicas} == {"chat-0", "chat-2"}
    assert set(report.running) == {"chat-0"}


def row(replica: str, state: ReplicaState) -> ReplicaRow:
    place = SliceRow(id="cpu-0", kind=SliceKind.CPU, memory_bytes=2**30)
    return ReplicaRow(
        replica=replica, model="chat", engine_model="chat", endpoint="http://10.0.0.7:1", slice=place, state=state
    )
