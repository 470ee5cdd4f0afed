"""How full and how busy every slice of this machine is, under the names of the routing table; part of `/metrics/engines`.

NVML's figures are joined to the table by UUID. A slice of another machine has no figures here: the gateway over there has them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Iterator

from gateway.metrics import Family, Sample
from gateway.routes import Routes
from placement.nvml import SliceActivity, read_activity
from placement.table import SliceRow

log = logging.getLogger("sliceway.gateway")

TIMEOUT_SECONDS = 2.0
_PROFILE = re.compile(r"/(?P<profile>[^/@#]+)@\d+$")

Read = Callable[[], tuple[SliceActivity, ...]]


class SliceMetrics:
    """Reads the driver in a thread, one reading at a time: a driver that hangs costs its figures and nothing else."""

    def __init__(self, routes: Callable[[], Routes], read: Read = read_activity) -> None:
        self._routes = routes
        self._read = read
        self._reading: asyncio.Task[tuple[SliceActivity, ...]] | None = None

    async def families(self) -> tuple[Family, ...]:
        """What there is to tell; nothing where there is no driver, or none that answers within `TIMEOUT_SECONDS`."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        done, _ = await asyncio.wait((self._reading,), timeout=TIMEOUT_SECONDS)
        if not done:
            log.warning("NVML has not answered for %g s: no figures of slices in this scrape", TIMEOUT_SECONDS)
            return ()
        return tuple(families(self._routes(), self._reading.result()))


def families(routes: Routes, activity: Iterable[SliceActivity]) -> Iterator[Family]:
    """Every family once, of the slices that are both in the table and in this machine."""
    rows = {row.slice.uuid: (row.slice, row.replica, row.model) for row in routes.replicas() if row.slice.uuid}
    rows |= {row.uuid: (row, "", "") for row in routes.idle if row.uuid}
    found = [
        (slice_labels(*rows[one.uuid]) | _instance(one), one)
        for one in sorted(activity, key=lambda one: one.uuid)
        if one.uuid in rows
    ]
    if not found:
        return
    used = tuple(Sample(labels, one.used_bytes) for labels, one in found)
    yield Family("sliceway_slice_memory_used_bytes", "gauge", "Memory in use, as the driver counts it.", used)
    total = tuple(Sample(labels, one.total_bytes) for labels, one in found)
    yield Family("sliceway_slice_memory_bytes", "gauge", "Memory that the slice has.", total)
    busy = tuple(Sample({**labels, "part": part}, share) for labels, one in found for part, share in one.busy.items())
    if busy:
        yield Family("sliceway_slice_busy_ratio", "gauge", "Share of the slice's own capacity that is busy.", busy)


def slice_labels(one: SliceRow, replica: str, model: str) -> dict[str, str]:
    """Ours, and those of DCGM's exporter (`UUID`, `GPU_I_PROFILE`), so that slice metrics can be joined to them."""
    profile = one.profile or (found["profile"] if (found := _PROFILE.search(one.id)) else "")
    return {"replica": replica, "model": model, "slice": one.id, "UUID": one.gpu or "", "GPU_I_PROFILE": profile}


def _instance(one: SliceActivity) -> dict[str, str]:
    return {"GPU_I_ID": "" if one.gpu_instance is None else str(one.gpu_instance)}
