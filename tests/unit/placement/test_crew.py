"""A machine's crew: what becomes of starts that wait when goals change, and of slices whose engines have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from placement.crew import Crew
from placement.goals import Goals, PlacementConfig
from placement.launch import LaunchSpec
from placement.replicas.ending import all_of
from placement.replicas.parts import Goal
from placement.schema import EngineConfig
from placement.slices import Inventory, Slice, SliceKind
from placement.table import ReplicaState
from placement.testing import FakeProcess, FakeWorld, fake_entry

HERE = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,))


def goal(replica: str) -> Goal:
    spec = LaunchSpec(replica, "chat", "generate", HERE, ("engine", "{uds}"))
    return Goal(replica, "chat", "generate", HERE, 16, spec)


def goals(*replicas: str) -> Goals:
    return Goals(PlacementConfig(), Inventory((HERE,)), {name: goal(name) for name in replicas}, {}, {}, {})


class Scene:
    """A crew whose engines are none, and `found`, those that the journal tells of."""

    def __init__(self) -> None:
        self.world = FakeWorld()
        self.found: dict[str, FakeProcess] = {}
        bench = SimpleNamespace(
            engine=EngineConfig(), hands=self.world.hands, probe=lambda *_: self.world.engine, read_log=lambda _: ""
        )
        launcher = SimpleNamespace(adopt=lambda entry: self.found[entry.replica], discard=lambda _: None)
        self.crew = Crew(cast(Any, launcher), cast(Any, bench), self.world.clock, lambda: None)

    def serves(self, replica: str) -> bool:
        one = self.crew.replicas.get(replica)
        return one is not None and one.view.state is ReplicaState.READY

    def adopt(self, there: Goals) -> Goals:
        self.crew.goals = there
        return there

    async def end(self) -> None:
        await asyncio.gather(*(replica.stop() for replica in self.crew.replicas.values()))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(45):
        while not condition():  # noqa: ASYNC110 - the condition is anything, and nothing here takes time
            await asyncio.sleep(0)


async def test_whoever_waits_for_a_start_that_newer_goals_begin_anew_is_not_given_up_with_it() -> None:
    scene = Scene()
    scene.crew.begin([], scene.adopt(goals("chat-0")))
    await until(lambda: scene.serves("chat-0"))
    waiting = asyncio.create_task(all_of(scene.crew.change(scene.adopt(goals("chat-1")))))
    await asyncio.sleep(0)
    assert scene.crew.leaving, "the start waits for the slice"
    scene.crew.change(goals("chat-1"))
    await waiting
    await until(lambda: scene.serves("chat-1"))
    assert [process.entry.replica for process in scene.world.started] == ["chat-0", "chat-1"]
    await scene.end()


async def test_what_goes_wrong_is_told_to_whoever_waits() -> None:
    async def fails() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        await all_of([asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(fails())])
    await all_of([])


async def test_a_slice_is_free_when_the_engine_that_was_found_there_has_ended() -> None:
    scene = Scene()
    spec = goal("chat-7").spec
    assert spec is not None
    scene.found["chat-7"] = FakeProcess(fake_entry(spec))
    assert scene.crew.begin([scene.found["chat-7"].entry], scene.adopt(goals())) == []
    assert scene.crew.occupied == {HERE.id}
    await until(lambda: scene.found["chat-7"].ended)
    await until(lambda: not scene.crew.occupied)
