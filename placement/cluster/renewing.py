"""Replicas of a cluster that take another one's place: started on a free slice of any node before the one that they replace is left.

As on one machine (`placement.renewals`) the new one has a name of its own, and keeps it. What is under way and what replicas are
called since is in the head's journal, together with the seats: a head that is killed between any two of its writes goes on there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from model_registry.schema import ModelConfig
from placement.assign import Pools, natural, stem, stem_of, wanted_replicas
from placement.cluster.members import NodeReport, Seat, slice_key
from placement.cluster.seating import FitOn
from placement.demanded import model_of, more_replicas
from placement.renewals import alike, fresh_name, renamed
from placement.slices import Slice
from placement.table import ReplicaRow, ReplicaState

log = logging.getLogger(__name__)

Reports = Mapping[str, NodeReport]
Seats = Mapping[str, Seat]


class Successor(BaseModel):
    """A replica that starts to take the place of another one, `of`. Once it `has_place` the other one is only still being left."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    of: str
    has_place: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What the configuration asks for at the moment: its models, their pools, and the numbers that demand asks for, by pool."""

    models: Sequence[ModelConfig]
    pools: Pools
    numbers: Mapping[str, int]

    def replicas(self, names: Sequence[str], current: Seats) -> set[str]:
        """Everybody who is to have a slice, by name."""
        wanted = wanted_replicas(self.models, self.pools, names)
        here = {replica: seat.key for replica, seat in current.items()}
        more = more_replicas(self.models, self.pools, wanted, self.numbers, here)
        return {w.replica for w in (*wanted, *more)}


class Renewing:
    """Which replicas are about to take a place, and what those are called that have. Values in, values out; `restore` sets both."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._successors: dict[str, Successor] = {}

    def restore(self, names: Sequence[str], successors: Mapping[str, Successor]) -> None:
        """Go on where a head before this one was."""
        self._names, self._successors = tuple(names), dict(successors)

    @property
    def names(self) -> tuple[str, ...]:
        """Replicas of those pools where one has taken another's place; see `wanted_replicas`."""
        return self._names

    @property
    def successors(self) -> Mapping[str, Successor]:
        """By their own names, for the journal."""
        return self._successors

    @property
    def under_way(self) -> Mapping[str, str]:
        """Whose place it is that each of those who start is to take."""
        return {replica: one.of for replica, one in self._successors.items() if not one.has_place}

    @property
    def left(self) -> frozenset[str]:
        """Replicas whose place another one has, and which have not ended yet."""
        return frozenset(one.of for one in self._successors.values() if one.has_place)

    def find(self, models: Sequence[ModelConfig], pools: Pools, current: Seats, reports: Reports) -> None:
        """The names of a cluster whose journal is lost: where a replica is missing and one of another number is there, that one has
        its place; rather one that serves.
        """
        names: list[str] = []
        for model in models:
            for tenant in pools.get(model.name, (None,)) if model.source and not model.slices else ():
                pool = stem(model.name, tenant)
                mine = [(not serves(seat, reports), natural(r), r) for r, seat in current.items() if stem_of(r) == pool]
                chosen = sorted(sorted(mine)[: model.least_replicas], key=lambda one: one[1])
                names += [replica for _, _, replica in chosen]
        self._names = _telling(names, models, pools)

    def look(self, models: Sequence[ModelConfig], pools: Pools, current: Seats, reports: Reports) -> None:
        """See how far it is. `current` are all seats, `reports` those of the nodes that take orders.

        Whoever serves by the newest configuration has the place, and so has one that is left alone, because the other one's node
        is lost. One that is not needed any more, or that would have to be replaced itself, is given up.
        """
        self._names = _telling(self._names, models, pools)
        for replica, one in list(self._successors.items()):
            mine, other = current.get(replica), current.get(one.of)
            if one.has_place:
                over = other is None or other.node not in reports
            else:
                over = mine is None or (other is not None and _needless(mine, other, reports))
            if over:
                del self._successors[replica]
            elif not one.has_place and mine is not None and (other is None or serves(mine, reports)):
                log.info("%s: %s on %s has its place", one.of, replica, mine.key)
                self._names = _telling(renamed(self._names, one.of, replica, models, pools), models, pools)
                self._successors[replica] = Successor(of=one.of, has_place=True)

    def drop_failed(self, current: Seats, reports: Reports) -> dict[str, tuple[str, str]]:
        """Give up those that start beside another one and do not get anywhere: whose place it was, and why, by their names."""
        found: dict[str, tuple[str, str]] = {}
        for replica, of in self.under_way.items():
            row = _row(current[replica], reports) if replica in current else None
            if row is not None and row.state is ReplicaState.FAILED:
                log.warning("%s: %s, which was to take its place, failed: %s", of, replica, row.reason)
                found[replica] = of, row.reason or "it failed"
                del self._successors[replica]
        return found

    def counted(self, current: Seats) -> dict[str, Seat]:
        """The seats without those that are two for one: who starts beside another one, and who is being left."""
        two_for_one = {*self.under_way, *self.left}
        return {replica: seat for replica, seat in current.items() if replica not in two_for_one}

    def give_way(self, asked: Asked, current: Seats) -> None:
        """Whoever is asked for by name is what it is called: demand may have grown to the number of one that starts beside another."""
        if self._successors:
            names = asked.replicas(self._names, self.counted(current))
            self._successors = {
                replica: one
                for replica, one in self._successors.items()
                if (one.of if one.has_place else replica) not in names
            }

    def give_up(self, seats: Seats, current: Seats) -> dict[str, Seat]:
        """The seats of those that start beside another one, as far as nobody in `seats` has their slice, and the other one is in there."""
        taken = {seat.key for seat in seats.values()}
        for replica, of in self.under_way.items():
            if replica in seats or of not in seats or current[replica].key in taken:
                log.info("%s: %s, which was to take its place, is given up", of, replica)
                del self._successors[replica]
        return {replica: current[replica] for replica in self.under_way}

    def begin(
        self,
        old: str,
        models: Sequence[ModelConfig],
        reports: Reports,
        fit_on: FitOn,
        seats: Seats,
        taken: Seats,
        avoid: Collection[str] = (),
    ) -> Seat | None:
        """Have one start for `old`, which serves: its seat; None where no slice is free that will do.

        `seats` are those of everybody, `taken` whatever else is held or still runs, and slices in `avoid` the last that are taken.
        """
        model = next((m for m in models if m.name == model_of(old)), None)
        if model is None or old in self.under_way.values() or not serves(seats[old], reports):
            return None
        found = place_beside(model, old, reports, fit_on, seats, taken, avoid)
        if found is None:
            return None
        node, there = found
        replica = fresh_name(old, {*seats, *taken, *self._names})
        log.info("%s: %s starts on %s, to take its place", old, replica, slice_key(node, there.id))
        self._successors[replica] = Successor(of=old)
        return Seat(replica=replica, model=model.name, node=node, slice_id=there.id)


def place_beside(
    model: ModelConfig,
    old: str,
    reports: Reports,
    fit_on: FitOn,
    seats: Seats,
    taken: Seats,
    avoid: Collection[str] = (),
) -> tuple[str, Slice] | None:
    """Node and slice for a successor of `old`, which is in `seats`; None where none will do. `taken` are more seats that somebody has.

    Rather one that is not in `avoid`, by its name in the cluster, then a slice like its own, then none that is smaller, then one of its own node, where the model's files are warm. None that is
    cordoned, nor one that the model's `spread` forbids beside its other replicas.
    """
    if model.slices:
        return None
    here = seats[old]
    own = next((s for s in reports[here.node].slices if s.id == here.slice_id), None)
    if own is None:
        return None
    occupied = {seat.key for seat in (*seats.values(), *taken.values())}
    occupied |= {slice_key(node, one) for node, report in reports.items() for one in report.running.values()}
    closed = {
        _group(model.spread, seat.node, _slice_of(seat, reports))
        for replica, seat in seats.items()
        if replica != old and seat.model == model.name
    } - {None}
    accepted = model.accepted_profiles
    free = [
        (node, one)
        for node, report in reports.items()
        for one in report.slices
        if slice_key(node, one.id) not in occupied
        and one.id not in report.cordoned
        and (not accepted or one.profile in accepted)
        and _group(model.spread, node, one) not in closed
    ]

    def rank(place: tuple[str, Slice]) -> tuple[bool, bool, bool, bool, int, object]:
        node, one = place
        size, key = one.memory_bytes - own.memory_bytes, slice_key(node, one.id)
        return key in avoid, not alike(one, own), size < 0, node != here.node, abs(size), natural(key)

    return next((place for place in sorted(free, key=rank) if fit_on(model.name, place[1]).fits), None)


def _group(spread: str, node: str, there: Slice | None) -> str | None:
    """What no other replica of the model may share with one there."""
    if spread == "nodes":
        return node
    return f"{node}/{there.gpu.uuid}" if spread == "gpus" and there is not None and there.gpu is not None else None


def _needless(mine: Seat, other: Seat, reports: Reports) -> bool:
    """Whether a successor is for nothing: the other one runs by the newest configuration, or itself does not any more."""
    there, here = reports.get(other.node), reports.get(mine.node)
    if there is None or here is None:
        return here is None
    runs = there.running.get(other.replica) == other.slice_id
    return (runs and other.replica not in there.outdated) or mine.replica in here.outdated


def serves(seat: Seat, reports: Reports) -> bool:
    """Whether its replica takes requests there."""
    row = _row(seat, reports)
    return row is not None and row.state is ReplicaState.READY


def _row(seat: Seat, reports: Reports) -> ReplicaRow | None:
    rows = reports[seat.node].table.replicas if seat.node in reports else ()
    return next((r for r in rows if r.replica == seat.replica and r.slice.id == seat.slice_id), None)


def _slice_of(seat: Seat, reports: Reports) -> Slice | None:
    slices = reports[seat.node].slices if seat.node in reports else ()
    return next((one for one in slices if one.id == seat.slice_id), None)


def _telling(names: Collection[str], models: Sequence[ModelConfig], pools: Pools) -> tuple[str, ...]:
    """Those of `names` that tell something: of pools that there are, and whose replicas would be called otherwise without them."""
    if not names:
        return ()
    by_pool: dict[str, list[str]] = {}
    for wanted in wanted_replicas(models, pools):
        by_pool.setdefault(stem_of(wanted.replica), []).append(wanted.replica)
    mine = {pool: [name for name in names if stem_of(name) == pool] for pool in by_pool}
    return tuple(
        name
        for pool, usual in by_pool.items()
        if mine[pool][: len(usual)] != usual[: len(mine[pool])]
        for name in mine[pool]
    )
