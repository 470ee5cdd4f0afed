"""The least price by numbers of GPUs in use: what it settles, what it leaves open, and that it is what one search comes to."""

from __future__ import annotations

from random import Random

import pytest

from model_registry.catalogue import load_catalogue
from placement.planner.master import Master
from placement.planner.numbers import Cheapest, cheapest
from placement.planner.shapes import Shaper
from placement.planner.solver import Limits
from placement.planner.testing import demands, fleet
from placement.planner.types import FleetGpu, ModelDemand, Option, Problem
from placement.planner.wants import wants_of

CATALOGUE = load_catalogue()
A100, H100 = CATALOGUE.product("a100-80gb"), CATALOGUE.product("h100-sxm")


def coarse(problem: Problem) -> Master:
    wants = wants_of(problem)
    classes = Shaper(wants).coarse(problem.gpus, maximal=True)
    return Master(classes, wants, problem.constraints, keep=False, slack=True)


def found(master: Master, *, fewest: bool = True) -> Cheapest | None:
    return cheapest(master, Limits(), fewest=fewest)


def halves(count: int, *products: str) -> ModelDemand:
    options = tuple(Option(CATALOGUE.product(p).name, "3g.40gb") for p in products)
    return ModelDemand("halves", "halves", options, replicas=count)


def gpus(a100: int, h100: int, price: float = 2.5) -> tuple[FleetGpu, ...]:
    return fleet([(A100, a100, 1.5), (H100, h100, price)])


def test_the_only_numbers_at_the_least_price_are_told_with_the_fewest_replicas() -> None:
    result = found(coarse(Problem(gpus(2, 2), (halves(5, "a100-80gb", "h100-sxm"),))))
    assert result is not None
    assert [(level.value, level.lower_bound) for level in result.levels] == [(0.0, 0.0), (5.5, 5.5)]
    assert (result.numbers, result.replicas) == ((2, 1), 5)


def test_numbers_are_open_where_several_cost_the_same() -> None:
    result = found(coarse(Problem(gpus(2, 2, price=1.5), (halves(5, "a100-80gb", "h100-sxm"),))))
    assert result is not None
    assert (result.levels[1].value, result.numbers, result.replicas) == (4.5, None, None)


def test_what_cannot_be_met_leaves_the_program_as_it_was() -> None:
    master = coarse(Problem(gpus(1, 1), (halves(5, "a100-80gb", "h100-sxm"),)))
    rows = master.program.rows
    assert found(master) is None
    assert master.program.rows == rows


@pytest.mark.parametrize("price", [0.0, 2.5])
def test_gpus_that_cost_nothing_are_searched_all_together(price: float) -> None:
    result = found(coarse(Problem(gpus(2, 2, price=price), (halves(3, "a100-80gb", "h100-sxm"),))))
    assert result is not None
    assert result.levels[1].value == (3.0 if price else 0.0)
    assert (result.numbers is None) == (price == 0.0)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_price_that_one_search_over_everything_finds(seed: int) -> None:
    wanted = demands(Random(seed), [A100, H100], models=5, replicas=14)
    problem = Problem(gpus(2, 2), wanted)
    plain = coarse(problem).meet_at_least_price(Limits())
    result = found(coarse(problem), fewest=False)
    assert (result is None) == (plain is None)
    if result is not None and plain is not None:
        assert result.levels[1].value == pytest.approx(plain[1].value)
        assert result.levels[1].optimal
