"""From a configuration to the planner's question: what is demanded of which model, and which slices could serve it."""

from __future__ import annotations

from placement.workload.cards import Card, Place, cards_of
from placement.workload.demands import ModelChoices, Tenant, Workload, demand_name, tenant_shares, workload
from placement.workload.fleet import Occupancy, Running, check_pins, constraints, observed_fleet
from placement.workload.options import Candidate, Subject, candidates, whole_card

__all__ = [
    "Candidate",
    "Card",
    "ModelChoices",
    "Occupancy",
    "Place",
    "Running",
    "Subject",
    "Tenant",
    "Workload",
    "candidates",
    "cards_of",
    "check_pins",
    "constraints",
    "demand_name",
    "observed_fleet",
    "tenant_shares",
    "whole_card",
    "workload",
]
