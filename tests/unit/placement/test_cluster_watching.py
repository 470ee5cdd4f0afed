"""How the head hears of its nodes: only what is another, at once; and who is silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import pytest

from placement.autoscale import Signals
from placement.cluster import watching
from placement.cluster.errors import NodeLost
from placement.cluster.members import NodeReport, Versions, Word
from placement.cluster.watching import Watch
from placement.testing import FakeClock

VERSIONS = Versions(sliceway="1", python="3.11", ray="2")


@dataclass
class Quiet:
    """Nodes that answer when they are told to, or have something else to tell than what is known."""

    address: dict[str, str]
    demand: Mapping[str, Signals] | None = None
    asked: list[str] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)
    answering: asyncio.Event = field(default_factory=asyncio.Event)

    async def word(self, node: str, known: str, wait_seconds: float) -> Word:
        self.asked.append(node)
        if node in self.silent:
            await asyncio.Event().wait()
        if not self.address[node]:
            raise NodeLost(node)
        while self.address[node] == known and not self.answering.is_set():  # noqa: ASYNC110 - tests set addresses
            await asyncio.sleep(0)
        if self.address[node] == known:
            return Word(demand=self.demand)
        address = self.address[node]
        report = NodeReport(node=node, address=address, versions=VERSIONS, boot="b", digest=address, demand=self.demand)
        return Word(report=report)

    async def settle(self) -> None:
        """Let everybody look again."""
        for _ in range(3):
            await asyncio.sleep(0)

    async def answer(self) -> None:
        """Have everybody who waits say what there is."""
        self.answering.set()
        await self.settle()
        self.answering.clear()


@pytest.fixture
async def nodes() -> Quiet:
    return Quiet({"a": "10.0.0.1", "b": "10.0.0.2"})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def watch(nodes: Quiet, clock: FakeClock) -> AsyncIterator[Watch]:
    made = Watch(nodes.word, clock)
    yield made
    made.stop()
    await asyncio.sleep(0)


async def test_nodes_that_have_nothing_new_are_asked_once(nodes: Quiet, clock: FakeClock, watch: Watch) -> None:
    first = await watch.look(["a", "b"])
    assert {node: heard.report.address for node, heard in first.items()} == nodes.address
    again = await watch.look(["a", "b"])
    for _ in range(10):
        await clock.sleep(0.5)
        again = await watch.look(["a", "b"])
    assert nodes.asked == ["a", "b", "a", "b"], "first for a report, then for another one"
    assert all(again[node].report is first[node].report for node in first)
    assert {heard.at_seconds for heard in again.values()} == {0.0}, "nobody has said since that it lives"
    await nodes.answer()
    heard = await watch.look(["a", "b"])
    assert {one.at_seconds for one in heard.values()} == {5.0}
    assert all(heard[node].report is first[node].report for node in first)


async def test_a_change_is_told_at_once_and_ends_the_pause(nodes: Quiet, watch: Watch) -> None:
    await watch.look(["a", "b"])
    await watch.look(["a", "b"])
    pause = asyncio.create_task(watch.stirred(3600))
    await nodes.settle()
    assert not pause.done()
    nodes.address["b"] = "10.0.0.9"
    await nodes.settle()
    await pause
    assert (await watch.look(["a", "b"]))["b"].report.address == "10.0.0.9"


async def test_demand_comes_with_the_word_that_a_node_lives_and_ends_no_pause(nodes: Quiet, watch: Watch) -> None:
    before = await watch.look(["a"])
    await watch.look(["a"])
    nodes.demand = {"chat": Signals(running=3)}
    await nodes.answer()
    await watch.stirred(0)
    heard = (await watch.look(["a"]))["a"]
    assert heard.demand == nodes.demand
    assert heard.report is before["a"].report


async def test_a_node_that_hangs_is_waited_for_once(
    nodes: Quiet, clock: FakeClock, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "ANSWER_SECONDS", 0.0)
    nodes.silent = {"b"}
    assert set(await watch.look(["a", "b"])) == {"a"}
    monkeypatch.setattr(watching, "ANSWER_SECONDS", 3600.0)
    assert set(await watch.look(["a", "b"])) == {"a"}, "it is not waited for again"


async def test_a_node_that_does_not_answer_in_time_is_asked_again(
    nodes: Quiet, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(watching, "ALIVE_SECONDS", 0.0)
    nodes.silent = {"a"}
    for _ in range(200):
        assert await watch.look(["a"]) == {}
        if len(nodes.asked) > 1:
            break
    nodes.silent = set()
    monkeypatch.setattr(watching, "ALIVE_SECONDS", 3600.0)
    for _ in range(200):
        if await watch.look(["a"]):
            return
    raise AssertionError("it was never heard of again")


async def test_a_node_that_refuses_keeps_its_last_word_and_its_time(
    nodes: Quiet, clock: FakeClock, watch: Watch
) -> None:
    first = await watch.look(["a"])
    known, nodes.address["a"] = nodes.address["a"], ""
    assert await watch.look(["a"]) == first
    await clock.sleep(1.0)
    assert await watch.look(["a"]) == first
    assert await watch.look(["a"]) == first
    nodes.address["a"] = known
    await watch.look(["a"])
    await nodes.answer()
    heard = await watch.look(["a"])
    assert heard["a"].report is first["a"].report
    assert heard["a"].at_seconds == 1.0


async def test_a_look_that_comes_late_takes_nobody_for_silent(nodes: Quiet, clock: FakeClock, watch: Watch) -> None:
    await watch.look(["a", "b"])
    await watch.look(["a", "b"])
    await nodes.answer()
    await clock.sleep(60.0)
    late = await watch.look(["a", "b"])
    assert {one.at_seconds for one in late.values()} == {60.0}, "nobody has asked them anything meanwhile"
    await clock.sleep(4.0)
    assert {one.at_seconds for one in (await watch.look(["a", "b"])).values()} == {60.0}


async def test_who_has_left_is_forgotten_and_asked_for_everything_when_it_is_back(nodes: Quiet, watch: Watch) -> None:
    await watch.look(["a", "b"])
    await watch.look(["a", "b"])
    assert set(await watch.look(["a"])) == {"a"}
    assert set(await watch.look(["a", "b"])) == {"a", "b"}
