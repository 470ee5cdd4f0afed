"""What the head knows of nodes and of Ray's books through `RayNodes`. Ray itself is never started."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from placement.cluster.errors import NodeLost
from placement.cluster.members import NodeOrder, NodeReport, Owner, Seat, Versions, Word

actors = pytest.importorskip("placement.cluster.actors", exc_type=ImportError)
ray = pytest.importorskip("ray")

SEAT = Seat(replica="chat-0", model="chat", node="n1", slice_id="GPU-a/1g.10gb@0")
RIVAL = Seat(replica="embed-0", model="embed", node="n1", slice_id=SEAT.slice_id)
OWNER = Owner(pid=7, start_ticks=1, boot_id="b")
REPORT = NodeReport(
    node="n1", address="10.0.0.1", versions=Versions(sliceway="1", python="3.11", ray="2.60.0"), boot="b0"
)


def answering(*outcomes: Any) -> Any:
    """A method of an actor: gives these one after another, or raises those that are errors."""
    left = list(outcomes)

    def remote(*_: Any) -> asyncio.Future[Any]:
        made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        outcome = left.pop(0)
        made.set_exception(outcome) if isinstance(outcome, Exception) else made.set_result(outcome)
        return made

    return SimpleNamespace(remote=remote)


class Books:
    """In the place of Ray's: actors by name, placement groups by name with their state, and what nodes offer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: dict[str, Any] = {}
        self.groups: dict[str, str] = {}
        self.offered: dict[str, float] = {}
        self.looked_up: list[str] = []
        self.read = 0
        monkeypatch.setattr(ray, "get_actor", self._get_actor)
        monkeypatch.setattr(ray, "cluster_resources", lambda: self.offered)
        monkeypatch.setattr(ray.util, "list_named_actors", self._named)
        monkeypatch.setattr(actors, "placement_group", self._book)
        monkeypatch.setattr(actors, "placement_group_table", self._table)
        monkeypatch.setattr(actors, "get_placement_group", self._group)
        monkeypatch.setattr(actors, "remove_placement_group", self.groups.pop)

    def _get_actor(self, name: str, *, namespace: str) -> Any:
        assert namespace == actors.NAMESPACE
        self.looked_up.append(name)
        if name not in self.actors:
            raise ValueError(f"no actor {name}")
        return self.actors[name]

    def _named(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        mine = [{"name": name, "namespace": actors.NAMESPACE} for name in self.actors]
        return [*mine, {"name": "agent|stranger", "namespace": "another"}]

    def _book(self, bundles: list[dict[str, float]], *, name: str, lifetime: str) -> None:
        assert lifetime == "detached"
        assert [list(bundle.values()) for bundle in bundles] == [[1.0]]
        self.groups[name] = "PENDING"

    def _table(self) -> dict[str, dict[str, str]]:
        self.read += 1
        return {str(i): {"name": name, "state": state} for i, (name, state) in enumerate(self.groups.items())}

    def _group(self, name: str) -> str:
        if name not in self.groups:
            raise ValueError(f"no placement group {name}")
        return name


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    return Books(monkeypatch)


@pytest.fixture
def nodes(books: Books) -> Any:
    return actors.RayNodes()


async def test_nodes_are_known_by_their_agents(books: Books, nodes: Any) -> None:
    books.actors = dict.fromkeys(("agent|n2", "agent|n1", "head", "holder|n1", "replica|chat-0"))
    assert await nodes.names() == ["n1", "n2"]


async def test_an_agent_is_looked_up_once_and_again_when_it_has_gone(books: Books, nodes: Any) -> None:
    with pytest.raises(NodeLost, match="node 'n1' does not answer"):
        await nodes.report("n1", "", 0.0)
    text = REPORT.model_dump_json()
    first = SimpleNamespace(
        report=answering(text, ray.exceptions.ActorUnavailableError("gone", None)), order=answering(None)
    )
    books.actors["agent|n1"] = first
    assert await nodes.report("n1", "", 0.0) == Word(report=REPORT)
    await nodes.order("n1", NodeOrder(generation=1, config="{}"))
    assert books.looked_up == ["agent|n1"] * 2
    with pytest.raises(NodeLost) as lost:
        await nodes.report("n1", "", 0.0)
    assert lost.value.where == "n1"
    books.actors["agent|n1"] = SimpleNamespace(report=answering(text))
    assert await nodes.report("n1", "", 0.0) == Word(report=REPORT), "another one of its name"


async def test_a_slice_is_booked_once_and_what_it_waits_for_is_told(books: Books, nodes: Any) -> None:
    assert await nodes.held() == {}
    assert "a node that offers slice n1/GPU-a/1g.10gb@0: none in the cluster does" in (await nodes.hold(SEAT)).waits_for
    books.offered = {"sliceway-slice:n1/GPU-a/1g.10gb@0": 1.0}
    assert await nodes.held() == {"chat-0": SEAT}
    assert (await nodes.hold(SEAT)).waits_for == "Ray to give it slice n1/GPU-a/1g.10gb@0"
    await nodes.hold(RIVAL)
    assert "which is still held for chat-0" in (await nodes.hold(RIVAL)).waits_for
    assert len(books.groups) == 2


async def test_books_in_which_nothing_waits_are_read_seldom(
    books: Books, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [100.0]
    monkeypatch.setattr(actors, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    books.groups[actors._booking(SEAT)] = "CREATED"
    for _ in range(3):
        assert await nodes.held() == {"chat-0": SEAT}
    assert books.read == 1
    seconds[0] += actors.BOOKS_SECONDS
    await nodes.held()
    assert books.read == 2
    await nodes.hold(RIVAL)
    await nodes.held()
    assert books.read == 3, "one waits"


async def test_what_is_let_go_is_out_of_the_books_also_where_ray_has_lost_it(books: Books, nodes: Any) -> None:
    books.groups |= {actors._booking(SEAT): "CREATED", actors._booking(RIVAL): "REMOVED", "somebody else's": "CREATED"}
    assert await nodes.held() == {"chat-0": SEAT}
    await nodes.let_go("chat-0")
    await nodes.let_go("chat-0")
    await nodes.let_go("nobody")
    assert actors._booking(SEAT) not in books.groups
    await nodes.hold(SEAT)
    books.groups.clear()
    await nodes.let_go("chat-0")
    assert await nodes.held() == {}


class Told:
    """In the place of `Owners`: what it was asked for, and the owner that it knows."""

    def __init__(self) -> None:
        self.each = "replica"
        self.asked: list[tuple[str, ...]] = []

    async def of(self, seat: Seat, booking: str, journal: str) -> Owner | None:
        self.asked.append((seat.replica, booking, journal))
        return OWNER

    def waits_for(self, seat: Seat) -> str:
        return seat.replica

    async def end(self, replica: str) -> None:
        self.asked.append((replica, "ended"))

    async def end_needless(self, seats: Mapping[str, Seat]) -> None:
        self.asked.append(("needed", *seats))

    def known(self, seats: Mapping[str, Seat]) -> dict[str, tuple[str, Owner]]:
        return {replica: (f"replica|{replica}", OWNER) for replica in seats}


async def test_the_engine_in_a_granted_slice_belongs_to_an_actor_that_is_told_where_it_is_written_down(
    books: Books, nodes: Any
) -> None:
    told = nodes.owners = Told()
    books.offered = {"sliceway-slice:n1/GPU-a/1g.10gb@0": 1.0}
    assert (await nodes.hold(SEAT)).owner is None
    assert told.asked == [("chat-0", "ended")], "what another booking has left cannot start in this one"
    books.groups[actors._booking(SEAT)] = "CREATED"
    assert await nodes.held() == {"chat-0": SEAT}
    assert (await nodes.hold(SEAT)).owner == OWNER
    assert nodes.actors() == {"chat-0": {"actor": "replica|chat-0", "pid": 7}}
    of_now = REPORT.model_copy(update={"directory": "/state/nodes/n1"})
    books.actors["agent|n1"] = SimpleNamespace(report=answering(REPORT.model_dump_json(), of_now.model_dump_json()))
    for _ in range(2):
        await nodes.report("n1", "", 0.0)
        await nodes.hold(SEAT)
    journal = "/state/nodes/n1/engines/replicas/chat-0/journal.json"
    assert told.asked[1:] == [
        ("needed", "chat-0"),
        *(("chat-0", actors._booking(SEAT), known) for known in ("", "", journal)),
    ], "an agent of an earlier version does not say where"


async def test_at_the_end_every_slice_is_given_back_and_nothing_of_others(books: Books) -> None:
    books.groups |= {actors._booking(SEAT): "CREATED", actors._booking(RIVAL): "PENDING", "somebody else's": "CREATED"}
    actors.give_all_back()
    assert list(books.groups) == ["somebody else's"]


@pytest.mark.parametrize("slice_id", ["cpu-0", "GPU-1/3g.40gb@4", "odd|one"])
def test_a_booking_says_whose_it_is(slice_id: str) -> None:
    seat = SEAT.model_copy(update={"slice_id": slice_id})
    read: Callable[[str], Seat] = actors._seat_of
    assert read(actors._booking(seat)) == seat


class KeptStore:
    """What a head before has left, which worked by a configuration of its time."""

    async def load(self) -> bytes:
        return b'{"config": "{\\"models\\": 3}", "generation": 7}'

    async def save(self, journal: bytes) -> None:
        assert journal


async def test_a_configuration_that_is_not_taken_any_more_keeps_no_other_out(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "RayStore", KeptStore)
    head = actors.HeadActor(REPORT.versions.model_dump_json(), "s3", 1)
    try:
        assert (await head.status())["generation"] == 7
        assert (await head.status())["actors"] == {}
        for actors_of in ("node", "replica"):
            await head.aim(json.dumps({"version": "v1", "models": [], "cluster": {"actors": actors_of}}), {})
            assert head._nodes.owners.each == actors_of
        assert not head._rounds.done()
    finally:
        head._rounds.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await head._rounds


class ByNode(KeptStore):
    """The journal of a head whose engines belong to their nodes' holders."""

    async def load(self) -> bytes:
        config = json.dumps({"version": "v1", "models": [], "cluster": {"actors": "node"}})
        return json.dumps({"config": config, "generation": 7}).encode()


async def test_the_next_head_has_engines_belong_to_whom_the_one_before_had(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "RayStore", ByNode)
    head = actors.HeadActor(REPORT.versions.model_dump_json(), "s3", 1)
    try:
        assert (await head.status())["generation"] == 7
        assert head._nodes.owners.each == "node"
    finally:
        head._rounds.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await head._rounds
