"""What is written down about a running engine, so that the next controller knows it again.

The shim writes the entry, with its own identity, before it tells the controller that the engine runs; so there is no engine
without an entry. The controller adds when the engine became ready.
"""

from __future__ import annotations

import contextlib
import shutil
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_registry.atomic import write_atomically
from model_registry.model import Task
from placement.replicas.procfs import ProcessIdentity
from placement.state import StatePaths


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class JournalEntry(_Record):
    """One engine process: who it is, what it is for, and how it was started."""

    version: Literal[1] = 1
    replica: str
    model: str
    task: Task
    slice_id: str
    spec_hash: str
    place_hash: str = ""
    endpoint: str
    secret: str = Field(
        default="", repr=False, description="What it wants to be shown; empty on a Unix socket, and of an older start."
    )
    log_offset: int
    started_at: datetime
    shim_pid: int = 0
    shim_start_ticks: int = 0
    boot_id: str = ""
    engine_pid: int = 0
    ready_at: datetime | None = None
    asleep: bool = False

    @property
    def shim(self) -> ProcessIdentity:
        """The process whose life is the engine's."""
        return ProcessIdentity(self.shim_pid, self.shim_start_ticks, self.boot_id)


class ExitRecord(_Record):
    """How an engine ended, as its shim wrote it. Exactly one of `code` and `signal` is set."""

    engine_pid: int
    code: int | None
    signal: int | None
    stop_requested: bool = False
    oom_kills: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0


class Journal:
    """The entries of one state directory."""

    def __init__(self, paths: StatePaths) -> None:
        self._paths = paths

    def entries(self) -> tuple[JournalEntry, ...]:
        """Every readable entry, by replica. An entry that is damaged is left out: its engine cannot be known again."""
        found = (self.read(path) for path in sorted(self._paths.replicas.glob("*/journal.json")))
        return tuple(entry for entry in found if entry is not None)

    def read(self, path: Path) -> JournalEntry | None:
        """The entry at `path`; None if there is none that makes sense."""
        try:
            return JournalEntry.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def of(self, replica: str) -> JournalEntry | None:
        """The entry of one replica."""
        return self.read(self._paths.journal(replica))

    def write(self, entry: JournalEntry) -> None:
        """Replace the replica's entry."""
        write_atomically(self._paths.journal(entry.replica), entry.model_dump_json().encode(), mode=0o600)

    def exit_record(self, entry: JournalEntry) -> ExitRecord | None:
        """How the engine of `entry` ended; None if it runs, or if its shim could not write it down."""
        try:
            record = ExitRecord.model_validate_json(self._paths.exit_record(entry.replica).read_bytes())
        except (OSError, ValidationError):
            return None
        return record if record.engine_pid == entry.engine_pid else None

    def forget(self, replica: str) -> None:
        """Remove everything but the logs of a replica that is gone."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._paths.replica(replica))
