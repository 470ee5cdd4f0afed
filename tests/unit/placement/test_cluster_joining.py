"""Machines that join a cluster with `fleet.layouts`: real agents on drivers in memory under a head, and nobody on a slice that goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.cluster_layouts import layout_transition
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.cluster.cutting import CutOrder
from placement.cluster.head import ClusterGoal, Head
from placement.cluster.laying_out import read_laid_out
from placement.cluster.layouts import layouts_in
from placement.cluster.members import NodeOrder, Word
from placement.cluster.node import NodeAgent, NodePaths, NodeSettings
from placement.cluster.seats import this_process
from placement.cluster.survey import NodeGpus, layouts_of
from placement.cluster.testing import VERSIONS, FakeBooks, FakeDriver, FakeStore, made_gpu
from placement.cluster.transitions import digest
from placement.gpu_slices import slices_of
from placement.replicas.journal import Journal, JournalEntry
from placement.slices import Inventory, Slice
from placement.table import ModelRow
from placement.testing import FakeClock

HALVES = ["3g.40gb@0", "3g.40gb@4"]


class NoProcesses:
    def ensure_controller(self, config: Path, seats: Path) -> None: ...
    def reload_controller(self) -> None: ...
    def ensure_gateway(self, config: Path) -> None: ...
    def reload_gateway(self) -> None: ...


def agent(root: Path, name: str, driver: FakeDriver, join: str = "j") -> NodeAgent:
    def observe() -> Inventory:
        return Inventory(tuple(s for gpu in driver.gpus for s in slices_of(gpu)), gpus=driver.gpus)

    settings = NodeSettings(
        name=name,
        address="10.0.0.1",
        paths=NodePaths(root / name),
        versions=VERSIONS,
        fleet={"discover": "nvidia"},
        simulated=True,
        join=join,
    )
    return NodeAgent(settings, NoProcesses(), observe, driver=driver)


@dataclass
class AgentNodes(FakeBooks):
    """`Nodes` whose agents are those of this process."""

    agents: dict[str, NodeAgent] = field(default_factory=dict)

    async def names(self) -> Sequence[str]:
        return sorted(self.agents)

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        return await self.agents[node].word(known, 0.0)

    async def order(self, node: str, order: NodeOrder) -> None:
        await self.agents[node].order(order)

    async def gpus(self, node: str) -> NodeGpus:
        return await self.agents[node].gpus()

    async def cut(self, node: str, order: CutOrder) -> None:
        await self.agents[node].cut(order)


def goal(replicas: int, layouts: Sequence[Mapping[str, Any]]) -> ClusterGoal:
    """A model that fits everything but the smallest slices."""

    def fit_on(_: str, target: Slice) -> SliceFit:
        fits = target.profile != "1g.10gb"
        return SliceFit(fits, "" if fits else "too small", target.memory_bytes, 0, 0, 0, 4096, 2**30)

    models = [ModelConfig(name="chat", source="org/x", replicas=replicas)]
    config = json.dumps({"version": "v1", "fleet": {"layouts": list(layouts)}})
    return ClusterGoal(config, models, (ModelRow(name="chat"),), fit_on, layouts=bool(layouts))


class Cluster:
    def __init__(self, **agents: NodeAgent) -> None:
        self.nodes = AgentNodes(agents=dict(agents))
        self.clock = FakeClock()
        self.head = Head(self.nodes, FakeStore(), self.clock, VERSIONS, secret="s")

    async def round(self) -> None:
        """One, with what the agents do meanwhile. Drivers are asked in threads, so how many it takes is not known."""
        await self.head.step()
        await asyncio.to_thread(lambda: None)
        await self.clock.sleep(0.001)

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(3000):
            if condition():
                return
            await self.round()
        pytest.fail(f"never: {self.head.status()}")

    @property
    def seats(self) -> dict[str, str]:
        return {row["replica"]: row["slice"] for row in self.head.status()["replicas"]}  # type: ignore[attr-defined]

    def node(self, name: str) -> dict[str, Any]:
        return next(n for n in self.head.status()["nodes"] if n["node"] == name)  # type: ignore[attr-defined]


async def test_nobody_comes_to_a_slice_before_the_gpus_are_cut(tmp_path: Path) -> None:
    """The 4g.40gb@0 that is there would do for the model, and has to go."""
    driver = FakeDriver((made_gpu(0, holds=("4g.40gb@0",)), made_gpu(1)))
    cluster = Cluster(a=agent(tmp_path, "a", driver))
    cluster.head.aim(goal(4, [{"layout": HALVES}]))
    await cluster.until(lambda: len(cluster.seats) == 4)
    assert sorted(cluster.seats.values()) == [f"a/GPU-{g}/{one}" for g in (0, 1) for one in HALVES]
    assert (cluster.node("a")["laid_out"], cluster.node("a")["layouts"]) == (True, [])
    found = read_laid_out(tmp_path / "a" / "layouts.json")
    assert found is not None
    assert len(found.said) == 2


async def test_a_node_that_joins_later_is_cut_too_and_who_serves_elsewhere_stays(tmp_path: Path) -> None:
    layouts = [{"gpus": [0], "layout": HALVES}]
    cluster = Cluster(a=agent(tmp_path, "a", FakeDriver((made_gpu(0),))))
    cluster.head.aim(goal(3, layouts))
    await cluster.until(lambda: len(cluster.seats) == 2)
    before = cluster.seats
    driver = FakeDriver((made_gpu(0, holds=("1g.10gb@6",)),))
    cluster.nodes.agents["b"] = agent(tmp_path, "b", driver)
    await cluster.until(lambda: len(cluster.seats) == 3)
    assert before.items() <= cluster.seats.items()
    assert cluster.seats["chat-2"].startswith("b/GPU-0/3g.40gb@")
    assert sorted(i.name for i in driver.gpus[0].instances) == HALVES


async def test_an_engine_that_ran_here_before_keeps_its_slice_and_that_is_said(tmp_path: Path) -> None:
    driver = FakeDriver((made_gpu(0, holds=("4g.40gb@0", "1g.10gb@6")), made_gpu(1)))
    mine = agent(tmp_path, "a", driver)
    runs(mine, "chat-0", "GPU-0/4g.40gb@0")
    cluster = Cluster(a=mine)
    cluster.head.aim(goal(2, [{"layout": HALVES}]))
    await cluster.until(lambda: len(cluster.seats) == 2)
    assert [i.name for i in driver.gpus[0].instances] == ["4g.40gb@0", "1g.10gb@6"]
    assert sorted(i.name for i in driver.gpus[1].instances) == HALVES
    assert cluster.seats["chat-0"] == "a/GPU-0/4g.40gb@0"
    assert cluster.seats["chat-1"].startswith("a/GPU-1/")
    (said,) = cluster.node("a")["layouts"]
    assert "GPU-0/4g.40gb@0 would have to go, and has a replica" in said
    assert "sliceway apply CONFIG --ray HOST:PORT --drain" in said


async def test_who_is_to_end_is_waited_for(tmp_path: Path) -> None:
    """An engine that nobody has seated is still there: of a replica that was seated elsewhere when this node was lost."""
    driver = FakeDriver((made_gpu(0, holds=("4g.40gb@0",)),))
    mine = agent(tmp_path, "a", driver)
    runs(mine, "gone-0", "GPU-0/4g.40gb@0")
    cluster = Cluster(a=mine)
    cluster.head.aim(goal(1, [{"layout": HALVES}]))
    await cluster.until(lambda: cluster.head.status()["nodes"] and cluster.node("a")["layouts"])
    for _ in range(3):
        await cluster.round()
    assert [i.name for i in driver.gpus[0].instances] == ["4g.40gb@0"]
    assert cluster.node("a")["laid_out"] is False
    assert "when engines that ran here before, if any, have ended" in cluster.node("a")["layouts"][0]
    Journal(mine.settings.paths.engines).forget("gone-0")
    await cluster.until(lambda: cluster.seats)
    assert sorted(i.name for i in driver.gpus[0].instances) == HALVES


async def test_a_configuration_that_changes_later_cuts_nothing_and_says_what_does(tmp_path: Path) -> None:
    driver = FakeDriver((made_gpu(0),))
    cluster = Cluster(a=agent(tmp_path, "a", driver))
    cluster.head.aim(goal(1, []))
    await cluster.until(lambda: cluster.head.status()["nodes"] and cluster.node("a")["laid_out"])
    cluster.head.aim(goal(1, [{"layout": HALVES, "gpus": [0, 3]}]))
    await cluster.until(lambda: cluster.node("a")["layouts"])
    assert driver.gpus[0].instances == ()
    assert "sliceway apply CONFIG --ray HOST:PORT" in cluster.node("a")["layouts"][0]
    (nowhere,) = cluster.head.status()["layouts"]  # type: ignore[misc]
    assert str(nowhere).startswith("fleet.layouts[0].gpus: no node of the cluster has a GPU 3")


async def test_apply_cuts_what_the_configuration_says_by_now_and_who_had_to_leave_is_seated_again(
    tmp_path: Path,
) -> None:
    driver = FakeDriver((made_gpu(0, holds=("4g.40gb@0",)),))
    cluster = Cluster(a=agent(tmp_path, "a", driver))
    cluster.head.aim(goal(1, []))
    await cluster.until(lambda: cluster.seats)
    cluster.head.aim(changed := goal(1, [{"layout": HALVES}]))
    await cluster.until(lambda: cluster.node("a")["layouts"])
    survey = await cluster.head.survey()
    plans = layouts_of(survey, layouts_in(changed.config))
    asked = replace(layout_transition(survey, plans, drain=True), wanted=digest(changed.config))
    await cluster.head.carry_out(asked)
    await cluster.until(lambda: not (cluster.head.transition() or {"under_way": True})["under_way"])
    outcome = cluster.head.transition()
    assert outcome is not None
    assert outcome["ok"], outcome["error"]
    assert sorted(i.name for i in driver.gpus[0].instances) == HALVES
    await cluster.until(lambda: cluster.seats)
    assert cluster.seats["chat-0"].startswith("a/GPU-0/3g.40gb@")
    assert cluster.node("a")["layouts"] == []


def runs(mine: NodeAgent, replica: str, slice_id: str) -> None:
    """As an engine that a controller has started, and that outlived it."""
    me = this_process()
    entry = JournalEntry(
        replica=replica,
        model="chat",
        task="generate",
        slice_id=slice_id,
        spec_hash="",
        endpoint="http://10.0.0.1:1",
        log_offset=0,
        started_at=datetime(2026, 11, 22, tzinfo=UTC),
        shim_pid=me.pid,
        shim_start_ticks=me.start_ticks,
        boot_id=me.boot_id,
    )
    Journal(mine.settings.paths.engines).write(entry)
