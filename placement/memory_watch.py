"""Looks after the memory budgets of `cpu` slices: an engine that exceeds its own is ended, and says why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from placement.clock import Clock
from placement.replicas.memory import Usage, measure
from placement.replicas.replica import Replica
from placement.slices import SliceKind

log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0


class MemoryWatch:
    """Looks at a controller's own `replicas`, which come and go; `changed` is called when there are new figures."""

    def __init__(self, replicas: Mapping[str, Replica], clock: Clock, changed: Callable[[], None]) -> None:
        self._replicas = replicas
        self._clock = clock
        self._changed = changed
        self._usage: Mapping[int, Usage] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._clock.sleep(_LOOK_SECONDS)
            await self._look()

    def used_bytes(self, session: int | None) -> int | None:
        """What a session's processes took at the last look; None for one that is not watched."""
        usage = self._usage.get(session) if session is not None else None
        return usage.used_bytes if usage else None

    async def _look(self) -> None:
        watched = {
            r.view.session: r
            for r in self._replicas.values()
            if r.view.session is not None and r.goal.slice.kind is SliceKind.CPU
        }
        budgets = {session: r.goal.slice.memory_bytes for session, r in watched.items()}
        self._usage = await asyncio.to_thread(measure, budgets)
        for session, usage in self._usage.items():
            if usage.exact and usage.used_bytes > budgets[session]:
                log.warning("%s: over its memory budget, killing it", watched[session].goal.replica)
                watched[session].exceed(usage.used_bytes)
        if watched:
            self._changed()
