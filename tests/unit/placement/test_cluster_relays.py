"""Nodes that pass on what the head tells: who does, that everybody hears of it, and what becomes of it when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.cluster import node as node_module
from placement.cluster.bulletin import Bulletin
from placement.cluster.errors import NodeLost
from placement.cluster.members import News, Versions
from placement.cluster.node import NodeAgent, NodePaths, NodeSettings
from placement.cluster.relays import RELAYED_FROM, relay_for, relays_of
from placement.slices import Inventory
from placement.table import RoutingTable, read


@given(st.sets(st.text(min_size=1, max_size=8), max_size=150))
def test_everybody_is_told_by_the_head_or_by_somebody_who_is(nodes: set[str]) -> None:
    relays = relays_of(nodes)
    assert bool(relays) == (len(nodes) > RELAYED_FROM)
    assert set(relays) <= nodes
    for node in nodes:
        asked = relay_for(node, relays)
        assert asked is None if node in relays or not relays else asked in relays


def test_each_tells_about_as_many_as_the_head_does() -> None:
    nodes = [f"node-{i:04}" for i in range(1000)]
    relays = relays_of(nodes)
    assert len(relays) == 31
    told = [relay_for(node, relays) for node in nodes]
    assert max(told.count(relay) for relay in relays) <= 60


class NoProcesses:
    def ensure_controller(self, config: Path, seats: Path) -> None:
        pass

    def reload_controller(self) -> None:
        pass

    def ensure_gateway(self, config: Path) -> None:
        pass

    def reload_gateway(self) -> None:
        pass


class Cluster:
    """A head, the node `relay` that passes its words on, and the node `other`, which asks that one."""

    def __init__(self, root: Path) -> None:
        self.head = Bulletin()
        self.agents = {name: agent(root / name, name) for name in ("relay", "other")}
        self.asked: dict[str, list[str | None]] = {"relay": [], "other": []}
        self.lost = False

    async def ask(self, who: str, relay: str | None, head: str, after: int, timeout_seconds: float) -> News | None:
        self.asked[who].append(relay)
        if relay is None:
            return await self.head.news(head, after, timeout_seconds=timeout_seconds)
        if self.lost:
            raise NodeLost("relay")
        return await self.agents[relay].pass_on(head, after, timeout_seconds)

    def following(self, who: str) -> asyncio.Task[None]:
        async def next_news(relay: str | None, head: str, after: int, timeout_seconds: float) -> News | None:
            return await self.ask(who, relay, head, after, timeout_seconds)

        return asyncio.create_task(self.agents[who].follow(next_news))

    async def tell(self, generation: int) -> None:
        await self.head.tell(RoutingTable(generation=generation), "{}", relays=("relay",))

    def generation(self, who: str) -> int:
        path = self.agents[who].settings.paths.gateway.routing_table
        return read(path).generation if path.exists() else 0


def agent(root: Path, name: str) -> NodeAgent:
    versions = Versions(sliceway="1", python="3.11", ray="2")
    settings = NodeSettings(name, "10.0.0.7", NodePaths(root), versions, {"discover": "none"})
    return NodeAgent(settings, NoProcesses(), lambda: Inventory(()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads
            await asyncio.sleep(0.001)


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(
        node_module, "RELAY_SECONDS", 3600.0
    )  # nobody is silent for too long, however slow this machine is
    made = Cluster(tmp_path)
    tasks = {who: made.following(who) for who in made.agents}
    yield made
    for task in tasks.values():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_who_has_a_relay_asks_it_and_hears_of_every_table(cluster: Cluster) -> None:
    for generation in range(1, 6):
        await cluster.tell(generation)
        await until(lambda: all(cluster.generation(who) == generation for who in cluster.agents))  # noqa: B023
    await until(lambda: cluster.asked["other"][-1] == "relay")
    assert set(cluster.asked["relay"]) == {None}
    assert cluster.asked["other"].count(None) == 1, "only as long as it did not know of the relay"


async def test_who_has_lost_its_relay_asks_the_head(cluster: Cluster) -> None:
    await cluster.tell(1)
    await until(lambda: "relay" in cluster.asked["other"])
    cluster.lost = True
    await cluster.tell(2)
    await cluster.tell(3)
    await until(lambda: cluster.generation("other") == 3)
    cluster.lost = False
    await cluster.tell(4)
    await until(lambda: cluster.generation("other") == 4)


async def test_a_relay_that_does_not_hear_from_the_head_says_so(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.tell(1)
    relay = cluster.agents["relay"]
    await until(lambda: cluster.generation("relay") == 1)
    head = cluster.head.latest.head
    with pytest.raises(NodeLost):
        await relay.pass_on("another head", 1, 0)
    assert (await relay.pass_on(head, 0, 0)) is not None
    monkeypatch.setattr(node_module, "RELAY_SECONDS", -1.0)
    with pytest.raises(NodeLost):
        await relay.pass_on(head, 0, 0)


async def test_a_new_head_is_heard_of_by_everybody(cluster: Cluster) -> None:
    await cluster.tell(1)
    await until(lambda: "relay" in cluster.asked["other"])
    cluster.head, before = Bulletin(), cluster.head
    cluster.lost = True  # the relay cannot say anything about a head that is gone
    await before.tell(RoutingTable(generation=1), "{}")  # ends the questions that this one has open
    await cluster.tell(2)
    await until(lambda: all(cluster.generation(who) == 2 for who in cluster.agents))
