"""Replicas that take another one's place: started beside it on a slice of its own, by what the configuration asks for now.

Two engines that run side by side are two replicas to everyone who knows replicas by name, so the new one has a name of its
own, and keeps it. `renewals.json` in the state directory holds what is under way, and what replicas are called since: the
next controller goes on with both. Where a fleet is planned the seat goes from one to the other.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Protocol

from model_registry.atomic import write_atomically
from model_registry.errors import SlicewayError
from model_registry.schema import ModelConfig
from placement.assign import Pools, natural, stem_of, wanted_replicas
from placement.errors import PlacementError, StateLocked
from placement.goals import Goals, PlacementConfig, Workshop
from placement.orders import Orders
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.replicas.parts import Goal
from placement.slices import Slice
from placement.state import StatePaths

log = logging.getLogger(__name__)

RENEWALS_FILE = "renewals.json"
"""Its name in the state directory."""


@dataclass(frozen=True, slots=True)
class Successor:
    """A replica that starts on `slice_id` to take the place of another one, `of`. Where the plan would not have it there, `home` is
    the slice that another one like it is to be found for, when nothing else is to be replaced; empty where it may stay.
    """

    replica: str
    of: str
    slice_id: str
    home: str = ""


class Rooms(Protocol):
    """Who makes slices where none is free. All verbs block, raise StateLocked while a plan is carried out, and other
    errors of SlicewayError where it cannot be done.
    """

    def find(self, like: str, not_on: Collection[str]) -> str | None:
        """Where a slice like that one could be made, nothing having to go for it, on none of the GPUs `not_on`, rather on a GPU that
        the plan uses; None where there is no room. Changes nothing, so that the id can be written down before there is such a slice.
        """

    def make(self, slice_id: str) -> None:
        """Make the slice that `find` has found room for."""

    def give_back(self, slice_id: str) -> bool:
        """Take it away again, if nobody uses it. Whether that is settled: it is not there any more, or somebody has a claim on it."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """What is written down. `names` are replicas of those models where one has taken another's place, `under_way` those that
    are about to. `spare` are slices beyond the plan, made for such a replica or left by the one before it. `away` are slices where
    replicas are for a while only, each with the one that it had before.
    """

    names: tuple[str, ...] = ()
    under_way: tuple[Successor, ...] = ()
    spare: tuple[str, ...] = ()
    away: tuple[tuple[str, str], ...] = ()

    def standing(self, config: PlacementConfig) -> Collection[str]:
        """The replicas that the plan, or where there is none the configuration, asks for by name: none that is there for demand."""
        if config.seats is not None:
            return config.seats.keys()
        return {w.replica for w in wanted_replicas(config.models, config.pools, self.names)}

    def held(self, goals: Goals, orders: Orders) -> dict[str, str]:
        """Why replicas are replaced in their places, whatever slices are free, by name; those that may be elsewhere are left out."""
        standing, ordered = self.standing(goals.config), {*orders.drained, *orders.stopped, *orders.seats}
        held: dict[str, str] = {}
        for name, goal in goals.replicas.items():
            if goals.models[goal.model].config.slices:
                held[name] = "it is pinned to its slice"
            elif name in ordered:
                held[name] = "it is under orders of an operator"
            elif name not in standing:  # it has no name to hand on
                held[name] = "it is there for demand only"
        return held

    def with_successor(self, one: Successor) -> Renewed:
        """One more is under way."""
        return replace(self, under_way=(*self.under_way, one))

    def without(self, replica: str) -> Renewed:
        """That successor is given up, or has its place."""
        return replace(self, under_way=tuple(s for s in self.under_way if s.replica != replica))

    def about_to_leave(self, one: Successor, left: str) -> Renewed:
        """Before the seat goes over: what is there afterwards is known already, whoever is killed in between."""
        spare = (
            (*(s for s in self.spare if s != left), left) if one.slice_id in self.spare and not one.home else self.spare
        )
        if not one.home:
            return replace(self, spare=spare)
        return replace(self, away=(*(a for a in self.away if a[0] != one.slice_id), (one.slice_id, one.home)))

    def having_left(self, one: Successor, left: str) -> Renewed:
        """After it. A slice that was made for a while is the plan's then, unless its replica is there for a while only."""
        spare = self.spare if one.home else tuple(s for s in self.spare if s != one.slice_id)
        away = tuple(a for a in self.away if a[0] != left)
        return replace(self.without(one.replica), spare=spare, away=away)

    def called(self, old: str, new: str, config: PlacementConfig) -> Renewed:
        """As `renamed`."""
        return replace(self, names=renamed(self.names, old, new, config.models, config.pools))


@dataclass(frozen=True, slots=True)
class RenewalsFile:
    """The file of one state directory."""

    path: Path

    def read(self) -> Renewed:
        """Nothing where there is no file, or one that makes no sense: then what runs under other names is started anew."""
        try:
            raw = json.loads(self.path.read_bytes())
            under_way = tuple(
                Successor(str(n), str(of), str(there), *map(str, home)) for n, of, there, *home in raw["under_way"]
            )
            names = tuple(str(n) for n in raw["names"] if str(n).rpartition("-")[2].isdigit())
            away = tuple((str(there), str(home)) for there, home in raw.get("away", ()))
            return Renewed(names, under_way, tuple(map(str, raw["spare"])), away)
        except (OSError, ValueError, KeyError, TypeError):
            return Renewed()

    def write(self, renewed: Renewed) -> None:
        """Replace it. Raises OSError."""
        if renewed == Renewed():
            self.path.unlink(missing_ok=True)
            return
        under_way = [[s.replica, s.of, s.slice_id, *filter(None, [s.home])] for s in renewed.under_way]
        raw = {"names": renewed.names, "under_way": under_way, "spare": renewed.spare, "away": renewed.away}
        write_atomically(self.path, json.dumps(raw).encode(), mode=0o600)


class Renewals:
    """What is under way, and what came of it. `alone` keeps a plan from being carried out meanwhile; it raises StateLocked
    where one is.
    """

    def __init__(self, paths: StatePaths, alone: Callable[[], AbstractContextManager[None]]) -> None:
        self._file = RenewalsFile(paths.root / RENEWALS_FILE)
        self._seats = PlannedSeats(paths.root / SEATS_FILE)
        self._alone = alone
        self._now = self._file.read()

    @property
    def names(self) -> tuple[str, ...]:
        """What replicas are called since another one took their place."""
        return self._now.names

    @property
    def under_way(self) -> tuple[Successor, ...]:
        """Replicas that start beside the one whose place they are to take."""
        return self._now.under_way

    @property
    def spare(self) -> tuple[str, ...]:
        """Slices beyond the plan, to be given back when nothing is to be replaced any more."""
        return self._now.spare

    @property
    def away(self) -> Mapping[str, str]:
        """Slices where replicas are for a while only, each with the one that it had before."""
        return dict(self._now.away)

    def find(self, alive: Collection[str], config: PlacementConfig) -> PlacementConfig:
        """Take over what a controller before this one has begun; `alive` are replicas whose engines run.

        A successor that is left alone has the place; one that has ended is forgotten, as are names that nobody has any more.
        Gives `config` as it is then.
        """
        for one in self.under_way:
            if one.replica not in alive or one.of in alive:
                continue
            told = self.finish(one, config)
            config = told if told is not None else config
        under_way = tuple(s for s in self.under_way if s.replica in alive and s.of in alive)
        called = {stem_of(name) for name in self.names if name in alive}
        names = tuple(n for n in self.names if stem_of(n) in called)
        self._keep(replace(self._now, names=names, under_way=under_way))
        return config

    def seated(self, config: PlacementConfig) -> PlacementConfig:
        """`config` with the seats that are written down by now, where it has any: it may be older than the last of them.

        Raises PlacementError for a list of seats that makes no sense.
        """
        seats = self._seats.read() if config.seats is not None else None
        return config if seats is None else config.model_copy(update={"seats": seats})

    def held(self, goals: Goals, orders: Orders) -> Mapping[str, str]:
        """See `Renewed.held`."""
        return self._now.held(goals, orders)

    def begin(self, one: Successor) -> None:
        """Written down before its engine is started. Raises OSError."""
        self._keep(self._now.with_successor(one))

    def made(self, slice_id: str) -> None:
        """That slice is beyond the plan. Raises OSError."""
        self._keep(replace(self._now, spare=(*(s for s in self.spare if s != slice_id), slice_id)))

    def given_back(self, slice_id: str) -> None:
        """It is not there any more, or somebody has it. Raises OSError."""
        self._keep(replace(self._now, spare=tuple(s for s in self.spare if s != slice_id)))

    def give_up(self, goals: Goals) -> None:
        """Forget successors that have no goal, and who was to be back from where nobody is."""
        for one in self.under_way:
            goal = goals.replicas.get(one.replica)
            if goal is None or goal.in_place_of is None:
                self._keep(self._now.without(one.replica))
        held = {g.slice.id for g in goals.replicas.values()} | set((goals.config.seats or {}).values())
        self._keep(replace(self._now, away=tuple(a for a in self._now.away if a[0] in held)))

    def finish(self, one: Successor, config: PlacementConfig) -> PlacementConfig | None:
        """It has the place: `config` as it is from here on; None if it has to wait, since a plan is being carried out, or since
        the fleet's configuration or the list of seats makes no sense at the moment.

        Blocks for a moment. Raises OSError.
        """
        if config.seats is None:
            self._keep(self._now.called(one.of, one.replica, config).without(one.replica))
            return config
        left = config.seats.get(one.of)
        try:
            with self._alone():
                if left is not None:
                    self._keep(self._now.about_to_leave(one, left))
                self._seats.hand_over(one.of, one.replica, one.slice_id)
        except StateLocked:
            return None
        except SlicewayError as error:
            log.warning("%s: %s cannot have its place yet: %s", one.of, one.replica, error)
            return None
        self._keep(self._now.without(one.replica) if left is None else self._now.having_left(one, left))
        seats = {name: there for name, there in config.seats.items() if name != one.of}
        return config.model_copy(update={"seats": seats | {one.replica: one.slice_id}})

    def _keep(self, renewed: Renewed) -> None:
        if renewed != self._now:
            self._file.write(renewed)
            self._now = renewed


def renamed(names: tuple[str, ...], old: str, new: str, models: Sequence[ModelConfig], pools: Pools) -> tuple[str, ...]:
    """`names` with those of one pool, `new` where `old` was; as they are where nobody asks for `old` by name."""
    pool = stem_of(old)
    wanted = [w.replica for w in wanted_replicas(models, pools, names)]
    mine = tuple(new if name == old else name for name in wanted if stem_of(name) == pool)
    return (*(name for name in names if stem_of(name) != pool), *mine) if old in wanted else names


def fresh_name(old: str, used: Collection[str]) -> str:
    """The lowest number of the same pool that nobody has."""
    pool = stem_of(old)
    return next(name for name in (f"{pool}-{i}" for i in count()) if name not in used)


def place_beside(
    goals: Goals,
    old: str,
    taken: Collection[str],
    *,
    like: Slice | None = None,
    away: Collection[str] = (),
    beyond: bool = False,
) -> Slice | None:
    """The slice on which a successor of `old` may start; None if there is none. `taken` are slice ids that it may not have.

    The best is one of the same kind as `like` (its own, unless another one is named), then a larger one. Where a fleet is planned only
    the same kind will do, and no GPU more is used for it: the plan has chosen both. Unless it goes `beyond` the plan, for a while.
    Slices where others are `away` for a while are no reason to use their GPU. Pure.
    """
    goal = goals.replicas[old]
    model, here = goals.models[goal.model].config, like or goal.slice
    if model.slices:
        return None
    occupied = set(taken) | _occupied(goals)
    closed = not_on(goals, old)
    free = [s for s in goals.fitting(goal.model) if s.id not in occupied and _group(s) not in closed]
    if goals.config.seats is not None and not beyond:
        free = [s for s in free if as_planned(goals, old, s, taken, like=here, away=away)]
    busy = _busy(goals, taken, {here.id, goal.slice.id, *away})

    def rank(one: Slice) -> tuple[bool, bool, bool, int, object]:
        smaller = one.memory_bytes < here.memory_bytes
        return (
            not alike(one, here),
            smaller,
            _group(one) not in busy,
            abs(one.memory_bytes - here.memory_bytes),
            natural(one.id),
        )

    return min(free, key=rank, default=None)


def as_planned(
    goals: Goals,
    old: str,
    target: Slice,
    taken: Collection[str],
    *,
    like: Slice | None = None,
    away: Collection[str] = (),
) -> bool:
    """Whether a successor of `old` may stay on `target`: nothing is planned, or it is of the same kind, on a GPU that is used anyway or
    that the other GPU is left for. Pure.
    """
    if goals.config.seats is None:
        return True
    here = like or goals.replicas[old].slice
    busy = _busy(goals, taken, {here.id, goals.replicas[old].slice.id, *away})
    return alike(target, here) and (_group(here) not in busy or _group(target) in busy)


def _occupied(goals: Goals) -> set[str]:
    return {g.slice.id for g in goals.replicas.values()} | set((goals.config.seats or {}).values())


def _busy(goals: Goals, taken: Collection[str], but: Collection[str]) -> set[str | None]:
    """GPUs that somebody uses, apart from what is on those slices."""
    occupied = (set(taken) | _occupied(goals)).difference(but)
    return {_group(s) for s in goals.inventory.slices if s.id in occupied}


def with_successors(
    goals: Goals,
    successors: Iterable[Successor],
    runs_by: Mapping[str, str],
    closed: Collection[str],
    workshop: Workshop,
    away: Collection[str] = (),
) -> Goals:
    """`goals` with those of `successors` that are still to take a place: their slice is free and not `closed`, and the other
    one still runs by another specification than it is to have, or on one of the slices `away`. `runs_by` are hashes of what runs, by
    replica.
    """
    added: dict[str, Goal] = {}
    taken = {g.slice.id for g in goals.replicas.values()} | set(closed) | set((goals.config.seats or {}).values())
    for one in successors:
        old, target = goals.replicas.get(one.of), goals.inventory.by_id.get(one.slice_id)
        if old is None or target is None or target.id in taken or one.replica in goals.replicas:
            continue
        runs = runs_by.get(one.of)
        comes_home = old.slice.id in away and not one.home
        if runs is None or (runs == old.spec_hash and not comes_home) or target not in goals.fitting(old.model):
            continue
        with contextlib.suppress(PlacementError):
            added[one.replica] = replace(goals.on(one.replica, target, workshop), in_place_of=one.of)
            taken.add(target.id)
    return replace(goals, replicas={**goals.replicas, **added})


def not_on(goals: Goals, old: str) -> frozenset[str]:
    """GPUs that a successor of `old` may not be on, since another replica is there that it is to be apart from."""
    goal = goals.replicas[old]
    if goals.models[goal.model].config.spread == "none":
        return frozenset()
    others = (g.slice for n, g in goals.replicas.items() if g.model == goal.model and n != old)
    return frozenset(s.gpu.uuid for s in others if s.gpu is not None)


def _group(one: Slice) -> str | None:
    return one.gpu.uuid if one.gpu else None


def alike(one: Slice, other: Slice) -> bool:
    """Whether they are cut the same, out of the same product."""

    def kind(s: Slice) -> tuple[object, ...]:
        return s.kind, s.profile, s.gpu.product if s.gpu else None, s.memory_bytes, len(s.cores) if not s.gpu else 0

    return kind(one) == kind(other)
