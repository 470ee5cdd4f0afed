"""Instances beyond the plan, for a replica that starts beside the one whose place it takes: made, and taken away afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from gateway.config import Config
from gateway.layouts import Machine, machine_of, one_at_a_time, seats
from gateway.planning import observed, reservations
from placement.errors import StateLocked
from placement.partition import plan as plan_layouts
from placement.transition import TransitionJournal
from placement.transition.journal import JOURNAL_FILE
from placement.transition.room import room_for
from placement.transition.steps import Place

_CHANGES = 2
"""One instance made, and one taken away."""


@dataclass(frozen=True, slots=True)
class PlannedRooms:
    """The rooms of the fleet that `load` gives the configuration of. See `placement.renewals.Rooms`."""

    load: Callable[[], Config]

    def find(self, like: str, not_on: Collection[str]) -> str | None:
        """Only on GPUs that the plan cuts, and within `max_layout_changes`."""
        config = self.load()
        most = config.fleet.max_layout_changes
        if config.fleet.partition != "planned" or (most is not None and most < _CHANGES):
            return None
        machine = machine_of(config)
        with one_at_a_time(config, machine):
            place = None if _under_way(config) else _room(config, machine, Place.parse(like), not_on)
        return place.slice_id if place is not None else None

    def make(self, slice_id: str) -> None:
        """Raises StateLocked also where a transition has begun since there was room."""
        config, place = self.load(), Place.parse(slice_id)
        machine = machine_of(config)
        with one_at_a_time(config, machine):
            if _under_way(config):
                raise StateLocked(
                    "a plan is being carried out", where=str(config.state), remedy="It goes on by itself afterwards."
                )
            machine.driver.create(place.gpu, place.placement)

    def give_back(self, slice_id: str) -> bool:
        """What somebody uses, or has a claim on, stays."""
        config, place = self.load(), Place.parse(slice_id)
        machine = machine_of(config)
        with one_at_a_time(config, machine):
            claimed = {*(seats(config).read() or {}).values(), *reservations(config).read()}
            if _under_way(config) or slice_id in claimed:
                return slice_id in claimed
            gpu = next((g for g in machine.driver.observe() if g.uuid == place.gpu), None)
            there = next((i for i in gpu.instances if i.placement == place.placement), None) if gpu else None
            if there is not None and not there.processes:
                machine.driver.destroy(place.gpu, there.id)
                return True
            return there is None


def _under_way(config: Config) -> bool:
    """Whether a transition is not finished: it counts on the GPUs as they are. One that has failed is given up, and what is
    planned next starts from what there is.
    """
    record = TransitionJournal(config.state / JOURNAL_FILE).read()
    return record is not None and record.failed is None


def _room(config: Config, machine: Machine, like: Place, not_on: Collection[str]) -> Place | None:
    gpus = machine.driver.observe()
    cut = {g.uuid for g in gpus if g.mig}
    fleet = observed(config, plan_layouts(gpus, config.fleet.layouts), recut=True)
    open_to_it = [g for g in fleet if g.id in cut]
    return room_for(open_to_it, like, not_on=not_on, beyond=True)
