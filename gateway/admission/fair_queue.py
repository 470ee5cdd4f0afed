"""A fair queue by tokens: the virtual token counter (Sheng et al., arXiv 2401.00588), with weights, priorities and ageing. Pure.

Every tenant has a counter of the service it got: `INPUT_WEIGHT` per token of a prompt, `OUTPUT_WEIGHT` per token of an answer,
divided by the tenant's weight. The next request is the oldest one of the tenant with the smallest counter. A tenant that comes back is
lifted to the smallest counter among those that wait, so that idleness saves nothing up. An answer's tokens are charged as predicted
when its request is taken, and corrected when it is over. Two tenants that both wait all the time get service that differs by at most
`2 * max(INPUT_WEIGHT * L, OUTPUT_WEIGHT * M)`, with L the longest prompt and M the tokens that fit into the engines at once.

Priorities come before fairness, and ageing before priorities: a request counts one level higher for every `ageing_seconds`
it has waited, so none waits for ever. The cost of every operation depends on the tenants that wait, by a logarithm, and not on
those that do not.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from itertools import count
from typing import Generic, Protocol, TypeVar

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0

_LEARNING = 0.2  # how much the latest answer counts in the prediction of the next one's length


class Waiting(Protocol):
    """What waits. `since` is when it came; `ticket` belongs to the queue, -1 while it is in none."""

    tenant: str
    weight: float
    priority: int
    since: float
    ticket: int


W = TypeVar("W", bound=Waiting)


class _Band(Generic[W]):
    """The requests of one priority: a lane per waiting tenant, and a heap over the lanes.

    An entry of the heap is (counter, version, tenant). One whose version is not its tenant's latest is void; one whose counter is below
    the tenant's moves down when it comes to the top.
    """

    __slots__ = ("arrivals", "heap", "lanes", "versions")

    def __init__(self) -> None:
        self.lanes: dict[str, OrderedDict[int, W]] = {}
        self.arrivals: OrderedDict[int, W] = OrderedDict()
        self.heap: list[tuple[float, int, str]] = []
        self.versions: dict[str, int] = {}


class FairQueue(Generic[W]):
    """See the module. Counters of tenants are kept for as long as the queue lives; they are as many as there are tenants."""

    def __init__(self, *, ageing_seconds: float) -> None:
        self.ageing_seconds = ageing_seconds
        self.waiting_of: dict[str, int] = {}  # requests by tenant, of those that wait
        self._bands: dict[int, _Band[W]] = {}
        self._counters: dict[str, float] = {}
        self._lengths: dict[str, float] = {}
        self._last: str | None = None
        self._tickets = count()
        self._versions = count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def counter(self, tenant: str) -> float:
        """Service that `tenant` got, in weighted tokens, with what it was lifted by."""
        return self._counters.get(tenant, 0.0)

    # ---- waiting

    def push(self, request: W) -> None:
        """Let `request` wait, behind those of its tenant and priority."""
        tenant = request.tenant
        if tenant not in self.waiting_of:
            self.lift(tenant)
            self.waiting_of[tenant] = 0
        request.ticket = ticket = next(self._tickets)
        band = self._bands.get(request.priority)
        if band is None:
            band = self._bands[request.priority] = _Band()
        lane = band.lanes.get(tenant)
        if lane is None:
            lane = band.lanes[tenant] = OrderedDict()
            self._enter(band, tenant)
        lane[ticket] = band.arrivals[ticket] = request
        self.waiting_of[tenant] += 1
        self._size += 1

    def remove(self, request: W) -> None:
        """Take `request` out, wherever it stands; nothing if it does not wait."""
        if request.ticket < 0:
            return
        tenant, ticket, request.ticket = request.tenant, request.ticket, -1
        band = self._bands[request.priority]
        lane = band.lanes[tenant]
        del lane[ticket], band.arrivals[ticket]
        if not lane:
            del band.lanes[tenant], band.versions[tenant]
            if not band.lanes:
                del self._bands[request.priority]
        self._size -= 1
        left = self.waiting_of[tenant] - 1
        if left:
            self.waiting_of[tenant] = left
        else:
            del self.waiting_of[tenant]
            self._last = tenant

    def first(self, now: float) -> W | None:
        """The request whose turn it is; it stays until it is removed."""
        if not self._size:
            return None
        band = self._bands[max(self._bands, key=lambda priority: self._urgency(priority, now))]
        return next(iter(band.lanes[self._least(band)].values()))

    def _urgency(self, priority: int, now: float) -> tuple[float, int]:
        oldest = next(iter(self._bands[priority].arrivals.values()))
        return priority + (now - oldest.since) // self.ageing_seconds, priority

    def _least(self, band: _Band[W]) -> str:
        """The tenant of `band` with the smallest counter."""
        heap = band.heap
        while True:
            key, version, tenant = heap[0]
            if band.versions.get(tenant) != version:
                heapq.heappop(heap)
            elif (counter := self._counters[tenant]) > key:
                heapq.heapreplace(heap, (counter, version, tenant))
            else:
                return tenant

    def _enter(self, band: _Band[W], tenant: str) -> None:
        """Put a lane into the heap with its tenant's counter, in place of what stood there for it."""
        band.versions[tenant] = version = next(self._versions)
        heapq.heappush(band.heap, (self._counters[tenant], version, tenant))
        if len(band.heap) > 64 + 4 * len(band.versions):
            band.heap = [entry for entry in band.heap if band.versions.get(entry[2]) == entry[1]]
            heapq.heapify(band.heap)

    def lift(self, tenant: str) -> None:
        """A tenant that did not wait begins where those that wait are, or where the last one left."""
        own = self._counters.get(tenant, 0.0)
        if self._size:
            floor = min(self._counters[self._least(band)] for band in self._bands.values())
        else:
            floor = self._counters.get(self._last, 0.0) if self._last is not None else 0.0
        self._counters[tenant] = max(own, floor)

    # ---- service

    def predicted_output(self, tenant: str, most: int) -> float:
        """How many tokens the next answer to `tenant` will have, going by those before; at most `most`."""
        length = self._lengths.get(tenant, 0.0)
        return length if length < most else most

    def charge(self, tenant: str, weight: float, cost: float) -> None:
        """`tenant` gets service worth `cost` weighted tokens; negative: it got less than it was charged."""
        counters = self._counters
        if tenant not in self.waiting_of:
            # It was served without having to wait: lifted, taken and gone in one step.
            if self._size == 0 and cost > 0:
                last = self._last
                floor = counters.get(last, 0.0) if last is not None else 0.0
                own = counters.get(tenant, 0.0)
                counters[tenant] = (own if own > floor else floor) + cost / weight
                self._last = tenant
            else:
                counters[tenant] = counters.get(tenant, 0.0) + cost / weight
            return
        counters[tenant] += cost / weight
        if cost < 0:
            for band in self._bands.values():
                if tenant in band.lanes:
                    self._enter(band, tenant)

    def learn(self, tenant: str, output_tokens: int) -> None:
        """An answer to `tenant` had `output_tokens`."""
        before = self._lengths.get(tenant)
        self._lengths[tenant] = (
            float(output_tokens) if before is None else before + _LEARNING * (output_tokens - before)
        )
