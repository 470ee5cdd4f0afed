"""Menus: bounds that hold, the same optimum with them as without, and programs that they are kept out of."""

from __future__ import annotations

from random import Random

import pytest

from model_registry.catalogue import load_catalogue
from placement.planner.master import Master
from placement.planner.menus import Menus, Priced, priced
from placement.planner.plan import plan
from placement.planner.shapes import Shaper
from placement.planner.solver import Columns, Limits, Program
from placement.planner.testing import changed, demands, fleet
from placement.planner.types import FleetPlan, ModelDemand, Objective, Option, Problem
from placement.planner.wants import wants_of

WITHOUT_MENUS = Limits(gap_ratio=1e-9)
"""Where a gap is allowed, however small, nothing is looked for by menus."""

PRODUCTS = [load_catalogue().product(name) for name in ("a100-80gb", "h100-sxm")]


def too_small(seed: int) -> Problem:
    """Two GPUs for what takes about three."""
    gpus = fleet([(product, 1, 1.5 + number) for number, product in enumerate(PRODUCTS)])
    return Problem(gpus, demands(Random(seed), PRODUCTS, models=4, replicas=16))


def coarse(problem: Problem) -> Master:
    wants = wants_of(problem)
    classes = Shaper(wants).coarse(problem.gpus, maximal=True)
    return Master(classes, wants, problem.constraints, keep=False, slack=True)


def bounded(master: Master) -> Priced:
    found = priced(
        master.program, master.shortfall(), master.blocks(), frozenset(k for b in master.blocks() for k in b.replicas)
    )
    assert found is not None
    return found


def values(made: FleetPlan) -> list[float]:
    return [level.value for level in made.levels]


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_over_menus_is_between_that_over_replicas_and_the_optimum(seed: int) -> None:
    master = coarse(too_small(seed))
    relaxed = master.program.relaxed().minimise(master.shortfall(), Limits())
    best = master.program.minimise(master.shortfall(), Limits())
    assert relaxed is not None
    assert best is not None
    assert relaxed.objective - 1e-6 <= bounded(master).bound <= best.objective + 1e-6


def test_the_bound_knows_that_replicas_are_whole() -> None:
    """Two halves of an A100 for a rate of 1.5 halves each: fractions of replicas would meet three quarters of all."""
    options = (Option("A100-80GB", "3g.40gb", capacity=2.0),)
    wants = tuple(ModelDemand(name, name, options, rate=3.0) for name in ("chat", "code"))
    master = coarse(Problem(fleet([(PRODUCTS[0], 1, 1.5)]), wants))
    relaxed = master.program.relaxed().minimise(master.shortfall(), Limits())
    assert relaxed is not None
    assert relaxed.objective == pytest.approx(1.0)
    assert bounded(master).bound == pytest.approx(1.0)
    wide = coarse(Problem(fleet([(PRODUCTS[0], 2, 1.5)]), (*wants, ModelDemand("docs", "docs", options, rate=1.0))))
    fractions = wide.program.relaxed().minimise(wide.shortfall(), Limits())
    assert fractions is not None
    assert fractions.objective == pytest.approx(0.0)
    assert bounded(wide).bound == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(4))
def test_plans_of_a_fleet_that_is_too_small_are_as_good_with_menus_as_without(seed: int) -> None:
    problem = too_small(seed)
    made, other = plan(problem), plan(problem, WITHOUT_MENUS)
    assert values(made) == pytest.approx(values(other), abs=1e-5)
    assert made.optimal
    after = changed(Random(seed), problem, made.after(), share=0.5, by=0.5)
    again, once_more = plan(after), plan(after, WITHOUT_MENUS)
    assert values(again) == pytest.approx(values(once_more), abs=1e-5)
    assert again.optimal


def test_the_least_that_is_missing_leaves_its_menus_to_later_searches() -> None:
    master = coarse(too_small(1))
    level = master.minimise(Objective.DEMAND, Limits())
    assert level is not None
    assert level.value > 0
    assert level.optimal
    assert master.menus is not None
    assert set(master.menus.by_want) == {b.want.name for b in master.blocks()}
    missing = master.answer(()).missing
    for block in master.blocks():
        keys, menus = master.menus.by_want[block.want.name]
        counts = tuple(master.answer(()).replicas.get(key, 0) for key in keys)
        mine = next(menu for menu in menus if menu.counts == counts)
        assert mine.missing == pytest.approx(missing.get(block.want.name, 0.0), abs=1e-5)


def test_wants_with_too_many_menus_are_not_named() -> None:
    master = coarse(too_small(2))
    none, some = bounded(master).within(0.1, most=0), bounded(master).within(0.1)
    assert none is not None
    assert some is not None
    assert not none.by_want
    assert some.by_want


def test_a_program_with_slots_that_the_menus_do_not_know_is_left_as_it_is() -> None:
    master = coarse(too_small(3))
    rows, variables = master.program.rows, master.program.variables
    master.restrict(Menus(frozenset(), {}))
    assert (master.program.rows, master.program.variables) == (rows, variables)


def test_columns_are_added_between_solutions() -> None:
    program = Program()
    program.row({program.variable(4, integer=False): 1.0}, 3.0)
    columns = Columns(program, {0: 2.0})
    first = columns.solve()
    columns.add(1.0, {0: 1.0})
    then = columns.solve()
    assert first is not None
    assert then is not None
    assert (first[0], *first[1]) == pytest.approx((6.0, 2.0))
    assert (then[0], *then[1]) == pytest.approx((3.0, 1.0))


def test_columns_without_an_answer_say_so() -> None:
    program = Program()
    program.row({program.variable(1, integer=False): 1.0}, 3.0)
    assert Columns(program, {}).solve() is None
