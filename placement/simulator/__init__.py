"""Machines full of GPUs that are not there: NVML at its C ABI, for planning, teaching and tests."""

from __future__ import annotations

from placement.simulator.machine import MachineOptions, PlainGpu, parse_fleet
from placement.simulator.simulation import Simulation, join

__all__ = ["MachineOptions", "PlainGpu", "Simulation", "join", "parse_fleet"]
