"""What should run: configuration, models and slices -> one goal per replica.

Two seams reach the world: the inventory, which was observed before, and a `Registry`, which reads models' files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pydantic import Field

from model_registry.errors import ConfigError, SlicewayError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig, ReplicaRange, Section
from placement.assign import Apart, Assignment, Fits, Wanted, assign, natural, seated, wanted_replicas
from placement.demanded import fits_apart, model_of, more_replicas
from placement.engines import EngineKind, EngineVersions, find_engine_python
from placement.errors import PlacementError
from placement.launch import SizedModel, build_launch, kv_cache_tokens
from placement.orders import Orders
from placement.replicas.parts import Goal
from placement.schema import ClusterConfig, EngineConfig, FleetConfig
from placement.sharing import share_environment
from placement.simulate import engine_environment
from placement.slices import Inventory, Slice, SliceKind
from placement.state import StatePaths


class PlacementConfig(Section):
    """The sections of the configuration that placement acts on."""

    fleet: FleetConfig = FleetConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    models: tuple[ModelConfig, ...] = ()
    seats: Mapping[str, str] | None = Field(
        default=None,
        description="Slice ids by replica, where somebody else has decided (a cluster's head): these replicas and no other.",
    )
    pools: Mapping[str, tuple[str | None, ...]] = Field(
        default={},
        description="Of models whose replicas follow demand: tenants with replicas of their own, and null for all others.",
    )
    turns: tuple[str, ...] | None = Field(
        default=None,
        description="Outdated replicas that may be replaced now, where somebody else gives turns; otherwise one after another.",
    )


class Registry(Protocol):
    """What models are and need; see `placement.registry.ModelRegistry`."""

    def describe(self, model: ModelConfig) -> SizedModel:
        """Read the model's files. Raises SlicewayError where they cannot be had or make no sense."""

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        """Whether it fits the slice, and with what it would be started there."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What launching needs besides the configuration."""

    paths: StatePaths
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    own_python: Path = Path(sys.executable)
    find_python: Callable[[EngineKind, str | None], Path] = find_engine_python
    versions: EngineVersions = field(default_factory=EngineVersions)


@dataclass(frozen=True, slots=True)
class Goals:
    """One goal per replica that has a slice, and why the others have none."""

    config: PlacementConfig
    inventory: Inventory
    replicas: Mapping[str, Goal]
    models: Mapping[str, SizedModel]
    unplaced: Mapping[str, SlicewayError] = field(default_factory=dict)
    fits: Fits = field(default_factory=dict, repr=False)

    def fitting(self, model: str) -> list[Slice]:
        """The slices that hold `model` and that it accepts, the smallest first."""
        sized = self.models[model]
        accepted = sized.config.accepted_profiles
        fitting = [
            s
            for s in self.inventory.slices
            if (f := self.fits.get((model, s.id))) and f.fits and (not accepted or s.profile in accepted)
        ]
        return sorted(fitting, key=lambda s: (s.memory_bytes, natural(s.id)))

    def on(self, replica: str, target: Slice, workshop: Workshop) -> Goal:
        """How `replica` would be started on `target`, one of `fitting`. Raises PlacementError where it cannot be."""
        sized = self.models[model_of(replica)]
        return _goal(replica, sized, target, self.fits[sized.config.name, target.id], self.config, workshop)

    def complete(self) -> Goals:
        """These goals, if every replica has a slice. Raises the first replica's reason otherwise."""
        for error in self.unplaced.values():
            raise error
        return self


def plan_goals(
    config: PlacementConfig,
    inventory: Inventory,
    registry: Registry,
    workshop: Workshop,
    *,
    current: Mapping[str, str] | None = None,
    orders: Orders | None = None,
    demanded: Mapping[str, int] | None = None,
    barred: Collection[str] = (),
    closed: Collection[str] = (),
    resting: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
) -> Goals:
    """Seat every replica and say how it is started.

    `current` are slice ids of replicas that run; they stay where they are if they can. Replicas that `orders` stop keep
    their seats but have no goal; those that they seat may have that slice only. `demanded` are numbers of replicas that
    demand asks for, by model or `model@tenant`: those beyond what is configured take slices that nobody else needs and that are not
    `barred` (or are theirs already) or `closed` (even if they are), and are left out where there is none. A model that cannot be read, or
    that fits nowhere, is told in `unplaced` and takes nothing from the others. `resting` are replicas that nobody asks for, with
    the hash of what runs: they sleep where they are, unless somebody else needs the slice or they would be started otherwise.
    `names` are what replicas are called that have taken another one's place (`placement.renewals`).
    """
    models, unreadable = _describe(config, registry)
    orders = orders or Orders()
    wanted = wanted_replicas(config.models, config.pools, names) if config.seats is None else seated(config.seats)
    wanted = tuple(replace(w, pin=orders.seats.get(w.replica, w.pin)) for w in wanted)
    unplaced: dict[str, SlicewayError] = {w.replica: unreadable[w.model] for w in wanted if w.model in unreadable}
    fits: Fits = {(name, s.id): registry.fit(sized, s) for name, sized in models.items() for s in inventory.slices}
    current = current or {}
    # An engine whose model cannot be read at the moment goes on where it is.
    held = {current[replica] for replica in unplaced if replica in current}
    free = Inventory(tuple(s for s in inventory.slices if s.id not in held), notes=inventory.notes)
    wanted = tuple(w for w in wanted if w.model in models)
    more = tuple(
        w for w in more_replicas(config.models, config.pools, wanted, demanded or {}, current) if w.model in models
    )
    barred = (set(barred) - {current.get(w.replica) for w in more}) | set(closed)
    sleepers = _sleepers(resting or {}, (*wanted, *more), current, models, free, closed)
    apart = _apart(config, inventory)
    assignment = _seat_all(
        wanted,
        more,
        fits,
        free,
        current,
        barred,
        frozenset(sleepers.values()),
        apart=apart,
        chosen=config.seats is not None,
    )
    unplaced |= assignment.unplaced
    goals: dict[str, Goal] = {}
    for replica, slice_id in assignment.slices.items():
        target, sized = inventory.by_id[slice_id], models[model_of(replica)]
        try:
            goals[replica] = _goal(replica, sized, target, fits[sized.config.name, slice_id], config, workshop)
        except PlacementError as error:
            unplaced[replica] = error
    taken = set(assignment.slices.values())
    for replica, slice_id in sleepers.items():
        sized, target = models[model_of(replica)], inventory.by_id[slice_id]
        with contextlib.suppress(PlacementError):
            goal = _goal(replica, sized, target, fits[sized.config.name, slice_id], config, workshop)
            if slice_id not in taken and goal.spec_hash == (resting or {})[replica]:
                goals[replica] = replace(goal, asleep=True)
    for replica in orders.stopped:
        goals.pop(replica, None)
        unplaced.pop(replica, None)
    return Goals(config, inventory, goals, models, unplaced, fits)


def _sleepers(
    resting: Mapping[str, str],
    others: tuple[Wanted, ...],
    current: Mapping[str, str],
    models: Mapping[str, SizedModel],
    free: Inventory,
    closed: Collection[str],
) -> dict[str, str]:
    """Slice ids of the replicas that may go on sleeping, as far as nobody needs them."""
    asked = {w.replica for w in others}
    return {
        replica: slice_id
        for replica in sorted(resting)
        if replica not in asked
        and (slice_id := current.get(replica, "")) in free.by_id
        and slice_id not in closed
        and model_of(replica) in models
    }


def _seat_all(
    wanted: tuple[Wanted, ...],
    more: tuple[Wanted, ...],
    fits: Fits,
    inventory: Inventory,
    current: Mapping[str, str],
    barred: Collection[str],
    asleep: Collection[str] = (),
    *,
    apart: Mapping[str, Apart],
    chosen: bool,
) -> Assignment:
    """`wanted` have every slice if they need it, and leave those of `more` and those where somebody is `asleep` alone if they
    do not; so do `more` with those who sleep. For `more` nothing moves. Where somebody else has `chosen` for `wanted`, only
    `more` are kept apart: on the way from one plan to the next two may be on one GPU.
    """
    lent = {current[w.replica] for w in more if w.replica in current}
    for kept in ({*lent, *asleep}, lent, set[str]()):
        open_to = _only(inventory, lambda s, kept=kept: s.id not in kept)  # type: ignore[misc]
        first = assign(wanted, fits, open_to, current=current, apart={} if chosen else apart)
        if not first.unplaced:
            break
    if not more:
        return first
    taken = {*first.slices.values(), *barred}
    fits = fits_apart(fits, first.slices, apart)
    for kept in (set(asleep), set[str]()):
        open_to = _only(inventory, lambda s, kept=kept: s.id not in taken | kept)  # type: ignore[misc]
        then = assign(more, fits, open_to, current=current, may_move=False, apart=apart)
        if not then.unplaced:
            break
    return Assignment({**first.slices, **then.slices}, first.unplaced)


def _apart(config: PlacementConfig, inventory: Inventory) -> dict[str, Apart]:
    """What replicas of which models must not share, by model. One machine is one node."""
    limits = {
        "nodes": Apart("node", {s.id: "this machine" for s in inventory.slices}),
        "gpus": Apart("GPU", {s.id: s.gpu.uuid for s in inventory.slices if s.gpu}),
    }
    return {m.name: limits[m.spread] for m in config.models if m.spread != "none"}


def _may_sleep(config: PlacementConfig, model: ModelConfig, target: Slice) -> bool:
    """Whether an engine of `model` there may have a sleep mode that is to be used.

    Its endpoints ask for no key, so only behind a Unix socket of our own. vLLM has none on a CPU.
    """
    engine = config.engine
    if config.fleet.autoscale.sleep == "stop" or engine.transport != "unix":
        return False
    zero = isinstance(model.replicas, ReplicaRange) and model.replicas.min == 0
    return zero and (bool(engine.command) or _has_sleep_mode(target))


def _has_sleep_mode(target: Slice) -> bool:
    return target.kind in (SliceKind.MIG, SliceKind.GPU) and target.sharers == 1


def _only(inventory: Inventory, keep: Callable[[Slice], bool]) -> Inventory:
    return Inventory(tuple(s for s in inventory.slices if keep(s)), notes=inventory.notes)


def engine_kind(target: Slice) -> EngineKind:
    """Which build of vLLM runs on this slice."""
    return "cpu" if target.kind is SliceKind.CPU else "cuda"


def slice_kind(target: Slice) -> str:
    """What slices have in common that an engine compiles the same for: product and profile, or a number of cores."""
    if target.gpu is None:
        return f"{target.kind}-{target.profile or len(target.cores)}"
    shares = f"{target.kind}-{target.sharers}" if target.sharers > 1 else None
    return "+".join(filter(None, (target.gpu.product, target.profile or shares)))


def _engine_name(engine: EngineConfig, vllm: Path | None, workshop: Workshop) -> str:
    if vllm is None:
        return "command-" + hashlib.sha256("\0".join(engine.command).encode()).hexdigest()[:8]
    return f"vllm-{workshop.versions.of(vllm) or 'unknown'}"


def _describe(config: PlacementConfig, registry: Registry) -> tuple[dict[str, SizedModel], dict[str, SlicewayError]]:
    models: dict[str, SizedModel] = {}
    unreadable: dict[str, SlicewayError] = {}
    for model in config.models:
        if not model.source:
            continue
        try:
            models[model.name] = registry.describe(model)
        except ConfigError:
            raise
        except SlicewayError as error:
            unreadable[model.name] = error
    return models, unreadable


def _goal(
    replica: str, sized: SizedModel, target: Slice, fit: SliceFit, config: PlacementConfig, workshop: Workshop
) -> Goal:
    engine = config.engine
    may_sleep = _may_sleep(config, sized.config, target)
    simulated = target.simulated and sized.limits is not None
    vllm = None if engine.command or simulated else workshop.find_python(engine_kind(target), engine.python)
    cache = workshop.paths.cache(sized.config.name, slice_kind(target), _engine_name(engine, vllm, workshop))
    spec = build_launch(
        replica,
        sized,
        target,
        fit,
        engine,
        vllm_python=vllm,
        own_python=workshop.own_python,
        cache=cache,
        extra_environment={
            **engine_environment(target, workshop.environ),
            **share_environment(target, workshop.paths.runtime(workshop.environ)),
        },
        sleep_mode=may_sleep and not engine.command,
        guarded=True,
    )
    return Goal(
        replica,
        sized.config.name,
        sized.task,
        target,
        sized.config.max_num_seqs,
        spec,
        kv_cache_tokens(sized, target, fit),
        may_sleep=may_sleep,
    )
