"""What this gateway sees of demand, model by model, told to the controller once a second (`placement.figures`).

Requests pay for one counter; everything else is looked up here, beside them. Only models whose replicas follow demand are
told of, and where there is none, nothing is written.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gateway.admission import Admission
from gateway.config import Config
from gateway.digests import LatencyBook
from gateway.exchange import Clock
from gateway.keys import WallClock
from gateway.routes import Routes
from gateway.sketch import Sketch
from gateway.stats import Stats
from gateway.tenant_pools import tenant_pools
from placement.assign import Pools, stem, stem_of
from placement.autoscale.scaler import scaled_models
from placement.figures import FiguresFile, GatewayFigures, ModelFigures
from placement.state import StatePaths
from placement.table import ReplicaRow

_SAMPLES = 120  # of the arrivals' counter, over the window
_SHARE = 0.95


@dataclass(slots=True)
class _Seen:
    """One model over time. `samples` are (time, arrivals until then), the oldest first."""

    samples: deque[tuple[float, int]] = field(default_factory=deque)
    active_at: float = 0.0

    def rate(self, now: float, arrivals: int, window: float) -> float:
        """Arrivals per second over the last `window` seconds, or over as much of it as was seen."""
        samples = self.samples
        if now - samples[-1][0] >= window / _SAMPLES:
            samples.append((now, arrivals))
        while len(samples) > 1 and samples[1][0] <= now - window:
            samples.popleft()
        since, before = samples[0]
        return (arrivals - before) / max(now - since, min(1.0, window)) if arrivals > before else 0.0


class FiguresWriter:
    """See the module. `clock` is monotonic, `wall` seconds since 1970."""

    def __init__(
        self,
        config: Config,
        routes: Callable[[], Routes],
        admission: Admission,
        stats: Stats,
        book: LatencyBook,
        clock: Clock,
        wall: WallClock,
    ) -> None:
        self._routes = routes
        self._admission = admission
        self._stats = stats
        self._book = book
        self._clock = clock
        self._wall = wall
        self._file = FiguresFile(StatePaths(config.state).figures, str(os.getpid()))
        self._seen: dict[str, _Seen] = {}
        self._slow: frozenset[str] = frozenset()
        self._apart: Pools = {}
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Go by another configuration from here on."""
        self._policy = config.fleet.autoscale
        self._apart = tenant_pools(config)
        models = scaled_models(config.models, pools=self._apart)
        self._slow = frozenset(m.name for m in models if m.ttft_slo_seconds or m.itl_slo_seconds)
        now, before = self._clock(), self._seen
        self._seen = {m.name: before.get(m.name) or self._new(m.name, now) for m in models}

    def _new(self, model: str, now: float) -> _Seen:
        return _Seen(deque([(now, self._arrivals(model))]), now)

    def _arrivals(self, pool: str) -> int:
        """Requests for one pool's replicas so far: a dedicated tenant's, or those of everybody who has none of his own."""
        model, _, tenant = pool.partition("@")
        if tenant:
            return self._stats.tenant_arrivals[model, tenant]
        apart = (t for t in self._apart.get(model, ()) if t is not None)
        return self._stats.arrivals[model] - sum(self._stats.tenant_arrivals[model, t] for t in apart)

    @property
    def interval_seconds(self) -> float:
        """How often `tick` is to be called."""
        return self._policy.look_every

    async def tick(self) -> None:
        """Tell what is seen now. Raises OSError where it cannot be written."""
        if not self._seen:
            self._file.remove()
            return
        rows = [await self._row(model, seen) for model, seen in list(self._seen.items())]
        self._file.write(GatewayFigures(at=self._wall(), models=tuple(rows)))

    def stop(self) -> None:
        """This gateway sees nothing any more."""
        self._file.remove()

    async def _row(self, pool: str, seen: _Seen) -> ModelFigures:
        now = self._clock()
        replicas = self._replicas(pool)
        waiting, oldest = self._queues(pool, now)
        in_flight = sum(self._admission.loads.count(row.replica) for row in replicas)
        arrivals = self._arrivals(pool)
        if waiting or in_flight or arrivals != seen.samples[-1][1]:
            seen.active_at = now
        rate = seen.rate(now, arrivals, self._policy.window)
        ttft, itl = await self._latencies(replicas) if pool in self._slow else (None, None)
        return ModelFigures(
            model=pool,
            arrivals_per_second=rate,
            waiting=waiting,
            in_flight=in_flight,
            oldest_wait_seconds=oldest,
            ttft_seconds=ttft,
            itl_seconds=itl,
            idle_seconds=max(0.0, now - seen.active_at),
        )

    def _replicas(self, pool: str) -> tuple[ReplicaRow, ...]:
        """The replicas of one pool, by their names."""
        route = self._routes().models.get(pool.partition("@")[0])
        rows = route.replicas if route else ()
        return tuple(row for row in rows if stem_of(row.replica) == pool)

    def _queues(self, name: str, now: float) -> tuple[int, float]:
        """Requests that wait in one pool, and for how long the next of them has."""
        waiting, oldest = 0, 0.0
        for pool in self._admission.pools():
            if stem(pool.model, pool.tenant) == name and pool.waiting:
                first = pool.queue.first(now)
                waiting += pool.waiting
                oldest = max(oldest, now - first.since if first is not None else 0.0)
        return waiting, oldest

    async def _latencies(self, replicas: Iterable[ReplicaRow]) -> tuple[float | None, float | None]:
        """TTFT and ITL at the share told, over a minute, of these replicas' slices; streams go on in between."""
        ttft, itl = Sketch(), Sketch()
        for row in replicas:
            for series in list(self._book.tenants(row.slice.id).values()):
                ttft.merge(series.ttft_seconds.window("1m", self._clock()))
                itl.merge(series.itl_seconds.window("1m", self._clock()))
                await asyncio.sleep(0)
        return ttft.nearest_rank(_SHARE), itl.nearest_rank(_SHARE)
