"""`spread` is about a model: replicas of a dedicated tenant and those of all others are kept apart, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from placement.errors import TransitionBlocked
from placement.planner.online import adjust
from placement.planner.plan import plan
from placement.planner.solver import Limits
from placement.planner.types import Constraints, FleetGpu, FleetPlan, Instance, ModelDemand, Option, Problem
from placement.transition import plan_transition

A100 = load_catalogue().product("a100-80gb")
SMALL = Option(A100.name, "1g.10gb")
NO_LIMITS: Mapping[str, int] = {}
GPUS = {"max_per_gpu": 1}
NODES = {"max_per_gpu": 1, "max_per_node": 1}


def gpu(name: str, *replicas: str, node: str = "n0") -> FleetGpu:
    there = (Instance(Placement(i, "1g.10gb"), r, r.rpartition("-")[0]) for i, r in enumerate(replicas))
    return FleetGpu(name, A100.name, A100, node, tuple(there))


def of_chat(
    tenant: str = "", limits: Mapping[str, int] = NO_LIMITS, *, replicas: int = 1, rate: float | None = None
) -> ModelDemand:
    number = replicas if rate is None else None
    return ModelDemand(
        f"chat{tenant}",
        "chat",
        (SMALL,),
        number,
        rate,
        max_per_gpu=limits.get("max_per_gpu"),
        max_per_node=limits.get("max_per_node"),
    )


def crowds(made: FleetPlan) -> Counter[str]:
    return Counter(g.gpu.id for g in made.gpus for s in g.slices if s.replica)


@pytest.mark.parametrize(("limits", "apart"), [({}, 1), (GPUS, 2), (NODES, 2)])
def test_a_tenants_replica_shares_no_gpu_with_the_others(limits: dict[str, int], apart: int) -> None:
    fleet = (gpu("a", node="n0"), gpu("b", node="n0"), gpu("c", node="n1"))
    made = plan(Problem(fleet, (of_chat(limits=limits), of_chat("@acme", limits))))
    assert len(crowds(made)) == apart
    assert not made.unmet
    if limits is NODES:
        assert "c" in crowds(made), "the two are on different nodes"


def test_a_fleet_that_runs_with_both_on_one_gpu_is_not_left_alone() -> None:
    fleet = (gpu("a", "chat-0", "chat@acme-0"), gpu("b"))
    asked = (of_chat("", GPUS), of_chat("@acme", GPUS))
    made = plan(Problem(fleet, asked))
    assert crowds(made) == {"a": 1, "b": 1}
    moved = [d for d in made.decisions if d.action == "move"]
    assert len(moved) == 1
    assert "too many replicas of chat would be on GPU a or its node" in moved[0].reason
    assert not plan(Problem(made.after(), asked)).changed


@pytest.mark.parametrize(
    ("fleet", "rules"),
    [
        ((gpu("a", "chat-0", "chat@acme-0"),), Constraints()),
        ((gpu("a", "chat-0", "chat@acme-0"), gpu("b")), Constraints(max_layout_changes=0)),
    ],
)
def test_who_alone_serves_a_tenant_is_not_ended_for_the_spread_unless_that_is_allowed(
    fleet: tuple[FleetGpu, ...], rules: Constraints
) -> None:
    asked = (of_chat("", GPUS), of_chat("@acme", GPUS))
    made = plan(Problem(fleet, asked, rules))
    (gone,) = (d for d in made.decisions if d.action == "stop")
    assert gone.reason == "too many replicas of chat would be on GPU a, and no other slice is left for it"
    with pytest.raises(TransitionBlocked) as refused:
        plan_transition(made, asked)
    assert refused.value.message.endswith(
        f"{gone.demand} would serve 0 of the 1 it is guaranteed, since too many replicas of chat would be on GPU a"
    )
    assert str(refused.value.remedy).startswith("Loosen `spread` for chat, ")
    assert "lower the demand" not in str(refused.value.remedy), "less would not help"
    allowed = plan_transition(made, asked, allow_dip=True)
    assert [(d.demand, d.guaranteed, d.lowest) for d in allowed.dips] == [(gone.demand, 1.0, 0.0)]


def test_one_pool_that_is_spread_later_keeps_its_number_unless_less_is_allowed() -> None:
    asked = (of_chat("", NODES, replicas=3),)
    made = plan(Problem((gpu("a", "chat-0"), gpu("b", "chat-1"), gpu("c", "chat-2", node="n1")), asked))
    (gone,) = (d for d in made.decisions if d.action == "stop")
    assert "too many replicas of chat would be on the node of GPU" in gone.reason
    with pytest.raises(TransitionBlocked, match="chat would serve 2 of the 3 it is guaranteed, since too many"):
        plan_transition(made, asked)


def test_what_is_wanted_no_more_goes_without_leave() -> None:
    asked = (of_chat("", GPUS),)
    made = plan(Problem((gpu("a", "chat-0", "chat-1"),), asked))
    (gone,) = (d for d in made.decisions if d.action == "stop")
    assert gone.reason == "1 replica is wanted, and the others do that"
    assert plan_transition(made, asked).dips == ()


def test_what_more_important_work_takes_is_told_as_that() -> None:
    asked = (of_chat(), ModelDemand("big", "big", (Option(A100.name, "7g.80gb"),), 1, priority=5))
    made = plan(Problem((gpu("a", "chat-0"),), asked))
    (gone,) = (d for d in made.decisions if d.action == "stop")
    assert gone.reason == "1g.10gb@0 on a makes room for big-0, and no other slice is left for it"
    assert plan_transition(made, asked).dips == ()


def test_what_stands_in_the_way_counts_the_replicas_of_all() -> None:
    asked = (of_chat("", GPUS, replicas=2), of_chat("@acme", GPUS))
    (short,) = plan(Problem((gpu("a"), gpu("b")), asked)).unmet
    assert short.reason == (
        "3 replicas of chat are wanted (2 for chat, 1 for chat@acme), and at most 1 on each of 2 GPUs is allowed"
    )
    assert "1 more A100-80GB" in short.remedies
    assert "allow more than 1 on a GPU (spread: none)" in short.remedies


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            (of_chat("", GPUS, rate=3.0),),
            "3 replicas are the fewest that serve what is asked for, and at most 1 on each of 2 GPUs is allowed",
        ),
        (
            (of_chat("", GPUS, rate=2.0), of_chat("@acme", GPUS)),
            "3 replicas of chat are the fewest that serve what is asked for (2 for chat, 1 for chat@acme), "
            "and at most 1 on each of 2 GPUs is allowed",
        ),
    ],
)
def test_a_rate_that_takes_more_replicas_than_may_be_is_no_lack_of_room(
    asked: tuple[ModelDemand, ...], reason: str
) -> None:
    (short,) = plan(Problem((gpu("a"), gpu("b")), asked)).unmet
    assert short.reason == reason
    assert "allow more than 1 on a GPU (spread: none)" in short.remedies


def test_where_another_spread_would_do_the_room_that_is_left_is_not_denied() -> None:
    """One card is taken whole by more important work, on the other there is room for more than the limit allows."""
    big = ModelDemand("big", "big", (Option(A100.name, "7g.80gb"),), 1, priority=5)
    (short,) = plan(Problem((gpu("a"), gpu("b")), (of_chat("", GPUS, replicas=2), big))).unmet
    assert (
        short.reason
        == "the 2 GPUs that it fits (1g.10gb of A100-80GB) have no room left within its spread: taken by big"
    )


def test_on_one_card_it_takes_no_spread_at_all() -> None:
    (short,) = plan(Problem((gpu("a"),), (of_chat("", NODES, replicas=2),))).unmet
    assert "allow more than 1 on a GPU (spread: none)" in short.remedies
    (short,) = plan(Problem((gpu("a"), gpu("b")), (of_chat("", NODES, replicas=2),))).unmet
    assert "allow more than 1 on a node (spread: gpus)" in short.remedies
    assert "spread: none" not in str(short.remedies), "the smaller change does"


def test_fewer_replicas_are_named_only_where_all_pools_have_them_then() -> None:
    both = of_chat("", GPUS, replicas=2), of_chat("@acme", GPUS, replicas=2)
    for short in plan(Problem((gpu("a"),), both)).unmet:
        assert not [r for r in short.remedies if r.startswith("replicas: ")]
    three = gpu("a"), gpu("b"), gpu("c")
    (short,) = plan(Problem(three, both)).unmet
    assert "replicas: 1" in short.remedies
    assert not plan(Problem(three, tuple(replace(d, replicas=1) for d in both))).unmet


def test_demands_of_one_model_have_the_same_limits() -> None:
    with pytest.raises(ValueError, match="'chat@acme': other limits per GPU or node than another demand of 'chat'"):
        Problem((gpu("a"),), (of_chat("", GPUS), of_chat("@acme")))


def test_between_plans_the_others_of_the_model_count() -> None:
    fleet = (gpu("a", "chat-0"), gpu("b", node="n1"))
    assert adjust(fleet, of_chat("@acme", GPUS), siblings=("chat",)).added[0].gpu == "b"
    assert adjust(fleet, of_chat("@acme", GPUS)).added[0].gpu == "a"
    assert adjust(fleet, of_chat("@acme", NODES, replicas=2), siblings=("chat",)).missing == 1


def test_a_large_fleet_keeps_them_apart() -> None:
    """Beyond what is planned GPU by GPU: what a full fleet can hold is seated, and what it cannot is told."""
    fleet = tuple(gpu(f"g{n:02}", node=f"n{n // 8}") for n in range(70))
    asked = (of_chat("", GPUS, replicas=40), of_chat("@acme", GPUS, rate=20.0), of_chat("@bee", GPUS, replicas=10))
    made = plan(Problem(fleet, asked))
    assert not made.unmet
    assert set(crowds(made).values()) == {1}
    assert not plan(Problem(made.after(), asked)).changed
    more = (replace(asked[0], replicas=41), *asked[1:])
    grown = plan(Problem(made.after(), more))
    assert max(crowds(grown).values()) == 1
    assert sum(u.missing for u in grown.unmet) == 1


def test_a_large_fleet_that_runs_takes_the_newcomers_apart() -> None:
    fleet = tuple(gpu(f"g{n:02}", f"chat-{n}" if n < 20 else f"other-{n}") for n in range(40))
    other = ModelDemand("other", "other", (SMALL,), replicas=20)
    asked = (of_chat("", GPUS, replicas=20), of_chat("@acme", GPUS, replicas=20), other)
    made = plan(Problem(fleet, asked), Limits(gap_ratio=0.01))
    assert not made.unmet
    mine = Counter(g.gpu.id for g in made.gpus for s in g.slices if (s.demand or "").startswith("chat"))
    assert set(mine.values()) == {1}
    assert not [d for d in made.decisions if d.action in ("move", "stop")]


def test_equal_questions_have_equal_answers() -> None:
    fleet = (gpu("a", "chat-0"), gpu("b"), gpu("c", node="n1"))
    asked = (of_chat("", GPUS, replicas=2), of_chat("@acme", GPUS))
    answers = [plan(Problem(f, d)) for f, d in ((fleet, asked), (fleet[::-1], asked[::-1]))]
    assert all(one == other for one, other in pairwise(answers))
