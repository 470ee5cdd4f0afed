"""What would help where a demand is not met: exact numbers of GPUs, and a bound on the work that all trials share."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from model_registry.catalogue import load_catalogue
from placement.planner.explain import unmet
from placement.planner.plan import plan
from placement.planner.solver import INFINITY, Allowance, Limits, Program
from placement.planner.types import (
    Alternative,
    Constraints,
    FleetGpu,
    ModelDemand,
    Option,
    Problem,
    Reservation,
    Unmet,
)
from placement.planner.wants import wants_of

CATALOGUE = load_catalogue()
A100 = CATALOGUE.product("a100-80gb")


def gpus(count: int, prefix: str = "gpu", product: str = "a100-80gb") -> tuple[FleetGpu, ...]:
    found = CATALOGUE.product(product)
    return tuple(FleetGpu(f"{prefix}-{n}", found.name, found, f"{prefix}-{n}") for n in range(count))


def on(profile: str, capacity: float = 1.0, product: str = "a100-80gb") -> Option:
    return Option(CATALOGUE.product(product).name, profile, capacity)


def told(problem: Problem, work: int) -> tuple[Unmet, ...]:
    return unmet(problem, wants_of(problem), plan(problem).gpus, work=work)


@pytest.mark.parametrize(
    ("demand", "more"),
    [
        (ModelDemand("chat", "chat", (on("1g.10gb"),), replicas=15), 2),
        (ModelDemand("chat", "chat", (on("1g.10gb"),), replicas=3, max_per_gpu=1), 2),
        (ModelDemand("chat", "chat", (on("1g.10gb"),), replicas=5, max_per_node=2), 2),
        (ModelDemand("chat", "chat", (on("1g.10gb"), on("3g.40gb", 4.0)), rate=20.0), 2),
        (ModelDemand("chat", "chat", (on("1g.10gb"), on("3g.40gb", 4.0)), rate=14.0, max_replicas=4), 1),
        (ModelDemand("chat", "chat", (on("1g.10gb", 1.0), on("7g.80gb", 3.0)), rate=9.0, max_replicas=3), 2),
        (ModelDemand("chat", "chat", (on("gpu"),), replicas=4), 3),
    ],
)
def test_the_number_of_gpus_named_is_enough_and_no_smaller_one_is(demand: ModelDemand, more: int) -> None:
    short = plan(Problem(gpus(1), (demand,)))
    where = ", each on another node" if demand.max_per_node else ""
    assert short.unmet[0].remedies[0] == f"{more} more A100-80GB{where}"
    assert plan(Problem((*gpus(1), *gpus(more, "more")), (demand,))).unmet == ()
    assert plan(Problem((*gpus(1), *gpus(more - 1, "more")), (demand,))).unmet != ()


def test_a_reservation_of_a_profile_that_no_gpu_has_names_those_there_are() -> None:
    chat = ModelDemand("chat", "chat", (on("1g.10gb"),), replicas=1)
    rules = Constraints(reserve=(Reservation("4g.20gb", 1, "jobs"),))
    (short,) = plan(Problem(gpus(2), (chat,), rules)).unmet
    assert short.reason == "no GPU here can be cut to hold 4g.20gb"
    assert short.remedies == ("reserve what there is: 1g.10gb, 1g.20gb, 2g.20gb, 3g.40gb and 2 more",)


def test_what_limits_replicas_is_named_as_the_configuration_calls_it() -> None:
    apart = ModelDemand("chat", "chat", (on("1g.10gb"),), replicas=2, max_per_gpu=1)
    (short,) = plan(Problem(gpus(1), (apart,))).unmet
    assert "allow more than 1 on a GPU (spread: none)" in short.remedies
    few = ModelDemand("chat", "chat", (on("1g.10gb"),), rate=2.0, max_replicas=1)
    (short,) = plan(Problem(gpus(1), (few,))).unmet
    assert "allow more than 1 replica (replicas: {max: ...})" in short.remedies


@pytest.mark.parametrize(
    ("missing", "unit", "words"),
    [(1.0, "replicas", "1 replica"), (2.0, "replicas", "2 replicas"), (1.0, "requests/s", "1 requests/s")],
)
def test_what_is_missing_in_words(missing: float, unit: str, words: str) -> None:
    assert Unmet("chat", missing, 0.0, unit, "full").shortfall == words  # type: ignore[arg-type]


def test_fewer_gpus_do_where_others_make_room_on_those_that_are_there() -> None:
    """Two 4g take two cards of their own; one card more is enough where a 3g moves beside one of them."""
    halves = ModelDemand("halves", "halves", (on("3g.40gb"),), replicas=2, priority=1)
    larger = ModelDemand("larger", "larger", (on("4g.40gb"),), replicas=2)
    problem = Problem(gpus(1), (halves, larger))
    assert told(problem, 0)[0].remedies == ("2 more A100-80GB",)
    assert plan(problem).unmet[0].remedies == ("1 more A100-80GB",)
    assert plan(replace(problem, gpus=gpus(2))).unmet == ()


def test_without_work_left_only_what_needs_no_search_is_told_and_the_rest_is_counted() -> None:
    demand = ModelDemand(
        "chat",
        "chat",
        (on("4g.40gb"),),
        replicas=2,
        max_per_node=1,
        alternatives=(
            Alternative("kv_cache_dtype: fp8", on("3g.40gb")),
            Alternative("max_model_len: 6144", on("3g.40gb")),
        ),
    )
    problem = Problem(
        gpus(1), (demand, ModelDemand("code", "code", (on("4g.40gb"),), rate=3.0)), Constraints(headroom_ratio=0.2)
    )
    chat, code = sorted(told(problem, 0), key=lambda u: u.demand)
    assert (chat.remedies[0], chat.untried) == ("1 more A100-80GB on another node", 3), (
        "two alternatives and the spread over nodes"
    )
    assert (code.remedies[0], code.untried) == ("4 more A100-80GB", 1), "the head-room"
    assert chat.as_public()["untried"] == 3


def test_with_work_enough_nothing_is_left_untried() -> None:
    alternatives = (
        Alternative("max_model_len: 6144", on("3g.40gb")),
        Alternative("max_model_len: 10240", on("3g.40gb")),
    )
    demand = ModelDemand("chat", "chat", (on("4g.40gb"),), replicas=2, alternatives=alternatives)
    (missing,) = told(Problem(gpus(1), (demand,)), 1_000_000)
    assert missing.remedies == ("1 more A100-80GB", "max_model_len: 10240", "replicas: 1")
    assert missing.untried == 0


def test_the_same_work_leaves_the_same_untried() -> None:
    demands = tuple(
        ModelDemand(
            f"m{n}",
            f"m{n}",
            (on("2g.20gb"), on("3g.40gb")),
            replicas=9,
            alternatives=(Alternative("fp8", on("1g.10gb")),),
        )
        for n in range(3)
    )
    problem = Problem(gpus(2), demands)
    assert told(problem, 3000) == told(replace(problem, demands=demands[::-1]), 3000)


def split_evenly() -> Program:
    """Four sums over forty things, each to come to about half: hopeless within a few steps, and not impossible at sight."""
    program, chance = Program(), Random(1)
    chosen = [program.variable(1.0) for _ in range(40)]
    for _ in range(4):
        weights = {v: float(chance.randrange(1, 100)) for v in chosen}
        half = sum(weights.values()) // 2
        program.row(weights, half, half)
    return program


def test_searches_on_one_allowance_take_from_it_and_say_when_it_cut_them_short() -> None:
    allowance = Allowance(10_000)
    easy = Program()
    easy.row({easy.variable(): 2.0}, 3.0, INFINITY)
    assert easy.minimise({0: 1.0}, Limits(allowance=allowance)) is not None
    left = allowance.left
    assert 0 < left < 10_000
    assert not allowance.cut
    assert split_evenly().minimise({}, Limits(allowance=allowance)) is None
    assert allowance.left == 0
    assert allowance.cut


def test_what_is_impossible_is_decided_and_not_cut_short() -> None:
    allowance = Allowance(1_000_000)
    program = Program()
    program.row({program.variable(): 2.0}, 3.0, 3.0)
    assert program.minimise({}, Limits(allowance=allowance)) is None
    assert not allowance.cut
