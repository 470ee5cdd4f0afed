"""What a replica's life is made of: what it is to be, what is seen of it, and the seams to processes, engines and time."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from model_registry.model import Task
from placement.clock import Clock
from placement.launch import Endpoint, LaunchSpec
from placement.proof import Proof
from placement.replicas.backoff import Restarts
from placement.replicas.journal import ExitRecord, JournalEntry
from placement.replicas.probe import Activity
from placement.schema import EngineConfig
from placement.slices import Slice
from placement.table import ReplicaState

Learned = Literal["start", "wake", "no_wake"]


class Process(Protocol):
    """An engine process; see `placement.replicas.process.EngineProcess`."""

    entry: JournalEntry

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens, or will."""

    @property
    def session(self) -> int:
        """The session that all its processes are in."""

    @property
    def ended(self) -> bool:
        """Whether all of it has ended."""

    async def wait(self) -> ExitRecord | None:
        """Wait for the end of all of it."""

    def terminate(self) -> None:
        """Ask it to stop."""

    def kill(self) -> None:
        """End it now."""

    def pin(self, cores: Sequence[int]) -> None:
        """Move all of it to these hardware threads."""

    def mark_ready(self, at: datetime) -> None:
        """Write down that it has answered a real request."""

    def mark_asleep(self, asleep: bool) -> None:
        """Write down that it was put to sleep, or woke."""


class Prober(Protocol):
    """Questions to an engine; see `placement.replicas.probe.Probe`."""

    async def healthy(self, *, timeout_seconds: float) -> bool:
        """Whether its server says that it is alive."""

    async def answers(self, *, timeout_seconds: float) -> bool:
        """Whether it answers a real request."""

    async def activity(self, *, timeout_seconds: float) -> Activity | None:
        """What it says it is doing."""

    async def asleep(self, *, timeout_seconds: float) -> bool | None:
        """Whether it sleeps; None where it has no sleep mode."""

    async def sleep(self, *, timeout_seconds: float) -> bool:
        """Put it to sleep, its weights in the host's memory; whether it does."""

    async def wake(self, *, timeout_seconds: float) -> bool:
        """Wake it; whether it did."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One replica that should run on one slice.

    `spec` is None for an engine that runs and is kept although how to start it is not known, because its model cannot be
    read at the moment: when it ends, it has failed. `may_sleep` is whether its model may go without a replica that serves;
    `asleep` that this one is to sleep, with its process and its slice. `in_place_of` names the replica that this one starts
    beside, to take its place.
    """

    replica: str
    model: str
    task: Task
    slice: Slice
    max_num_seqs: int | None
    spec: LaunchSpec | None
    kv_cache_tokens: int | None = None
    may_sleep: bool = False
    asleep: bool = False
    in_place_of: str | None = None

    @property
    def spec_hash(self) -> str | None:
        """Equal exactly if an engine that runs need not be restarted."""
        return self.spec.spec_hash if self.spec else None


@dataclass(frozen=True, slots=True)
class View:
    """A replica as the controller, the table and the status file see it. `can_sleep` is None until its engine was asked.

    `secret` is what the engine wants to be shown: for the table alone.
    """

    state: ReplicaState
    since: datetime
    endpoint: str | None = None
    secret: str = field(default="", repr=False)
    stage: str | None = None
    reason: str | None = None
    remedy: str | None = None
    retry_at: datetime | None = None
    engine_pid: int | None = None
    session: int | None = None
    adopted: bool = False
    restarts: Restarts = field(default_factory=Restarts)
    proof: Proof | None = None
    can_sleep: bool | None = None


def _forget(_: Goal, __: Learned, ___: float) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Hands:
    """Everything a replica reaches the world through.

    `prove` looks whether an engine that answers is on its slice. `gate` is held while an engine starts, and tells what it
    waits for. `learned` is told how many seconds a start or a wake took, or that a wake failed (0).
    """

    start: Callable[[LaunchSpec, EngineConfig], Process]
    probe: Callable[[Endpoint, str, Task], Prober]
    read_log: Callable[[JournalEntry], str]
    secure: Callable[[Endpoint], None]
    prove: Callable[[Goal, JournalEntry], Awaitable[Proof]]
    gate: Callable[[Goal, Callable[[str], None]], contextlib.AbstractAsyncContextManager[object]]
    clock: Clock
    jitter: Callable[[], float]
    changed: Callable[[], None]
    learned: Callable[[Goal, Learned, float], None] = _forget
