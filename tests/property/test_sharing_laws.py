"""Several processes, one limit: the sum of what they use is below it in every window, whatever dies in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.admission import Admission, AdmissionPolicy, Loads
from gateway.admission.limits import Need
from gateway.admission.schema import TenantLimits
from gateway.admission.sharing import LimitShares, LimitStore, Report, Sharing, settle
from gateway.admission.sharing.known_gateways import FEWER_SECONDS, KnownGateways
from gateway.admission.sharing.ledger import Grant, State
from gateway.admission.sharing.taken import LeftBooks, TakenBook
from gateway.errors import RateLimited, StoreUnavailable
from gateway.routes import Routes

LIMIT, LEASE = 20, 5.0


class MemoryStore:
    """The rules alone, on the clock of the world; with `mute` its answers are lost. `left` tells of processes that died."""

    def __init__(self, world: Any, left: LeftBooks | None = None) -> None:
        self.world = world
        self.left = left
        self.leases: dict[str, float] = {}
        self.states: dict[str, State] = {}
        self.mute = False

    async def sync(
        self, process: str, reports: Sequence[Report], lease_seconds: float, peers: int
    ) -> tuple[Mapping[str, Grant], int]:
        now = self.world.now
        self.leases[process] = now + lease_seconds
        left = self.left
        for other, until in self.leases.items():
            if left is not None and other != process and until > now and left.ended(other):
                self.leases[other] = now
        untold = left.untold if left is not None else lambda process, name: None
        grants = {}
        for report in reports:
            before = self.states.get(report.name)
            self.states[report.name], grants[report.name] = settle(
                before, report, process, self.leases, now, lease_seconds, peers, untold
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
    def __init__(
        self, world: Any, store: LimitStore, name: str, expected: int = 1, book: TakenBook | None = None
    ) -> None:
        policy = AdmissionPolicy(limits={"t": TenantLimits(requests_per_minute=LIMIT)})
        self.admission = Admission(lambda: Routes(), Loads(bound=1), lambda: world.now, policy)
        self.book = book
        self.sharing = Sharing(
            LimitShares(self.admission),
            store,
            lambda: world.now,
            process=name,
            lease_seconds=LEASE,
            expected=expected,
            book=book,
        )
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
        self.store = self.made_store()
        self.processes: dict[str, Process] = {}
        self.served: list[float] = []
        self.names = 0
        self.start()

    def made_store(self) -> MemoryStore:
        return MemoryStore(self)

    def book_of(self, name: str) -> TakenBook | None:
        return None

    @rule()
    def start(self) -> None:
        if len(self.processes) < 4:
            self.names += 1
            name = f"p{self.names}"
            self.processes[name] = Process(self, self.store, name, book=self.book_of(name))

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
            self.buried(self.processes.pop(name))
            if replaced_after is not None:
                self.wait(replaced_after, True)
                self.start()
                self.serve(len(self.processes) - 1, 25)

    def buried(self, process: Process) -> None:
        """What the kernel does."""
        if process.book is not None:
            process.book.close(remove=False)

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
        for process in self.processes.values():
            self.buried(process)
        self.processes.clear()
        self.now += 2 * 61.0 + LEASE
        last = Process(self, self.store, "last")
        assert sum(last.admits(self.now) for _ in range(LIMIT + 5)) == LIMIT


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class FleetOfOneMachine(Fleet):
    """The same where every process notes what it takes, so that its death is known at once, and what it had not told."""

    def made_store(self) -> MemoryStore:
        self.folder = TemporaryDirectory()
        return MemoryStore(self, LeftBooks(Path(self.folder.name)))

    def book_of(self, name: str) -> TakenBook:
        return TakenBook(Path(self.folder.name), name, lambda: 0.0)

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


TestFleetOfOneMachine = FleetOfOneMachine.TestCase
TestFleetOfOneMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.store = MemoryStore(self)

    def rounds(self, processes: list[Process], seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            for process in processes:
                step(process.sharing.sync())

    def admitted(self, process: Process) -> int:
        return sum(process.admits(self.now) for _ in range(LIMIT + 5))


def test_what_a_process_holds_is_not_cut_while_its_report_is_under_way() -> None:
    """It may use all of it before the answer comes, also in the time in which a limit that is new is given out by parts."""
    first, granted = settle(None, Report("m", 4, 0.0, 4, 0, ()), "a", {}, 0.0, 5.0, 1)
    assert granted.share == 4
    _, granted = settle(first, Report("m", 4, 0.0, 4, 0, ((0.0, 1),)), "a", {"a": 5.0, "b": 5.0}, 1.0, 5.0, 2)
    assert granted.share == 4
    _, granted = settle(first, Report("m", 4, 0.0, 2, 0, ((0.0, 1),)), "a", {"a": 5.0, "b": 5.0}, 1.0, 5.0, 2)
    assert granted.share == 2


def test_an_idle_process_does_not_keep_a_limit_from_one_that_has_just_come() -> None:
    world = World()
    idle = Process(world, world.store, "idle")
    world.rounds([idle], 60.0)
    fresh = Process(world, world.store, "fresh")
    got = 0
    for _ in range(40):
        got += world.admitted(fresh)
        world.rounds([idle, fresh], 0.25)
    assert got == LIMIT


def test_where_the_store_is_away_from_the_start_each_has_its_fair_part(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.store.mute = True
    with caplog.at_level("INFO"):
        processes = [Process(world, world.store, name, expected=4) for name in "abcd"]
        world.rounds(processes, 2.0)
        assert [world.admitted(process) for process in processes] == [LIMIT // 4] * 4
        assert all(process.sharing.problem for process in processes)
        told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(told) == len(processes), "each says it once"
        assert all("1/4 of each" in message for message in told)
        world.store.mute = False
        world.rounds(processes, 70.0)
    assert [process.sharing.problem for process in processes] == [None] * 4
    assert processes[0].sharing.peers == 4
    assert 0 < sum(world.admitted(process) for process in processes) <= LIMIT
    world.rounds(processes, 70.0)
    got = 0
    for _ in range(40):
        got += world.admitted(processes[0])
        world.rounds(processes, 0.25)
    assert got == LIMIT, "what the others leave can be had again"


def test_how_many_gateways_there_were_is_known_at_the_next_start(tmp_path: Path) -> None:
    now = [0.0]
    known = KnownGateways(tmp_path, lambda: now[0])
    assert known.read() == 1
    for gateways in (1, 2, 4, 3, 2, 1):
        known.told(gateways)
    assert KnownGateways(tmp_path, lambda: 0.0).read() == 4, (
        "gateways that stop one after the other are no smaller fleet"
    )
    now[0] = FEWER_SECONDS
    known.told(1)
    assert known.read() == 1
    (tmp_path / "limits.gateways").write_bytes(b"many")
    assert known.read() == 1
