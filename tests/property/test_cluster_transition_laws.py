"""Whatever two plans for a cluster: the head carries one out after the other, is killed at any round, and no promise is broken on the way.

Nodes are dictionaries with drivers in memory. Gateways hear of a table late, each in its own round; an engine that is ended while any of
them still sends requests to it would fail some.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from model_registry.schema import ModelConfig
from placement.cluster.cutting import CutOrder
from placement.cluster.head import ClusterGoal
from placement.cluster.survey import Survey, fleet_of, layouts_of
from placement.cluster.testing import FakeDriver, fits_anywhere, made_gpu
from placement.cluster.testing_laws import FakeNode, LawfulCluster
from placement.cluster.transitions import digest
from placement.errors import SliceInUse, StalePlan
from placement.planner.plan import plan
from placement.planner.types import Constraints, FleetPlan, ModelDemand, Option, Problem, Reservation
from placement.policy import PlanningConfig
from placement.table import ModelRow
from placement.transition.planning import plan_transition
from placement.transition.steps import Transition

PRODUCT = load_catalogue().product("a30").name
PROFILES = ("1g.6gb", "2g.12gb", "4g.24gb")
MODELS = ("chat", "code")


def goal_of(replicas: Mapping[str, int], profiles: Mapping[str, tuple[str, ...]]) -> ClusterGoal:
    models = [ModelConfig(name=m, source="org/x", replicas=n, profiles=profiles[m]) for m, n in replicas.items() if n]

    config = f"{sorted(replicas.items())}"
    return ClusterGoal(config, models, tuple(ModelRow(name=m.name) for m in models), fits_anywhere)


def demands_of(replicas: Mapping[str, int], profiles: Mapping[str, tuple[str, ...]]) -> tuple[ModelDemand, ...]:
    return tuple(
        ModelDemand(m, m, tuple(Option(PRODUCT, p) for p in profiles[m]), replicas=n) for m, n in replicas.items() if n
    )


class Cluster(LawfulCluster):
    """Nodes of so many GPUs, which work towards `goal_of` something."""

    def __init__(self, nodes: Iterable[str], gpus: int, seed: int) -> None:
        bare = {n: FakeNode(FakeDriver(tuple(made_gpu(i, "a30") for i in range(gpus)))) for n in nodes}
        super().__init__(bare, goal_of({}, {}), seed)

    async def planned(self, demands: Sequence[ModelDemand], limits: Constraints) -> tuple[Survey, FleetPlan]:
        survey = await self.head.survey()
        fleet = fleet_of(survey, layouts_of(survey, ()), PlanningConfig(), (), recut=True)
        return survey, plan(Problem(fleet, tuple(demands), limits))

    async def transition(self, demands: Sequence[ModelDemand], limits: Constraints) -> Transition:
        survey, found = await self.planned(demands, limits)
        steps = plan_transition(found, demands, allow_dip=True)
        return replace(steps, fingerprint=survey.fingerprint, wanted=digest(self.goal.config))

    async def carry_out(self, transition: Transition, kills: frozenset[int]) -> Mapping[str, object]:
        dips = {d.demand: d.lowest for d in transition.dips}
        await self.head.carry_out(transition)
        self.guaranteed = {d: dips.get(d, least) for d, least in transition.guaranteed.items()}
        self.carrying = True
        for number in range(80 + 12 * len(transition.steps)):
            if number in kills:
                await self.kill()
            await self.round()
            outcome = self.head.transition()
            assert isinstance(outcome, dict)
            if not outcome["under_way"] and self.head.status()["nodes"]:
                self.carrying = False
                return outcome
        raise AssertionError(f"it does not end: {outcome}")


REPLICAS = st.fixed_dictionaries({m: st.integers(0, 3) for m in MODELS})
ACCEPTED = st.fixed_dictionaries({m: st.sampled_from([(p,) for p in PROFILES[:2]] + [PROFILES[:2]]) for m in MODELS})


@settings(max_examples=25, deadline=None)
@given(
    first=REPLICAS,
    second=REPLICAS,
    accepted=st.tuples(ACCEPTED, ACCEPTED),
    gpus=st.integers(1, 2),
    reserve=st.booleans(),
    kills=st.frozensets(st.integers(0, 30), max_size=4),
    restarts=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_two_plans_one_after_the_other(
    first: dict[str, int],
    second: dict[str, int],
    accepted: tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]],
    gpus: int,
    reserve: bool,
    kills: frozenset[int],
    restarts: int,
    seed: int,
) -> None:
    async def play() -> None:
        cluster = Cluster(("a", "b"), gpus, seed)
        limits = Constraints((Reservation("1g.6gb", 1, "other work"),) if reserve else ())
        for replicas, profiles in ((first, accepted[0]), (second, accepted[1])):
            cluster.goal = goal_of(replicas, profiles)
            await cluster.head.take_over(cluster.goal)
            await cluster.settle()
            demands = demands_of(replicas, profiles)
            transition = await cluster.transition(demands, limits)
            cluster.nodes.restarts = restarts
            outcome = await cluster.carry_out(transition, kills)
            assert outcome["ok"], outcome["error"]
            await cluster.settle()
            _, again = await cluster.planned(demands, limits)
            assert not again.changed, [g for g in again.gpus if g.changes or any(s.change != "keep" for s in g.slices)]
            event(f"{min(4, len(transition.steps) // 4)}: steps by four")

    asyncio.run(play())


ONE = {"chat": ("1g.6gb",), "code": ("2g.12gb",)}
NO_LIMITS = Constraints()


async def serving(replicas: Mapping[str, int], limits: Constraints = NO_LIMITS) -> Cluster:
    """Two nodes of one GPU each, cut for so many replicas, which serve."""
    cluster = Cluster(("a", "b"), 1, seed=1)
    cluster.goal = goal_of(replicas, ONE)
    await cluster.head.take_over(cluster.goal)
    await cluster.settle()
    outcome = await cluster.carry_out(await cluster.transition(demands_of(replicas, ONE), limits), frozenset())
    assert outcome["ok"]
    await cluster.settle()
    return cluster


async def aimed(cluster: Cluster, replicas: Mapping[str, int]) -> Transition:
    """The transition to so many, which the head works towards by now."""
    cluster.goal = goal_of(replicas, ONE)
    await cluster.head.take_over(cluster.goal)
    await cluster.settle()
    return await cluster.transition(demands_of(replicas, ONE), NO_LIMITS)


def replicas_of(cluster: Cluster) -> dict[str, str]:
    rows = cluster.head.status()["replicas"]
    return {row["replica"]: row["state"] for row in rows}  # type: ignore[attr-defined]


async def test_a_plan_is_refused_where_anything_is_another_since() -> None:
    cluster = await serving({"chat": 1})
    transition = await aimed(cluster, {"chat": 2, "code": 1})
    for other in (replace(transition, fingerprint="x"), replace(transition, wanted="x")):
        with pytest.raises(StalePlan, match="since the plan was made"):
            await cluster.head.carry_out(other)
    cluster.nodes.nodes["b"].driver.create("GPU-0", Placement(0, "1g.6gb"))
    with pytest.raises(StalePlan, match="since the plan was made"):
        await cluster.head.carry_out(transition)
    assert cluster.nodes.nodes["a"].ready == {"chat-0"}


async def test_one_at_a_time() -> None:
    cluster = await serving({"chat": 1})
    transition = await aimed(cluster, {"chat": 2})
    await cluster.head.carry_out(transition)
    with pytest.raises(StalePlan, match="another transition is under way, 3 of 3 steps are left"):
        await cluster.head.carry_out(transition)


async def test_an_engine_that_fails_stops_it_with_everything_else_serving() -> None:
    cluster = await serving({"chat": 1})
    transition = await aimed(cluster, {"chat": 1, "code": 1})
    for node in cluster.nodes.nodes.values():
        node.broken = frozenset({"code-0"})
    outcome = await cluster.carry_out(transition, frozenset())
    assert not outcome["ok"]
    assert "code-0 failed" in str(outcome["error"])
    assert [s["action"] for s in outcome["done"]] == ["create"]  # type: ignore[attr-defined]
    for _ in range(10):
        await cluster.round()
    assert replicas_of(cluster)["chat-0"] == "ready"


async def test_a_node_that_is_lost_ends_it_and_its_replicas_are_seated_elsewhere() -> None:
    cluster = await serving({"chat": 2})
    cluster.nodes.nodes["b"].driver.create("GPU-0", Placement(0, "1g.6gb"))  # room that nobody uses yet
    cluster.nodes.nodes["b"].driver.create("GPU-0", Placement(1, "1g.6gb"))
    await cluster.settle()
    transition = await aimed(cluster, {"chat": 2, "code": 1})
    await cluster.head.carry_out(transition)
    cluster.nodes.nodes["a"].up = False
    for _ in range(40):
        await cluster.round()
    outcome = cluster.head.transition()
    assert isinstance(outcome, dict)
    assert not outcome["under_way"]
    assert outcome["error"]["code"] == "node_lost"  # type: ignore[index]
    assert cluster.nodes.nodes["b"].ready >= {"chat-0", "chat-1"}


async def test_another_configuration_ends_it() -> None:
    cluster = await serving({"chat": 1})
    transition = await aimed(cluster, {"chat": 3})
    await cluster.head.carry_out(transition)
    await cluster.round()
    cluster.goal = goal_of({"chat": 2}, ONE)
    await cluster.head.take_over(cluster.goal)
    await cluster.round()
    outcome = cluster.head.transition()
    assert isinstance(outcome, dict)
    assert "another configuration" in outcome["error"]["message"]  # type: ignore[index]
    assert replicas_of(cluster)["chat-0"] == "ready"


async def test_nobody_is_seated_on_a_slice_for_other_work_also_after_the_head_was_killed() -> None:
    cluster = await serving({"chat": 1}, Constraints((Reservation("1g.6gb", 2, "tuning"),)))
    await cluster.kill()
    cluster.goal = goal_of({"chat": 3}, ONE)
    await cluster.head.take_over(cluster.goal)
    for _ in range(20):
        await cluster.round()
    assert len(cluster.head.status()["unplaced"]) == 2  # type: ignore[arg-type]
    survey = await cluster.head.survey()
    assert sorted(survey.reserved.values()) == ["tuning", "tuning"]
    assert not {now.seat.key for now in survey.replicas.values()} & set(survey.reserved)


async def test_a_node_cuts_nothing_that_an_engine_is_on() -> None:
    cluster = await serving({"chat": 1})
    (seat,) = [now.seat for now in (await cluster.head.survey()).replicas.values()]
    order = CutOrder(gpu="GPU-0", slice=seat.slice_id.partition("/")[2], there=False)
    with pytest.raises(SliceInUse, match="an engine is on it"):
        await cluster.nodes.cut(seat.node, order)
