"""Cutting one GPU of a node as a cluster's plan says: one instance at a time, where no engine is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from model_registry.geometry import Placement
from placement.errors import SliceInUse, StalePlan
from placement.gpus import GpuState
from placement.partition import Driver
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.planner.types import WHOLE, FleetGpu
from placement.reservations import RESERVATIONS_FILE, Reservations
from placement.transition.execute import is_done, why_not
from placement.transition.local import LocalFleet, NoEngines
from placement.transition.steps import Place, Step


class CutOrder(BaseModel):
    """One instance that is to be there, or not; of `gpu@0`: MIG off, and on again. `gpu` is the UUID that the node knows."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    gpu: str
    slice: str
    there: bool
    allow_mode_change: bool = False

    @property
    def step(self) -> Step:
        """As a step of this machine."""
        placement = WHOLE if self.slice == str(WHOLE) else Placement.parse(self.slice)
        return Step(0, "create" if self.there else "destroy", Place(self.gpu, placement))


async def cut(driver: Driver, order: CutOrder, taken: Collection[str], directory: Path) -> None:
    """Carry `order` out, if that is not done already. `taken` are the slices that engines are on or have a seat on.

    Raises SliceInUse for one of those, StalePlan where the GPU is not what the plan was made for, and what the driver raises.
    """
    step = order.step
    if not order.there and step.place.slice_id in taken:
        raise SliceInUse(
            "an engine is on it", where=step.place.slice_id, remedy="Plan again: sliceway plan CONFIG --ray."
        )
    fleet = LocalFleet(
        driver,
        _not_planned_here,
        NoEngines(),
        PlannedSeats(directory / SEATS_FILE),
        Reservations(directory / RESERVATIONS_FILE),
        allow_mode_change=order.allow_mode_change,
    )
    observed = await fleet.observe()
    if is_done(step, observed):
        if order.there and step.place.placement != WHOLE:
            await fleet.complete(step.place)  # a driver may have made an instance, and failed to make it usable
        return
    if (obstacle := why_not(step, observed)) is not None:
        raise StalePlan(f"{step}: {obstacle}", remedy="Plan again: sliceway plan CONFIG --ray.")
    await (fleet.create(step) if order.there else fleet.destroy(step))


def _not_planned_here(_: Sequence[GpuState]) -> Sequence[FleetGpu]:
    return ()
