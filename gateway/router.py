"""Which replica takes a request: the least loaded by the gateway's own count, in turn among equals.

The counts are the gateway's own in-flight requests: gauges scraped from engines overshoot between two scrapes
(llm-d-router#2066). `InFlight` owns every counter and hands out leases, so that no path can forget to count down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from gateway.errors import EngineUnreachable, NoReadyReplica, UnknownModel
from gateway.routes import ModelRoute, Routes
from placement.table import ReplicaRow


def least_loaded(loads: Sequence[int], turn: int) -> int:
    """The index of the smallest load; among equal ones the first at or after `turn`, so that a growing turn goes round."""
    count = len(loads)
    return min(range(count), key=lambda i: (loads[i], (i - turn) % count))


class InFlight:
    """How many requests each replica has from this gateway. Zero again when all leases are closed."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def count(self, replica: str) -> int:
        """Of one replica."""
        return self._counts.get(replica, 0)

    def total(self) -> int:
        """Over all replicas."""
        return sum(self._counts.values())

    def lease(self, replica: ReplicaRow) -> Lease:
        """Count one more request on `replica` until the lease is closed."""
        self._counts[replica.replica] = self.count(replica.replica) + 1
        return Lease(self, replica)

    def _give_back(self, replica: str) -> None:
        left = self._counts[replica] - 1
        if left:
            self._counts[replica] = left
        else:
            del self._counts[replica]


class Lease:
    """One request's place on one replica. Closing twice is closing once."""

    __slots__ = ("_in_flight", "_open", "replica")

    def __init__(self, in_flight: InFlight, replica: ReplicaRow) -> None:
        self._in_flight = in_flight
        self._open = True
        self.replica = replica

    def close(self) -> None:
        """Give the place back."""
        if self._open:
            self._open = False
            self._in_flight._give_back(self.replica.replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Router:
    """Chooses among the ready replicas of the routes at the moment of the call."""

    def __init__(self, routes: Callable[[], Routes], in_flight: InFlight, *, max_in_flight_per_replica: int) -> None:
        self._routes = routes
        self._in_flight = in_flight
        self._bound = max_in_flight_per_replica
        self._turn = 0

    @property
    def in_flight(self) -> int:
        """Requests on all replicas together."""
        return self._in_flight.total()

    def replicas(self) -> Iterable[ReplicaRow]:
        """Every replica of every model, ready or not."""
        return self._routes().replicas()

    def model(self, name: str) -> ModelRoute:
        """The model that clients call `name`. Raises UnknownModel."""
        if (model := self._routes().models.get(name)) is None:
            raise unknown_model(name)
        return model

    def lease(
        self,
        name: str,
        *,
        avoid: frozenset[str] = frozenset(),
        rather_not: frozenset[str] = frozenset(),
        only: str | None = None,
    ) -> Lease:
        """A place on a ready replica of model `name`, none of `avoid` (those that this request could not connect to).

        One of `rather_not` only if there is no other. `only` is the replica that holds state which this request needs: no other will do.
        Raises UnknownModel, NoReadyReplica (none is ready, or all are full), or EngineUnreachable if only `avoid` is left.
        """
        model = self.model(name)
        ready = [replica for replica in model.ready if replica.replica not in avoid] if avoid else model.ready
        if only is not None:
            ready = [replica for replica in ready if replica.replica == only]
        if not ready:
            if avoid and model.ready:
                raise EngineUnreachable(f"No replica of model {name!r} accepts connections at the moment.")
            raise NoReadyReplica(
                f"Model {name!r} takes no requests at the moment: {model.why_not_ready()}.",
                retry_after_seconds=model.retry_after_seconds(),
            )
        if rather_not:
            ready = [replica for replica in ready if replica.replica not in rather_not] or ready
        chosen = ready[0]
        if len(ready) > 1:
            self._turn += 1
            chosen = ready[
                least_loaded([self._in_flight.count(replica.replica) for replica in ready], self._turn % len(ready))
            ]
        if self._in_flight.count(chosen.replica) >= self._bound:
            raise NoReadyReplica(
                f"Model {name!r} has {self._bound} requests on each of its replicas, which is the limit.",
                retry_after_seconds=1.0,
            )
        return self._in_flight.lease(chosen)


def unknown_model(name: str) -> UnknownModel:
    """The same words whether a model does not exist or this tenant may not use it."""
    return UnknownModel(
        f"The model {name[:128]!r} does not exist or you do not have access to it.",
        param="model",
        remedy="GET /v1/models lists the models you may use.",
    )
