"""The Locust users: one class for every tenant, closed loop or open. Importing this patches the process for gevent."""

from __future__ import annotations

from typing import ClassVar

import gevent
from gevent.pool import Pool
from locust import User, constant, task
from locust.exception import StopUser

from loadtests.client import Connection
from loadtests.load import Load, arrivals
from loadtests.samples import Sample
from loadtests.scenario import Closed, Open


class TenantUser(User):
    """A user of whichever tenant still needs one. `load` is set by whoever starts the run.

    Every request is also reported to Locust, as rows `TTFT` and `E2E` per tenant and model in milliseconds, so that its web
    page and CSV files show streams rightly. Exact figures come from `load.samples`.
    """

    abstract = True
    wait_time = constant(0)
    load: ClassVar[Load]

    def on_start(self) -> None:
        """Take a seat: a tenant and a stream of random numbers of its own."""
        self.tenant, self.random = self.load.take_seat()
        self.connection = self.load.connect()
        self.idle: list[Connection] = []
        arrival = self.tenant.arrival
        if isinstance(arrival, Open):
            self.next_due = arrivals(arrival.requests_per_second, self.random)
            self.in_flight = Pool(arrival.max_in_flight)

    def on_stop(self) -> None:
        """Leave the seat; the run ends with the last one."""
        for connection in (self.connection, *self.idle):
            connection.close()
        self.load.leave_seat(self.tenant)

    @task
    def work(self) -> None:
        """One request of a closed loop, or one arrival of an open one."""
        if isinstance(self.tenant.arrival, Closed):
            self._ask_and_think(self.tenant.arrival.think_seconds)
        else:
            self._arrive()

    def _ask_and_think(self, think_seconds: float) -> None:
        if not self.load.is_open(self.tenant):
            raise StopUser
        self._report(self.load.ask(self.connection, self.tenant, self.random, self.load.now()))
        gevent.sleep(think_seconds)

    def _arrive(self) -> None:
        due = self.next_due()
        gevent.sleep(max(0.0, due - self.load.now()))
        if not self.load.is_open(self.tenant):
            self.in_flight.join()
            raise StopUser
        self.in_flight.spawn(self._ask_once, due)  # waits while max_in_flight are under way; `due` stays what it was

    def _ask_once(self, due: float) -> None:
        connection = self.idle.pop() if self.idle else self.load.connect()
        self._report(self.load.ask(connection, self.tenant, self.random, due))
        self.idle.append(connection)

    def _report(self, sample: Sample) -> None:
        name = f"{sample.tenant} {sample.model}"
        error = RuntimeError(f"{sample.failure}: {sample.message}") if sample.failure else None
        for kind, seconds in (("TTFT", sample.ttft_seconds), ("E2E", sample.e2e_seconds)):
            if seconds is not None or (error and kind == "E2E"):
                self.environment.events.request.fire(
                    request_type=kind,
                    name=name,
                    response_time=(seconds or 0.0) * 1000,
                    response_length=sample.output_tokens,
                    exception=error,
                    context={},
                )
