"""`/slices`: what each slice does and how fast it answered, per slice and tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gateway.admission import Admission
from gateway.admission.view import queue_of
from gateway.digests import LatencyBook, WindowSums, WindowTable
from gateway.exchange import Clock
from gateway.routes import Routes
from placement.table import ReplicaRow, SliceRow

CACHE_SECONDS = 1.0


class SlicesView:
    """`/slices` for any number of readers: computed at most once a second, and letting the streams go on in between.

    The work grows with the tenants that were active on each slice, a few milliseconds for each; that is where it gives way.
    """

    def __init__(
        self,
        routes: Callable[[], Routes],
        book: LatencyBook,
        clock: Clock,
        admission: Admission | None = None,
        batch_book: LatencyBook | None = None,
    ) -> None:
        self._routes = routes
        self._book = book
        self._clock = clock
        self._admission = admission
        self._batch_book = batch_book or LatencyBook()
        self._lock = asyncio.Lock()
        self._rows: list[dict[str, Any]] = []
        self._taken_at = float("-inf")

    async def rows(self) -> list[dict[str, Any]]:
        """Every slice of the routes, those with a replica first, in the table's order; at most CACHE_SECONDS old."""
        async with self._lock:
            if self._clock() - self._taken_at >= CACHE_SECONDS:
                routes = self._routes()
                placed = [await self._row(replica.slice, replica) for replica in routes.replicas()]
                self._rows = placed + [await self._row(idle, None) for idle in routes.idle]
                self._taken_at = self._clock()
            return self._rows

    async def _row(self, slice_row: SliceRow, replica: ReplicaRow | None) -> dict[str, Any]:
        whole, tenants = await self._tables(self._book, slice_row.id)
        of_batches, batch_tenants = await self._tables(self._batch_book, slice_row.id)
        return {
            "slice": {name: getattr(slice_row, name) for name in ("id", "kind", "profile", "uuid", "gpu", "product")},
            "model": replica.model if replica else None,
            "replica": replica.replica if replica else None,
            "state": replica.state.value if replica else "idle",
            "queue": queue_of(self._admission, replica.replica) if replica and self._admission else None,
            "windows": whole,
            "tenants": {name: {"windows": table} for name, table in tenants.items()},
            "batches": {"windows": of_batches} if batch_tenants else None,
        }

    async def _tables(self, book: LatencyBook, slice_id: str) -> tuple[WindowTable, dict[str, WindowTable]]:
        """The windows of a slice, and of each tenant on it."""
        whole, tables = WindowSums(), {}
        for name, series in sorted(book.tenants(slice_id).items()):
            sums = WindowSums.of(series, self._clock())
            tables[name] = sums.table()
            whole.add(sums)
            await asyncio.sleep(0)
        return whole.table(), tables
