"""The state of one run, and what every kind of user does with it: which requests are due, sending them, keeping the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from loadtests import bodies
from loadtests.client import Answer, Clock, Connection
from loadtests.samples import Sample
from loadtests.scenario import Closed, Scenario, ScenarioError, TenantLoad


class Load:
    """One run of a scenario. `samples` grows as answers end; requests due in the warm-up leave none.

    A tenant marked `background` goes on until every request of the others is answered, so that the last of those are
    measured under the same load as the first.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        environment: Mapping[str, str],
        clock: Clock,
        places: Places | None = None,
    ) -> None:
        self.scenario = scenario
        self.samples: list[Sample] = []
        self.sent = 0
        self.in_flight = 0
        self._clock = clock
        self._places = places or Places()
        self._keys = {tenant.name: tenant.key(environment) for tenant in scenario.tenants}
        self._waiting = [tenant for tenant in scenario.tenants for _ in range(seats(tenant))]
        self._taken = 0
        self._foreground = sum(seats(tenant) for tenant in scenario.tenants if not tenant.background)
        if not self._foreground:
            raise ScenarioError("every tenant is `background`; nothing would ever end the run")
        self._open_seats = len(self._waiting)
        self._on_end: list[Callable[[], None]] = []
        self._started = clock()

    @property
    def user_count(self) -> int:
        """Users to start: one per user of a closed loop, one per open-loop tenant."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to count time; requests are due from here on."""
        self._started = self._clock()

    def on_end(self, call: Callable[[], None]) -> None:
        """Call this once every user has left."""
        self._on_end.append(call)

    def take_seat(self) -> tuple[TenantLoad, Random]:
        """The tenant that the next user works for, and its own random numbers. Raises IndexError when all seats are taken."""
        tenant = self._waiting[self._taken]
        self._taken += 1
        return tenant, Random(f"{self.scenario.seed}/{tenant.name}/{self._taken}")

    def leave_seat(self, tenant: TenantLoad) -> None:
        """A user of `tenant` has nothing left to do."""
        self._open_seats -= 1
        self._foreground -= not tenant.background
        if self._open_seats == 0:
            for call in self._on_end:
                call()

    def now(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._started

    def is_open(self, tenant: TenantLoad) -> bool:
        """Whether requests of `tenant` are still due."""
        if tenant.background:
            return self._foreground > 0
        return self.now() < self.scenario.warmup_seconds + self.scenario.duration_seconds

    def connect(self) -> Connection:
        """A connection of its own for one user, or for one request in flight."""
        return Connection(self.scenario.base_url, timeout_seconds=self.scenario.timeout_seconds, clock=self._clock)

    def ask(self, connection: Connection, tenant: TenantLoad, random: Random, due: float) -> Sample:
        """Send one request that was due at `due` (seconds since the run began), and keep what came of it."""
        body = bodies.body(tenant, random)
        sent = self.now()
        self.sent += 1
        self.in_flight += 1
        try:
            answer = connection.ask(
                bodies.PATHS[tenant.task],
                body,
                key=self._keys[tenant.name],
                streams=tenant.streams,
                due=self._started + due,
            )
        finally:
            self.in_flight -= 1
        sample = self._sample(tenant, answer, due, sent)
        if due >= self.scenario.warmup_seconds:
            self.samples.append(sample)
        return sample

    def _sample(self, tenant: TenantLoad, answer: Answer, due: float, sent: float) -> Sample:
        timing, failure = answer.timing, answer.failure
        return Sample(
            tenant=tenant.name,
            model=tenant.model,
            slice=self._places.of(answer, tenant.model),
            due_seconds=due,
            sent_seconds=sent,
            ended_seconds=self.now(),
            status=answer.status,
            request_id=answer.request_id,
            failure=failure.kind if failure else None,
            message=failure.message if failure else None,
            ttft_seconds=timing.ttft_seconds if timing else None,
            itl_seconds=timing.itl_seconds if timing else (),
            e2e_seconds=timing.e2e_seconds if timing else None,
            output_tokens=timing.output_tokens if timing else 0,
        )


def seats(tenant: TenantLoad) -> int:
    """How many users a tenant's load takes."""
    return tenant.arrival.users if isinstance(tenant.arrival, Closed) else 1


def arrivals(requests_per_second: float, random: Random) -> Callable[[], float]:
    """Seconds since the run began at which the next request is due, one call after the other: a Poisson process."""
    due = 0.0

    def following() -> float:
        nonlocal due
        due += random.expovariate(requests_per_second)
        return due

    return following


@dataclass(frozen=True, slots=True)
class Places:
    """Where answers come from: the slice of each replica, and of each model that is on one slice only."""

    by_replica: Mapping[str, str] = field(default_factory=dict)
    by_model: Mapping[str, str] = field(default_factory=dict)

    def of(self, answer: Answer, model: str) -> str | None:
        """The slice that `answer` came from, by the replica that it names, else by its model; None where neither tells."""
        named = self.by_replica.get(answer.replica) if answer.replica else None
        return named or self.by_model.get(model)


def read_places(shown: object) -> Places:
    """Places, from what the gateway's `/slices` says; nothing where it says nothing."""
    rows = [row for row in shown if row.get("model")] if isinstance(shown, list) else []
    by_model: dict[str, set[str]] = {}
    for row in rows:
        by_model.setdefault(row["model"], set()).add(row["slice"]["id"])
    return Places(
        by_replica={row["replica"]: row["slice"]["id"] for row in rows if row.get("replica")},
        by_model={model: ids.pop() for model, ids in by_model.items() if len(ids) == 1},
    )
