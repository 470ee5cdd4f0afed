"""The process's side of what is shared: what it wants of each limit and each replica, asked for beside the requests.

Requests never wait for the store unless they would be refused, or have to wait, for lack of a share. A store that is away takes nothing down: after its
lease a process goes on with at most its fair part of everything, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from gateway.admission.sharing.ledger import Grant, Report
from gateway.admission.sharing.shares import Shared, Shares
from gateway.admission.sharing.taken import TakenBook
from gateway.admission.windows import Window
from gateway.errors import StoreUnavailable

log = logging.getLogger("sliceway.limits")

RETRY_SECONDS = 1.0  # how often a share is asked for again that nobody waits for, and how often others are looked for
REPEAT_SECONDS = 3600.0  # stores forget what nobody mentions
SLAB = 8  # who lacks something asks for this part of the whole, so that its next requests find some too
SPACING_SECONDS = 0.02  # between two rounds, however many requests ask for one
_NEVER = float("-inf")


class LimitStore(Protocol):
    """Where the shares of all processes are kept."""

    async def sync(
        self, process: str, reports: Sequence[Report], lease_seconds: float, peers: int
    ) -> tuple[Mapping[str, Grant], int]:
        """Settle `reports` and renew the lease: grants by name, and how many processes live. Raises StoreUnavailable."""
        ...

    async def leave(self, process: str) -> None:
        """The process is gone; it has reported `leaving` before. Raises StoreUnavailable."""
        ...

    async def close(self) -> None:
        """Let go of connections and files."""
        ...


class Sharing:
    """Keeps what one process holds of `shares` in step with a store; nothing is held before the first `sync`.

    `expected` is how many processes to reckon with while the store has never told, at least; `remember` is called with their number
    whenever the store tells it. `book` is where it is noted what this process takes.
    """

    def __init__(
        self,
        shares: Shares,
        store: LimitStore,
        clock: Callable[[], float],
        *,
        process: str,
        lease_seconds: float,
        expected: int = 1,
        remember: Callable[[int], None] = lambda peers: None,
        book: TakenBook | None = None,
    ) -> None:
        self._shares = shares
        self._store = store
        self._clock = clock
        self._process = process
        self._lease_seconds = lease_seconds
        self._expected = expected
        self._remember = remember
        self._book = book
        self._told: dict[str, _Told] = {}
        self._wake = asyncio.Event()
        self._attached = False
        self._synced_at = _NEVER
        self.peers = 1
        self.away_since: float | None = None
        self.problem: str | None = None

    async def run(self, seconds: float) -> None:
        """Sync for ever: every `seconds`, and at once when a request lacks a share."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            self._wake.clear()
            await self.sync()
            await asyncio.sleep(min(seconds, SPACING_SECONDS))

    async def sync(self) -> None:
        """One round. Never raises; what is wrong with the store stands in `problem`."""
        if not self._attached:
            self._attached = True
            self._shares.attach(self._wake.set, self._lapse)
        now = self._clock()
        gauges = {gauge.name: gauge for gauge in self._shares.gauges()}
        reports = [report for gauge in gauges.values() if (report := self._report(gauge, now)) is not None]
        gone = self._forgotten(gauges)
        marks = self._noted(gauges)
        if not self._due(now, something=bool(reports or gone), anything=bool(gauges)):
            return
        try:
            grants, peers = await self._store.sync(
                self._process, [*reports, *gone], self._lease_seconds, self._reckoned()
            )
        except StoreUnavailable as error:
            self._away(str(error))
        else:
            for report in gone:
                del self._told[report.name]
            self._back(now, peers)
            if self._book is not None:
                self._book.told(marks, [report.name for report in reports])
            for report in reports:
                self._take(gauges[report.name], grants[report.name], report, now)
        self._shares.came(self._reckoned(), self._synced_at + self._lease_seconds if self._met else float("inf"))

    async def leave(self) -> None:
        """Give everything back that is not used, and close the store. Never raises."""
        now = self._clock()
        reports = [
            Report(g.name, g.full, g.window.seconds, 0, 0, tuple(g.window.ages(now)), leaving=True)
            for g in self._shares.gauges()
        ]
        told = False
        try:
            if reports:
                await self._store.sync(self._process, reports, self._lease_seconds, self.peers)
                await self._store.leave(self._process)
            told = True
        except StoreUnavailable as error:
            log.warning("%s were not given back, they come free by themselves: %s", self._shares.what, error)
        if self._book is not None:
            self._book.close(remove=told)
        await self._store.close()

    def _noted(self, gauges: Mapping[str, Shared]) -> Mapping[str, int]:
        """Have it noted what is taken of every limit with a window. What was until this moment."""
        if self._book is None:
            return {}
        for name, gauge in gauges.items():
            if isinstance(gauge.window, Window):
                self._book.watch(name, gauge.window)
        return self._book.marks()

    def _due(self, now: float, *, something: bool, anything: bool) -> bool:
        """Whether to ask the store. With nothing to say it is asked often enough to keep the lease, and to see who else has come."""
        return something or (anything and now - self._synced_at >= min(RETRY_SECONDS, self._lease_seconds / 3))

    @property
    def _met(self) -> bool:
        """Whether the store has ever answered."""
        return self._synced_at != _NEVER

    def _reckoned(self) -> int:
        """How many processes there are: as the store told, or before it ever did, as somebody expects."""
        return self.peers if self._met else max(self.peers, self._expected)

    # ---- one gauge

    def _forgotten(self, gauges: Mapping[str, Shared]) -> list[Report]:
        """Forget what is not there any more. What is used only while it is held is given back; the rest leaves its window by itself."""
        gone = [name for name in self._told if name not in gauges]
        for name in gone:
            if self._told[name].seconds:
                del self._told[name]
        return [Report(name, 0, 0.0, 0, 0, (), leaving=True) for name in gone if name in self._told]

    def _report(self, gauge: Shared, now: float) -> Report | None:
        """What is to be said of `gauge`; None if the store knows it."""
        window = gauge.window
        window.advance(now)
        told = self._told.get(gauge.name, _UNTOLD)
        aim = aimed_share(gauge.full, told.share, window.used, gauge.wanted, told.wanted_by_others, self.peers)
        want = max(aim, window.used)  # what is used cannot be given back
        cut_short = window.limit < min(told.share, aim)  # it has been made anew since, and knows of no share
        if not cut_short and self._known(gauge, told, want, now):
            return None
        window.limit = min(window.limit, aim)
        lacking = max(0, want - told.share) if gauge.wanted else 0  # a fair part that nobody asks for is not lacking
        return Report(gauge.name, gauge.full, window.seconds, want, lacking, tuple(window.ages(now)))

    def _known(self, gauge: Shared, told: _Told, want: int, now: float) -> bool:
        """Whether there is nothing to say.

        Once a second it is asked again for what cannot be had at the moment; and where there are others, whether they lack what is held here.
        """
        if self.away_since is not None or now - self._synced_at > self._lease_seconds:
            return False
        if self.peers <= 1 and not gauge.window.seconds and want == told.share:
            return now - told.at < REPEAT_SECONDS  # nobody else is there to be told what runs
        if gauge.wanted or told.wanted_by_others or told.used != gauge.window.used:
            return False
        return now - told.at < (REPEAT_SECONDS if want == told.share and self.peers <= 1 else RETRY_SECONDS)

    def _take(self, gauge: Shared, grant: Grant, report: Report, now: float) -> None:
        used = sum(units for _, units in report.used)
        aim = aimed_share(gauge.full, grant.share, used, gauge.wanted, grant.wanted_by_others, self.peers)
        gauge.window.limit = min(grant.share, aim)
        gauge.spare = grant.spare
        gauge.wanted = 0
        self._told[gauge.name] = _Told(grant.share, used, grant.wanted_by_others, now, gauge.window.seconds)
        if grant.wanted_by_others and grant.share > used:
            self._wake.set()  # somebody waits for what is left over here

    # ---- a store that is away

    def _back(self, now: float, peers: int) -> None:
        if self.away_since is not None:
            log.info("the store of %s answers again: %d gateways share them", self._shares.what, peers)
        self._remember(peers)
        self._synced_at, self.away_since, self.problem, self.peers = now, None, None, peers

    def _away(self, problem: str) -> None:
        if self.away_since is None:
            self.away_since = self._clock()
            parts = self._reckoned()
            part = f"1/{parts} of each" if parts > 1 else "all of each, as no other gateway is known"
            log.error(
                "%s are not shared at the moment, this gateway goes on with %s: %s", self._shares.what, part, problem
            )
        self.problem = problem
        self._lapse()

    def _lapse(self) -> None:
        """The lease is over: go on with a fair part. A part that is larger than the share has to wait until no window counts the old ones."""
        now = self._clock()
        if now - self._synced_at <= self._lease_seconds:
            return
        for gauge in self._shares.gauges():
            fair = max(1, gauge.full // self._reckoned())
            settled = now - self._synced_at > gauge.window.seconds + 2 * self._lease_seconds
            gauge.window.limit = fair if settled else min(gauge.window.limit, fair)
            gauge.spare = 0


class _Told(NamedTuple):
    """What this process and the store last told each other of a gauge."""

    share: int
    used: int
    wanted_by_others: int
    at: float
    seconds: float = 0.0


_UNTOLD = _Told(0, 0, 0, _NEVER)


def aimed_share(full: int, share: int, used: int, unmet: int, wanted_by_others: int, peers: int) -> int:
    """How much of a gauge to hold. Alone: all of it. Else a fair part, more if it is needed, less if others lack it.

    It may be less than is used: then what comes back is not used again here, but given to those who lack it. Nobody gives more than leaves it
    what it needs of a fair part.
    """
    if peers <= 1 and not wanted_by_others:
        return full
    fair = full // max(1, peers)
    needed = min(full, used + max(unmet, full // SLAB)) if unmet else used
    if wanted_by_others:
        return max(min(needed, fair), share - wanted_by_others)
    return max(needed, share, fair)
