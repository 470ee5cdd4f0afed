"""`/slices`: what each slice does and how fast it answered, per slice and tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from gateway.digests import LatencyBook, window_table
from gateway.exchange import Clock
from gateway.routes import Routes
from placement.table import SliceRow

CACHE_SECONDS = 1.0


def slice_row(
    slice_row: SliceRow, book: LatencyBook, now: float, *, model: str | None, replica: str | None, state: str
) -> dict[str, Any]:
    """One element of `/slices`: a slice with its replica, where it has one, and the windows of the slice and of each tenant."""
    tenants = book.tenants(slice_row.id)
    tables = {name: window_table([series], now) for name, series in sorted(tenants.items())}
    return {
        "slice": {
            "id": slice_row.id,
            "kind": slice_row.kind,
            "profile": slice_row.profile,
            "uuid": slice_row.uuid,
            "gpu": slice_row.gpu,
        },
        "model": model,
        "replica": replica,
        "state": state,
        # With one tenant the slice's figures are that tenant's.
        "windows": next(iter(tables.values())) if len(tables) == 1 else window_table(tenants.values(), now),
        "tenants": {name: {"windows": table} for name, table in tables.items()},
    }


def slice_rows(routes: Routes, book: LatencyBook, now: float) -> Iterator[dict[str, Any]]:
    """Every slice of the routes, those with a replica first, in the table's order; computed one by one as they are taken."""
    for replica in routes.replicas():
        yield slice_row(
            replica.slice, book, now, model=replica.model, replica=replica.replica, state=replica.state.value
        )
    for idle in routes.idle:
        yield slice_row(idle, book, now, model=None, replica=None, state="idle")


class SlicesView:
    """`/slices` for any number of readers: computed at most once a second, and letting the streams go on between two slices."""

    def __init__(self, routes: Callable[[], Routes], book: LatencyBook, clock: Clock) -> None:
        self._routes = routes
        self._book = book
        self._clock = clock
        self._lock = asyncio.Lock()
        self._rows: list[dict[str, Any]] = []
        self._taken_at = float("-inf")

    async def rows(self) -> list[dict[str, Any]]:
        """The list, at most CACHE_SECONDS old."""
        async with self._lock:
            now = self._clock()
            if now - self._taken_at >= CACHE_SECONDS:
                rows = []
                for row in slice_rows(self._routes(), self._book, now):
                    rows.append(row)
                    await asyncio.sleep(0)
                self._rows, self._taken_at = rows, now
            return self._rows
