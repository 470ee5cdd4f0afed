"""How a replica of an earlier configuration is replaced: by another one that starts beside it, or in its place where none can.

Whose turn it is says `placement.turns`; what is under way, and where a successor may be, `placement.renewals`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from placement.accepted import AcceptedConfig
from placement.assign import stem_of
from placement.crew import Crew
from placement.demand_slices import for_demand
from placement.errors import PlacementError
from placement.goals import Goals, Workshop
from placement.renewals import Renewals, Successor, as_planned, fresh_name, place_beside
from placement.replicas.parts import Goal
from placement.slices import Slice
from placement.spare_slices import SpareSlices

log = logging.getLogger(__name__)


class Succession:
    """Replaces replicas of one machine's crew, each step under goals that nobody else changes meanwhile.

    `adopt` is given goals that are in force from then on, and `postpone` has all of this looked at again later.
    """

    def __init__(
        self,
        crew: Crew,
        renewals: Renewals,
        spare: SpareSlices,
        workshop: Workshop,
        *,
        accepted: AcceptedConfig,
        adopt: Callable[[Goals], None],
        postpone: Callable[[], None],
    ) -> None:
        self._crew = crew
        self._renewals = renewals
        self._spare = spare
        self._workshop = workshop
        self._accepted = accepted
        self._adopt = adopt
        self._postpone = postpone

    def renew(self, name: str, goals: Goals) -> Goals:
        """Replace it: beside it where there is a slice for that, so that nothing is missing meanwhile; in its place else.

        Gives `goals` with its successor, where one starts. Raises OSError.
        """
        if any(goal.in_place_of == name for goal in goals.replicas.values()):
            return goals
        if self._may_be_elsewhere(name, goals):
            successor = self._successor(name, goals)
            if successor is None and (self._is_being_left(name, goals) or self._is_being_made(name, goals)):
                return goals
            successor = successor or self._successor(name, goals, beyond=True)
            if successor is not None:
                return self._start(name, successor, goals)
        elif self._spare.busy:
            return goals
        others = sum(r.serves for n, r in self._crew.replicas.items() if n != name and stem_of(n) == stem_of(name))
        log.info(
            "%s: its turn to be replaced by what the configuration asks for, in its place; %d others serve meanwhile",
            name,
            others,
        )
        self._crew.restart(goals.replicas[name])
        return goals

    def come_home(self, goals: Goals) -> Goals:
        """Have one start for a replica that is where the plan would not have it, on a slice like the one that it had before.

        Gives `goals` with it, as they are where there is none, or no such slice. Raises OSError.
        """
        away = {n for n, g in goals.replicas.items() if g.slice.id in self._renewals.away and n in self._crew.replicas}
        for name in sorted(away):
            if self._home(name, goals) is None or not self._may_be_elsewhere(name, goals):
                continue
            successor = self._successor(name, goals)
            if successor is not None:
                return self._start(name, successor, goals)
        return goals

    def _start(self, name: str, successor: Goal, goals: Goals) -> Goals:
        away, here, there = self._renewals.away, goals.replicas[name].slice, successor.slice
        stays = as_planned(goals, name, there, self._taken(goals), like=self._home(name, goals), away=away)
        log.info(
            "%s: %s starts beside it, to take its place%s", name, successor.replica, "" if stays else " for a while"
        )
        self._renewals.begin(
            Successor(successor.replica, name, there.id, home="" if stays else away.get(here.id, here.id))
        )
        self._crew.launch(successor)
        return replace(goals, replicas={**goals.replicas, successor.replica: successor})

    async def hand_over(self, one: Successor) -> None:
        """A successor that serves has the place, and the other one ends. Raises OSError."""
        goals, new, old = self._crew.goals, self._crew.replicas.get(one.replica), self._crew.replicas.get(one.of)
        if goals is None or new is None or new.goal.in_place_of is None or not new.serves:
            return
        config = await asyncio.to_thread(self._renewals.finish, one, goals.config)
        if config is None:
            self._postpone()
            return
        log.info("%s: %s has its place", one.of, one.replica)
        goal = replace(new.goal, in_place_of=None)
        new.reconfigure(goal, config.engine)
        others = {name: g for name, g in goals.replicas.items() if name != one.of}
        self._adopt(replace(goals, config=config, replicas=others | {one.replica: goal}))
        if old is not None and one.of not in self._crew.leaving:
            self._crew.dismiss(old, gone=True)
        self._accepted.remember(config)

    def _may_be_elsewhere(self, name: str, goals: Goals) -> bool:
        """Whether something that serves may be replaced beside itself: not by somebody else's turns, orders or pins."""
        if goals.config.turns is not None or not self._crew.replicas[name].serves:
            return False
        return name not in self._renewals.held(goals, self._crew.orders)

    def _is_being_made(self, name: str, goals: Goals) -> bool:
        """Whether it waits for a slice that is made for it, or for somebody else."""
        return self._spare.busy or self._spare.seek(name, goals)

    def _is_being_left(self, name: str, goals: Goals) -> bool:
        """Whether somebody is about to leave a slice that will do."""
        leaving = {r.goal.slice.id for n, r in self._crew.replicas.items() if n in self._crew.leaving}
        taken = self._taken(goals) - leaving
        home, away = self._home(name, goals), self._renewals.away
        return bool(leaving) and place_beside(goals, name, taken, like=home, away=away) is not None

    def _home(self, name: str, goals: Goals) -> Slice | None:
        """The slice like which it is to have one again, if it is away; None if it is not, or that slice is gone."""
        return goals.inventory.by_id.get(self._renewals.away.get(goals.replicas[name].slice.id, ""))

    def _taken(self, goals: Goals) -> set[str]:
        open_to_all = for_demand(goals.config, goals.inventory, self._workshop.paths)
        return self._crew.occupied | open_to_all.barred

    def _successor(self, name: str, goals: Goals, *, beyond: bool = False) -> Goal | None:
        """What could start beside `name`; None where no slice that will do is free."""
        home, away = self._home(name, goals), self._renewals.away
        target = place_beside(goals, name, self._taken(goals), like=home, away=away, beyond=beyond)
        if target is None:
            return None
        stopped, seats = self._crew.orders.stopped, goals.config.seats or ()
        used = {*goals.replicas, *goals.unplaced, *self._crew.replicas, *stopped, *seats}
        try:
            return replace(goals.on(fresh_name(name, used), target, self._workshop), in_place_of=name)
        except PlacementError:
            return None
