"""Batches in the database; each is one row, changed only from the state it was read in."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import msgspec

from gateway.batches.record import OPEN, Batch
from gateway.errors import UnknownObject
from gateway.files.database import Database, page

_decode = msgspec.json.Decoder(Batch).decode
Change = Callable[[Batch], Batch]


class BatchStore:
    """The batches of all tenants; questions of tenants are about their own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, batch: Batch) -> None:
        """Store a new batch."""

        def add(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", [batch.id, batch.tenant, *_row(batch)])

        await self._database.call(add)

    async def get(self, batch_id: str, tenant: str) -> Batch:
        """One batch. Raises UnknownObject where there is none, or where it is another tenant's."""
        row = await self._database.call(lambda connection: _find(connection, batch_id, tenant))
        return _decode(row["record"])

    async def page(self, tenant: str, *, limit: int, after: str | None) -> tuple[list[Batch], bool]:
        """The tenant's batches, the newest first, and whether there are more."""
        rows, more = await self._database.call(
            lambda connection: page(connection, "batches", tenant, limit=limit, after=after, ascending=False)
        )
        return [_decode(row["record"]) for row in rows], more

    async def open(self) -> list[Batch]:
        """Every batch of every tenant that has something left to do, the oldest first."""

        def find(connection: sqlite3.Connection) -> list[sqlite3.Row]:
            marks = ", ".join("?" * len(OPEN))
            return connection.execute(
                f"SELECT record FROM batches WHERE status IN ({marks}) ORDER BY created_at, id", OPEN
            ).fetchall()

        return [_decode(row["record"]) for row in await self._database.call(find)]

    async def forget(self, before: float) -> None:
        """Remove batches that ended and were made before that time."""

        def forget(connection: sqlite3.Connection) -> None:
            marks = ", ".join("?" * len(OPEN))
            connection.execute(f"DELETE FROM batches WHERE created_at < ? AND status NOT IN ({marks})", [before, *OPEN])

        await self._database.call(forget)

    async def change(self, batch_id: str, tenant: str, change: Change) -> Batch:
        """Replace a batch by what `change` makes of it as it is stored, in one transaction. Raises UnknownObject, and what `change` raises."""

        def apply(connection: sqlite3.Connection) -> Batch:
            after = change(_decode(_find(connection, batch_id, tenant)["record"]))
            connection.execute(
                "UPDATE batches SET status = ?, created_at = ?, record = ? WHERE id = ?", [*_row(after), batch_id]
            )
            return after

        return await self._database.call(apply)


def _find(connection: sqlite3.Connection, batch_id: str, tenant: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute(
        "SELECT record FROM batches WHERE id = ? AND tenant = ?", [batch_id, tenant]
    ).fetchone()
    if row is None:
        raise UnknownObject(f"No such batch: {batch_id[:80]!r}.", param="batch_id")
    return row


def _row(batch: Batch) -> tuple[str, int, bytes]:
    return batch.status, batch.created_at, msgspec.json.encode(batch)
