"""The Locust users: one class for every tenant, closed loop or open. Importing this patches the process for gevent."""

from __future__ import annotations

import time
from typing import ClassVar

import gevent
from gevent.pool import Pool
from locust import User, constant, task
from locust.exception import StopUser

from loadtests.arrivals import Closed
from loadtests.bodies import Asked, Message
from loadtests.load import Client, Load
from loadtests.manners import Misbehaving
from loadtests.samples import Sample
from loadtests.scenario import Patient


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
        self.seat = self.load.take_seat()
        self.tenant = self.seat.tenant
        self.history: list[Message] = []
        self.turn = 0
        self.idle: list[Client] = []
        arrival = self.tenant.arrival
        if isinstance(arrival, Closed):
            self.client_of_mine = self._client()
        else:
            self.arrivals = self.load.arrivals(self.seat)
            self.in_flight = Pool(arrival.max_in_flight)
        gevent.sleep(max(0.0, -self.load.now()))

    def on_stop(self) -> None:
        """Leave the seat; the run ends with the last one."""
        mine = [self.client_of_mine] if isinstance(self.tenant.arrival, Closed) else []
        for client in (*mine, *self.idle):
            client.close()
        self.load.leave_seat(self.tenant)

    @task
    def work(self) -> None:
        """One request of a closed loop, or one arrival of an open one."""
        if isinstance(self.tenant.arrival, Closed):
            self._ask_and_think(self.tenant.arrival.think_seconds)
        else:
            self._arrive()

    def _client(self) -> Client:
        if isinstance(self.tenant.manner, Patient):
            return self.load.connect()
        return Misbehaving(self.load.scenario.base_url, self.tenant.manner, clock=time.perf_counter, pause=gevent.sleep)

    def _ask_and_think(self, think_seconds: float) -> None:
        if not self.load.is_open(self.tenant):
            raise StopUser
        asked = self.load.make(self.tenant, self.seat.random, history=self.history)
        sample, answer = self.load.ask(self.client_of_mine, self.tenant, asked, self.load.now())
        self._report(sample)
        said = answer.timing.text if answer.timing else None
        gevent.sleep(self._next_turn(asked, said) if self.tenant.turns else think_seconds)

    def _next_turn(self, asked: Asked, said: str | None) -> float:
        """Carry the conversation on, or begin another; the seconds to think before."""
        turns = self.tenant.turns
        assert turns is not None
        self.turn += 1
        if said is None or self.turn >= turns.count:
            self.turn, self.history = 0, []
        else:
            self.history += [
                {"role": "user", "content": asked.question},
                {"role": "assistant", "content": said},
            ]
        return turns.think_seconds

    def _arrive(self) -> None:
        number, (due, row) = next(self.arrivals, (0, (float("inf"), None)))
        # Looks up once a second whether the load is over: the next arrival may be far away, or not come at all.
        while (wait := due - self.load.now()) > 0 and self.load.is_open(self.tenant):
            gevent.sleep(min(wait, 1.0))
        if not self.load.is_due(self.tenant, due):
            self.in_flight.join()
            raise StopUser
        asked = self.load.make(self.tenant, self.load.random_for(self.tenant, number), row)
        self.in_flight.spawn(self._ask_once, asked, due)  # waits while max_in_flight are under way; `due` stays

    def _ask_once(self, asked: Asked, due: float) -> None:
        client = self.idle.pop() if self.idle else self._client()
        sample, _ = self.load.ask(client, self.tenant, asked, due)
        self._report(sample)
        self.idle.append(client)

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
