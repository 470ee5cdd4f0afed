"""The part of `sliceway plan` that is about models: a machine's GPUs, and what the configuration's demands make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from gateway.config import Config
from gateway.layouts import machine_of
from gateway.planning import FleetAnswer, ReservedSlice, answer, plans_fleet, reserved_slices
from model_registry.errors import ConfigError
from placement.gpus import GpuState
from placement.partition import plan as plan_layouts

AllowDip = Annotated[
    bool,
    typer.Option(
        "--allow-dip", help="Let models fall below what they are guaranteed where no order of steps avoids it."
    ),
]


@dataclass(frozen=True, slots=True)
class PlannedFleet:
    """The answer, the GPUs it is for, and the slices that are reserved there."""

    answer: FleetAnswer
    gpus: Sequence[GpuState]
    reserved: Sequence[ReservedSlice]

    def as_public(self, why: str | None = None) -> dict[str, object]:
        """The stable JSON shape: `fleet` in `sliceway plan --json`. `why` keeps the decisions about one model only."""
        public = self.answer.as_public() | {"reserved": [r.as_public() for r in self.reserved]}
        if why is not None:
            names = [d.name for d in self.answer.demands.values() if why in (d.name, d.model)] or [why]
            public["decisions"] = [d.as_public() for n in names for d in self.answer.plan.why(n)]
        return public


def planned_fleet(config: Config, *, asked: bool = False, allow_dip: bool = False) -> PlannedFleet | None:
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
    gpus = machine_of(config).driver.observe()
    if not gpus:
        if asked or config.fleet.partition == "planned":
            raise ConfigError(
                "there is no GPU on this machine to plan for",
                where="fleet",
                remedy="Plan for GPUs that are not there: --simulate h100-sxm:2; or ask what to buy: sliceway capacity.",
            )
        return None
    found = answer(config, plan_layouts(gpus, config.fleet.layouts), allow_dip=allow_dip)
    return PlannedFleet(found, gpus, reserved_slices(config, gpus))
