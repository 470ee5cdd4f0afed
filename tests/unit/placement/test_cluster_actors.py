"""Ray's books as the head asks for them, where Ray fails. Ray itself is never started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from placement.cluster.members import Broadcast, News, NodeReport, Seat, Versions, Word
from placement.table import RoutingTable

actors = pytest.importorskip("placement.cluster.actors", exc_type=ImportError)
ray = pytest.importorskip("ray")

SEAT = Seat(replica="chat-0", model="chat", node="n1", slice_id="cpu-0")


def with_a_slice() -> Any:
    nodes = actors.RayNodes()
    nodes._books[SEAT.replica] = actors._Booked(SEAT, granted=True)
    return nodes


def answer(outcome: Any) -> Any:
    made = asyncio.get_running_loop().create_future()
    if isinstance(outcome, Exception):
        made.set_exception(outcome)
    else:
        made.set_result(outcome)
    return made


async def test_a_slice_that_ray_did_not_take_back_is_given_back_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = with_a_slice()
    tried: list[str] = []

    def give_back(name: str) -> None:
        tried.append(name)
        if len(tried) == 2:
            raise ray.exceptions.RpcError("no route")

    async def end(replica: str) -> None:
        tried.append(f"the actor of {replica}")

    monkeypatch.setattr(actors, "_give_back", give_back)
    monkeypatch.setattr(nodes.owners, "end", end)
    with pytest.raises(ray.exceptions.RpcError):
        await nodes.let_go(SEAT.replica)
    await nodes.let_go(SEAT.replica)
    await nodes.let_go(SEAT.replica)
    assert tried == ["the actor of chat-0", "sliceway|chat-0|chat|n1|cpu-0"] * 2, "the actor before the slice"


class EarlierAgent:
    """As a node of a version before this one answers."""

    def __init__(self, report: NodeReport) -> None:
        self._text = report.model_dump_json(exclude={"digest"})
        self.report = self
        self.waited: list[tuple[str, float]] = []

    def remote(self, *asked: Any) -> Any:
        self.waited.append(asked)
        return answer(self._text)


class Agent(EarlierAgent):
    def __init__(self, word: Word) -> None:
        self._text = word.model_dump_json()
        self.waited = []
        self.word = self


async def test_an_agent_of_an_earlier_version_is_asked_as_it_was_asked_then() -> None:
    versions = Versions(sliceway="0", python="3.11", ray="2")
    report = NodeReport(node="n1", address="10.0.0.1", versions=versions, boot="b")
    nodes = actors.RayNodes()
    for agent, asked in ((EarlierAgent(report), ()), (Agent(Word(report=report)), ("d", 2.0))):
        nodes._agents["n1"] = agent
        assert await nodes.report("n1", "d", 2.0) == Word(report=report)
        assert agent.waited == [asked]


async def test_a_head_of_an_earlier_version_is_asked_for_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Broadcast(head="h", table=RoutingTable(generation=3), sequence=1)
    earlier, latest = EarlierHead(told.model_dump_json()), EarlierHead("")
    latest.next_news, latest.text = latest, News(whole=told).model_dump_json()
    for head, asked in ((earlier, ("", 0, 20.0)), (latest, ("", 0, 20.0, "b"))):
        monkeypatch.setattr(ray, "get_actor", lambda name, namespace, head=head: head)
        assert await actors._next_news("b", None, "", 0, 20.0) == News(whole=told)
        assert head.waited == [asked]


class EarlierHead:
    next_news: Any

    def __init__(self, text: str) -> None:
        self.text = text
        self.waited: list[tuple[Any, ...]] = []
        self.next_broadcast = self

    def remote(self, *asked: Any) -> Any:
        self.waited.append(asked)
        return answer(self.text)
