"""Several processes, one limit: the sum of what they use is below it in every window, whatever dies in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.admission import Admission, AdmissionPolicy, Loads
from gateway.admission.limits import Need
from gateway.admission.schema import TenantLimits
from gateway.admission.sharing import LimitStore, Report, Sharing, settle
from gateway.admission.sharing.ledger import Grant, State
from gateway.errors import RateLimited, StoreUnavailable
from gateway.routes import Routes

LIMIT, LEASE = 20, 5.0


class MemoryStore:
    """The rules alone, on the clock of the world; with `mute` its answers are lost."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.leases: dict[str, float] = {}
        self.states: dict[str, State] = {}
        self.mute = False

    async def sync(
        self, process: str, reports: Sequence[Report], lease_seconds: float, peers: int
    ) -> tuple[Mapping[str, Grant], int]:
        now = self.world.now
        self.leases[process] = now + lease_seconds
        grants = {}
        for report in reports:
            before = self.states.get(report.name)
            self.states[report.name], grants[report.name] = settle(
                before, report, process, self.leases, now, lease_seconds, peers
            )
        if self.mute:
            raise StoreUnavailable("the answer was lost")
        return grants, sum(until > now for until in self.leases.values())

    async def leave(self, process: str) -> None:
        del self.leases[process]

    async def close(self) -> None: ...


def step(coroutine: Any) -> None:
    """Run what never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")


class Process:
    def __init__(self, world: Any, store: LimitStore, name: str) -> None:
        policy = AdmissionPolicy(limits={"t": TenantLimits(requests_per_minute=LIMIT)})
        self.admission = Admission(lambda: Routes(), Loads(bound=1), lambda: world.now, policy)
        self.sharing = Sharing(self.admission, store, lambda: world.now, process=name, lease_seconds=LEASE)
        step(self.sharing.sync())

    def admits(self, now: float) -> bool:
        if now > self.admission.shares_until:
            self.admission.shares_lapsed()
        gauges = self.admission.limits.of("t", "m")
        try:
            self.admission.limits.reserve(gauges, Need(1, 1), now)
        except RateLimited:
            return False
        return True


class Fleet(RuleBasedStateMachine):
    """Processes that come, serve, sync, leave and die without a word, with a store whose answers get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.store = MemoryStore(self)
        self.processes: dict[str, Process] = {}
        self.served: list[float] = []
        self.names = 0
        self.start()

    @rule()
    def start(self) -> None:
        if len(self.processes) < 4:
            self.names += 1
            self.processes[f"p{self.names}"] = Process(self, self.store, f"p{self.names}")

    @rule(pick=st.integers(0, 9), requests=st.integers(1, 25))
    def serve(self, pick: int, requests: int) -> None:
        for name in self.picked(pick):
            self.served += [self.now for _ in range(requests) if self.processes[name].admits(self.now)]

    @rule(pick=st.integers(0, 9), mute=st.booleans())
    def sync(self, pick: int, mute: bool) -> None:
        self.store.mute = mute  # what the store was told counts, what it answered is lost
        for name in self.picked(pick):
            step(self.processes[name].sharing.sync())
        self.store.mute = False

    @rule(pick=st.integers(0, 9), last_words=st.integers(0, 25), replaced_after=st.sampled_from([None, 0.5, 7.0, 30.0]))
    def die(self, pick: int, last_words: int, replaced_after: float | None) -> None:
        """It dies with requests that it told nobody of; sometimes another one is started in its place."""
        for name in self.picked(pick):
            self.serve(pick, last_words)
            del self.processes[name]
            if replaced_after is not None:
                self.wait(replaced_after, True)
                self.start()
                self.serve(len(self.processes) - 1, 25)

    @rule(pick=st.integers(0, 9))
    def leave(self, pick: int) -> None:
        for name in self.picked(pick):
            step(self.processes.pop(name).sharing.leave())

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 20.0, 61.0]), keep_in_touch=st.booleans())
    def wait(self, seconds: float, keep_in_touch: bool) -> None:
        """Time passes; a fleet that keeps in touch renews its leases meanwhile."""
        end = self.now + seconds
        while keep_in_touch and self.now + 1.0 < end:
            self.now += 1.0
            for process in self.processes.values():
                step(process.sharing.sync())
        self.now = end
        if not keep_in_touch and seconds > LEASE:
            # Whoever lost its lease goes on with its fair part, which is bounded elsewhere; here everybody syncs before serving.
            for process in self.processes.values():
                step(process.sharing.sync())

    def picked(self, pick: int) -> list[str]:
        names = sorted(self.processes)
        return [names[pick % len(names)]] if names else []

    @invariant()
    def the_limit_holds_over_all(self) -> None:
        assert sum(at + 60.0 > self.now for at in self.served) <= LIMIT

    def teardown(self) -> None:
        """What the dead held is not lost: after a lease and a window a process that is alone has all of it."""
        self.processes.clear()
        self.now += 2 * 61.0 + LEASE
        last = Process(self, self.store, "last")
        assert sum(last.admits(self.now) for _ in range(LIMIT + 5)) == LIMIT


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
