"""Which replica goes to which node's slice: a pure function over what the nodes report.

All slices of all nodes are one inventory, and `placement.assign` seats the replicas on it as on one machine's. Where there is
not room for all, those of the highest priority are seated: the sets of replicas that can be seated together are the
independent sets of a transversal matroid, so taking them greedily in order of priority, each with an augmenting path,
loses nothing that a cleverer choice would keep (Edmonds and Fulkerson 1965).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from model_registry.errors import SlicewayError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import Assignment, Fits, Wanted, assign, wanted_replicas
from placement.cluster.members import NodeReport, Seat, in_cluster
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

    Models that something else runs (`endpoints`) have no replicas. Equal inputs give equal seats, in whatever order they come.
    """
    homes = {in_cluster(node, s).id: (node, s) for node in sorted(reports) for s in reports[node].slices}
    inventory = Inventory(tuple(in_cluster(node, s) for node, s in homes.values()))
    wanted = _by_priority(models)
    fits = _fits({w.model for w in wanted}, inventory, fit_on)
    here = {replica: seat.key for replica, seat in current.items() if seat.key in homes}
    found = _seated(wanted, fits, inventory, here)
    unplaced: dict[str, SlicewayError] = dict(found.unplaced)
    if unplaced:
        chosen = _most_important(wanted, fits, inventory)
        found = assign([w for w in wanted if w.replica in chosen], fits, inventory, current=here)
        unplaced = {w.replica: _why(w, chosen, wanted, fits, inventory) for w in wanted if w.replica not in chosen}
    by_replica = {w.replica: w for w in wanted}
    seats = {
        replica: Seat(replica=replica, model=by_replica[replica].model, node=homes[key][0], slice_id=homes[key][1].id)
        for replica, key in sorted(found.slices.items())
    }
    return Seating(seats, unplaced)


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


def _seated(wanted: Sequence[Wanted], fits: Fits, inventory: Inventory, here: Mapping[str, str]) -> Assignment:
    """As `assign` has it. Whoever runs stays unless another one could not run at all, so mostly only the others have to be seated."""
    by_id = inventory.by_id
    kept: dict[str, str] = {}
    taken: set[str] = set()
    for one in sorted(wanted, key=lambda w: (w.model, w.ordinal, w.replica)):
        place = here.get(one.replica)
        if place is not None and place not in taken and _accepts(one, by_id[place], fits):
            kept[one.replica] = place
            taken.add(place)
    free = Inventory(tuple(s for s in inventory.slices if s.id not in taken))
    found = assign([w for w in wanted if w.replica not in kept], fits, free)
    if found.unplaced:
        return assign(wanted, fits, inventory, current=here)
    return Assignment({**kept, **found.slices})


def _by_priority(models: Sequence[ModelConfig]) -> tuple[Wanted, ...]:
    priority = {model.name: model.priority for model in models}
    return tuple(sorted(wanted_replicas(models), key=lambda w: (-priority[w.model], w.ordinal, w.model)))


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


def _most_important(wanted: Sequence[Wanted], fits: Fits, inventory: Inventory) -> frozenset[str]:
    """The replicas to seat, in order of `wanted` as long as those before can all keep a place."""
    accepted = {w.replica: [s.id for s in inventory.slices if _accepts(w, s, fits)] for w in wanted}
    holder: dict[str, str] = {}

    def augment(replica: str) -> bool:
        """Breadth first, so that a path of any length needs no recursion."""
        came: dict[str, tuple[str, str | None]] = {}
        frontier: list[tuple[str, str | None]] = [(replica, None)]
        for seeker, freed in frontier:
            for place in accepted[seeker]:
                if place in came:
                    continue
                came[place] = (seeker, freed)
                if place not in holder:
                    _shift(place, came, holder)
                    return True
                frontier.append((holder[place], place))
        return False

    return frozenset(w.replica for w in wanted if augment(w.replica))


def _shift(place: str, came: Mapping[str, tuple[str, str | None]], holder: dict[str, str]) -> None:
    """Move every replica on the path to `place` one place on."""
    here: str | None = place
    while here is not None:
        seeker, freed = came[here]
        holder[here] = seeker
        here = freed


def _accepts(wanted: Wanted, one: Slice, fits: Fits) -> bool:
    if wanted.pin is not None and wanted.pin != one.id:
        return False
    if wanted.profiles and one.profile not in wanted.profiles:
        return False
    return fits[wanted.model, one.id].fits


def _why(
    one: Wanted, chosen: frozenset[str], wanted: Sequence[Wanted], fits: Fits, inventory: Inventory
) -> SlicewayError:
    """What stands in its way beside those that were chosen."""
    beside = assign([w for w in wanted if w.replica in chosen or w is one], fits, inventory)
    return next(iter(beside.unplaced.values()))
