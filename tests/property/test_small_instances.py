"""The planner against brute force on small instances: a spread-out sample of what scripts/planner_exhaustive.py looks at."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import islice

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from placement.planner.brute_force import BruteForce
from placement.planner.pack import pack
from placement.planner.plan import plan
from placement.planner.small_instances import Kind, kinds
from placement.planner.small_packings import SmallPackings
from placement.planner.types import (
    Constraints,
    FleetGpu,
    Instance,
    ModelDemand,
    Objective,
    Option,
    Problem,
    Reservation,
)

CATALOGUE = load_catalogue()
A30, A100 = CATALOGUE.product("a30"), CATALOGUE.product("a100-80gb")
KINDS = {kind.name: kind for kind in kinds(CATALOGUE)}
_PARTS = 6
SAMPLES = {
    "one A30": 240,
    "one A100": 54,
    "two A30s": 78,
    "limits on two A30s": 60,
    "a model with a dedicated tenant on two A30s": 60,
    "an A30 and an A100": 120,
    "two A100s": 6,
    "reservations on two A30s": 48,
    "reservations on an A30 and an A100": 48,
    "layout changes on an A100": 48,
    "layout changes on two A30s": 48,
}


@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("name", SAMPLES)
def test_no_way_of_using_a_small_fleet_is_better_than_its_plan(name: str, part: int) -> None:
    for number in islice(KINDS[name].sample(SAMPLES[name]), part, None, _PARTS):
        problem = KINDS[name].at(number)
        assert BruteForce(problem).differs(plan(problem)) is None, f"{name} {number}"


def test_every_kind_is_sampled() -> None:
    assert set(SAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_numbers_all_combinations_and_a_sample_takes_none_twice(kind: Kind) -> None:
    assert kind.at(0) != kind.at(len(kind) - 1)
    taken = list(kind.sample(500))
    assert len(set(taken)) == 500
    assert all(0 <= number < len(kind) for number in taken)


@cache
def packings(name: str) -> SmallPackings:
    product = CATALOGUE.product(name)
    return SmallPackings(product) if name == "a30" else SmallPackings(product, ("1g.20gb", "2g.20gb", "3g.40gb"))


@pytest.mark.parametrize(("name", "every"), [("a30", 1), ("a100-80gb", 37)])
@pytest.mark.parametrize("used", range(3))
def test_every_packing_of_up_to_two_gpus_is_as_small_as_can_be(name: str, every: int, used: int) -> None:
    """Whatever is on the GPUs at the start, every demand that two can hold, and those that one slice puts beyond."""
    small = packings(name)
    starts = [start for start in small.starts() if len(start) == used]
    instances = [(start, demand, fewest) for start in starts for demand, fewest in small.demands(start).items()]
    assert len(instances) > 50
    for start, demand, fewest in instances[::every]:
        made = pack(small.product, small.named(demand), start)
        assert made.optimal
        assert made.gpus == fewest if fewest is not None else made.gpus > 2, (list(map(str, start)), demand)


def one(profile: str, **more: object) -> ModelDemand:
    return ModelDemand("chat", "chat", (Option(A30.name, profile),), replicas=1, **more)  # type: ignore[arg-type]


def running(placement: str) -> FleetGpu:
    return FleetGpu("a", A30.name, A30, instances=(Instance(Placement.parse(placement), "chat-0", "chat"),))


def test_brute_force_tells_a_plan_that_could_be_better_or_says_more_than_is_true() -> None:
    problem = Problem((running("1g.6gb@3"),), (one("1g.6gb"),))
    best = plan(problem)
    assert BruteForce(problem).differs(best) is None
    moved = plan(replace(problem, gpus=(FleetGpu("a", A30.name, A30),)))
    elsewhere = replace(moved, gpus=tuple(replace(g, gpu=problem.gpus[0]) for g in moved.gpus))
    assert "is possible" in str(BruteForce(problem).differs(elsewhere))
    boasting = replace(best, levels=(replace(best.levels[0], value=-1.0, lower_bound=-1.0), *best.levels[1:]))
    assert "the plan says" in str(BruteForce(problem).differs(boasting))


def test_brute_force_counts_what_is_reserved_and_what_is_reserved_already() -> None:
    problem = Problem((running("1g.6gb@0"),), (one("1g.6gb"),), Constraints((Reservation("2g.12gb", 2),)))
    best = BruteForce(problem).best()
    assert best.missing == (0.0, 1.0), "what is reserved comes before the replica that runs"
    made = plan(problem)
    assert BruteForce(problem).of(made).close_to(best)
    held = replace(problem, gpus=made.after())
    assert BruteForce(held).best().missing == (0.0, 1.0)
    without = replace(problem, constraints=Constraints())
    assert "is possible" in str(BruteForce(problem).differs(replace(plan(without), levels=made.levels)))


def test_brute_force_takes_no_more_layout_changes_than_are_allowed() -> None:
    wanted = replace(one("1g.6gb"), replicas=3)
    problem = Problem((running("1g.6gb@0"),), (wanted,), Constraints(max_layout_changes=1))
    assert BruteForce(problem).best().missing == (1.0,)
    unlimited = plan(replace(problem, constraints=Constraints()))
    with pytest.raises(ValueError, match="2 layout changes, and 1 are allowed"):
        BruteForce(problem).of(unlimited)


def test_brute_force_refuses_what_it_does_not_cover() -> None:
    gpus, demands = (running("1g.6gb@0"),), (one("1g.6gb"),)
    with pytest.raises(ValueError, match="not tried out"):
        BruteForce(Problem(gpus, demands, order=(Objective.PRICE, Objective.DEMAND)))


def test_brute_force_refuses_a_plan_that_cannot_be() -> None:
    problem = Problem((running("1g.6gb@0"),), (one("1g.6gb"),))
    drained = Problem((replace(problem.gpus[0], draining=True),), problem.demands)
    made = plan(problem)
    with pytest.raises(ValueError, match="cannot be used like that"):
        BruteForce(drained).of(replace(made, gpus=tuple(replace(g, gpu=drained.gpus[0]) for g in made.gpus)))
    unwanted = replace(problem, demands=(replace(problem.demands[0], replicas=0),))
    with pytest.raises(ValueError, match="limit"):
        BruteForce(unwanted).of(made)
