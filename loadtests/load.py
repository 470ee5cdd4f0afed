"""The state of one run, and what every kind of user does with it: which requests are due, sending them, keeping the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from random import Random
from typing import Protocol

from loadtests.arrivals import Closed, Due, Trace, due_times, share_of
from loadtests.bodies import Asked, Bodies
from loadtests.client import Answer, Clock, Connection
from loadtests.problems import ScenarioError
from loadtests.samples import Sample
from loadtests.scenario import Scenario, TenantLoad
from loadtests.tokens import Lexicon
from loadtests.traces import Row, read_trace

Lexicons = Mapping[str, Lexicon]
"""By tenant, for those that count in tokens."""


class Client(Protocol):
    """Whatever sends one request and tells what became of it."""

    def ask(self, path: str, body: bytes, *, key: str | None, streams: bool, due: float) -> Answer:
        """Send one request; see `Connection.ask`."""
        ...

    def close(self) -> None:
        """Let go of the socket."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """One user's place: whose it is, and which user of that tenant it is, counted over all processes."""

    tenant: TenantLoad
    number: int
    random: Random


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a load this process sends: every `of`-th user and arrival, from `index` on."""

    index: int = 0
    of: int = 1


class Load:
    """One run of a scenario in this process. `samples` grows as answers end; requests due in the warm-up leave none.

    A tenant marked `background` goes on until every request of the others is answered, so that the last of those are
    measured under the same load as the first; where only background tenants are in this process, until `stop` is called.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        environment: Mapping[str, str],
        clock: Clock,
        places: Places | None = None,
        keys: Mapping[str, str | None] | None = None,
        lexicons: Lexicons | None = None,
        shard: Shard = Shard(),
        until_stopped: bool = False,
    ) -> None:
        self.scenario = scenario
        self.samples: list[Sample] = []
        self.sent = 0
        self._begun: Counter[str] = Counter()
        self.in_flight = 0
        self._clock = clock
        self._places = places or Places()
        self._keys = {t.name: (keys or {}).get(t.name) or t.key(environment) for t in scenario.tenants}
        self._bodies = {
            t.name: Bodies(t, seed=scenario.seed, wording=scenario.wording, lexicon=(lexicons or {}).get(t.name))
            for t in scenario.tenants
        }
        self._rows = {t.name: _rows_of(t) for t in scenario.tenants}
        self._shard = shard
        self._waiting = list(_seats(scenario, shard))
        self._taken = 0
        self._foreground = sum(not seat.tenant.background for seat in self._waiting)
        if not until_stopped and all(tenant.background for tenant in scenario.tenants):
            raise ScenarioError("every tenant is `background`; nothing would ever end the run")
        self._until_stopped = until_stopped
        self._stopped = False
        self._open_seats = len(self._waiting)
        self._on_end: list[Callable[[], None]] = []
        self._started = clock()

    @property
    def user_count(self) -> int:
        """Users to start: one per user of a closed loop, one per open-loop tenant."""
        return len(self._waiting)

    def start(self, at: float | None = None) -> None:
        """Begin to count time, from `at` on this load's clock or from now; requests are due from there on."""
        self._started = self._clock() if at is None else at

    @property
    def is_endless(self) -> bool:
        """Whether only `stop` ends this load."""
        return self._until_stopped

    @property
    def was_told_to_stop(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """Let no further request become due, and give up those that are under way."""
        self._stopped = True

    def on_end(self, call: Callable[[], None]) -> None:
        """Call this once every user has left."""
        self._on_end.append(call)

    def take_seat(self) -> Seat:
        """The next user's place. Raises IndexError when all seats are taken."""
        seat = self._waiting[self._taken]
        self._taken += 1
        return seat

    def leave_seat(self, tenant: TenantLoad) -> None:
        """A user of `tenant` has nothing left to do."""
        self._open_seats -= 1
        self._foreground -= not tenant.background
        if self._open_seats == 0:
            for call in self._on_end:
                call()

    def now(self) -> float:
        """Seconds since the run began; negative before."""
        return self._clock() - self._started

    def is_open(self, tenant: TenantLoad) -> bool:
        """Whether requests of `tenant` are still due."""
        if self._stopped:
            return False
        if tenant.background:
            return self._until_stopped or self._foreground > 0
        return self.now() < self._ends

    def is_due(self, tenant: TenantLoad, due: float) -> bool:
        """Whether an arrival at `due` is part of the load. One that is stays so, however late this process gets to send it."""
        if self._stopped or tenant.background:
            return self.is_open(tenant)
        return due < self._ends

    def unsent(self) -> int:
        """Arrivals that were due and not begun: a load that is given up leaves them in the client. None of one that was told to stop."""
        if self._stopped:
            return 0
        open_ones = [s for s in self._waiting if not isinstance(s.tenant.arrival, Closed) and not s.tenant.background]
        due = 0
        for seat in open_ones:
            again = replace(seat, random=_random_of(self.scenario, seat.tenant, "arrivals"))
            due += sum(1 for _ in takewhile(lambda arrival: arrival[1][0] < self._ends, self.arrivals(again)))
        return due - sum(self._begun[seat.tenant.name] for seat in open_ones)

    @property
    def _ends(self) -> float:
        return self.scenario.warmup_seconds + self.scenario.duration_seconds

    def arrivals(self, seat: Seat) -> Iterator[tuple[int, Due]]:
        """This process's share of an open loop's arrivals, each with its number in the whole."""
        assert not isinstance(seat.tenant.arrival, Closed)
        sequence = due_times(seat.tenant.arrival, seat.random, self._rows[seat.tenant.name])
        return share_of(sequence, self._shard.index, self._shard.of)

    def connect(self) -> Connection:
        """A connection of its own for one user, or for one request in flight."""
        return Connection(self.scenario.base_url, timeout_seconds=self.scenario.timeout_seconds, clock=self._clock)

    def random_for(self, tenant: TenantLoad, number: int) -> Random:
        """The random numbers of one arrival: the same whichever process sends it."""
        return _random_of(self.scenario, tenant, f"request/{number}")

    def make(
        self, tenant: TenantLoad, random: Random, row: Row | None = None, history: Sequence[dict[str, str]] = ()
    ) -> Asked:
        """The next request of `tenant`."""
        return self._bodies[tenant.name].make(random, row, history)

    def ask(self, client: Client, tenant: TenantLoad, asked: Asked, due: float) -> tuple[Sample, Answer]:
        """Send one request that was due at `due` (seconds since the run began), and keep what came of it."""
        sent = self.now()
        self.sent += 1
        self._begun[tenant.name] += 1
        self.in_flight += 1
        try:
            answer = client.ask(
                asked.path,
                asked.body,
                key=self._keys[tenant.name],
                streams=tenant.streams,
                due=self._started + due,
            )
        finally:
            self.in_flight -= 1
        sample = self._sample(tenant, answer, due, sent)
        if due >= self.scenario.warmup_seconds:
            self.samples.append(sample)
        return sample, answer

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
            prompt_tokens=timing.prompt_tokens if timing else 0,
        )


def _seats(scenario: Scenario, shard: Shard) -> Iterator[Seat]:
    for tenant in scenario.tenants:
        if isinstance(tenant.arrival, Closed):
            for number in range(shard.index, tenant.arrival.users, shard.of):
                yield Seat(tenant, number, _random_of(scenario, tenant, f"user/{number}"))
        else:
            yield Seat(tenant, 0, _random_of(scenario, tenant, "arrivals"))


def _random_of(scenario: Scenario, tenant: TenantLoad, what: str) -> Random:
    return Random(f"{scenario.seed}/{tenant.name}/{what}")


def _rows_of(tenant: TenantLoad) -> tuple[Row, ...]:
    return read_trace(tenant.arrival.file) if isinstance(tenant.arrival, Trace) else ()


def needs_lexicon(tenant: TenantLoad) -> bool:
    """Whether this tenant's prompts are counted in tokens."""
    return tenant.prompt_tokens is not None or isinstance(tenant.arrival, Trace)


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
