"""The process's side of shared limits: what it wants of each, asked for beside the requests.

Requests never wait for the store unless they would be refused for lack of a share. A store that is away takes nothing down: after its
lease a process goes on with at most its fair part of every limit, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from gateway.admission.admission import Admission
from gateway.admission.limits import Gauge
from gateway.admission.sharing.ledger import Grant, Report
from gateway.errors import StoreUnavailable

log = logging.getLogger("sliceway.limits")

RETRY_SECONDS = 1.0  # how often a share is asked for again that nobody waits for
REPEAT_SECONDS = 3600.0  # stores forget what nobody mentions


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
    """Keeps the limits of one process and a store in step."""

    def __init__(
        self, admission: Admission, store: LimitStore, clock: Callable[[], float], *, process: str, lease_seconds: float
    ) -> None:
        self._admission = admission
        self._store = store
        self._clock = clock
        self._process = process
        self._lease_seconds = lease_seconds
        self._told: dict[str, _Told] = {}
        self._wake = asyncio.Event()
        self._synced_at = float("-inf")
        self.peers = 1
        self.away_since: float | None = None
        self.problem: str | None = None
        admission.shared = True
        admission.limits.fresh_share = lambda full: 0  # nothing is known of the others yet
        admission.ask_store = self._wake.set
        admission.shares_lapsed = self._lapse
        for gauge in admission.limits:
            gauge.window.limit = 0

    async def run(self, seconds: float) -> None:
        """Sync for ever: every `seconds`, and at once when a request lacks a share."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            self._wake.clear()
            await self.sync()

    async def sync(self) -> None:
        """One round. Never raises; what is wrong with the store stands in `problem`."""
        now = self._clock()
        gauges = {gauge.name: gauge for gauge in self._admission.limits}
        self._told = {name: told for name, told in self._told.items() if name in gauges}
        reports = [report for gauge in gauges.values() if (report := self._report(gauge, now)) is not None]
        if not gauges or (not reports and now - self._synced_at < self._lease_seconds / 3):
            return
        try:
            grants, self.peers = await self._store.sync(self._process, reports, self._lease_seconds, self.peers)
        except StoreUnavailable as error:
            self._away(str(error))
        else:
            self._back(now)
            for report in reports:
                self._take(gauges[report.name], grants[report.name], report, now)
        self._admission.shares_came()

    async def leave(self) -> None:
        """Give everything back that is not used, and close the store. Never raises."""
        now = self._clock()
        reports = [
            Report(g.name, g.full, g.window.seconds, 0, 0, tuple(g.window.ages(now)), leaving=True)
            for g in self._admission.limits
        ]
        try:
            if reports:
                await self._store.sync(self._process, reports, self._lease_seconds, self.peers)
                await self._store.leave(self._process)
        except StoreUnavailable as error:
            log.warning("limits were not given back, they come free by themselves: %s", error)
        await self._store.close()

    # ---- one limit

    def _report(self, gauge: Gauge, now: float) -> Report | None:
        """What is to be said of `gauge`; None if the store knows it."""
        window = gauge.window
        window.advance(now)
        told = self._told.get(gauge.name, _UNTOLD)
        want = wanted_share(gauge.full, told.share, window.used, gauge.wanted, told.wanted_by_others, self.peers)
        if self._known(gauge, told, want, now):
            return None
        window.limit = min(window.limit, max(want, window.used))
        lacking = max(0, want - told.share)
        return Report(gauge.name, gauge.full, window.seconds, want, lacking, tuple(window.ages(now)))

    def _known(self, gauge: Gauge, told: _Told, want: int, now: float) -> bool:
        """Whether there is nothing to say. What cannot be had at the moment is asked for once a second."""
        if self.away_since is not None or now - self._synced_at > self._lease_seconds:
            return False
        if gauge.wanted or told.wanted_by_others or told.used != gauge.window.used:
            return False
        return now - told.at < (REPEAT_SECONDS if want == told.share else RETRY_SECONDS)

    def _take(self, gauge: Gauge, grant: Grant, report: Report, now: float) -> None:
        gauge.window.limit = grant.share
        gauge.spare = grant.spare
        gauge.wanted = 0
        used = sum(units for _, units in report.used)
        self._told[gauge.name] = _Told(grant.share, used, grant.wanted_by_others, now)

    # ---- a store that is away

    def _back(self, now: float) -> None:
        if self.away_since is not None:
            log.info("the store of limits answers again")
        self._synced_at, self.away_since, self.problem = now, None, None
        self._admission.shares_until = now + self._lease_seconds

    def _away(self, problem: str) -> None:
        if self.away_since is None:
            self.away_since = self._clock()
            log.warning("the store of limits does not answer, this gateway goes on with its part: %s", problem)
        self.problem = problem
        self._lapse()

    def _lapse(self) -> None:
        """The lease is over: go on with a fair part. A part that is larger than the share has to wait until no window counts the old ones."""
        now = self._clock()
        if now - self._synced_at <= self._lease_seconds:
            return
        for gauge in self._admission.limits:
            fair = max(1, gauge.full // self.peers)
            settled = now - self._synced_at > gauge.window.seconds + 2 * self._lease_seconds
            gauge.window.limit = fair if settled else min(gauge.window.limit, fair)
            gauge.spare = 0


class _Told(NamedTuple):
    """What this process and the store last told each other of a limit."""

    share: int
    used: int
    wanted_by_others: int
    at: float


_UNTOLD = _Told(0, 0, 0, float("-inf"))


def wanted_share(full: int, share: int, used: int, unmet: int, wanted_by_others: int, peers: int) -> int:
    """How much of a limit to hold. Alone: all of it. Else a fair part, more if it is needed, less if others lack it.

    Never less than is used, which cannot be given back.
    """
    if peers <= 1 and not wanted_by_others:
        return full
    needed = min(full, used + unmet)
    if wanted_by_others:
        return max(needed, share - wanted_by_others)
    return max(needed, share, full // max(1, peers))
