"""What the head keeps of a transition: slices that nodes still cut, nodes that it waits for, and what is not begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from model_registry.geometry import Placement
from placement.cluster.carrying import AWAY_SECONDS, CUT_SECONDS, Round
from placement.cluster.cutting import CutOrder
from placement.cluster.errors import NodeLost
from placement.cluster.head import ClusterGoal, Head
from placement.cluster.members import NodeOrder, NodeReport, Word
from placement.cluster.survey import NodeGpus
from placement.cluster.testing import VERSIONS, FakeBooks, FakeStore, made_gpu
from placement.cluster.transitions import Transitions, digest
from placement.errors import StalePlan
from placement.gpu_slices import slices_of
from placement.testing import FakeClock
from placement.transition.steps import Place, Step, Transition

AT = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = "{}"
GONE = Place("b/GPU-0", Placement(0, "1g.10gb"))
MADE = Place("b/GPU-0", Placement(1, "1g.10gb"))


def steps(fingerprint: str = "f") -> Transition:
    """One instance goes and another one comes, for other work."""
    both = (Step(0, "destroy", GONE), Step(1, "create", MADE, reserved="tuning"))
    return Transition(both, fingerprint, "t", wanted=digest(CONFIG))


@dataclass
class Cuts:
    """A node that takes its time."""

    asked: list[tuple[str, CutOrder]] = field(default_factory=list)
    answer: asyncio.Event = field(default_factory=asyncio.Event)
    restarts: int = 0  # so many orders have no answer, because the node's agent is started again

    async def cut(self, node: str, order: CutOrder) -> None:
        self.asked.append((node, order))
        if self.restarts:
            self.restarts -= 1
            raise NodeLost("its agent has ended", where=node)
        await self.answer.wait()


def seen(config: str, *, holds: str = "1g.10gb@0", now: float = 0.0, away: bool = False) -> Round:
    report = NodeReport(
        node="b", address="", versions=VERSIONS, boot="b", slices=tuple(slices_of(made_gpu(0, holds=[holds])))
    )
    return Round({} if away else {"b": report}, frozenset() if away else frozenset({"b"}), {}, digest(config), now)


@pytest.fixture
async def cuts() -> AsyncIterator[Cuts]:
    made = Cuts()
    yield made
    made.answer.set()
    await asyncio.sleep(0)


def begun(cuts: Cuts) -> Transitions:
    made = Transitions(cuts.cut)
    made.begin(steps(), AT, CONFIG, {}, allow_mode_change=False)
    return made


async def stopped(cuts: Cuts) -> Transitions:
    """One that another configuration has ended while a node is at its cuts."""
    made = begun(cuts)
    made.look({}, seen(CONFIG))
    await asyncio.sleep(0)
    assert len(cuts.asked) == 2
    assert made.look({}, seen("another")) is None
    return made


async def test_nobody_is_offered_a_slice_that_a_node_is_still_destroying(cuts: Cuts) -> None:
    transitions = await stopped(cuts)
    assert transitions.going == {"b/GPU-0/1g.10gb@0"}
    with pytest.raises(StalePlan, match="b/GPU-0: still being cut"):
        transitions.begin(steps(), AT, CONFIG, {}, allow_mode_change=False)
    cuts.answer.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert transitions.going == frozenset()
    transitions.begin(steps(), AT, CONFIG, {}, allow_mode_change=False)


async def test_a_slice_for_other_work_that_a_node_is_still_making_is_for_nobody_else(cuts: Cuts) -> None:
    transitions = await stopped(cuts)
    assert transitions.journal.reserved == {"b/GPU-0/1g.10gb@1": "tuning"}
    after = Transitions(cuts.cut)
    after.restore(transitions.journal, CONFIG)
    assert after.reserved == {"b/GPU-0/1g.10gb@1": "tuning"}


async def test_such_a_slice_is_known_also_to_a_head_that_has_told_nobody_to_make_it_itself(cuts: Cuts) -> None:
    first = begun(cuts)
    first.look({}, seen(CONFIG))
    after = Transitions(cuts.cut)
    after.restore(first.journal, CONFIG)
    assert after.look({}, seen("another")) is None
    assert after.reserved == {"b/GPU-0/1g.10gb@1": "tuning"}
    assert after.journal.reserved == after.reserved


async def test_a_node_whose_agent_is_started_again_during_a_cut_is_asked_again(cuts: Cuts) -> None:
    transitions = begun(cuts)
    cuts.restarts = 3
    for _ in range(4):
        assert transitions.look({}, seen(CONFIG)) == {}
        await asyncio.sleep(0)
    assert [order.slice for _, order in cuts.asked] == ["1g.10gb@0", "1g.10gb@1", "1g.10gb@0", "1g.10gb@1", "1g.10gb@0"]
    cuts.answer.set()
    for _ in range(2):
        await asyncio.sleep(0)
        transitions.look({}, seen(CONFIG, holds="1g.10gb@1"))
    assert not transitions.under_way
    assert str(transitions.in_short()).count("'done': 2") == 1


async def test_a_node_that_says_nothing_to_a_cut_for_too_long_ends_it_with_what_it_was(cuts: Cuts) -> None:
    transitions = begun(cuts)
    cuts.restarts = 10**6
    for now in (0.0, CUT_SECONDS, CUT_SECONDS + 1.0):
        transitions.look({}, seen(CONFIG, now=now))
        await asyncio.sleep(0)
    assert "not done after 181 s: b: its agent has ended" in str(transitions.in_short())


async def test_a_node_without_replicas_that_does_not_answer_is_waited_for_before_its_plan_is_stopped(
    cuts: Cuts,
) -> None:
    transitions = begun(cuts)
    assert transitions.look({}, seen(CONFIG)) == {}
    for now in (10.0, 10.0 + AWAY_SECONDS):
        assert transitions.look({}, seen(CONFIG, now=now, away=True)) == {}
    assert transitions.look({}, seen(CONFIG, now=10.0 + AWAY_SECONDS)) == {}, "it is back"
    assert transitions.look({}, seen(CONFIG, now=100.0, away=True)) == {}
    assert transitions.look({}, seen(CONFIG, now=101.0 + AWAY_SECONDS, away=True)) is None
    assert "node_lost" in str(transitions.in_short())


async def test_the_nodes_of_the_steps_that_are_left(cuts: Cuts) -> None:
    assert Transitions(cuts.cut).nodes == frozenset()
    assert begun(cuts).nodes == {"b"}
    assert (await stopped(cuts)).nodes == frozenset()


@dataclass
class FakeNodes(FakeBooks):
    """`b` has one GPU with one instance, and no replica anywhere."""

    silent: set[str] = field(default_factory=set)
    cuts: list[CutOrder] = field(default_factory=list)

    async def names(self) -> Sequence[str]:
        return ["a", "b"]

    async def report(self, node: str, known: str, wait_seconds: float) -> Word:
        if node in self.silent:
            raise ConnectionError(node)
        slices = tuple(slices_of(made_gpu(0, holds=["1g.10gb@0"])))
        return Word(report=NodeReport(node=node, address="", versions=VERSIONS, boot="b", slices=slices))

    async def order(self, node: str, order: NodeOrder) -> None:
        pass

    async def gpus(self, node: str) -> NodeGpus:
        return NodeGpus(gpus=(made_gpu(0, holds=["1g.10gb@0"]),))

    async def cut(self, node: str, order: CutOrder) -> None:
        self.cuts.append(order)


@dataclass
class Cluster:
    nodes: FakeNodes = field(default_factory=FakeNodes)
    store: FakeStore = field(default_factory=FakeStore)
    clock: FakeClock = field(default_factory=FakeClock)

    async def head(self) -> Head:
        goal = ClusterGoal(CONFIG, (), (), lambda _, __: pytest.fail("nothing is seated here"))
        head = Head(self.nodes, self.store, self.clock, VERSIONS, secret="s")
        await head.restore()
        await head.take_over(goal)
        return head


def told(head: Head) -> object:
    return head.status()["transition"]


async def test_what_cannot_be_written_down_is_not_begun() -> None:
    cluster = Cluster()
    head = await cluster.head()
    await head.step()
    transition = steps((await head.survey()).fingerprint)
    cluster.store.reachable = False
    with pytest.raises(ConnectionError):
        await head.carry_out(transition)
    cluster.store.reachable = True
    await head.step()
    await head.step()
    assert (told(head), cluster.nodes.cuts) == (None, [])
    await head.carry_out(transition)
    await head.step()
    assert told(head) is not None


async def test_what_was_written_down_all_the_same_is_taken_back() -> None:
    cluster = Cluster()
    head = await cluster.head()
    await head.step()
    transition = steps((await head.survey()).fingerprint)
    cluster.store.mute = True
    with pytest.raises(ConnectionError):
        await head.carry_out(transition)
    cluster.store.mute = False
    await head.step()
    assert told(await cluster.head()) is None, "whoever asked was told that it is not begun"


async def test_a_new_head_waits_for_the_nodes_of_a_plan_that_have_no_replicas() -> None:
    cluster = Cluster()
    head = await cluster.head()
    await head.step()
    await cluster.clock.sleep(60.0)
    await head.step()
    await head.carry_out(steps((await head.survey()).fingerprint))
    cluster.nodes.silent = {"b"}
    head = await cluster.head()
    await head.step()
    assert told(head)["under_way"]  # type: ignore[index]
    cluster.nodes.silent = set()
    await head.step()
    assert told(head)["under_way"]  # type: ignore[index]
    await asyncio.sleep(0)
    assert cluster.nodes.cuts
