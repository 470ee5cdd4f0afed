"""Slices beyond the plan: made for a replica that is to start beside the one it replaces, and given back afterwards.

How a slice is made is behind a seam (`placement.renewals.Rooms`), and which ones there are is kept there too; here is when:
one thing at a time, and what becomes of goals then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from model_registry.errors import ConfigError, SlicewayError
from placement.errors import StateLocked
from placement.goals import Goals
from placement.renewals import Renewals, Rooms, not_on
from placement.replicas.parts import Goal
from placement.slices import SliceKind

log = logging.getLogger(__name__)

_NOT_NOW = (StateLocked, ConfigError)  # a plan is carried out, or a file is being written: it is tried again


class SpareSlices:
    """Without `rooms` none are ever made. `deciding` is held while slices are given back or written down. `replan` has goals
    worked out anew on the slices that there are then, `postpone` has all of this looked at again later, and `changed` says that
    it may be now.
    """

    def __init__(
        self,
        rooms: Rooms | None,
        renewals: Renewals,
        deciding: asyncio.Lock,
        *,
        replan: Callable[[], Awaitable[None]],
        postpone: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._rooms = rooms
        self._renewals = renewals
        self._deciding = deciding
        self._replan = replan
        self._postpone = postpone
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        self._sought: set[tuple[str, str | None]] = set()  # replicas and specifications that room was sought for

    @property
    def busy(self) -> bool:
        """Whether one is being made, or some are being given back."""
        return self._task is not None

    def seek(self, name: str, goals: Goals) -> bool:
        """Have a slice made for a successor of `name`, once for each specification. Whether that is under way."""
        goal = goals.replicas[name]
        if self._rooms is None or goals.config.seats is None or goal.slice.kind is not SliceKind.MIG:
            return False
        if (name, goal.spec_hash) in self._sought:
            return False
        self._task = asyncio.create_task(self._make(self._rooms, goal, not_on(goals, name)))
        return True

    def tidy_up(self, in_use: Callable[[], Collection[str]], *, unsettled: bool) -> None:
        """Give back those that are not `in_use`, later if things are `unsettled`: something is to be replaced, or about to leave
        its slice. Those where a replica is for a while are kept in mind until it is back.
        """
        if not self._to_give_back() or self._rooms is None or self.busy:
            return
        if unsettled:
            self._postpone()
            return
        self._task = asyncio.create_task(self._give_back(self._rooms, in_use))

    def _to_give_back(self) -> tuple[str, ...]:
        return tuple(s for s in self._renewals.spare if s not in self._renewals.away)

    async def stop(self) -> None:
        """Give up what is under way; what was made is written down for the next controller."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _make(self, rooms: Rooms, goal: Goal, apart_from: Collection[str]) -> None:
        """Its id is written down before there is such a slice, so that one is given back also by the next controller."""
        try:
            found = await asyncio.to_thread(rooms.find, goal.slice.id, apart_from)
            if found is not None:
                # Else what a seat that goes over writes down meanwhile would be lost, or this.
                async with self._deciding:
                    self._renewals.made(found)
                await asyncio.to_thread(rooms.make, found)
                log.info("%s: %s is made, to start another one there beside it", goal.replica, found)
                await self._replan()
            self._settle(goal)
        except _NOT_NOW:
            self._postpone()
        except (SlicewayError, OSError) as error:
            log.warning("%s: no room is made to start another one beside it: %s", goal.replica, error)
            self._settle(goal)
        finally:
            self._task = None

    def _settle(self, goal: Goal) -> None:
        """Room was sought for it, with or without success: what it is to be next is decided anew."""
        self._sought.add((goal.replica, goal.spec_hash))
        self._changed()

    async def _give_back(self, rooms: Rooms, in_use: Callable[[], Collection[str]]) -> None:
        before = self._renewals.spare
        try:
            async with self._deciding:
                for slice_id in self._to_give_back():
                    if slice_id in in_use():
                        self._renewals.given_back(slice_id)
                    elif await asyncio.to_thread(rooms.give_back, slice_id):
                        log.info("%s is given back: nothing is to be replaced any more", slice_id)
                        self._renewals.given_back(slice_id)
                    else:
                        self._postpone()
            # Planned anew for nothing, this would be looked at again at once, for as long as somebody has a claim on one.
            if self._renewals.spare != before:
                await self._replan()
        except _NOT_NOW:
            self._postpone()
        except (SlicewayError, OSError) as error:
            log.warning("what was made to start a replica beside another one is not given back yet: %s", error)
            self._postpone()
        finally:
            self._task = None
