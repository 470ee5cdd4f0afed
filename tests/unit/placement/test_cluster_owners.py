"""Which actors there are that engines belong to, in rounds as the head makes them. Ray itself is never started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from placement.cluster.members import Owner, Seat

owners = pytest.importorskip("placement.cluster.owners", exc_type=ImportError)
ray = pytest.importorskip("ray")


def seat(replica: str, node: str = "n1", slice_id: str | None = None) -> Seat:
    return Seat(replica=replica, model="chat", node=node, slice_id=slice_id or f"cpu-{replica[-1]}")


CHAT_0, CHAT_1, ELSEWHERE = seat("chat-0"), seat("chat-1"), seat("chat-2", "n2")
ALL = {one.replica: one for one in (CHAT_0, CHAT_1, ELSEWHERE)}


class Actor:
    """One process. It answers what it was asked as soon as it has started, or ends with every answer that it owes."""

    def __init__(self, pid: int, seat: Mapping[str, str] | None) -> None:
        self.pid, self.seat = pid, seat
        self.owner = self
        self.started = False
        self._owed: list[asyncio.Future[str]] = []

    def remote(self) -> asyncio.Future[str]:
        asked: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._owed.append(asked)
        if self.started:
            self.start()
        return asked

    def start(self) -> None:
        self.started = True
        text = json.dumps(
            {"pid": self.pid, "start_ticks": 1, "boot_id": "b"} | ({"seat": self.seat} if self.seat else {})
        )
        for asked in self._owed:
            if not asked.done():
                asked.set_result(text)

    def die(self) -> None:
        for asked in self._owed:
            if not asked.done():
                asked.set_exception(ray.exceptions.ActorDiedError())


class World:
    """In the place of Ray: named actors, each with what it was made with, and the placement groups that there are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: dict[str, Actor] = {}
        self.options: dict[str, dict[str, Any]] = {}
        self.made_with: dict[str, tuple[Any, ...]] = {}
        self.gone: set[str] = set()
        self.killed: list[str] = []
        self._pids = iter(range(100, 1000))
        monkeypatch.setattr(owners, "detached", self._detached)
        monkeypatch.setattr(owners, "get_placement_group", self._group)
        monkeypatch.setattr(ray, "get_actor", self._get_actor)
        monkeypatch.setattr(ray, "kill", self._kill)
        monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([a for a in asked if a.done()], []))

    def _detached(self, made: Any, name: str, **options: Any) -> Any:
        world = self
        assert options["get_if_exists"]
        assert options["max_restarts"] == 0, "the head tells of another one"

        class Maker:
            def remote(self, *arguments: Any) -> Actor:
                world.options[name], world.made_with[name] = options, arguments
                known = arguments[0] if arguments else None
                return world.actors.setdefault(name, Actor(next(world._pids), known))

        return Maker()

    def _group(self, name: str) -> str:
        if name in self.gone:
            raise ValueError(f"no placement group {name}")
        return f"group of {name}"

    def _get_actor(self, name: str, *, namespace: str) -> Actor:
        assert namespace == owners.NAMESPACE
        if name not in self.actors:
            raise ValueError(f"no actor {name}")
        return self.actors[name]

    def _kill(self, actor: Actor) -> None:
        name = next(name for name, one in self.actors.items() if one is actor)
        self.killed.append(name)
        self.lose(name)

    def lose(self, name: str) -> None:
        self.actors.pop(name).die()

    def start(self, names: Iterable[str] | None = None) -> None:
        for name in self.actors if names is None else names:
            self.actors[name].start()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(monkeypatch)

    async def at_once(call: Any, *arguments: Any, **more: Any) -> Any:
        return call(*arguments, **more)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    return made


async def a_round(
    own: Any, world: World, seats: Mapping[str, Seat] = ALL, *, silent: Iterable[str] = ()
) -> dict[str, int | None]:
    """What the head does with them in a round; the pids that engines belong to from then on, but for those on nodes that are `silent`."""
    own.look(list(world.actors))
    await own.end_needless(seats)
    found = {r: await own.of(s, f"group|{r}", f"/journal/{r}") for r, s in seats.items()}
    for node in {s.node for s in seats.values()}:
        told = {r: found[r] for r, s in seats.items() if s.node == node and found[r] is not None}
        own.told(node, None if node in silent else told)
    return {replica: owner.pid if owner else None for replica, owner in found.items()}


async def settled(own: Any, world: World, seats: Mapping[str, Seat] = ALL) -> dict[str, int | None]:
    await a_round(own, world, seats)
    world.start()
    return await a_round(own, world, seats)


async def test_every_replica_has_an_actor_in_the_placement_group_of_its_slice(world: World) -> None:
    own = owners.Owners()
    assert await a_round(own, world) == dict.fromkeys(ALL)
    assert sorted(world.actors) == ["replica|chat-0", "replica|chat-1", "replica|chat-2"]
    options = world.options["replica|chat-2"]
    assert options["resources"] == {"sliceway-slice:n2/cpu-2": 1.0}
    strategy = options["scheduling_strategy"]
    assert (strategy.placement_group, strategy.placement_group_bundle_index) == ("group of group|chat-2", 0)
    assert world.made_with["replica|chat-2"] == (ELSEWHERE.model_dump(), "/journal/chat-2")
    assert own.waits_for(ELSEWHERE) == "its actor to start on node n2"
    world.start()
    found = await a_round(own, world)
    assert found == {r: world.actors[f"replica|{r}"].pid for r in ALL}
    assert own.known(ALL)["chat-0"] == ("replica|chat-0", Owner(pid=found["chat-0"], start_ticks=1, boot_id="b"))
    assert await a_round(own, world) == found
    assert world.killed == []


async def test_a_lost_actor_is_made_again_and_no_other_is_touched(world: World) -> None:
    own = owners.Owners()
    before = await settled(own, world)
    world.lose("replica|chat-0")
    assert await a_round(own, world) == before | {"chat-0": None}
    world.start()
    after = await a_round(own, world)
    assert after["chat-0"] not in (None, before["chat-0"])
    assert after | {"chat-0": 0} == before | {"chat-0": 0}


async def test_one_actor_of_each_node_is_enough_where_that_is_asked_for(world: World) -> None:
    own = owners.Owners()
    own.each = "node"
    found = await settled(own, world)
    assert sorted(world.actors) == ["holder|n1", "holder|n2"]
    assert found["chat-0"] == found["chat-1"] != found["chat-2"]
    assert own.waits_for(CHAT_0) == "the holder of node n1 to start"
    assert own.known(ALL)["chat-1"][0] == "holder|n1"
    await a_round(own, world, {})
    assert sorted(world.actors) == ["holder|n1", "holder|n2"], "the next replica there needs it again"


@pytest.mark.parametrize(("before", "after"), [("replica", "node"), ("node", "replica")])
async def test_what_engines_belong_to_changes_without_a_moment_in_which_they_belong_to_nobody(
    before: str, after: str, world: World
) -> None:
    first = owners.Owners()
    first.each = before
    old = await settled(first, world)
    others = set(world.actors)
    own = owners.Owners()  # another head, which knows nothing of the one before
    own.each = after
    await a_round(own, world)
    assert await a_round(own, world) == old, "until the new ones have started"
    assert (world.killed, others <= set(world.actors)) == ([], True)
    world.start()
    found = await a_round(own, world)
    assert not set(found.values()) & set(old.values())
    assert world.killed == [], "nodes are only told of them after this"
    assert await a_round(own, world) == found
    assert set(world.killed) == others


@pytest.mark.parametrize(("before", "after"), [("replica", "node"), ("node", "replica")])
async def test_who_engines_belong_to_on_a_node_that_was_not_told_of_another_one_is_not_ended(
    before: str, after: str, world: World
) -> None:
    own = owners.Owners()
    own.each = before
    await settled(own, world)
    others = {name for name, actor in world.actors.items() if "n2" in name or name == "replica|chat-2"}
    own.each = after
    for _ in range(5):
        world.start()
        await a_round(own, world, silent=["n2"])
    assert world.killed, "the other node was told"
    assert not others & set(world.killed)
    await a_round(own, world)
    await a_round(own, world)
    assert others <= set(world.killed)


async def test_a_node_keeps_its_holder_until_the_last_of_its_replicas_has_an_actor(world: World) -> None:
    own = owners.Owners()
    own.each = "node"
    await settled(own, world)
    holder = world.actors["holder|n1"].pid
    own.each = "replica"
    await a_round(own, world)
    world.start(["replica|chat-0", "replica|chat-2"])
    for _ in range(2):
        found = await a_round(own, world)
    assert found["chat-1"] == holder != found["chat-0"]
    assert world.killed == ["holder|n2"]


@pytest.mark.parametrize("started", [True, False])
async def test_a_replica_that_is_given_up_takes_its_actor_along(started: bool, world: World) -> None:
    own = owners.Owners()
    await a_round(own, world, {"chat-0": CHAT_0})
    if started:
        world.start()
    await own.end("chat-0")
    await own.end("chat-0")
    await own.end("chat-1")
    assert (world.killed, world.actors) == (["replica|chat-0"], {})
    moved = {"chat-0": seat("chat-0", "n2")}
    assert (await settled(own, world, moved))["chat-0"] == world.actors["replica|chat-0"].pid


async def test_an_actor_without_a_seat_is_ended(world: World) -> None:
    await settled(owners.Owners(), world)
    world.actors["agent|n1"] = world.actors["head"] = Actor(1, None)
    own = owners.Owners()  # another head, whose books have but one of them
    await a_round(own, world, {"chat-0": CHAT_0})
    assert sorted(world.killed) == ["replica|chat-1", "replica|chat-2"]


async def test_an_actor_of_the_last_slice_that_is_about_to_end_is_not_believed(world: World) -> None:
    await settled(owners.Owners(), world, {"chat-0": CHAT_0})
    last = world.actors["replica|chat-0"]
    own = owners.Owners()
    moved = {"chat-0": seat("chat-0", "n2")}
    assert (await a_round(own, world, moved))["chat-0"] is None
    assert (await a_round(own, world, moved))["chat-0"] is None
    world.lose("replica|chat-0")
    assert (await settled(own, world, moved))["chat-0"] not in (None, last.pid)


async def test_a_slice_that_is_not_in_the_books_any_more_has_no_actor_made(world: World) -> None:
    own = owners.Owners()
    world.gone.add("group|chat-0")
    assert await settled(own, world, {"chat-0": CHAT_0}) == {"chat-0": None}
    world.gone.clear()
    assert (await settled(own, world, {"chat-0": CHAT_0}))["chat-0"] is not None


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.RayTaskError("owner", "Traceback", AssertionError("no /proc")),
        ray.exceptions.RpcError("no route"),
    ],
)
async def test_an_actor_that_fails_is_asked_again_and_its_round_goes_on(error: Exception, world: World) -> None:
    own = owners.Owners()
    await a_round(own, world)
    for asked in world.actors["replica|chat-0"]._owed:
        asked.set_exception(error)
    world.start()
    found = await a_round(own, world)
    assert (found["chat-0"], found["chat-1"] is None) == (None, False)
    assert (await a_round(own, world))["chat-0"] is not None


async def test_an_actor_that_cannot_be_made_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    own = owners.Owners()

    def refuse(*_: Any, **__: Any) -> None:
        raise ray.exceptions.RpcError("no route")

    with monkeypatch.context() as refusing:
        refusing.setattr(owners, "detached", refuse)
        assert await a_round(own, world, {"chat-0": CHAT_0}) == {"chat-0": None}
    assert (await settled(own, world, {"chat-0": CHAT_0}))["chat-0"] is not None
