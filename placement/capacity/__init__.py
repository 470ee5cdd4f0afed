"""What a workload costs: the cheapest cards for it, per model and per tenant, against whole cards."""

from __future__ import annotations

from placement.capacity.answer import Capacity, ModelCost, Purchase, capacity, whole_cards
from placement.capacity.costs import Costs, costs_of_demands, costs_of_tenants

__all__ = [
    "Capacity",
    "Costs",
    "ModelCost",
    "Purchase",
    "capacity",
    "costs_of_demands",
    "costs_of_tenants",
    "whole_cards",
]
