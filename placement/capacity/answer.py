"""How many of which GPUs a workload needs, what they cost, and what whole cards would cost instead. Pure.

The planner is asked with as many cards of each product as could ever be useful: enough to give every demand cards of its
own. Of a product, more than that can never be part of a cheapest answer, since all that is on them would fit on these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from model_registry.geometry import Geometry
from placement.capacity.costs import Costs, costs_of_demands, costs_of_tenants
from placement.planner.plan import plan
from placement.planner.solver import Limits
from placement.planner.types import (
    WHOLE_GPU,
    Constraints,
    FleetGpu,
    FleetPlan,
    ModelDemand,
    Objective,
    Option,
    Problem,
    Unmet,
)
from placement.workload.cards import Card
from placement.workload.demands import ModelChoices, Tenant, Workload
from placement.workload.measured import Measured
from placement.workload.options import needed, whole_card

_MOST_CARDS = 10_000
_MOST_TIDIED = 64
"""On so many cards a plan is made in a moment; of larger purchases the slices are those that were priced."""


@dataclass(frozen=True, slots=True)
class Purchase:
    """One answer: cards by product, what they cost per hour, and the plan on them. `proven` that nothing is cheaper."""

    products: tuple[str, ...]
    gpus: Mapping[str, int]
    cost_per_hour: float
    plan: FleetPlan

    @property
    def proven(self) -> bool:
        """Whether no cheaper one exists among these products."""
        return self.plan.optimal

    @property
    def meets_all(self) -> bool:
        """Whether every demand is met."""
        return not self.plan.unmet

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "products": list(self.products),
            "gpus": dict(self.gpus),
            "cost_per_hour": self.cost_per_hour,
            "meets_all": self.meets_all,
            "optimal": self.proven,
            "lower_bound": self.plan.lower_bound,
            "unmet": [u.as_public() for u in self.plan.unmet],
            "layouts": _layouts(self.plan),
        }


@dataclass(frozen=True, slots=True)
class ModelCost:
    """One demand: where its replicas are, what they serve together, and what they cost, beside whole cards of its own.

    `asked` and `served` are requests per second, or replicas where those are counted. `whole` are cards by product if it
    had cards to itself, None where no card holds it.
    """

    demand: str
    model: str
    tenant: str | None
    replicas: int
    places: Mapping[str, int]
    asked: float
    served: float
    unit: str
    cost_per_hour: float
    whole_product: str | None = None
    whole_cards: int | None = None
    whole_cost_per_hour: float | None = None

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        whole = None
        if self.whole_cards is not None:
            whole = {
                "product": self.whole_product,
                "gpus": self.whole_cards,
                "cost_per_hour": self.whole_cost_per_hour,
            }
        return {
            "model": self.model,
            "demand": self.demand,
            "tenant": self.tenant,
            "replicas": self.replicas,
            "slices": dict(self.places),
            "asked": self.asked,
            "served": self.served,
            "unit": self.unit,
            "cost_per_hour": self.cost_per_hour,
            "whole_cards": whole,
        }


@dataclass(frozen=True, slots=True)
class Capacity:
    """The cheapest purchase (`best`), the others that were looked at, and who pays for what."""

    best: Purchase
    others: tuple[Purchase, ...]
    models: tuple[ModelCost, ...]
    tenants: Costs = field(default_factory=dict)
    reserved: Costs = field(default_factory=dict)

    @property
    def whole_cards_cost_per_hour(self) -> float | None:
        """What whole cards per model would cost for all that is served; None where some of it fits no whole card."""
        costs = [m.whole_cost_per_hour for m in self.models if m.replicas]
        return None if None in costs else sum(c for c in costs if c is not None)

    @property
    def unmet(self) -> tuple[Unmet, ...]:
        """What no number of these cards meets."""
        return self.best.plan.unmet

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway capacity --json`."""
        return {
            "gpus": dict(self.best.gpus),
            "cost_per_hour": self.best.cost_per_hour,
            "optimal": self.best.proven,
            "meets_all": self.best.meets_all,
            "unmet": [u.as_public() for u in self.unmet],
            "layouts": _layouts(self.best.plan),
            "whole_cards_cost_per_hour": self.whole_cards_cost_per_hour,
            "models": [m.as_public() for m in self.models],
            "tenants": [{"tenant": t, "cost_per_hour": c} for t, c in self.tenants.items()],
            "reserved": [{"note": n, "cost_per_hour": c} for n, c in self.reserved.items()],
            "options": [p.as_public() for p in (self.best, *self.others)],
        }


def capacity(
    work: Workload,
    cards: Sequence[Card],
    prices: Mapping[str, float],
    *,
    constraints: Constraints | None = None,
    tenants: Sequence[Tenant] = (),
    measured: Measured | None = None,
    limits: Limits | None = None,
) -> Capacity:
    """The cheapest cards that serve `work`, from `cards` together and from each kind alone. `prices` are by product.

    Demands that no card can serve are left out of the count and told in `unmet`. What has to go on different nodes is put
    on cards of different nodes, one card each.
    """
    rules = replace(constraints or Constraints(), max_layout_changes=None)
    kinds = [tuple(cards)] if len(cards) == 1 else [tuple(cards), *((card,) for card in cards)]
    purchases = [_purchase(work.demands, kind, prices, rules, limits) for kind in kinds]
    cheapest = min(purchases, key=_rank)
    best = _tidied(cheapest, work.demands, rules, limits)
    costs = costs_of_demands(best.plan)
    return Capacity(
        best=best,
        others=tuple(p for p in purchases if p is not cheapest),
        models=tuple(
            _model_cost(d, work.models[d.model], best, costs, cards, prices, rules, measured) for d in work.demands
        ),
        tenants=costs_of_tenants(costs, work.demands, work.shares, tenants),
        reserved={n: c for n, c in costs.items() if n not in {d.name for d in work.demands}},
    )


def _rank(purchase: Purchase) -> tuple[float, float, int]:
    """What meets most, then costs least, then mixes fewest products."""
    missing = sum(u.missing for u in purchase.plan.unmet)
    return missing, round(purchase.cost_per_hour, 9), len(purchase.gpus)


def _purchase(
    demands: Sequence[ModelDemand],
    cards: Sequence[Card],
    prices: Mapping[str, float],
    constraints: Constraints,
    limits: Limits | None,
) -> Purchase:
    gpus = [
        FleetGpu(
            id=f"{card.name}#{number:05d}",
            product=card.name,
            geometry=card.geometry,
            node=f"{card.name}#{number:05d}",
            price_per_hour=prices[card.name],
        )
        for card in cards
        for number in range(_enough(demands, card, constraints))
    ]
    # On bare cards the least disturbance is the fewest slices; what is left over is no question before they are bought.
    order = (Objective.DEMAND, Objective.PRICE, Objective.DISTURBANCE)
    found = plan(Problem(tuple(gpus), tuple(demands), constraints, order), limits)
    used = Counter(g.gpu.product for g in found.gpus if g.used)
    return Purchase(tuple(c.name for c in cards), dict(sorted(used.items())), found.price_per_hour, found)


def _tidied(
    bought: Purchase, demands: Sequence[ModelDemand], constraints: Constraints, limits: Limits | None
) -> Purchase:
    """The same cards with the slices that a plan on them chooses, which minds what is left over as well. What is proven of
    the purchase stays so.
    """
    cards = tuple(g.gpu for g in bought.plan.gpus if g.used)
    if not bought.meets_all or not 0 < len(cards) <= _MOST_TIDIED:
        return bought
    found = plan(Problem(cards, tuple(demands), constraints), limits)
    if found.unmet or found.price_per_hour > bought.cost_per_hour + 1e-9:
        return bought
    settled = [x for x in bought.plan.levels if x.objective in (Objective.DEMAND, Objective.PRICE)]
    rest = [x for x in found.levels if x.objective not in (Objective.DEMAND, Objective.PRICE)]
    return replace(bought, plan=replace(found, levels=(*settled, *rest)))


def _enough(demands: Sequence[ModelDemand], card: Card, constraints: Constraints) -> int:
    """Cards with which every demand and reservation could have cards of its own."""
    cards = sum(_alone(demand, card, constraints) for demand in demands)
    for wanted in constraints.reserve:
        if card.geometry is not None and wanted.product in (None, card.name):
            cards += ceil(wanted.count / _per_card(card, wanted.profile)) if _per_card(card, wanted.profile) else 0
    return min(_MOST_CARDS, cards)


def _alone(demand: ModelDemand, card: Card, constraints: Constraints) -> int:
    """The fewest cards that serve `demand` with one profile; 0 if it cannot be on this card."""
    found = []
    for option in (o for o in demand.options if o.product == card.name):
        per_card = min(_per_card(card, option.profile), demand.max_per_gpu or _MOST_CARDS)
        if per_card:
            found.append(ceil(_replicas(demand, option, constraints) / min(per_card, demand.max_per_node or per_card)))
    return min(found, default=0)


def _replicas(demand: ModelDemand, option: Option, constraints: Constraints) -> int:
    if demand.rate is None:
        return demand.floor
    return max(demand.floor, needed(demand.rate * (1 + constraints.headroom_ratio), option.capacity))


def _per_card(card: Card, profile: str) -> int:
    if profile == WHOLE_GPU:
        return 1
    if card.geometry is None or profile not in {p.name for p in card.geometry.profiles}:
        return 0
    return Geometry(card.geometry, (profile,)).remaining_capacity(profile)


def _model_cost(
    demand: ModelDemand,
    choices: ModelChoices,
    best: Purchase,
    costs: Mapping[str, float],
    cards: Sequence[Card],
    prices: Mapping[str, float],
    constraints: Constraints,
    measured: Measured | None,
) -> ModelCost:
    keys = [(g.gpu.product, s.placement.profile) for g in best.plan.gpus for s in g.slices if s.demand == demand.name]
    counted = demand.rate is None
    product, number, cost = whole_cards(demand, choices, cards, prices, constraints, measured) or (None, None, None)
    return ModelCost(
        demand=demand.name,
        model=demand.model,
        tenant=demand.tenant,
        replicas=len(keys),
        places=dict(sorted(Counter(f"{profile} on {product}" for product, profile in keys).items())),
        asked=float(demand.floor if counted else demand.rate or 0.0),
        served=float(len(keys) if counted else demand.served_by(keys)),
        unit="replicas" if counted else "requests/s",
        cost_per_hour=costs.get(demand.name, 0.0),
        whole_product=product,
        whole_cards=number,
        whole_cost_per_hour=cost,
    )


def whole_cards(
    demand: ModelDemand,
    choices: ModelChoices,
    cards: Sequence[Card],
    prices: Mapping[str, float],
    constraints: Constraints | None = None,
    measured: Measured | None = None,
) -> tuple[str, int, float] | None:
    """The cheapest whole cards for one demand by itself: product, number, cost per hour; None where no card holds it."""
    found: list[tuple[float, str, int]] = []
    for card in cards:
        option = _whole_option(choices, card, measured)
        if option is not None:
            number = _replicas(demand, option, constraints or Constraints())
            found.append((number * prices[card.name], card.name, number))
    if not found:
        return None
    cost, product, number = min(found)
    return product, number, cost


def _whole_option(choices: ModelChoices, card: Card, measured: Measured | None) -> Option | None:
    if choices.subject is None:
        return None if choices.config.demand else Option(card.name, WHOLE_GPU)
    return whole_card(choices.subject, card, measured).option


def _layouts(plan: FleetPlan) -> list[dict[str, object]]:
    """Cards that are cut alike and hold the same, with their number; what is shown to people and machines."""
    groups: Counter[tuple[str, tuple[tuple[str, str | None], ...]]] = Counter()
    for gpu in plan.gpus:
        if gpu.used:
            slices = tuple((str(s.placement), s.demand or s.reserved) for s in gpu.slices if s.replica or s.reserved)
            groups[gpu.gpu.product, slices] += 1
    return [
        {"product": product, "gpus": number, "slices": [{"slice": s, "for": who} for s, who in slices]}
        for (product, slices), number in sorted(groups.items(), key=lambda g: (g[0][0], -g[1], g[0][1]))
    ]
