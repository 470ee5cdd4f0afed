"""Which slices demand may have: none that is reserved, cordoned, or about to be cut anew."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from model_registry.catalogue import load_catalogue
from model_registry.errors import SlicewayError
from placement.goals import PlacementConfig
from placement.partition.select import GpuSelection, selected
from placement.reservations import RESERVATIONS_FILE, Reservations
from placement.slices import Inventory
from placement.state import StatePaths
from placement.transition.journal import JOURNAL_FILE, TransitionJournal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenToDemand:
    """Slices that replicas for demand do not get: those `barred` stay with whom they have, those `closed` are given up."""

    barred: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()


def for_demand(config: PlacementConfig, inventory: Inventory, paths: StatePaths) -> OpenToDemand:
    """What demand may have at this moment. While a transition is under way nothing new: it counts on what is free, and
    what it will take away is left before.
    """
    record = TransitionJournal(paths.root / JOURNAL_FILE).in_progress()
    if record is None:
        return OpenToDemand(barred(config, inventory, paths))
    leaving = frozenset(step.place.slice_id for step in record.left if step.kind == "destroy")
    return OpenToDemand(frozenset(inventory.by_id), leaving)


def barred(config: PlacementConfig, inventory: Inventory, paths: StatePaths) -> frozenset[str]:
    """The slices that demand gets nothing of: reserved for other work, or on a cordoned GPU. All, where nobody can tell."""
    try:
        reserved: Collection[str] = Reservations(paths.root / RESERVATIONS_FILE).read()
        cordoned = _cordoned(config, inventory)
    except SlicewayError as error:
        log.warning("no replica is added for demand: %s", error)
        return frozenset(inventory.by_id)
    return frozenset(s.id for s in inventory.slices if s.id in reserved or (s.gpu and s.gpu.uuid in cordoned))


def _cordoned(config: PlacementConfig, inventory: Inventory) -> Sequence[str]:
    if not config.fleet.cordon:
        return ()
    rule = GpuSelection(gpus=config.fleet.cordon)
    return [g.uuid for g in selected(inventory.gpus, rule, "fleet.cordon", load_catalogue())]
