"""Which replica goes to which node's slice: a pure function over what the nodes report.

All slices of all nodes are one inventory, and `placement.assign` seats the replicas on it as on one machine's. Where there is
not room for all, those of the highest priority are seated, and of equal priority those that have a seat: who runs gives way
only to what is more important. The sets of replicas that can be seated together are the independent sets of a matroid, so taking
them greedily in that order, as long as those before keep a place, loses nothing that a cleverer choice would keep (Edmonds and
Fulkerson 1965).

Replicas that are there for demand take what these leave, those of the highest priority first, and nothing that runs moves for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from model_registry.errors import SlicewayError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import (
    Apart,
    Assignment,
    Fits,
    Pools,
    Wanted,
    assign,
    ground_of,
    pinned_amiss,
    pinned_together,
    wanted_replicas,
    why_not,
)
from placement.cluster.members import NodeReport, Seat, in_cluster, slice_key
from placement.demanded import fits_apart, more_replicas
from placement.errors import NoFreeSlice, PlacementError
from placement.matching import can_all_sit
from placement.slices import Inventory, Slice

FitOn = Callable[[str, Slice], SliceFit]
"""Model name and slice -> what it gets there."""

Shape = tuple[str, str | None, int, str | None]


@dataclass(frozen=True, slots=True)
class Seating:
    """The seats, by replica, and why the other replicas have none. `staying` are those that have one which their model's `profiles` do not
    name, as long as there is no other, with what they wait for.
    """

    seats: Mapping[str, Seat]
    unplaced: Mapping[str, SlicewayError] = field(default_factory=dict)
    staying: Mapping[str, SlicewayError] = field(default_factory=dict)


def seat_replicas(
    models: Sequence[ModelConfig],
    reports: Mapping[str, NodeReport],
    fit_on: FitOn,
    current: Mapping[str, Seat],
    *,
    pools: Pools | None = None,
    numbers: Mapping[str, int] | None = None,
    names: Sequence[str] = (),
) -> Seating:
    """Seat every replica of `models` on the nodes of `reports`, keeping the seats of `current` that are still there.

    `pools` are the tenants that have replicas of their own, and `numbers` how many replicas demand asks for, by pool: those beyond
    what is configured take free slices that no node has cordoned, and give way to whoever is configured. `names` are what replicas
    are called that have taken another one's place.
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
    configured = wanted_replicas(models, pools, names)
    wanted = _by_importance(configured, models, here)
    more = _by_importance(more_replicas(models, pools or {}, configured, numbers or {}, here), models, here)
    fits = _fits({w.model for w in (*wanted, *more)}, inventory, fit_on)
    ground = _Ground(fits, inventory, here, _apart(models, homes))
    closed = {slice_key(node, one) for node in reports for one in reports[node].cordoned}
    by_replica = {w.replica: w for w in (*wanted, *more)}
    found, staying = _seat_all(wanted, more, ground, closed, {m.name: m.priority for m in models})
    seats = {
        replica: Seat(replica=replica, model=by_replica[replica].model, node=homes[key][0], slice_id=homes[key][1].id)
        for replica, key in sorted({**found.slices, **{replica: here[replica] for replica in staying}}.items())
    }
    return Seating(seats, {r: why for r, why in found.unplaced.items() if r not in staying}, staying)


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
        *,
        pools: Pools | None = None,
        numbers: Mapping[str, int] | None = None,
        names: Sequence[str] = (),
    ) -> Seating:
        """As `seat_replicas`. `fit_on` is taken for another one only where it is another object."""
        offers = {node: (report.slices, report.cordoned) for node, report in reports.items()}
        asked = (models, offers, fit_on, dict(current), dict(pools or {}), dict(numbers or {}), tuple(names))
        if asked != self._asked:
            self._found = seat_replicas(models, reports, fit_on, current, pools=pools, numbers=numbers, names=names)
            self._asked = asked
        return self._found


def without_slices(reports: Mapping[str, NodeReport], keys: Collection[str]) -> Mapping[str, NodeReport]:
    """`reports` without the slices that have these names in the cluster."""
    if not keys:
        return reports

    def left(report: NodeReport) -> NodeReport:
        slices = tuple(one for one in report.slices if slice_key(report.node, one.id) not in keys)
        return report if len(slices) == len(report.slices) else report.model_copy(update={"slices": slices})

    return {node: left(report) for node, report in reports.items()}


@dataclass(frozen=True, slots=True)
class _Ground:
    """What all replicas have in common: who fits where, the slices, the slice ids of those that run, and what is kept apart."""

    fits: Fits
    inventory: Inventory
    here: Mapping[str, str]
    apart: Mapping[str, Apart]

    def without(self, slice_ids: Collection[str]) -> Inventory:
        return Inventory(tuple(s for s in self.inventory.slices if s.id not in slice_ids))


def _seat_all(
    wanted: Sequence[Wanted],
    more: Sequence[Wanted],
    ground: _Ground,
    closed: Collection[str],
    priority: Mapping[str, int],
) -> tuple[Assignment, dict[str, SlicewayError]]:
    """Seats for everybody, and who stays where `profiles` do not want it. Whoever would stay, and has lost its slice, keeps that from all
    who are not more important, and from those who are configured only if it is itself; where it cannot stay even so, nobody spares it.
    Each replica comes to be spared, and not to be, at most once.
    """
    by_replica = {w.replica: w for w in (*wanted, *more)}
    lent = {ground.here[w.replica] for w in more if w.replica in ground.here}
    spared, in_vain = set[str](), set[str]()
    while True:
        of_configured = spared & {w.replica for w in wanted}
        found = _seat_configured(wanted, _sparing(ground, of_configured, by_replica, priority), lent)
        if more:
            found = _seat_more(more, _sparing(ground, spared, by_replica, priority), found, closed, priority)
        staying = _staying(found, by_replica, ground)
        lost = spared - staying.keys() - found.slices.keys()
        driven_out = _serving_on(found, by_replica, ground) - staying.keys() - spared - in_vain
        if not (lost or driven_out):
            return _explained(found, spared, by_replica, ground), staying
        spared, in_vain = (spared - lost, in_vain | lost) if lost else (spared | driven_out, in_vain)


def _sparing(
    ground: _Ground, spared: Collection[str], wanted: Mapping[str, Wanted], priority: Mapping[str, int]
) -> _Ground:
    """`ground` where the slices of those who are `spared` fit no other model that is not more important."""
    if not spared:
        return ground
    owners = {ground.here[replica]: wanted[replica] for replica in spared}
    pinned = {w.model for w in wanted.values() if w.pin is not None}  # an operator has named the slice
    fits = {
        (model, key): replace(fit, fits=False, reason=f"{owner.replica} serves on there")
        if (owner := owners.get(key)) and model not in pinned and priority[model] <= priority[owner.model]
        else fit
        for (model, key), fit in ground.fits.items()
    }
    for key, owner in owners.items():
        fits[owner.model, key] = ground.fits[owner.model, key]
    return replace(ground, fits=fits)


def _explained(found: Assignment, spared: Collection[str], wanted: Mapping[str, Wanted], ground: _Ground) -> Assignment:
    """`found` where those who wait for a slice that is spared are told so, and not that they fit nowhere."""
    unplaced = dict(found.unplaced)
    for replica in found.unplaced.keys() - spared:
        one = wanted[replica]
        in_the_way = [
            other
            for other in sorted(spared)
            if ground.fits[one.model, ground.here[other]].fits
            and (not one.profiles or ground.inventory.by_id[ground.here[other]].profile in one.profiles)
        ]
        if in_the_way and one.pin is None:
            unplaced[replica] = NoFreeSlice(
                f"no slice is free for {replica!r}: {', '.join(in_the_way)} serves on where it could be",
                where=f"models.{one.model}",
                remedy="Have a plan make room: sliceway apply CONFIG --ray HOST:PORT.",
            )
    return Assignment(found.slices, unplaced)


def _serving_on(found: Assignment, wanted: Mapping[str, Wanted], ground: _Ground) -> set[str]:
    """Replicas that run where `profiles` do not want them any more, and find no other slice."""
    return {
        replica
        for replica in found.unplaced
        if (key := ground.here.get(replica)) is not None
        and (one := wanted[replica]).pin is None
        and one.profiles
        and ground.inventory.by_id[key].profile not in one.profiles
        and ground.fits[one.model, key].fits
    }


def _staying(found: Assignment, wanted: Mapping[str, Wanted], ground: _Ground) -> dict[str, SlicewayError]:
    """Those that serve on: where nobody has their slice, and none of their model is too near."""
    taken, staying = set(found.slices.values()), dict[str, SlicewayError]()
    for replica in sorted(_serving_on(found, wanted, ground)):
        one, key = wanted[replica], ground.here[replica]
        group = ground.apart[one.model].group_of if one.model in ground.apart else {}
        beside = {group.get(s) for r, s in found.slices.items() if wanted[r].model == one.model}
        if key in taken or group.get(key, object()) in beside:
            continue
        staying[replica] = NoFreeSlice(
            f"it serves on until there is a free slice of {' or '.join(one.profiles)}",
            where=f"models.{one.model}",
            remedy="Have a plan make room: sliceway apply CONFIG --ray HOST:PORT.",
        )
    return staying


def _seat_configured(wanted: Sequence[Wanted], ground: _Ground, lent: Collection[str]) -> Assignment:
    """Seats on any slice; on those that are `lent` to replicas for demand only where as many would not find one otherwise."""
    everywhere = _seat(wanted, ground, ground.inventory)
    if not lent:
        return everywhere
    spared = _seat(wanted, ground, ground.without(lent))
    same = spared.unplaced.keys() == everywhere.unplaced.keys()
    return Assignment(spared.slices, everywhere.unplaced) if same else everywhere


def _seat(wanted: Sequence[Wanted], ground: _Ground, inventory: Inventory) -> Assignment:
    found = assign(wanted, ground.fits, inventory, current=ground.here, apart=ground.apart)
    if found.unplaced:
        found = _most_important(wanted, ground.fits, inventory, ground.here, ground.apart)
    return found


def _seat_more(
    more: Sequence[Wanted],
    ground: _Ground,
    configured: Assignment,
    closed: Collection[str],
    priority: Mapping[str, int],
) -> Assignment:
    """Seats for replicas that are there for demand, where those before them leave room. One priority after the other, the
    highest first: each spares the slices of those after it for as long as there are others.
    """
    seats, unplaced = dict(configured.slices), dict(configured.unplaced)
    for level in sorted({priority[w.model] for w in more}, reverse=True):
        mine = [w for w in more if priority[w.model] == level]
        after = {ground.here[w.replica] for w in more if priority[w.model] < level and w.replica in ground.here}
        fits = fits_apart(ground.fits, seats, ground.apart)
        taken = {*seats.values(), *(set(closed) - {ground.here.get(w.replica) for w in mine})}
        for spared in (after, set[str]()):
            open_to = ground.without(taken | spared)
            found = assign(mine, fits, open_to, current=ground.here, may_move=False, apart=ground.apart)
            if not found.unplaced:
                break
        seats |= found.slices
        unplaced |= {w.replica: _no_room(w) for w in mine if w.replica in found.unplaced}
    return Assignment(seats, unplaced)


def _no_room(wanted: Wanted) -> PlacementError:
    return NoFreeSlice(
        f"demand asks for {wanted.replica!r}, and no slice that it fits is free",
        where=f"models.{wanted.model}.replicas",
        remedy="It starts as soon as one is; add a node, or lower `max`.",
    )


def _by_importance(
    replicas: Sequence[Wanted], models: Sequence[ModelConfig], here: Mapping[str, str]
) -> tuple[Wanted, ...]:
    """The highest priority first; among equals who sits already, then every model's first replica, its second one, and so on."""
    priority = {model.name: model.priority for model in models}
    return tuple(
        sorted(replicas, key=lambda w: (-priority[w.model], w.replica not in here, w.ordinal, w.model, w.replica))
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
