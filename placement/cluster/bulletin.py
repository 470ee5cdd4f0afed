"""What the head tells every gateway, to whom it was told last: only what is another since, where that is known."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from uuid import uuid4

from placement.cluster.change import change_between, digest_of
from placement.cluster.members import Broadcast, BroadcastChange, News
from placement.status import ClusterScaling
from placement.table import RoutingTable

REMEMBERED = 32
"""Broadcasts that a change can be told from. Who has an older one than that gets the whole table."""


class Bulletin:
    """The broadcasts of one head, numbered from 1; none as long as `sequence` is 0."""

    def __init__(self) -> None:
        self._latest = Broadcast(head=uuid4().hex, table=RoutingTable(generation=0))
        self._told: dict[int, Broadcast] = {}
        self._news: dict[int, News] = {}  # of the latest, by what it is told from; the same for all who have that
        self._digest = ""
        self._another = asyncio.Condition()
        self._taken_over: dict[str, int] = {}

    @property
    def latest(self) -> Broadcast:
        """The newest one."""
        return self._latest

    async def tell(
        self,
        table: RoutingTable,
        config: str,
        *,
        files: Mapping[str, str] | None = None,
        scaling: ClusterScaling | None = None,
        relays: tuple[str, ...] = (),
    ) -> None:
        """A new broadcast, for everybody who asks; `files` and `scaling` None: those of the last one."""
        async with self._another:
            before = self._latest
            self._put(
                Broadcast(
                    head=before.head,
                    table=table,
                    files=before.files if files is None else dict(files),
                    config=config,
                    sequence=before.sequence + 1,
                    scaling=before.scaling if scaling is None else scaling,
                    relays=relays,
                )
            )

    async def pass_on(self, broadcast: Broadcast) -> None:
        """What a head elsewhere has told, for those who ask here."""
        async with self._another:
            self._put(broadcast)

    def _put(self, broadcast: Broadcast) -> None:
        if broadcast.head != self._latest.head:
            self._told.clear()
        self._latest = self._told[broadcast.sequence] = broadcast
        for forgotten in [one for one in self._told if one <= broadcast.sequence - REMEMBERED]:
            del self._told[forgotten]
        self._news.clear()
        self._digest = ""
        self._another.notify_all()

    def generation_at(self, boot: str) -> int:
        """Of the newest table that the agent of this start has taken over from this head; 0 where it has told of none."""
        return self._taken_over.get(boot, 0)

    def forget_all_but(self, boots: Collection[str]) -> None:
        """Nobody asks any more what other agents have."""
        self._taken_over = {boot: generation for boot, generation in self._taken_over.items() if boot in boots}

    def share(self, files: Mapping[str, str]) -> None:
        """Have the first broadcast carry these files. Only before there is one."""
        self._latest = self._latest.model_copy(update={"files": dict(files)})

    async def after(self, head: str, sequence: int, *, timeout_seconds: float) -> Broadcast | None:
        """The newest broadcast, as soon as there is one after number `sequence` of `head`, or of another head; None if there is none in
        time.
        """
        async with self._another:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._another.wait_for(lambda: self._is_newer(head, sequence))
            except TimeoutError:
                return None
            return self._latest

    def _is_newer(self, head: str, sequence: int) -> bool:
        latest = self._latest
        return latest.sequence > 0 and (latest.head != head or latest.sequence > sequence)

    async def news(self, head: str, sequence: int, *, timeout_seconds: float, boot: str = "") -> News | None:
        """As `after`, told as what is another since number `sequence` of `head`, where that is still known.

        Who asks like that has taken that one over; `boot` says which start of an agent it is.
        """
        if head == self._latest.head and boot and (taken_over := self._told.get(sequence)) is not None:
            self._taken_over[boot] = taken_over.table.generation
        latest = await self.after(head, sequence, timeout_seconds=timeout_seconds)
        if latest is None:
            return None
        before = self._told.get(sequence) if head == latest.head else None
        known = before.sequence if before else 0
        if known not in self._news:
            self._news[known] = News(change=self._change(before)) if before else News(whole=latest)
        return self._news[known]

    def _change(self, before: Broadcast) -> BroadcastChange:
        latest = self._latest
        self._digest = self._digest or digest_of(latest.table)
        return BroadcastChange(
            head=latest.head,
            sequence=latest.sequence,
            after=before.sequence,
            table=change_between(before.table, latest.table, self._digest),
            files=None if before.files == latest.files else latest.files,
            config=None if before.config == latest.config else latest.config,
            relays=None if before.relays == latest.relays else latest.relays,
            scaling=None if before.scaling == latest.scaling else latest.scaling,
        )
