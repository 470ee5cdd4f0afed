"""Files on disk with a row each in the database. A file is there as a whole, with its row, or not at all.

::

    STATE/objects.db         rows of files and batches
    STATE/files/FILE_ID      contents; names with a dot are uploads under way

The contents come first (written, synced, renamed), then the row; going away it is the other way round. What a crash leaves between
the two is a file without a row, which `sweep` removes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from gateway.errors import StorageError, StorageFull, UnknownObject
from gateway.files.database import Database, page
from gateway.keys import WallClock

ORPHAN_SECONDS = 3600.0  # older contents without a row belong to nobody any more


class FileRecord(msgspec.Struct, frozen=True):
    """One file. Times are seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None

    def as_public(self) -> dict[str, object]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """The files of all tenants; every question is one tenant's. `max_bytes_per_tenant` bounds what each may keep."""

    def __init__(self, root: Path, database: Database, wall: WallClock, *, max_bytes_per_tenant: int) -> None:
        self._root = root
        self._database = database
        self._wall = wall
        self._max_bytes_per_tenant = max_bytes_per_tenant

    def path(self, file_id: str) -> Path:
        """Where the contents lie."""
        return self._root / file_id

    @contextlib.contextmanager
    def writing(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new temporary file, and its path to give to `keep`; gone afterwards unless it was kept. Raises StorageError."""
        path = self._root / f".{secrets.token_hex(12)}"
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
        except OSError as error:
            raise StorageError(f"a file cannot be made: {error.strerror}", where=str(self._root)) from error
        try:
            with file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    async def keep(
        self, path: Path, *, tenant: str, filename: str, purpose: str, lifetime_seconds: float | None
    ) -> FileRecord:
        """Make the file at `path` one of the tenant's. It must be closed or flushed. Raises StorageFull, StorageError."""
        now = int(self._wall())
        record = FileRecord(
            id=new_file_id(),
            tenant=tenant,
            filename=filename[:255],
            purpose=purpose,
            bytes=path.stat().st_size,
            created_at=now,
            expires_at=now + int(lifetime_seconds) if lifetime_seconds is not None else None,
        )

        def keep(connection: sqlite3.Connection) -> None:
            self._check_room(connection, record)
            target = self.path(record.id)
            sync(path)
            path.replace(target)
            sync(self._root)
            try:
                connection.execute(
                    "INSERT INTO files VALUES (:id, :tenant, :filename, :purpose, :bytes, :created_at, :expires_at)",
                    msgspec.structs.asdict(record),
                )
            except BaseException:
                target.unlink(missing_ok=True)
                raise

        await self._database.call(keep)
        return record

    def _check_room(self, connection: sqlite3.Connection, record: FileRecord) -> None:
        row = connection.execute("SELECT sum(bytes) FROM files WHERE tenant = ?", [record.tenant]).fetchone()
        used = row[0] or 0
        if used + record.bytes > self._max_bytes_per_tenant:
            raise StorageFull(
                f"This file of {record.bytes} bytes would exceed the {self._max_bytes_per_tenant} bytes that a tenant may keep; "
                f"{used} are in use.",
                remedy="Delete files that are no longer needed: DELETE /v1/files/{id}.",
            )

    async def adopt(
        self, file_id: str, path: Path, *, tenant: str, filename: str, purpose: str, lifetime_seconds: float
    ) -> None:
        """Make `path` the tenant's file of this id, however often it is asked, and wherever a crash has ended it before.

        Nothing bounds it: these are answers to requests that have been served. Raises StorageError.
        """
        target = self.path(file_id)
        now = int(self._wall())

        def adopt(connection: sqlite3.Connection) -> None:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists():
                path.replace(target)
                sync(self._root)
            values = [file_id, tenant, filename, purpose, target.stat().st_size, now, now + int(lifetime_seconds)]
            connection.execute("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values)

        await self._database.call(adopt)

    async def get(self, file_id: str, tenant: str) -> FileRecord:
        """One file. Raises UnknownObject where there is none, or where it is another tenant's or has expired."""

        def find(connection: sqlite3.Connection) -> sqlite3.Row | None:
            row: sqlite3.Row | None = connection.execute(
                "SELECT * FROM files WHERE id = ? AND tenant = ? AND (expires_at IS NULL OR expires_at > ?)",
                [file_id, tenant, self._wall()],
            ).fetchone()
            return row

        row = await self._database.call(find)
        if row is None:
            raise UnknownObject(f"No such file: {file_id[:80]!r}.", param="file_id")
        return FileRecord(**dict(row))

    async def page(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, ascending: bool
    ) -> tuple[list[FileRecord], bool]:
        """The tenant's files by time, and whether there are more."""

        def find(connection: sqlite3.Connection) -> tuple[list[sqlite3.Row], bool]:
            also: dict[str, object] = {"(expires_at IS NULL OR expires_at > ?)": self._wall()}
            if purpose is not None:
                also["purpose = ?"] = purpose
            return page(connection, "files", tenant, limit=limit, after=after, ascending=ascending, also=also)

        rows, more = await self._database.call(find)
        return [FileRecord(**dict(row)) for row in rows], more

    async def delete(self, file_id: str, tenant: str) -> None:
        """Remove a file. Raises UnknownObject."""

        def delete(connection: sqlite3.Connection) -> int:
            return connection.execute("DELETE FROM files WHERE id = ? AND tenant = ?", [file_id, tenant]).rowcount

        if not await self._database.call(delete):
            raise UnknownObject(f"No such file: {file_id[:80]!r}.", param="file_id")
        self.path(file_id).unlink(missing_ok=True)

    async def sweep(self) -> None:
        """Remove what has expired, and what belongs to no row."""
        now = self._wall()

        def sweep(connection: sqlite3.Connection) -> list[str]:
            expired = [r[0] for r in connection.execute("SELECT id FROM files WHERE expires_at <= ?", [now])]
            connection.execute("DELETE FROM files WHERE expires_at <= ?", [now])
            known = {r[0] for r in connection.execute("SELECT id FROM files")}
            return expired + [name for name in self._old(now) if name not in known]

        for name in await self._database.call(sweep):
            self.path(name).unlink(missing_ok=True)

    def _old(self, now: float) -> list[str]:
        if not self._root.is_dir():
            return []
        return [entry.name for entry in os.scandir(self._root) if now - entry.stat().st_mtime > ORPHAN_SECONDS]


def new_file_id() -> str:
    """An id that nobody can guess."""
    return f"file-{secrets.token_hex(16)}"


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names are in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
