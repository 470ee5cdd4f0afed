"""One search for all objectives against one search for each: the same optimum."""

from __future__ import annotations

from random import Random

import pytest

from model_registry.catalogue import load_catalogue
from placement.planner.plan import plan
from placement.planner.solver import Limits
from placement.planner.testing import changed, demands, fleet
from placement.planner.types import FleetGpu, FleetPlan, ModelDemand, Option, Problem

ONE_BY_ONE = Limits(gap_ratio=1e-9)
"""A gap that is allowed, however small, takes the objectives one after the other."""


def empty(*, price: float = 1.5) -> tuple[FleetGpu, ...]:
    catalogue = load_catalogue()
    return fleet([(catalogue.product("a100-80gb"), 3, price), (catalogue.product("h100-sxm"), 1, 2.5)])


@pytest.mark.parametrize("seed", range(6))
def test_every_objective_comes_to_the_same(seed: int) -> None:
    catalogue = load_catalogue()
    products = [catalogue.product(name) for name in ("a100-80gb", "h100-sxm")]
    problem = Problem(empty(), demands(Random(seed), products, models=4, replicas=10))
    together, one_by_one = plan(problem), plan(problem, ONE_BY_ONE)
    assert [level.value for level in together.levels] == pytest.approx([level.value for level in one_by_one.levels])
    assert together.optimal
    assert not together.unmet


@pytest.mark.parametrize("seed", range(6))
def test_a_fleet_that_runs_is_disturbed_as_little_by_as_few_replicas(seed: int) -> None:
    chance, catalogue = Random(seed), load_catalogue()
    products = [catalogue.product(name) for name in ("a100-80gb", "h100-sxm")]
    fresh = Problem(empty(), demands(chance, products, models=4, replicas=10))
    problem = changed(chance, fresh, plan(fresh).after(), share=0.8, by=0.6)
    together, one_by_one = plan(problem), plan(problem, ONE_BY_ONE)
    assert [level.value for level in together.levels] == pytest.approx([level.value for level in one_by_one.levels])
    assert together.optimal
    assert serving(together) == serving(one_by_one)


def serving(made: FleetPlan) -> int:
    return sum(decision.action != "stop" for decision in made.decisions)


def test_penalties_count_for_more_than_fragmentation() -> None:
    options = (Option("A100-80GB", "2g.20gb"), Option("A100-80GB", "3g.40gb", penalty=0.5))
    problem = Problem(empty()[:1], (ModelDemand("chat", "chat", options, replicas=2),))
    assert {s.placement.profile for s in plan(problem).gpus[0].slices} == {"2g.20gb"}


def test_prices_beyond_exact_arithmetic_are_settled_one_by_one() -> None:
    options = (Option("A100-80GB", "3g.40gb"),)
    problem = Problem(empty(price=1.2347), (ModelDemand("chat", "chat", options, replicas=3),))
    made = plan(problem)
    assert made.optimal
    assert made.price_per_hour == pytest.approx(2 * 1.2347)
