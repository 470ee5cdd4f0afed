"""The SQLite database of files and batches, in a thread of its own.

One file in the state directory, which several gateways may use at once (write-ahead log). Statements run one after the other in
one thread per process, so that the event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gateway.errors import StorageError

T = TypeVar("T")

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE files (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE INDEX files_of_tenant ON files (tenant, created_at, id);
CREATE TABLE batches (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL, record BLOB NOT NULL
);
CREATE INDEX batches_of_tenant ON batches (tenant, created_at, id);
CREATE INDEX batches_by_status ON batches (status, created_at);
"""
_BUSY_SECONDS = 10.0  # another gateway's transaction is over long before


class Database:
    """See the module. Nothing is opened before the first call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._connection: sqlite3.Connection | None = None

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one transaction, in the database's thread. Raises StorageError; what else `work` raises undoes its changes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    async def close(self) -> None:
        """Close it, after what is under way."""

        def close() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown(wait=True)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._open()
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                return work(self._connection)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"files and batches cannot be read or written: {error}",
                where=str(self._path),
                remedy="Look for a full disk, or for a state directory that the gateway may not write to.",
            ) from error

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.touch(mode=0o600)
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        _prepare(connection)
        return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables where there are none. Two gateways that start at once do it one after the other."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it has version {version}, and this gateway knows {SCHEMA_VERSION}")


def page(
    connection: sqlite3.Connection,
    table: str,
    tenant: str,
    *,
    limit: int,
    after: str | None,
    ascending: bool,
    also: Mapping[str, object] | None = None,
) -> tuple[list[sqlite3.Row], bool]:
    """Rows of one tenant by time, after the one with the id `after`, and whether there are more. `also`: conditions of ours with values."""
    order, beyond = ("ASC", ">") if ascending else ("DESC", "<")
    where, values = "tenant = ?", [tenant, *(also or {}).values()]
    where += "".join(f" AND {condition}" for condition in also or ())
    if after is not None:
        where += f" AND (created_at, id) {beyond} (SELECT created_at, id FROM {table} WHERE id = ? AND tenant = ?)"
        values += [after, tenant]
    statement = f"SELECT * FROM {table} WHERE {where} ORDER BY created_at {order}, id {order} LIMIT ?"
    rows: list[sqlite3.Row] = connection.execute(statement, [*values, limit + 1]).fetchall()
    return rows[:limit], len(rows) > limit
