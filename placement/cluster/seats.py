"""The seats of one node, as its controller reads them: a file that the agent writes.

A file and not a call, so that a controller that starts alone, after the agent or Ray on this node has died, knows what was
asked for last. Each seat names its owner, the process that holds the slice in Ray's books. An engine outlives its owner for a
while, because Ray may lose a head or an agent and be given another one; it does not outlive it for ever.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from model_registry.atomic import write_atomically
from placement.cluster.members import Owner
from placement.controller import Controller
from placement.goals import PlacementConfig, Workshop
from placement.replicas.procfs import ProcessIdentity
from placement.sources import Sources

LOOK_SECONDS = 0.5


class SeatRow(BaseModel):
    """One replica's slice, and who holds it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    slice_id: str
    owner: Owner


class SeatsFile(BaseModel):
    """All of a node's seats."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seats: Mapping[str, SeatRow] = {}
    turns: tuple[str, ...] = ()
    orphan_seconds: float = 600.0


def write_seats(path: Path, seats: SeatsFile) -> None:
    """Replace the file."""
    write_atomically(path, seats.model_dump_json(indent=1).encode(), mode=0o600)


def read_seats(path: Path) -> SeatsFile | None:
    """The file at `path`; None if there is none that makes sense."""
    try:
        return SeatsFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def owner_lives(owner: Owner) -> bool:
    """Whether exactly this process still runs."""
    return ProcessIdentity(owner.pid, owner.start_ticks, owner.boot_id).alive


def this_process() -> Owner:
    """The calling process as an owner."""
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    return Owner(pid=me.pid, start_ticks=me.start_ticks, boot_id=me.boot_id)


async def run_seats(path: Path, sources: Sources, workshop: Workshop) -> None:
    """A controller that runs the seats in the file at `path`, for as long as they count."""
    keeper = SeatKeeper(path, sources.clock.monotonic)

    def load() -> PlacementConfig:
        keeper.look()
        return sources.load().model_copy(update={"seats": dict(keeper.seats), "turns": keeper.turns})

    controller = Controller(replace(sources, load=load, scales=False), workshop)

    async def watch() -> None:
        while True:
            await sources.clock.sleep(LOOK_SECONDS)
            if keeper.look():
                controller.reload()

    watching = asyncio.create_task(watch())
    try:
        await controller.run()
    finally:
        watching.cancel()


class SeatKeeper:
    """Which seats count at the moment. `look` says whether that has changed since the last time."""

    def __init__(
        self, path: Path, monotonic: Callable[[], float], lives: Callable[[Owner], bool] = owner_lives
    ) -> None:
        self._path = path
        self._monotonic = monotonic
        self._lives = lives
        self._file = read_seats(path) or SeatsFile()
        self._dead_since: dict[str, float] = {}
        self._counted = self._count()
        self._turns = self._file.turns

    @property
    def turns(self) -> tuple[str, ...]:
        """Replicas of an earlier configuration whose turn to be replaced it is."""
        return self._turns

    @property
    def seats(self) -> Mapping[str, str]:
        """Slice ids by replica, without the seats whose owner has been dead for too long."""
        return self._counted

    def look(self) -> bool:
        """Read the file and look at the owners. A file that makes no sense changes nothing."""
        self._file = read_seats(self._path) or self._file
        counted = self._count()
        changed = (counted, self._file.turns) != (self._counted, self._turns)
        self._counted, self._turns = counted, self._file.turns
        return changed

    def _count(self) -> dict[str, str]:
        now = self._monotonic()
        counted = {}
        for replica, row in self._file.seats.items():
            if self._lives(row.owner):
                self._dead_since.pop(replica, None)
            elif now - self._dead_since.setdefault(replica, now) >= self._file.orphan_seconds:
                continue
            counted[replica] = row.slice_id
        return counted
