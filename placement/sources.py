"""Where a controller gets what it compares: configuration, slices and models, each through a seam of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from model_registry.sizing.calibration import CalibrationStore
from placement.calibration import CalibratedRegistry
from placement.clock import Clock, SystemClock
from placement.engines import EngineKind
from placement.goals import Goals, PlacementConfig, Registry, Workshop, plan_goals
from placement.inventory import observe
from placement.registry import ModelRegistry, installed_vllm
from placement.renewals import Rooms
from placement.repartitioning import Repartitioner
from placement.schema import EngineConfig, FleetConfig
from placement.slices import Inventory, SliceKind


def make_registry(engine: EngineConfig, inventory: Inventory) -> Registry:
    """The real registry, for the engine that is installed."""
    kind: EngineKind = "cuda" if any(s.kind is not SliceKind.CPU for s in inventory.slices) else "cpu"
    return ModelRegistry(engine, vllm_version=installed_vllm(engine, kind), device=kind)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the controller gets what it compares. `load` reads the configuration anew at every call.

    `scales` is whether replicas follow demand here; on a node of a cluster the head decides. `repartitioner` cuts GPUs anew
    where demand asks for it and the configuration allows it. `alone` keeps plans from being carried out for a moment, and raises
    StateLocked where one is. `rooms` makes slices for replicas that start beside the one they replace.
    """

    load: Callable[[], PlacementConfig]
    name: str
    observe: Callable[[FleetConfig], Inventory] = observe
    registry: Callable[[EngineConfig, Inventory], Registry] = make_registry
    clock: Clock = field(default_factory=SystemClock)
    jitter: Callable[[], float] = random.random
    scales: bool = True
    repartitioner: Repartitioner | None = None
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    rooms: Rooms | None = None


def calibrated_registry(
    sources: Sources, workshop: Workshop, config: PlacementConfig, inventory: Inventory
) -> CalibratedRegistry:
    """The registry of `sources`, with what engines measured in this state directory."""
    return CalibratedRegistry(sources.registry(config.engine, inventory), CalibrationStore(workshop.paths.calibration))


def preflight(sources: Sources, workshop: Workshop, *, partial: bool = False) -> Goals:
    """What would run, without starting anything.

    Raises the first reason why not all of it can; with `partial` only if nothing of it can.
    """
    config = sources.load()
    inventory = sources.observe(config.fleet)
    goals = plan_goals(config, inventory, calibrated_registry(sources, workshop, config, inventory), workshop)
    return goals if partial and goals.replicas else goals.complete()
