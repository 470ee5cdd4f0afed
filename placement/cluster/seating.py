"""Which replica goes to which node's slice: a pure function over what the nodes report.

All slices of all nodes are one inventory, and `placement.assign` seats the replicas on it as on one machine's. Where there is
not room for all, those of the highest priority are seated, and of equal priority those that have a seat: who runs gives way
only to what is more important. The sets of replicas that can be seated together are the independent sets of a matroid, so taking
them greedily in that order, as long as those before keep a place, loses nothing that a cleverer choice would keep (Edmonds and
Fulkerson 1965).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from model_registry.errors import SlicewayError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import (
    Apart,
    Assignment,
    Fits,
    Wanted,
    assign,
    ground_of,
    pinned_amiss,
    pinned_together,
    wanted_replicas,
    why_not,
)
from placement.cluster.members import NodeReport, Seat, in_cluster
from placement.errors import PlacementError
from placement.matching import can_all_sit
from placement.slices import Inventory, Slice

FitOn = Callable[[str, Slice], SliceFit]
"""Model name and slice -> what it gets there."""

Shape = tuple[str, str | None, int, str | None]


@dataclass(frozen=True, slots=True)
class Seating:
    """The seats, by replica, and why the other replicas have none."""

    seats: Mapping[str, Seat]
    unplaced: Mapping[str, SlicewayError] = field(default_factory=dict)


def seat_replicas(
    models: Sequence[ModelConfig], reports: Mapping[str, NodeReport], fit_on: FitOn, current: Mapping[str, Seat]
) -> Seating:
    """Seat every replica of `models` on the nodes of `reports`, keeping the seats of `current` that are still there.

    Models that something else runs (`endpoints`) have no replicas. A model's `spread` keeps its replicas on different nodes, or
    on different GPUs as far as slices say which GPU they are of. Equal inputs give equal seats, in whatever order they come.
    """
    homes: dict[str, tuple[str, Slice]] = {}
    slices: list[Slice] = []
    for node in sorted(reports):
        for one in reports[node].slices:
            slices.append(in_cluster(node, one))
            homes[slices[-1].id] = node, one
    inventory = Inventory(tuple(slices))
    here = {replica: seat.key for replica, seat in current.items() if seat.key in homes}
    wanted = _by_importance(models, here)
    fits = _fits({w.model for w in wanted}, inventory, fit_on)
    apart = _apart(models, homes)
    found = assign(wanted, fits, inventory, current=here, apart=apart)
    if found.unplaced:
        found = _most_important(wanted, fits, inventory, here, apart)
    by_replica = {w.replica: w for w in wanted}
    seats = {
        replica: Seat(replica=replica, model=by_replica[replica].model, node=homes[key][0], slice_id=homes[key][1].id)
        for replica, key in sorted(found.slices.items())
    }
    return Seating(seats, dict(found.unplaced))


class SeatingBook:
    """`seat_replicas`, which is asked in every round, worked out only where something that counts is another than last time."""

    def __init__(self) -> None:
        self._asked: object = None
        self._found = Seating({})

    def seat(
        self,
        models: Sequence[ModelConfig],
        reports: Mapping[str, NodeReport],
        fit_on: FitOn,
        current: Mapping[str, Seat],
    ) -> Seating:
        """As `seat_replicas`. `fit_on` is taken for another one only where it is another object."""
        asked = (models, {node: report.slices for node, report in reports.items()}, fit_on, dict(current))
        if asked != self._asked:
            self._found = seat_replicas(models, reports, fit_on, current)
            self._asked = asked
        return self._found


def _by_importance(models: Sequence[ModelConfig], here: Mapping[str, str]) -> tuple[Wanted, ...]:
    """The highest priority first; among equals who sits already, then every model's first replica, its second one, and so on."""
    priority = {model.name: model.priority for model in models}
    return tuple(
        sorted(wanted_replicas(models), key=lambda w: (-priority[w.model], w.replica not in here, w.ordinal, w.model))
    )


def _fits(models: set[str], inventory: Inventory, fit_on: FitOn) -> Fits:
    """Slices of one shape are equal to a model; a fleet has few shapes and many slices."""
    known: dict[tuple[str, Shape], SliceFit] = {}
    fits: dict[tuple[str, str], SliceFit] = {}
    for one in inventory.slices:
        shape = (one.kind.value, one.profile, one.memory_bytes, one.gpu.product if one.gpu else None)
        for model in models:
            if (model, shape) not in known:
                known[model, shape] = fit_on(model, one)
            fits[model, one.id] = known[model, shape]
    return fits


def _apart(models: Sequence[ModelConfig], homes: Mapping[str, tuple[str, Slice]]) -> Mapping[str, Apart]:
    """What replicas of which models must not share."""
    nodes = Apart("node", {key: node for key, (node, _) in homes.items()})
    # Two machines never have a card in common, but simulated ones have cards of equal names.
    gpus = Apart("GPU", {key: f"{node}/{one.gpu.uuid}" for key, (node, one) in homes.items() if one.gpu})
    kinds = {"nodes": nodes, "gpus": gpus}
    return {model.name: kinds[model.spread] for model in models if model.spread != "none"}


def _most_important(
    wanted: Sequence[Wanted], fits: Fits, inventory: Inventory, here: Mapping[str, str], apart: Mapping[str, Apart]
) -> Assignment:
    """Seats for the replicas that come first in `wanted`, and for the others what stands in their way beside those."""
    unplaced: dict[str, PlacementError] = pinned_together(wanted, apart)
    seekers = [w for w in wanted if w.replica not in unplaced]
    chosen = can_all_sit(ground_of(seekers, fits, inventory, apart), range(len(seekers)))
    found = assign([w for i, w in enumerate(seekers) if i in chosen], fits, inventory, current=here, apart=apart)
    first = [w for i, w in enumerate(seekers) if i in chosen] + [w for i, w in enumerate(seekers) if i not in chosen]
    unplaced |= pinned_amiss(first, apart)
    others = [w for w in seekers if w.replica not in unplaced]
    return Assignment(found.slices, unplaced | why_not(others, found.slices, fits, inventory, apart))
