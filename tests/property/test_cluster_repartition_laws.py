"""Whatever demand asks for on a cluster: GPUs are cut anew where that helps, no model has less than it is guaranteed on the way, and with the
same demand it comes to an end. The head is a real one, which is killed at any round, and so is its leader.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from gateway.cluster_leader import Seen, Work
from gateway.cluster_planning import config_text, plan_cluster, repartition_for
from gateway.cluster_repartitioning import ForDemand
from gateway.config import Config
from model_registry.errors import SlicewayError
from model_registry.geometry import Placement
from placement.autoscale import Signals
from placement.cluster.goal import read_goal
from placement.cluster.survey import Survey
from placement.cluster.testing import FakeDriver, made_gpu
from placement.cluster.testing_laws import FakeNode, LawfulCluster
from placement.cluster.transitions import Why, digest
from placement.repartitioning import Repartitioned
from placement.status import LeaderStatus
from placement.transition.steps import Transition

SLOTS = 2
POLICY = {
    "look_every": "500ms",
    "window": "2s",
    "scale_up_after": "1s",
    "scale_down_after": "1h",
    "cool_down": "2s",
    "target_busy": 0.7,
}


def config_of(profiles: Mapping[str, str], mode: str = "automatic", **fleet: Any) -> Config:
    """`chat` and `code` follow demand, `base` does not."""
    content = {
        "version": "v1",
        "state_dir": "/nonexistent",
        "fleet": {"partition": "planned", "autoscale": POLICY | {"repartition": mode}} | fleet,
        "engine": {"command": ["engine"]},
        "models": [
            {
                "name": name,
                "source": "simulated",
                "profile": profiles[name],
                "replicas": 1 if name == "base" else {"min": 1, "max": 4},
                "max_num_seqs": SLOTS,
            }
            for name in ("base", "chat", "code")
        ],
        "gateway": {"authentication": "none"},
    }
    return Config.model_validate(content)


class Questions:
    """The head as the leader's thread asks it: one question after the other, which the test answers, so that nothing depends on who is faster."""

    def __init__(self) -> None:
        self.asked: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue()
        self.answers: queue.Queue[Any] = queue.Queue()

    def _ask(self, what: str, *about: Any) -> Any:
        self.asked.put((what, about))
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def survey(self) -> Survey:
        found: Survey = self._ask("survey")
        return found

    def carry_out(self, survey: Survey, transition: Transition, why: Why) -> None:
        self._ask("carry_out", survey, transition, why)

    def transition(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self._ask("transition")
        return found

    def tell(self, told: LeaderStatus) -> None:
        raise AssertionError("that is told in the leader's rounds")

    def pause(self, seconds: float) -> bool:
        """A round of everybody else. True where the leader is killed."""
        return bool(self._ask("pause"))


@dataclass
class Site:
    """A cluster with its leader. `kills` are rounds in which the head is killed, `ends` in which the leader is."""

    cluster: LawfulCluster
    config: Config
    kills: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()
    rounds: int = 0
    begun: list[Transition] = field(default_factory=list)
    results: list[Repartitioned] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reason = ForDemand(self.cluster.clock)

    @classmethod
    async def of(cls, config: Config, gpus: Mapping[str, int], **more: Any) -> Site:
        """Nodes of so many A30, cut for the least of every model, which serves."""
        seed = more.pop("seed", 1)
        bare = {n: FakeNode(FakeDriver(tuple(made_gpu(i, "a30") for i in range(k)))) for n, k in gpus.items()}
        cluster = LawfulCluster(bare, read_goal(config_text(config), 0), seed)
        await cluster.head.take_over(cluster.goal)
        await cluster.settle()
        site = cls(cluster, config, **more)
        survey = await cluster.head.survey()
        transition = plan_cluster(config, survey).answer.transition
        assert transition is not None
        await site.begin(transition, "apply")
        while cluster.head.transition()["under_way"]:  # type: ignore[index]
            await cluster.round()
        cluster.carrying = False
        await cluster.settle()
        return site

    async def begin(self, transition: Transition, why: Why) -> None:
        await self.cluster.head.carry_out(replace(transition, wanted=self.asked), why=why)
        self.cluster.guaranteed, self.cluster.carrying = transition.guaranteed, True

    @property
    def asked(self) -> str:
        return digest(self.cluster.goal.config)

    def demand(self, **requests: int) -> None:
        """So many at once, seen by the first node's gateway."""
        first = min(self.cluster.nodes.nodes.items())[1]
        first.demand = {
            name: Signals(arrivals_per_second=number / 2, running=min(number, SLOTS), queued=max(0, number - SLOTS))
            for name, number in requests.items()
        }

    async def round(self) -> None:
        self.rounds += 1
        if self.rounds in self.kills:
            await self.cluster.kill()
        await self.cluster.round()
        transition = self.cluster.head.transition()
        if transition is None or not transition["under_way"]:
            self.cluster.carrying = False

    async def run(self, rounds: int) -> None:
        """So many rounds of the leader; an attempt has further ones in it."""
        for _ in range(rounds):
            await self.round()
            seen = Seen(self.config, self.cluster.head.status())
            if seen.status["nodes"] and self.reason.look(seen):
                await self.attempt(seen)

    async def attempt(self, seen: Seen) -> None:
        """One attempt of the leader; one that is killed meanwhile is followed by another one."""
        questions, found = Questions(), list[Repartitioned]()
        self.reason.begin(seen)
        work = Work(seen, questions, self.reason.show, questions.pause)

        def attempt() -> None:
            try:
                found.append(self.reason.attempt(work))
            except SlicewayError as error:
                found.append(Repartitioned("failed", str(error)))
            questions.asked.put(("end", ()))

        thread = threading.Thread(target=attempt)
        thread.start()
        killed = False
        while (question := questions.asked.get(timeout=60))[0] != "end":
            if question[0] == "pause":
                await self.round()
                killed = killed or self.rounds in self.ends
            questions.answers.put(killed if question[0] == "pause" else await self.answer(*question))
        thread.join()
        if killed:
            self.reason = ForDemand(self.cluster.clock)
        else:
            self.results += found
            self.reason.end(seen, found[0])

    async def answer(self, what: str, about: tuple[Any, ...]) -> Any:
        try:
            if what == "survey":
                return await self.cluster.head.survey()
            if what == "transition":
                return self.cluster.head.transition()
            _, transition, why = about
            await self.begin(transition, why)
        except SlicewayError as error:
            return error
        self.begun.append(transition)
        return None


PROFILES = st.fixed_dictionaries(
    {
        "base": st.sampled_from(["1g.6gb", "2g.12gb"]),
        "chat": st.sampled_from(["1g.6gb", "2g.12gb"]),
        "code": st.sampled_from(["1g.6gb", "2g.12gb", "4g.24gb"]),
    }
)


@pytest.mark.timeout(300)
@settings(max_examples=6, deadline=None)
@given(
    profiles=PROFILES,
    gpus=st.fixed_dictionaries({"a": st.integers(1, 2), "b": st.integers(1, 2)}),
    demand=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=2),
    kills=st.frozensets(st.integers(1, 60), max_size=3),
    ends=st.frozensets(st.integers(1, 60), max_size=2),
    seed=st.integers(0, 999),
)
def test_it_keeps_what_is_guaranteed_and_comes_to_an_end(
    profiles: dict[str, str],
    gpus: dict[str, int],
    demand: list[tuple[int, int]],
    kills: frozenset[int],
    ends: frozenset[int],
    seed: int,
) -> None:
    async def play() -> None:
        config = config_of(profiles)
        site = await Site.of(config, gpus, kills=kills, ends=ends, seed=seed)
        for chat, code in demand:
            site.demand(chat=chat, code=code)
            await site.run(20)
            begun, seats = len(site.begun), site.cluster.head.status()["replicas"]
            await site.run(10)
            assert len(site.begun) == begun, f"with the same demand it goes on and on: {site.results}"
            assert site.cluster.head.status()["replicas"] == seats
            proposal = repartition_for(config, await site.cluster.head.survey())
            assert proposal is None or not proposal.automatic
        serves = {row["replica"].rpartition("-")[0] for row in seats}  # type: ignore[attr-defined]
        assert serves == {"base", "chat", "code"}
        event(f"{len(site.begun)} transitions")

    asyncio.run(play())


SMALL = {"base": "1g.6gb", "chat": "1g.6gb", "code": "2g.12gb"}
BOTH = {"a": 1, "b": 2}


def told(site: Site) -> Any:
    return site.reason.told(Seen(site.config, {}), LeaderStatus()).repartition


async def test_what_is_only_to_be_proposed_is_told_and_shown_by_a_plan_and_not_done() -> None:
    site = await Site.of(config_of(SMALL, "propose"), BOTH)
    site.demand(chat=8)
    await site.run(12)
    assert site.begun == []
    assert {found.result for found in site.results} == {"proposed"}
    assert "requests/s more" in told(site).proposed
    shown = plan_cluster(site.config, await site.cluster.head.survey())
    assert shown.answer.proposal is not None
    assert (shown.answer.proposal.worthwhile, shown.answer.proposal.automatic) == (True, False)
    site.demand(chat=1)
    site.reason.look(Seen(site.config, {}))
    assert told(site).proposed is None, "nobody is short of slices any more"


async def test_a_plan_that_is_stale_is_tried_again_later() -> None:
    site = await Site.of(config_of(SMALL), BOTH)
    usual = site.answer

    async def meddle(what: str, about: tuple[Any, ...]) -> Any:
        if what == "carry_out" and not site.results:
            driver = site.cluster.nodes.nodes["b"].driver
            driver.create("GPU-1", Placement.parse("1g.6gb@0"))
        return await usual(what, about)

    site.answer = meddle  # type: ignore[method-assign]
    site.demand(chat=8)
    await site.run(20)
    assert [found.result for found in site.results][:2] == ["busy", "done"]
    assert "since the plan was made" in site.results[0].reason


async def test_what_an_operator_has_carried_out_goes_first() -> None:
    site = await Site.of(config_of(SMALL), BOTH)
    status = {"transition": {"under_way": True, "why": "apply"}, "scaling": {"chat": {"replicas": 3, "short": 2}}}
    await site.attempt(Seen(site.config, status))
    assert [found.result for found in site.results] == ["busy"]
    assert site.begun == []


async def test_a_node_that_is_lost_meanwhile_ends_it_and_it_is_tried_again_on_what_is_left() -> None:
    site = await Site.of(config_of(SMALL), {"a": 2, "b": 2})
    site.demand(chat=8)
    usual = site.answer

    async def lose(what: str, about: tuple[Any, ...]) -> Any:
        answer = await usual(what, about)
        if what == "carry_out":
            gone = next(n for n in ("b", "a") if any(s.place.gpu.startswith(n) for s in about[1].steps))
            if all(n.up for n in site.cluster.nodes.nodes.values()):
                site.cluster.nodes.nodes[gone].up = False
                site.cluster.carrying = False
                site.cluster.guaranteed = {}
        return answer

    site.answer = lose  # type: ignore[method-assign]
    await site.run(10)
    assert site.results[0].result == "busy"
    assert "does not take part" in site.results[0].reason
    assert told(site).next_in_seconds is not None


async def test_another_configuration_ends_it_and_counts_at_once() -> None:
    site = await Site.of(config_of(SMALL), BOTH)
    site.demand(chat=8)
    usual = site.answer

    async def change(what: str, about: tuple[Any, ...]) -> Any:
        answer = await usual(what, about)
        if what == "carry_out" and not site.results:
            site.config = config_of(SMALL, "automatic", head_room=0.1)
            site.cluster.goal = read_goal(config_text(site.config), 0)
            await site.cluster.head.take_over(site.cluster.goal)
        return answer

    site.answer = change  # type: ignore[method-assign]
    await site.run(25)
    assert [found.result for found in site.results][:2] == ["busy", "done"]
    assert "another configuration" in site.results[0].reason


async def test_replicas_that_demand_has_brought_go_when_it_does() -> None:
    config = config_of(SMALL, autoscale=POLICY | {"repartition": "automatic", "scale_down_after": "2s"})
    site = await Site.of(config, BOTH)
    site.demand(chat=8)
    await site.run(20)
    assert [found.result for found in site.results] == ["done"]
    assert len([r for r in replicas_of(site) if r.startswith("chat-")]) == 4
    site.demand(chat=0)
    await site.run(40)
    assert replicas_of(site) == {"base-0", "chat-0", "code-0"}


def replicas_of(site: Site) -> set[str]:
    return {row["replica"] for row in site.cluster.head.status()["replicas"]}  # type: ignore[attr-defined]


async def test_what_others_have_and_need_is_not_taken_from_them_unasked() -> None:
    """Two replicas of `chat` more, for the only one of `code`: more requests, and still nobody's to decide but an operator's."""
    site = await Site.of(config_of({"base": "1g.6gb", "chat": "2g.12gb", "code": "4g.24gb"}), {"a": 1, "b": 1})
    site.demand(chat=10)
    await site.run(15)
    assert site.begun == []
    assert replicas_of(site) >= {"base-0", "chat-0", "code-0"}
    assert {found.result for found in site.results} == {"proposed"}
    assert "code would serve less" in site.results[0].reason
