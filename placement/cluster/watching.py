"""What the head knows of its nodes: each is asked to answer when something there is another than the head has, and at the latest in a
moment that it lives. So a look at all of them costs what has changed, however many there are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace

from placement.autoscale import Signals
from placement.clock import Clock
from placement.cluster.members import NodeReport, Word

log = logging.getLogger(__name__)

ALIVE_SECONDS = 2.0
"""So long a node of which nothing changes may be silent."""
ANSWER_SECONDS = 2.0
"""So much longer it may take to answer."""

Ask = Callable[[str, str, float], Awaitable[Word]]
"""Node, digest of the report that is known (`""`: of none), seconds to wait for another one -> its word. Raises NodeLost."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The last report of a node, which answered whatever it was asked until `at_seconds` (monotonic). What is another all the time is
    apart from it.
    """

    report: NodeReport
    demand: Mapping[str, Signals] | None
    generation: int
    at_seconds: float


class Watch:
    """One question to each node at a time, asked anew at the first look after its answer."""

    def __init__(self, ask: Ask, clock: Clock) -> None:
        self._ask = ask
        self._clock = clock
        self._heard: dict[str, Heard] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._asked: set[str] = set()
        self._answered: set[str] = set()  # the last question, and was asked none since
        self._stirred = asyncio.Event()

    async def look(self, names: Collection[str]) -> Mapping[str, Heard]:
        """The last word of all of `names` that have ever answered; the others are forgotten. Who is asked for the first time is waited
        for, as long as it may take to answer.
        """
        self._stirred.clear()
        for node in self._asked.difference(names):
            self._forget(node)
        first = [self._begin(node) for node in names if node not in self._asked]
        for node in names:
            if node not in self._asking:
                self._begin(node)
        if first:
            await asyncio.wait(first, timeout=ANSWER_SECONDS)
        else:
            await asyncio.sleep(0)  # for answers that are there already
        return dict(self._heard)

    async def stirred(self, timeout_seconds: float) -> None:
        """Return when a node has told something new since the last look began, or in `timeout_seconds`."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._stirred.wait()
        except TimeoutError:
            return

    def stop(self) -> None:
        """Ask nobody any more."""
        for node in list(self._asked):
            self._forget(node)

    def _begin(self, node: str) -> asyncio.Task[None]:
        if node in self._answered:  # a look that comes late is not the node's silence
            self._answered.discard(node)
            self._heard[node] = replace(self._heard[node], at_seconds=self._clock.monotonic())
        self._asked.add(node)
        task = self._asking[node] = asyncio.create_task(self._hear(node))
        return task

    def _forget(self, node: str) -> None:
        self._asked.discard(node)
        self._answered.discard(node)
        self._heard.pop(node, None)
        if (task := self._asking.pop(node, None)) is not None:
            task.cancel()

    async def _hear(self, node: str) -> None:
        known = self._heard.get(node)
        try:
            async with asyncio.timeout(ALIVE_SECONDS + ANSWER_SECONDS):
                word = await self._ask(node, known.report.digest if known else "", ALIVE_SECONDS if known else 0.0)
        except Exception as error:  # noqa: BLE001 - whatever keeps a node from answering, it has not answered
            log.info("node %s: %s", node, error)
        else:
            self._take(node, word, known)
        if self._asking.get(node) is asyncio.current_task():
            del self._asking[node]

    def _take(self, node: str, word: Word, known: Heard | None) -> None:
        report = known.report if known else None
        demand, generation = word.demand, word.generation
        if word.report is not None:
            demand, generation = word.report.demand, word.report.generation
            latest = word.report.model_copy(update={"demand": None})
            if latest != report:
                report = latest
                self._stirred.set()
        if report is not None:
            self._heard[node] = Heard(report, demand, generation, self._clock.monotonic())
            self._answered.add(node)
