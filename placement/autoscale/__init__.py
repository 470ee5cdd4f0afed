"""Replicas that follow demand: how many, how they sleep, and when cutting GPUs anew is worth it. Pure throughout."""

from __future__ import annotations

from placement.autoscale.policy import Look, Scaled, ScaledModel, Signals, decide, needed_replicas
from placement.autoscale.repartition import Repartition, Rescale, rescale
from placement.autoscale.wake import Choice, WakeFigures, choose_sleep

__all__ = [
    "Choice",
    "Look",
    "Repartition",
    "Rescale",
    "Scaled",
    "ScaledModel",
    "Signals",
    "WakeFigures",
    "choose_sleep",
    "decide",
    "needed_replicas",
    "rescale",
]
