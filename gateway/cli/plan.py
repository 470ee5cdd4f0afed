"""The part of `sliceway plan` that is about models: a machine's GPUs, and what the configuration's demands make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal

import typer
from rich.markup import escape

from gateway.applying import AppliedPlan, apply_plan
from gateway.changes import engine_changes
from gateway.cli.output import err
from gateway.cli.plan_view import show_step
from gateway.config import Config
from gateway.layouts import machine_of, one_at_a_time, plans_fleet
from gateway.planning import FleetAnswer, ReservedSlice, answer, reserved_slices
from gateway.reviewed import ReviewedPlan
from gateway.tenant_pools import tenant_pools
from model_registry.errors import ConfigError, SlicewayError
from placement.assign import stem_of, wanted_replicas
from placement.changeover import Changeover
from placement.gpus import GpuState
from placement.partition import plan as plan_layouts
from placement.planner.written import unused_names
from placement.transition import Step

AllowDip = Annotated[
    bool,
    typer.Option(
        "--allow-dip", help="Let models fall below what they are guaranteed where no order of steps avoids it."
    ),
]

Online = Annotated[
    bool,
    typer.Option(
        "--online", help="Only bring every demand to its number, in milliseconds: nobody moves, no GPU is emptied."
    ),
]


@dataclass(frozen=True, slots=True)
class PlannedFleet:
    """The answer, the GPUs it is for, the slices that are reserved there, and why GPUs are left out that the machine has."""

    answer: FleetAnswer
    gpus: Sequence[GpuState]
    reserved: Sequence[ReservedSlice]
    left_out: Sequence[str] = ()

    def replicas(self, config: Config) -> frozenset[str]:
        """Whom `config` asks for: those that the plan seats, as many as each demand takes at least, and those that it says nothing of,
        which are pinned or of models that cannot be read.
        """
        steps = self.answer.transition
        slices = (s for gpu in self.answer.plan.gpus for s in gpu.slices)
        found = set(steps.seats if steps is not None else (s.replica for s in slices if s.replica is not None))
        for demand in self.answer.problem.demands:
            here = sum(stem_of(replica) == demand.name for replica in found)
            found.update(islice(unused_names(demand.name, found), max(0, demand.floor - here)))
        others = [m for m in config.models if m.slices or m.name in self.answer.workload.unreadable]
        return frozenset({*found, *(w.replica for w in wanted_replicas(others, tenant_pools(config)))})

    def started(self, missing: Sequence[str]) -> int:
        """How many replicas the next `up` starts, where none runs: those that the plan seats, and pinned ones, which it leaves
        alone, of `missing`.
        """
        seated = sum(s.replica is not None for gpu in self.answer.plan.gpus for s in gpu.slices)
        pinned = {name for name, choices in self.answer.workload.models.items() if choices.config.slices}
        return seated + sum(replica.rpartition("-")[0] in pinned for replica in missing)

    def as_public(self, why: str | None = None) -> dict[str, object]:
        """The stable JSON shape: `fleet` in `sliceway plan --json`. `why` keeps the decisions about one model only."""
        public = self.answer.as_public() | {
            "reserved": [r.as_public() for r in self.reserved],
            "left_out": list(self.left_out),
        }
        if why is not None:
            names = [d.name for d in self.answer.demands.values() if why in (d.name, d.model)] or [why]
            public["decisions"] = [d.as_public() for n in names for d in self.answer.plan.why(n)]
        return public


def planned_fleet(
    config: Config, *, asked: bool = False, allow_dip: bool = False, online: bool = False
) -> PlannedFleet | None:
    """The plan for the configuration's demands; None where it has none and nobody `asked`, or where models run on cores.

    Raises ConfigError where somebody asked and there is no GPU to plan for.
    """
    if config.fleet.discover in ("cpu", "none") or config.fleet.slices or not (asked or plans_fleet(config)):
        if asked:
            raise ConfigError(
                "only GPUs are planned, and this configuration has none",
                where="fleet",
                remedy="Plan for GPUs that are not there: --simulate h100-sxm:2.",
            )
        return None
    driver = machine_of(config).driver
    gpus = driver.observe()
    if not gpus:
        if asked or config.fleet.partition == "planned":
            raise ConfigError(
                "there is no GPU on this machine to plan for",
                where="fleet",
                remedy="Plan for GPUs that are not there: --simulate h100-sxm:2; or ask what to buy: sliceway capacity.",
            )
        return None
    found = answer(config, plan_layouts(gpus, config.fleet.layouts), allow_dip=allow_dip, online=online)
    return PlannedFleet(found, gpus, reserved_slices(config, gpus), driver.left_out())


def told_changes(config: Config, fleet: PlannedFleet | None, *, quiet: bool = False) -> Changeover | None:
    """What becomes of engines that run by earlier settings, after the plan's steps; None, and why unless `quiet`, where that cannot be
    told.
    """
    try:
        return engine_changes(config, fleet.answer if fleet is not None else None)
    except SlicewayError as error:
        if quiet:
            return None
        err.print(f"[yellow]which engines are replaced cannot be told[/]: {escape(str(error))}", highlight=False)
        return None


def gpu_labels(config: Config, changes: Changeover) -> dict[str, str]:
    """What GPUs are called where people read it, by their ids; empty where none is spoken of."""
    if not any("/" in told.slice_id for told in changes.replacements):
        return {}
    return {g.uuid: f"GPU {g.index}" for g in machine_of(config).driver.observe()}


def carry_out(
    config: Config,
    *,
    allow_dip: bool,
    allow_mode_change: bool,
    quiet: bool,
    online: bool = False,
    reviewed: ReviewedPlan | None = None,
) -> AppliedPlan | None:
    """Carry the plan out, telling each step unless `quiet`; None where nothing is planned. With `reviewed` that plan or none."""
    if config.fleet.discover in ("cpu", "none") or config.fleet.slices or not plans_fleet(config):
        return None
    machine = machine_of(config)
    gpus = machine.driver.observe()
    if not gpus:
        return None
    labels = {g.uuid: f"GPU {g.index}" for g in gpus}

    def watch(step: Step, what: Literal["begun", "done", "failed"]) -> None:
        if not quiet:
            show_step(step, what, labels)

    with one_at_a_time(config, machine):
        applied = apply_plan(
            config,
            machine,
            allow_dip=allow_dip,
            allow_mode_change=allow_mode_change,
            online=online,
            reviewed=reviewed,
            watch=watch,
        )
    return replace(applied, labels=labels)
