"""From the configuration's text to what the head works towards. Reads models' files, as a controller does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pydantic import ValidationError

from model_registry.errors import ConfigError, SlicewayError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import Pools
from placement.autoscale.capacity import Capacity, capacity_on
from placement.cluster.head import ClusterGoal
from placement.goals import PlacementConfig, Registry
from placement.launch import SizedModel
from placement.registry import ModelRegistry, unsized
from placement.slices import Slice, SliceKind
from placement.table import ModelRow
from placement.workload.measured import Measured


def read_goal(text: str, created: int, pools: Pools | None = None) -> ClusterGoal:
    """The goal of a configuration that a command has checked before. `created` is the Unix time shown for its models, `pools` are
    the tenants that have replicas of their own.

    A model that cannot be read at the moment fits nowhere, with that as its reason. Raises ConfigError for a text that is no
    configuration.
    """
    try:
        sections = json.loads(text)
        config = PlacementConfig.model_validate(
            {k: sections[k] for k in ("fleet", "engine", "cluster", "models") if k in sections}
        )
    except (ValueError, ValidationError) as error:
        raise ConfigError(f"the cluster was given a configuration that makes no sense: {error}") from error
    known = _Known({kind: ModelRegistry(config.engine, device=kind) for kind in ("cuda", "cpu")})
    rows = []
    for model in config.models:
        task = "unknown" if model.task == "auto" else model.task
        longest = model.max_model_len
        if model.source:
            sized = known.describe(model.name, model)
            if sized is not None:
                task, longest = sized.task, sized.max_model_len
        rows.append(ModelRow(name=model.name, task=task, max_model_len=longest, created=created))
    return ClusterGoal(
        text,
        config.models,
        tuple(rows),
        known.fit,
        policy=config.fleet.autoscale,
        pools=pools or {},
        capacity_on=known.capacity,
        head_room=config.fleet.head_room,
        actors=config.cluster.actors,
        layouts=bool(config.fleet.layouts),
    )


@dataclass(slots=True)
class _Known:
    """The models by device, and why some are not known."""

    registries: dict[str, Registry]
    sized: dict[tuple[str, str], SizedModel] = field(default_factory=dict)
    problems: dict[str, SlicewayError] = field(default_factory=dict)
    capacities: dict[object, Capacity | None] = field(default_factory=dict)

    def describe(self, name: str, model: ModelConfig) -> SizedModel | None:
        for device, registry in self.registries.items():
            try:
                self.sized[name, device] = registry.describe(model)
            except SlicewayError as error:
                self.problems[name] = error
        return self.sized.get((name, "cuda")) or self.sized.get((name, "cpu"))

    def fit(self, name: str, target: Slice) -> SliceFit:
        device = "cpu" if target.kind is SliceKind.CPU else "cuda"
        sized = self.sized.get((name, device))
        if sized is None:
            return unsized(target, fits=False, reason=str(self.problems.get(name, "the model is not known")))
        return self.registries[device].fit(sized, target)

    def capacity(self, name: str, target: Slice, measured: Measured) -> Capacity | None:
        """What a replica bears there, as `measured`, else by the estimate."""
        if measured.throughput:
            return self._capacity(name, target, replace(measured, now=datetime.now(UTC)))
        shape = (
            name,
            target.kind,
            target.profile,
            target.memory_bytes,
            len(target.cores),
            target.gpu and target.gpu.product,
        )
        if shape not in self.capacities:
            self.capacities[shape] = self._capacity(name, target, Measured())
        return self.capacities[shape]

    def _capacity(self, name: str, target: Slice, measured: Measured) -> Capacity | None:
        sized = self.sized.get((name, "cpu" if target.kind is SliceKind.CPU else "cuda"))
        fit = self.fit(name, target)
        if sized is None or not fit.fits:
            return None
        accepted = sized.config.accepted_profiles
        if accepted and target.profile not in accepted:
            return None
        return capacity_on(sized, target, fit, measured)
