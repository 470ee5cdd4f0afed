"""Orders to a running controller, carried out before the call returns: drain, stop, start and check single replicas.

This is what a change of a fleet is made of. To move a slice's work elsewhere and cut the slice anew, one gives, in order::

    foreman.drain(["chat-3"])                          # no new requests; returns when none runs
    foreman.stop(["chat-3"])                           # its engine has ended; the slice is free
    ...                                                # placement.partition: destroy, create
    foreman.start(["chat-3"], on={"chat-3": new_id})   # returns when it serves; one at a time on each GPU
    foreman.check("chat-3")                            # where it was proven to run
    foreman.forget()                                   # the configuration alone decides again

The controller keeps the orders over its own restart, and whoever was interrupted finds them in `orders.json` and the
history in `orders.log`. Giving an order again does no harm. See `placement.orders` for what is kept.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from placement.errors import NoSuchReplica, NotCarriedOut
from placement.locks import holder
from placement.orders import Orders, read_orders, write_orders
from placement.replicas.replica import DRAINED
from placement.schema import EngineConfig
from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, read_status
from placement.table import ReplicaState

_POLL_SECONDS = 0.1
# Beyond what engines may take: reading configuration, models and slices again.
_SLACK_SECONDS = 30.0


class Foreman:
    """Gives orders to the controller of one state directory. Every verb blocks, and may be called again.

    Verbs raise NotCarriedOut where no controller runs, a replica has failed or time runs out, and NoSuchReplica, a kind of it.
    """

    def __init__(
        self,
        paths: StatePaths,
        engine: EngineConfig,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._paths = paths
        self._engine = engine
        self._monotonic = monotonic
        self._sleep = sleep
        self._now = now

    def drain(self, replicas: Sequence[str]) -> None:
        """Take these off the routing table; return when no request runs on them. Engines that tell of no requests are
        waited for as long as requests may take (`engine.drain_timeout_seconds`).
        """
        self._order("drain", replicas, read_orders(self._paths).drain(replicas))
        patience = self._monotonic() + self._engine.drain_timeout_seconds

        def left(status: ControllerStatus) -> list[str]:
            rows = _rows(status, replicas)
            mute = self._monotonic() >= patience
            return [
                _told(r)
                for r in rows
                if not (r.state is ReplicaState.DRAINING and (r.stage == DRAINED or mute))
                and r.state not in (ReplicaState.FAILED, ReplicaState.ASLEEP)
            ]

        self._wait("drain", left, self._engine.drain_timeout_seconds)

    def stop(self, replicas: Sequence[str]) -> None:
        """Let requests finish and end the engines; return when all of them are gone."""
        self._order("stop", replicas, read_orders(self._paths).stop(replicas))
        patience = self._engine.drain_timeout_seconds + self._engine.stop_timeout_seconds
        self._wait("stop", lambda status: [_told(r) for r in _rows(status, replicas)], patience)

    def start(self, replicas: Sequence[str], *, on: Mapping[str, str] | None = None) -> None:
        """Run these again and send them requests, each on its slice in `on` (slice ids by replica) if that names one.

        Returns when all are ready. A replica that runs elsewhere than `on` says is stopped there first.
        """
        orders = read_orders(self._paths).start(replicas, on)
        self._order("start", replicas, orders)

        def left(status: ControllerStatus) -> list[str]:
            self._refuse_failed(status, replicas)
            there = {r.replica: r for r in _rows(status, replicas)}
            return [
                _told(there[name]) if name in there else f"{name} has no slice yet"
                for name in replicas
                if name not in there
                or there[name].state is not ReplicaState.READY
                or there[name].slice.id != orders.seats.get(name, there[name].slice.id)
            ]

        self._wait("start", left, self._engine.start_timeout_seconds * len(replicas))

    def check(self, replica: str) -> ReplicaStatus:
        """The replica's status, if it serves and nothing spoke against its place when it became ready."""
        (row,) = _rows(self._status(), [replica]) or (None,)
        if row is None or row.state is not ReplicaState.READY:
            raise NotCarriedOut(f"{_told(row) if row else replica + ' does not run'}", where=replica, remedy=_LOOK)
        if row.placement is not None and not row.placement["ok"]:
            raise NotCarriedOut("it is not proven to run on its slice", where=replica, remedy=_LOOK)
        return row

    def forget(self) -> None:
        """Take back every order: the configuration alone decides again. Returns at once."""
        orders = read_orders(self._paths)
        if orders.any:
            write_orders(self._paths, orders.none(), verb="forget", replicas=(), at=self._now())
            self._signal()

    def _order(self, verb: str, replicas: Iterable[str], orders: Orders) -> None:
        names = list(replicas)
        status = self._status()
        known = {r.replica for r in status.replicas} | set(status.unplaced) | read_orders(self._paths).stopped
        for name in names:
            if name not in known:
                raise NoSuchReplica(
                    f"there is no replica {name!r}",
                    remedy=f"There are {', '.join(sorted(known)) or 'none'}.",
                )
        write_orders(self._paths, orders, verb=verb, replicas=names, at=self._now())
        self._signal()
        self._wait(
            verb,
            lambda told: [] if told.orders >= orders.number else ["the controller has not taken the order over"],
            self._engine.drain_timeout_seconds + self._engine.stop_timeout_seconds,
        )

    def _wait(self, verb: str, left: Callable[[ControllerStatus], list[str]], patience_seconds: float) -> None:
        deadline = self._monotonic() + patience_seconds + _SLACK_SECONDS
        while missing := left(self._status()):
            if self._monotonic() > deadline:
                raise NotCarriedOut(f"{verb}: {'; '.join(missing)}", remedy=_LOOK)
            self._sleep(_POLL_SECONDS)

    def _refuse_failed(self, status: ControllerStatus, replicas: Sequence[str]) -> None:
        for name in replicas:
            if name in status.unplaced:
                error = status.unplaced[name]
                raise NotCarriedOut(f"{name}: {error.message}", where=error.where, remedy=error.remedy)
        for row in _rows(status, replicas):
            if row.state is ReplicaState.FAILED:
                raise NotCarriedOut(f"{name_of(row)}: {row.reason}", where=row.log, remedy=row.remedy)

    def _status(self) -> ControllerStatus:
        pid, status = holder(self._paths.controller_lock), read_status(self._paths.controller_status)
        if pid is None or status is None:
            raise NotCarriedOut(
                "no controller runs here", where=str(self._paths.root), remedy="Start one: sliceway up CONFIG."
            )
        return status

    def _signal(self) -> None:
        notify(self._paths)


def notify(paths: StatePaths) -> None:
    """Have the controller of this state directory, if one runs, look at configuration, seats and orders again."""
    pid = holder(paths.controller_lock)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


_LOOK = "`sliceway status` shows what it does, and where its log is."


def name_of(row: ReplicaStatus) -> str:
    """Replica and slice in one word each."""
    return f"{row.replica} on {row.slice.id}"


def _rows(status: ControllerStatus, replicas: Iterable[str]) -> list[ReplicaStatus]:
    wanted = set(replicas)
    return [r for r in status.replicas if r.replica in wanted]


def _told(row: ReplicaStatus) -> str:
    return f"{name_of(row)} is {row.state}" + (f" ({row.stage})" if row.stage else "")
