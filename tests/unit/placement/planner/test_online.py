"""Placing one demand between full plans: the rule, and how far it stays from the exact plan on random workloads."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Layout, Placement
from placement.planner.fragmentation import Fragmentation
from placement.planner.online import adjust
from placement.planner.pack import pack
from placement.planner.testing import MIXES, arrivals, fleet
from placement.planner.types import FleetGpu, Instance, ModelDemand, Option

CATALOGUE = load_catalogue()
A100 = CATALOGUE.product("a100-80gb")


def gpu(name: str, *instances: Instance, price: float = 1.0, **more: object) -> FleetGpu:
    return FleetGpu(name, A100.name, A100, "n0", instances, price_per_hour=price, **more)  # type: ignore[arg-type]


def runs(placement: str, replica: str, requests: int = 0) -> Instance:
    return Instance(Placement.parse(placement), replica, replica.rpartition("-")[0], requests=requests)


def one(profile: str, name: str = "new") -> ModelDemand:
    return ModelDemand(name, name, (Option(A100.name, profile),), replicas=1)


def test_fragmentation_counts_what_the_free_slices_can_no_longer_hold() -> None:
    measure = Fragmentation(A100)

    def of(*texts: str) -> int:
        return measure.of(Layout.parse(A100, texts))

    assert of() == 0
    assert of("7g.80gb@0") == 0
    assert of("3g.40gb@0", "3g.40gb@4") == 0
    # Four slices free, 3 and 4 of them at start 0 only: every profile loses the starts on the right half.
    assert of("3g.40gb@4") == 3 * 1 + 2 * 2 + 1 * 2 + 1 * 4
    assert of("3g.40gb@0") > of("3g.40gb@4"), "a lone 3g goes to start 4"


def test_a_newcomer_goes_where_fragmentation_grows_least() -> None:
    fleet = (gpu("a", runs("3g.40gb@0", "x-0")), gpu("b", runs("1g.10gb@6", "x-1")))
    added = adjust(fleet, one("1g.20gb")).added[0]
    assert (added.gpu, str(added.placement)) == ("a", "1g.20gb@6")


def test_a_gpu_in_use_is_taken_before_one_is_opened_and_a_cheap_one_before_a_dear_one() -> None:
    fleet = (gpu("a", price=2.0), gpu("b", price=1.0), gpu("c", runs("4g.40gb@0", "x-0"), price=9.0))
    assert adjust(fleet, one("3g.40gb")).added[0].gpu == "c"
    assert adjust(fleet, one("7g.80gb")).added[0].gpu == "b"


def test_an_idle_instance_is_used_again_and_one_in_the_way_is_destroyed() -> None:
    idle = Instance(Placement.parse("1g.10gb@6"))
    added = adjust((gpu("a", idle),), one("1g.10gb")).added[0]
    assert (str(added.placement), added.reused, added.destroyed) == ("1g.10gb@6", True, ())
    added = adjust((gpu("a", idle),), one("7g.80gb")).added[0]
    assert added.destroyed == (idle.placement,)


def test_stopping_empties_a_gpu_if_it_can_and_spares_the_busy() -> None:
    demand = ModelDemand("chat", "chat", (Option(A100.name, "1g.10gb"),), replicas=2)
    fleet = (gpu("a", runs("1g.10gb@0", "chat-0"), runs("1g.10gb@1", "chat-1")), gpu("b", runs("1g.10gb@0", "chat-2")))
    assert adjust(fleet, demand).stopped == ("chat-2",)
    busy = (gpu("a", runs("1g.10gb@0", "chat-0", 5), runs("1g.10gb@1", "chat-1"), runs("1g.10gb@2", "chat-2", 5)),)
    assert adjust(busy, demand).stopped == ("chat-1",)


def test_a_rate_is_met_with_as_little_of_a_gpu_as_possible_and_no_limit_broken() -> None:
    options = (Option(A100.name, "1g.10gb", 1.0), Option(A100.name, "2g.20gb", 3.0))
    demand = ModelDemand("chat", "chat", options, rate=4.0, max_per_gpu=1)
    done = adjust((gpu("a"), gpu("b"), gpu("c")), demand)
    assert sorted(a.placement.profile for a in done.added) == ["1g.10gb", "2g.20gb"]
    assert len({a.gpu for a in done.added}) == 2
    short = adjust((gpu("a"),), demand)
    assert short.missing == pytest.approx(1 / 3)


def test_closed_gpus_get_nothing() -> None:
    done = adjust((gpu("a", cordoned=True), gpu("b", draining=True)), one("1g.10gb"))
    assert (done.added, done.missing) == ((), 1.0)


@pytest.mark.parametrize("mix", MIXES)
def test_arrivals_of_the_published_mixes_take_at_most_a_tenth_more_gpus_than_the_exact_plan(mix: str) -> None:
    gpus = fleet([(A100, 60, 1.0)])
    arrived: Counter[str] = Counter()
    for number, profile in enumerate(arrivals(Random(3), mix, 100)):
        done = adjust(gpus, one(profile, f"w{number}"))
        assert not done.missing
        gpus = done.gpus
        arrived[profile] += 1
        used = sum(bool(g.instances) for g in gpus)
        if number % 10 == 9 and (exact := pack(A100, arrived).gpus) >= 20:
            assert used <= 1.1 * exact, f"{used} GPUs for {number + 1} arrivals, {exact} would do"
