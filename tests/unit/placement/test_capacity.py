"""What to buy: the cheapest cards, proven; who pays; whole cards beside."""

from __future__ import annotations

from collections import Counter

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.schema import ModelConfig
from placement.capacity import capacity, costs_of_demands, costs_of_tenants
from placement.planner.plan import plan
from placement.planner.types import Constraints, FleetGpu, ModelDemand, Option, Problem, Reservation
from placement.workload import Card, ModelChoices, Tenant, Workload

CATALOGUE = load_catalogue()
A100, H100 = (Card.of(CATALOGUE.product(name)) for name in ("a100-80gb", "h100-sxm"))
PRICES = {A100.name: 1.0, H100.name: 2.5}


def work(*demands: ModelDemand, shares: dict[str, dict[str, float]] | None = None) -> Workload:
    """Models of an engine that nobody can size: whole cards hold all of them."""
    choices = {
        d.model: ModelChoices(ModelConfig(name=d.model, source="org/x", replicas=d.replicas), None, ()) for d in demands
    }
    return Workload(demands, choices, shares or {})


def small(name: str, replicas: int, *, profile: str = "1g.10gb", tenant: str | None = None) -> ModelDemand:
    options = tuple(Option(card.name, profile) for card in (A100, H100))
    return ModelDemand(name, name.partition("@")[0], options, replicas=replicas, tenant=tenant)


def test_seven_small_replicas_take_one_card_where_whole_cards_take_seven() -> None:
    found = capacity(work(small("chat", 7)), [A100], PRICES)
    assert dict(found.best.gpus) == {A100.name: 1}
    assert found.best.proven
    assert found.best.cost_per_hour == 1.0
    (model,) = found.models
    assert (model.whole_product, model.whole_cards, model.whole_cost_per_hour) == (A100.name, 7, 7.0)
    assert found.whole_cards_cost_per_hour == 7.0


def test_the_cheapest_mix_is_chosen_and_every_kind_alone_is_told() -> None:
    demand = ModelDemand(
        "chat", "chat", (Option(A100.name, "7g.80gb", 1.0), Option(H100.name, "7g.80gb", 3.0)), rate=4.0
    )
    found = capacity(work(demand), [A100, H100], PRICES)
    assert dict(found.best.gpus) == {A100.name: 1, H100.name: 1}
    assert found.best.cost_per_hour == 3.5
    assert sorted(p.cost_per_hour for p in found.others) == [4.0, 5.0]


@pytest.mark.parametrize(("replicas", "other"), [(1, "1g.10gb"), (2, "2g.20gb"), (3, "3g.40gb"), (4, "1g.20gb")])
def test_of_slices_that_cost_the_same_it_names_those_of_the_plan(replicas: int, other: str) -> None:
    either = tuple(Option(A100.name, profile) for profile in ("1g.10gb", "1g.20gb"))
    demands = (ModelDemand("chat", "chat", either, replicas=replicas), small("code", 1, profile=other))
    found = capacity(work(*demands), [A100], PRICES)
    assert (found.best.gpus, found.best.proven) == ({A100.name: 1}, True)
    made = plan(Problem((FleetGpu("a", A100.name, A100.geometry),), demands))
    slices = [(s.demand, f"{s.placement.profile} on {A100.name}") for g in made.gpus for s in g.slices]
    assert {m.demand: m.places for m in found.models} == {
        name: dict(Counter(place for demand, place in slices if demand == name)) for name in ("chat", "code")
    }


@pytest.mark.parametrize(("headroom", "cards"), [(0.0, 2), (0.6, 4)])
def test_head_room_is_bought_too(headroom: float, cards: int) -> None:
    demand = ModelDemand("chat", "chat", (Option(A100.name, "7g.80gb", 1.0),), rate=2.0)
    found = capacity(work(demand), [A100], PRICES, constraints=Constraints(headroom_ratio=headroom))
    assert found.best.gpus == {A100.name: cards}


def test_replicas_that_must_not_share_a_card_get_cards() -> None:
    demand = ModelDemand("chat", "chat", (Option(A100.name, "1g.10gb"),), replicas=3, max_per_gpu=1, max_per_node=1)
    assert capacity(work(demand), [A100], PRICES).best.gpus == {A100.name: 3}


def test_reservations_take_room_and_are_paid_for() -> None:
    rules = Constraints(reserve=(Reservation("4g.40gb", 1, "fine-tuning"),))
    found = capacity(work(small("chat", 3)), [A100], PRICES, constraints=rules)
    assert found.best.gpus == {A100.name: 1}
    assert sum(found.reserved.values()) + sum(m.cost_per_hour for m in found.models) == pytest.approx(1.0)
    assert list(found.reserved) == ["fine-tuning"]


def test_what_no_card_serves_is_told_and_left_out_of_the_count() -> None:
    nowhere = ModelDemand("large", "large", (), replicas=1)
    found = capacity(work(small("chat", 1), nowhere), [A100], PRICES)
    assert [u.demand for u in found.unmet] == ["large"]
    assert not found.best.meets_all
    assert found.whole_cards_cost_per_hour == 1.0


def test_costs_sum_up_to_the_price_and_fall_on_who_uses_what() -> None:
    shares = {"chat": {"acme": 0.25, "globex": 0.75}, "code": {"acme": 1.0}}
    tenants = [Tenant("acme"), Tenant("globex"), Tenant("initech", dedicated=True)]
    demands = (small("chat", 2), small("code", 1, profile="3g.40gb"), small("chat@initech", 2, tenant="initech"))
    asked = Workload(demands, work(small("chat", 2), small("code", 1)).models, shares)
    found = capacity(asked, [A100], PRICES, tenants=tenants)
    costs = costs_of_demands(found.best.plan)
    assert sum(costs.values()) == pytest.approx(1.0)
    assert costs["code"] == pytest.approx(4 / 8)
    by_tenant = costs_of_tenants(costs, demands, shares, tenants)
    assert by_tenant == pytest.approx({"acme": 1 / 16 + 0.5, "globex": 3 / 16, "initech": 0.25})
    assert found.tenants == pytest.approx(by_tenant)


def test_without_tenants_everyone_pays() -> None:
    found = capacity(work(small("chat", 1)), [A100], PRICES)
    assert found.tenants == {"everyone": 1.0}


def test_nothing_asked_costs_nothing() -> None:
    found = capacity(work(), [A100, H100], PRICES)
    assert found.best.cost_per_hour == 0.0
    assert found.as_public()["gpus"] == {}
