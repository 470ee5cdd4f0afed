"""`fleet.partition: planned` on a cluster: when its leader plans, what of a plan it has carried out, and what it only says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.cluster_leader import Seen, Work
from gateway.cluster_planned import FAILED_SECONDS, SETTLE_SECONDS, ForConfiguration, without_taking_away
from gateway.cluster_planning import config_text
from gateway.cluster_repartitioning import ForDemand
from gateway.config import Config
from model_registry.errors import SlicewayError
from placement.autoscale.attempts import Result
from placement.cluster.errors import NodeLost, NotSurveyed
from placement.cluster.members import Seat
from placement.cluster.survey import ReplicaNow, Survey, SurveyedNode
from placement.cluster.testing import made_gpu
from placement.cluster.transitions import Why
from placement.errors import NotCarriedOut, StalePlan
from placement.repartitioning import Repartitioned
from placement.status import LeaderStatus
from placement.testing import FakeClock
from placement.transition.steps import Place, Step, Transition

MODELS = Path(__file__).parents[3] / "configs" / "examples" / "models"


def config(replicas: int = 1, **fleet: Any) -> Config:
    model = {
        "name": "small",
        "source": "Qwen/Qwen3-0.6B",
        "metadata": str(MODELS / "Qwen--Qwen3-0.6B.json"),
        "max_model_len": 4096,
        "replicas": replicas,
    }
    return Config.model_validate(
        {
            "version": "v1",
            "fleet": {"partition": "planned"} | fleet,
            "models": [model],
            "tenants": [{"name": "acme", "models": "all"}],
        }
    )


def seen(asked: Config, *nodes: str, under_way: bool = False, **rows: Mapping[str, Any]) -> Seen:
    """With these nodes, and others that `rows` are of."""
    listed = [{"node": name, "problem": None, "laid_out": True} for name in nodes]
    listed += [{"node": name, "problem": None, "laid_out": True} | dict(row) for name, row in rows.items()]
    return Seen(asked, {"nodes": listed, "transition": {"under_way": under_way}})


@dataclass
class FakeHead:
    """A cluster of bare H100s that works by `known`. It takes every step at once."""

    known: Config
    nodes: tuple[SurveyedNode, ...] = (SurveyedNode(node="a", gpus=(made_gpu(0),)),)
    replicas: Mapping[str, ReplicaNow] = field(default_factory=dict)
    stale: bool = False
    silent: bool = False
    error: SlicewayError | None = None
    begun: list[Transition] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    def survey(self) -> Survey:
        if self.silent:
            raise NotSurveyed("node 'a' does not tell its GPUs", where="a")
        return Survey(nodes=self.nodes, replicas=self.replicas, config=config_text(self.known))

    def carry_out(self, survey: Survey, transition: Transition, why: Why) -> None:
        if self.stale:
            raise StalePlan("seats are others")
        self.begun.append(transition)
        self.why.append(why)

    def transition(self) -> Mapping[str, Any] | None:
        steps = [s.as_public() for s in self.begun[-1].steps] if self.begun else []
        if self.error is not None:
            what = {"done": steps[:1], "not_done": steps[1:], "failed": steps[1] if steps else None}
            return what | {"error": self.error.as_dict(), "under_way": False, "begun": []}
        return {"done": steps, "not_done": [], "failed": None, "error": None, "under_way": False, "begun": []}

    def tell(self, told: LeaderStatus) -> None:
        raise AssertionError("the attempt tells nobody itself")


def attempt(head: FakeHead, asked: Config | None = None) -> Repartitioned:
    work = Work(seen(asked or head.known, "a"), head, lambda _: None, lambda _: False)
    return ForConfiguration(FakeClock()).attempt(work)


# ---- when


async def test_it_is_planned_when_nodes_have_been_there_for_a_moment_and_again_for_each_that_comes() -> None:
    clock, asked = FakeClock(), config()
    reason = ForConfiguration(clock)
    assert not reason.look(seen(asked, "a"))
    await clock.sleep(SETTLE_SECONDS / 2)
    assert not reason.look(seen(asked, "a", "b")), "another one has just come: they are planned together"
    await clock.sleep(SETTLE_SECONDS)
    assert not reason.look(seen(asked, "a", "b", under_way=True))
    now = seen(asked, "a", "b")
    assert reason.look(now)
    reason.begin(now)
    reason.end(now, Repartitioned("done", "3 steps of the plan done"))
    assert not reason.look(now)
    assert reason.told(now, LeaderStatus()).planned == ("fleet.partition: 3 steps of the plan done",)
    reason.look(seen(asked, "a"))
    reason.look(now)
    await clock.sleep(SETTLE_SECONDS)
    assert reason.look(now), "b was lost and is back"


async def test_a_node_that_takes_no_part_or_is_not_cut_yet_does_not_count() -> None:
    clock, asked = FakeClock(), config()
    reason = ForConfiguration(clock)
    for row in ({"problem": "another version"}, {"laid_out": False}):
        for _ in range(2):
            assert not reason.look(seen(asked, b=row))
            await clock.sleep(SETTLE_SECONDS)


@pytest.mark.parametrize(
    ("result", "pauses"), [("busy", (5.0, 10.0, 20.0, 40.0, 60.0, 60.0)), ("failed", (60.0, 120.0, 240.0))]
)
async def test_what_came_to_nothing_is_tried_again_later_each_time(result: Result, pauses: tuple[float, ...]) -> None:
    clock, now = FakeClock(), seen(config(), "a")
    reason = ForConfiguration(clock)
    reason.look(now)
    await clock.sleep(SETTLE_SECONDS)
    for pause in pauses:
        assert reason.look(now)
        reason.begin(now)
        reason.end(now, Repartitioned(result, "x"))
        await clock.sleep(pause - 1.0)
        assert not reason.look(now)
        await clock.sleep(1.0)
    assert reason.look(now)
    reason.end(now, Repartitioned("done", ""))
    await clock.sleep(FAILED_SECONDS[1])
    assert not reason.look(now)


async def test_after_a_failure_other_nodes_are_planned_at_once_and_nothing_is_waited_for_longer_than_that() -> None:
    clock, now = FakeClock(), seen(config(), "a", "b")
    reason = ForConfiguration(clock)
    reason.look(now)
    for _ in range(12):
        reason.begin(now)
        reason.end(now, Repartitioned("failed", "b's driver refuses"))
        await clock.sleep(FAILED_SECONDS[1])
        assert reason.look(now)
    reason.end(now, Repartitioned("failed", "b's driver refuses"))
    left = seen(config(), "a")
    assert not reason.look(left)
    await clock.sleep(SETTLE_SECONDS)
    assert reason.look(left), "b is lost, and what is left is planned"


async def test_what_was_in_the_way_does_not_count_as_a_failure() -> None:
    clock, now = FakeClock(), seen(config(), "a")
    reason = ForConfiguration(clock)
    reason.look(now)
    for _ in range(6):
        reason.begin(now)
        reason.end(now, Repartitioned("busy", "x"))
    reason.begin(now)
    reason.end(now, Repartitioned("failed", "the driver refuses"))
    await clock.sleep(FAILED_SECONDS[0])
    assert reason.look(now)


@pytest.mark.parametrize("then", [seen(config(), "a"), seen(config(), "a", "b")], ids=["configuration", "nodes"])
@pytest.mark.parametrize("during", [True, False])
async def test_what_changes_is_planned_as_soon_as_it_has_settled(then: Seen, during: bool) -> None:
    clock, now = FakeClock(), seen(config(), "a")
    reason = ForConfiguration(clock)
    reason.look(now)
    await clock.sleep(SETTLE_SECONDS)
    assert reason.look(now)
    reason.begin(now)
    if during:
        reason.look(then)
    reason.end(now, Repartitioned("failed", "the driver refuses"))
    reason.look(then)
    await clock.sleep(SETTLE_SECONDS)
    assert reason.look(then)


async def test_without_planned_nothing_is_planned() -> None:
    clock = FakeClock()
    reason = ForConfiguration(clock)
    for _ in range(2):
        assert not reason.look(seen(config(partition="layouts"), "a"))
        await clock.sleep(SETTLE_SECONDS)
    assert reason.told(seen(config(), "a"), LeaderStatus()) == LeaderStatus()


# ---- what


def test_the_first_machine_is_cut_for_what_is_configured() -> None:
    head = FakeHead(config(replicas=2))
    found = attempt(head)
    assert found.result == "done", found.reason
    assert head.why == ["configuration"]
    assert sorted(s.kind for s in head.begun[0].steps) == ["check", "check", "create", "create", "start", "start"]
    assert set(head.begun[0].seats) == {"small-0", "small-1"}


def test_what_finds_no_room_is_told_and_the_rest_is_done() -> None:
    full = SurveyedNode(node="a", gpus=(made_gpu(0, "a30"),))
    head = FakeHead(config(replicas=9), nodes=(full,))
    found = attempt(head)
    assert found.result == "done"
    assert "not met: small" in found.reason
    assert head.begun[0].steps


def test_where_all_is_as_planned_nothing_is_said() -> None:
    there = {"small-0": now("small-0", "GPU-0/1g.10gb@0")}
    head = FakeHead(
        config(), nodes=(SurveyedNode(node="a", gpus=(made_gpu(0, holds=("1g.10gb@0",)),)),), replicas=there
    )
    assert attempt(head) == Repartitioned("unchanged", "")
    assert head.begun == []


def test_mig_mode_stays_and_that_is_said() -> None:
    head = FakeHead(config(), nodes=(SurveyedNode(node="a", gpus=(made_gpu(0, mig=False),)),))
    found = attempt(head)
    assert head.begun == []
    assert found.result == "unchanged"
    assert "or switch MIG: sliceway apply CONFIG --ray HOST:PORT" in found.reason


@pytest.mark.parametrize(
    ("change", "result", "reason"),
    [
        ({"stale": True}, "busy", "seats are others"),
        ({"silent": True}, "busy", "does not tell its GPUs"),
        ({"nodes": (SurveyedNode(node="a"),)}, "unchanged", ""),
    ],
)
def test_what_keeps_it_from_being_planned(change: dict[str, Any], result: str, reason: str) -> None:
    head = FakeHead(config(), **change)
    found = attempt(head)
    assert found.result == result
    assert reason in found.reason
    assert head.begun == []


@pytest.mark.parametrize(
    ("error", "result"),
    [(NodeLost("node 'b' does not take part any more"), "busy"), (NotCarriedOut("its driver refuses"), "failed")],
)
def test_a_node_that_is_lost_is_no_failure_as_a_step_is(error: SlicewayError, result: str) -> None:
    head = FakeHead(config(), error=error)
    found = attempt(head)
    assert found.result == result
    assert error.message in found.reason
    for_demand = {"transition": {"under_way": True, "why": "demand"}}
    work = Work(Seen(config(), for_demand), head, lambda _: None, lambda _: False)
    assert ForDemand(FakeClock()).attempt(work).result == result


def test_another_configuration_and_layouts_that_differ_are_waited_for_or_told() -> None:
    assert attempt(FakeHead(config()), config(replicas=3)).result == "busy"
    differs = config(layouts=[{"layout": ["3g.40gb@0"]}])
    found = attempt(FakeHead(differs))
    assert found.result == "failed"
    assert "is not cut as fleet.layouts says; then: sliceway apply CONFIG --ray HOST:PORT" in found.reason


def test_a_model_on_a_slice_of_no_gpu_keeps_nothing_else_from_being_planned() -> None:
    raw = config(replicas=2).model_dump(mode="json", exclude_unset=True)
    both = Config.model_validate(
        raw | {"models": [*raw["models"], raw["models"][0] | {"name": "oncores", "replicas": 1}]}
    )
    seat = Seat(replica="oncores-0", model="oncores", node="c", slice_id="cpu0-3")
    gpus, cores = SurveyedNode(node="a", gpus=(made_gpu(0),)), SurveyedNode(node="c")
    head = FakeHead(both, nodes=(gpus, cores), replicas={"oncores-0": ReplicaNow(seat=seat, state="ready")})
    found = attempt(head)
    assert found.result == "done", found.reason
    assert {s.replica for s in head.begun[0].steps if s.kind == "start"} == {"small-0", "small-1"}


def with_big(spread: str, replicas: int) -> Config:
    """`big` counts for more than `small`, and has room only where `small` gives way."""
    raw = config(replicas).model_dump(mode="json", exclude_unset=True)
    small = raw["models"][0] | {"spread": spread, "priority": 1}
    big = raw["models"][0] | {"name": "big", "replicas": 1, "profile": "4g.40gb", "priority": 50}
    return Config.model_validate(raw | {"models": [small, big]})


@pytest.mark.parametrize(("spread", "replicas"), [("none", 1), ("nodes", 2), ("gpus", 2)])
def test_who_would_take_the_place_of_one_that_serves_is_not_begun_beside_it(spread: str, replicas: int) -> None:
    seat = Seat(replica="small-0", model="small", node="b", slice_id="GPU-0/1g.10gb@0")
    there = SurveyedNode(node="b", gpus=(made_gpu(0, holds=("1g.10gb@0",)),))
    more = (SurveyedNode(node="a", gpus=(made_gpu(0, "a30"),)),) if replicas > 1 else ()
    head = FakeHead(
        with_big(spread, replicas),
        nodes=(*more, there),
        replicas={"small-0": ReplicaNow(seat=seat, state="ready")},
    )
    found = attempt(head)
    assert head.begun == []
    assert found.result == "unchanged"
    assert "more would move or end who serves" in found.reason


# ---- without taking away


def now(replica: str, slice_id: str) -> ReplicaNow:
    model = replica.rpartition("-")[0]
    return ReplicaNow(seat=Seat(replica=replica, model=model, node="a", slice_id=slice_id), state="ready")


def step(number: int, kind: str, place: str, replica: str | None = None, *after: int, **more: Any) -> Step:
    demand = replica.rpartition("-")[0] if replica else None
    return Step(number, kind, Place.parse(f"a/{place}"), replica, demand, after=after, **more)  # type: ignore[arg-type]


def test_only_what_is_new_and_needs_nobody_to_leave_is_taken() -> None:
    """`old-0` would move so that `big-0` has room, which is not done; `new-0` comes on a slice of its own."""
    survey = Survey(replicas={"old-0": now("old-0", "GPU-0/1g.10gb@0")})
    whole = Transition(
        (
            step(0, "create", "GPU-1/1g.10gb@0"),
            step(1, "start", "GPU-1/1g.10gb@0", "old-0", 0),
            step(2, "check", "GPU-1/1g.10gb@0", "old-0", 1),
            step(3, "drain", "GPU-0/1g.10gb@0", "old-0", 2),
            step(4, "stop", "GPU-0/1g.10gb@0", "old-0", 3),
            step(5, "destroy", "GPU-0/1g.10gb@0", None, 4),
            step(6, "create", "GPU-0/7g.80gb@0", None, 5),
            step(7, "start", "GPU-0/7g.80gb@0", "big-0", 6),
            step(8, "check", "GPU-0/7g.80gb@0", "big-0", 7),
            step(9, "destroy", "GPU-1/2g.20gb@2"),
            step(10, "create", "GPU-1/1g.10gb@2", None, 9),
            step(11, "start", "GPU-1/1g.10gb@2", "new-0", 10),
            step(12, "check", "GPU-1/1g.10gb@2", "new-0", 11),
            step(13, "create", "GPU-1/1g.10gb@6", reserved="notebooks"),
            step(14, "destroy", "GPU-2"),
            step(15, "create", "GPU-2/1g.10gb@0", None, 14),
            step(16, "start", "GPU-2/1g.10gb@0", "new-1", 15),
        ),
        "f",
        "t",
        seats={"old-0": "a/GPU-1/1g.10gb@0", "big-0": "a/GPU-0/7g.80gb@0"},
    )
    taken = without_taking_away(whole, survey)
    assert [str(s) for s in taken.steps] == [str(whole.steps[n]) for n in (9, 10, 11, 12, 13)]
    assert [s.number for s in taken.steps] == [0, 1, 2, 3, 4]
    assert [s.after for s in taken.steps] == [(), (0,), (1,), (2,), ()]
    assert taken.seats == {"old-0": "a/GPU-0/1g.10gb@0", "new-0": "a/GPU-1/1g.10gb@2"}


def test_of_what_is_all_new_all_is_taken() -> None:
    whole = Transition(
        (step(0, "create", "GPU-0/1g.10gb@0"), step(1, "start", "GPU-0/1g.10gb@0", "new-0", 0)), "f", "t"
    )
    assert without_taking_away(whole, Survey()).steps == whole.steps


def test_where_one_of_a_model_leaves_nothing_is_taken_of_it_nor_what_comes_after_that() -> None:
    """`old-1` takes the place of `old-0`, and `acme`'s is of the same model. `new-0` needs nobody, `late-0` waits for `old-1`."""
    survey = Survey(replicas={"old-0": now("old-0", "GPU-0/1g.10gb@0"), "new-1": now("new-1", "GPU-3/1g.10gb@0")})
    whole = Transition(
        (
            step(0, "start", "GPU-1/1g.10gb@0", "old-1"),
            step(1, "check", "GPU-1/1g.10gb@0", "old-1", 0),
            step(2, "drain", "GPU-0/1g.10gb@0", "old-0", 1),
            step(3, "stop", "GPU-0/1g.10gb@0", "old-0", 2),
            step(4, "start", "GPU-1/1g.10gb@1", "old@acme-0"),
            step(5, "create", "GPU-2/1g.10gb@0", None, 1),
            step(6, "start", "GPU-2/1g.10gb@0", "late-0", 5),
            step(7, "start", "GPU-2/1g.10gb@1", "new-0"),
        ),
        "f",
        "t",
    )
    taken = without_taking_away(whole, survey)
    assert [str(s) for s in taken.steps] == [str(whole.steps[7])]
    assert taken.seats == {
        "old-0": "a/GPU-0/1g.10gb@0",
        "new-0": "a/GPU-2/1g.10gb@1",
        "new-1": "a/GPU-3/1g.10gb@0",
    }
