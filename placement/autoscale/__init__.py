"""Replicas that follow demand: how many, how they sleep, and when cutting GPUs anew is worth it. Pure throughout.

What asks the planner is imported from `placement.autoscale.repartition`: a controller without one need not load a solver.
"""

from __future__ import annotations

from placement.autoscale.policy import Look, Scaled, ScaledModel, Signals, decide, needed_replicas
from placement.autoscale.scaler import Scaler
from placement.autoscale.wake import Choice, WakeFigures, choose_sleep

__all__ = [
    "Choice",
    "Look",
    "Scaled",
    "ScaledModel",
    "Scaler",
    "Signals",
    "WakeFigures",
    "choose_sleep",
    "decide",
    "needed_replicas",
]
