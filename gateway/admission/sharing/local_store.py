"""Shares of limits for the gateways of one machine: a SQLite file in the state directory.

SQLite's lock on the file makes each round one transaction, whichever process dies in the middle. All of it runs in one thread of its own,
so that a slow disk holds up no request.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import msgspec

from gateway.admission.sharing.ledger import Grant, Report, State, Untold, settle
from gateway.admission.sharing.taken import LeftBooks
from gateway.errors import StoreUnavailable

T = TypeVar("T")

_BUSY_SECONDS = 1.0
_LONGEST_WINDOW_SECONDS = 86400.0  # of limits per day: so long what a process has left may count
_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (process TEXT PRIMARY KEY, until REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS limits (name TEXT PRIMARY KEY, state BLOB NOT NULL) STRICT;
"""


class LocalStore:
    """A `LimitStore` in the file at `path`, made if there is none. `wall` is seconds since 1970, the same for every process.

    With `left`, a process that ended without a word holds nothing from that moment on but what it used.
    """

    def __init__(self, path: Path, wall: Callable[[], float], left: LeftBooks | None = None) -> None:
        self._path = path
        self._left = left
        self._wall = wall
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="limits")
        self._connection: sqlite3.Connection | None = None

    async def sync(
        self, process: str, reports: Sequence[Report], lease_seconds: float, peers: int
    ) -> tuple[Mapping[str, Grant], int]:
        """See LimitStore."""
        return await self._run(lambda db: _sync(db, process, reports, lease_seconds, peers, self._wall(), self._left))

    async def leave(self, process: str) -> None:
        """See LimitStore."""
        await self._run(lambda db: db.execute("DELETE FROM leases WHERE process = ?", (process,)))

    async def close(self) -> None:
        """See LimitStore."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._forget)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, work)

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            try:
                answer = work(db)
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        except (sqlite3.Error, OSError, msgspec.MsgspecError, LookupError) as error:
            self._forget()
            raise StoreUnavailable(
                f"the shares of limits cannot be read or written: {error}",
                where=str(self._path),
                remedy="Check that the state directory is writable and has room; the file itself may be removed.",
            ) from error
        return answer

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.executescript(_SCHEMA)
            except BaseException:
                db.close()
                raise
            self._connection = db
        return self._connection

    def _forget(self) -> None:
        if self._connection is not None:
            with closing(self._connection):
                self._connection = None


def _sync(
    db: sqlite3.Connection,
    process: str,
    reports: Sequence[Report],
    lease_seconds: float,
    peers: int,
    now: float,
    left: LeftBooks | None,
) -> tuple[Mapping[str, Grant], int]:
    db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?)", (process, now + lease_seconds))
    db.execute("DELETE FROM leases WHERE until < ?", (now - _LONGEST_WINDOW_SECONDS - lease_seconds,))
    leases = dict(db.execute("SELECT process, until FROM leases"))
    if left is not None:
        for other in [name for name, until in leases.items() if until > now and name != process and left.ended(name)]:
            leases[other] = now
            db.execute("UPDATE leases SET until = ? WHERE process = ?", (now, other))
    untold: Untold = left.untold if left is not None else lambda process, name: None
    grants = {}
    for report in reports:
        row = db.execute("SELECT state FROM limits WHERE name = ?", (report.name,)).fetchone()
        before: State | None = msgspec.json.decode(row[0]) if row else None
        state, grants[report.name] = settle(before, report, process, leases, now, lease_seconds, peers, untold)
        db.execute("INSERT OR REPLACE INTO limits VALUES (?, ?)", (report.name, msgspec.json.encode(state)))
    return grants, sum(until > now for until in leases.values())
