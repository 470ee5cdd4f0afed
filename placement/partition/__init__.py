"""Cutting GPUs: from the layouts of a configuration to MIG instances, by difference.

Observed against wanted gives ordered steps (pure); a `Driver` carries them out; what there is afterwards is read again.
"""

from __future__ import annotations

from placement.partition.actions import Action, Complete, Create, Destroy, SetMode
from placement.partition.apply import Applied, Drain, Driver, GpuOutcome, Tools, apply
from placement.partition.diff import Obstacle, diff
from placement.partition.plan import GpuPlan, plan
from placement.partition.rules import LayoutRule
from placement.partition.wanted import Wanted

__all__ = [
    "Action",
    "Applied",
    "Complete",
    "Create",
    "Destroy",
    "Drain",
    "Driver",
    "GpuOutcome",
    "GpuPlan",
    "LayoutRule",
    "Obstacle",
    "SetMode",
    "Tools",
    "Wanted",
    "apply",
    "diff",
    "plan",
]
