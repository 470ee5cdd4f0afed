"""Fakes of everything that placement reaches the world through: time, processes, questions to engines.

They are part of the package, so that whoever builds on it can test without processes and without waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from model_registry.model import Task
from placement.errors import PlacementError
from placement.launch import Endpoint, LaunchSpec
from placement.proof import Proof
from placement.replicas.gates import StartGates
from placement.replicas.journal import ExitRecord, JournalEntry
from placement.replicas.parts import Goal, Hands
from placement.replicas.probe import Activity
from placement.schema import EngineConfig


class FakeClock:
    """A clock that stands still until everything else waits, and then jumps to the next moment that someone waits for.

    `slept` holds every sleep's seconds, in the order they began.
    """

    def __init__(self, start: datetime = datetime(2026, 11, 21, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed = 0.0
        self.slept: list[float] = []

    def now(self) -> datetime:
        """The time of day."""
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        """Let everyone else run, then be `seconds` later."""
        self.slept.append(seconds)
        due = self._elapsed + seconds
        for _ in range(20):
            await asyncio.sleep(0)
        self._elapsed = max(self._elapsed, due)


@dataclass
class FakeProcess:
    """An engine process without one. `end` ends it; `kill` and `terminate` do too, unless it is `stubborn`."""

    entry: JournalEntry
    stubborn: bool = False
    received: list[str] = field(default_factory=list)
    record: ExitRecord | None = None
    pinned: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = asyncio.Event()

    @property
    def endpoint(self) -> Endpoint:
        """Where it would listen."""
        return Endpoint.parse(self.entry.endpoint, secret=self.entry.secret)

    @property
    def session(self) -> int:
        """Its session."""
        return self.entry.shim_pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    async def wait(self) -> ExitRecord | None:
        """Wait for its end."""
        await self._over.wait()
        return self.record

    def end(self, *, code: int | None = None, signal: int | None = None, oom_kills: int = 0) -> None:
        """End it this way."""
        self.record = ExitRecord(engine_pid=self.entry.engine_pid, code=code, signal=signal, oom_kills=oom_kills)
        self._over.set()

    def terminate(self) -> None:
        """SIGTERM."""
        self.received.append("terminate")
        if not self.stubborn:
            self.end(code=0)

    def kill(self) -> None:
        """SIGKILL."""
        self.received.append("kill")
        self.end(signal=9)

    def pin(self, cores: Sequence[int]) -> None:
        """Move it to these cores."""
        self.pinned.append(tuple(cores))

    def mark_ready(self, at: datetime) -> None:
        """Write down that it is ready."""
        self.entry = self.entry.model_copy(update={"ready_at": at})

    def mark_asleep(self, asleep: bool) -> None:
        """Write down that it sleeps, or woke."""
        self.entry = self.entry.model_copy(update={"asleep": asleep})


@dataclass
class FakeEngine:
    """What every probe answers, and how many were asked. Change it while a replica runs."""

    is_healthy: bool = True
    does_answer: bool = True
    doing: Activity | None = None
    is_asleep: bool | None = None
    does_sleep: bool = True
    does_wake: bool = True
    asked: int = 0
    on_ask: Callable[[], None] = lambda: None

    async def healthy(self, *, timeout_seconds: float) -> bool:
        """As set."""
        self.asked += 1
        self.on_ask()
        return self.is_healthy

    async def answers(self, *, timeout_seconds: float) -> bool:
        """As set."""
        return self.does_answer

    async def activity(self, *, timeout_seconds: float) -> Activity | None:
        """As set."""
        self.asked += 1
        self.on_ask()
        return self.doing

    async def asleep(self, *, timeout_seconds: float) -> bool | None:
        """As set; None: it has no sleep mode."""
        return self.is_asleep

    async def sleep(self, *, timeout_seconds: float) -> bool:
        """As set."""
        self.is_asleep = True if self.does_sleep else self.is_asleep
        return self.does_sleep

    async def wake(self, *, timeout_seconds: float) -> bool:
        """As set."""
        self.is_asleep = False if self.does_wake else self.is_asleep
        return self.does_wake


@dataclass
class FakeWorld:
    """Hands for replicas: every start gives the next process and is written down in `started`.

    `log` is what every engine has written. `proof` is what is found out about every place; nothing is wrong if None. `refuse` makes starts fail. `on_start` sees each new process.
    """

    clock: FakeClock = field(default_factory=FakeClock)
    engine: FakeEngine = field(default_factory=FakeEngine)
    log: str = ""
    refuse: PlacementError | None = None
    proof: Proof | None = None
    on_start: Callable[[FakeProcess], None] = lambda _: None
    started: list[FakeProcess] = field(default_factory=list)
    secured: list[Endpoint] = field(default_factory=list)
    gates: StartGates = field(default_factory=lambda: StartGates(at_once=8))
    learned: list[tuple[str, str, float]] = field(default_factory=list)

    def hands(self) -> Hands:
        """What a replica is given."""
        return Hands(
            start=self.start,
            probe=lambda *_: self.engine,
            read_log=lambda _: self.log,
            secure=self.secured.append,
            prove=self._prove,
            gate=lambda goal, say: self.gates.turn(goal.slice, goal.spec.cache if goal.spec else None, say),
            clock=self.clock,
            jitter=lambda: 0.0,
            changed=lambda: None,
            learned=lambda goal, what, seconds: self.learned.append((goal.replica, what, seconds)),
        )

    def start(self, spec: LaunchSpec, _: EngineConfig) -> FakeProcess:
        """A new process for `spec`."""
        if self.refuse is not None:
            raise self.refuse
        process = FakeProcess(fake_entry(spec, number=len(self.started) + 1, started_at=self.clock.now()))
        self.started.append(process)
        self.on_start(process)
        return process

    async def _prove(self, goal: Goal, _: JournalEntry) -> Proof:
        return self.proof or Proof(goal.slice, (), ok=True)


def fake_entry(
    spec: LaunchSpec,
    *,
    number: int = 1,
    started_at: datetime = datetime(2026, 11, 21, tzinfo=UTC),
    task: Task = "generate",
) -> JournalEntry:
    """A journal entry as if process `number` had been started for `spec`."""
    return JournalEntry(
        replica=spec.replica,
        model=spec.model,
        task=task,
        slice_id=spec.slice.id,
        spec_hash=spec.spec_hash,
        endpoint=f"unix:/run/{spec.replica}.sock",
        log_offset=0,
        started_at=started_at,
        shim_pid=1000 + number,
        engine_pid=2000 + number,
    )
