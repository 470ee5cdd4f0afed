"""Processes that outlive the one that started them: the controller and the gateway under `sliceway up`.

Each is in a session of its own, so that a Ctrl-C reaches `up` alone, and none ends because `up` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from model_registry.atomic import write_atomically
from placement.replicas.procfs import ProcessIdentity, boot_id


class ProcessRow(BaseModel):
    """A process as a file tells of it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    start_ticks: int
    boot_id: str

    @property
    def identity(self) -> ProcessIdentity:
        """The process that it was."""
        return ProcessIdentity(self.pid, self.start_ticks, self.boot_id)


class UpRecord(BaseModel):
    """What `sliceway up` has started, for the next one to find."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    config: str
    listen: str
    simulate: str | None = None
    processes: dict[str, ProcessRow] = {}


def read_record(path: Path) -> UpRecord | None:
    """The record at `path`; None if there is none that makes sense."""
    try:
        return UpRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_record(record: UpRecord, path: Path) -> None:
    """Replace the record at `path`."""
    write_atomically(path, record.model_dump_json(indent=1).encode(), mode=0o600)


class WatchedProcess:
    """A process that runs, child or not; known by a pidfd, so that no signal reaches a stranger with its pid."""

    def __init__(self, identity: ProcessIdentity, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._ended = asyncio.Event()
        self.exit_status: int | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @classmethod
    def spawn(cls, argv: Sequence[str], log: Path) -> WatchedProcess:
        """Start `argv` in a session of its own, its output appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        actions = [(os.POSIX_SPAWN_DUP2, nothing, 0), *((os.POSIX_SPAWN_DUP2, output, n) for n in (1, 2))]
        try:
            pid = os.posix_spawn(argv[0], list(argv), dict(os.environ), file_actions=actions, setsid=True)
        finally:
            os.close(output)
            os.close(nothing)
        identity = ProcessIdentity.of(pid) or ProcessIdentity(pid, 0, boot_id())
        return cls(identity, os.pidfd_open(pid))

    @classmethod
    def find(cls, identity: ProcessIdentity) -> WatchedProcess | None:
        """The process with this identity, if it still runs."""
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError:
            return None
        if not identity.alive:
            os.close(pidfd)
            return None
        return cls(identity, pidfd)

    @property
    def row(self) -> ProcessRow:
        """As a file tells of it."""
        return ProcessRow(pid=self.identity.pid, start_ticks=self.identity.start_ticks, boot_id=self.identity.boot_id)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Wait for its end."""
        await self._ended.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing if it has ended."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(ChildProcessError):  # found, not started here: its parent learns how it ended
            _, status = os.waitpid(self.identity.pid, 0)
            self.exit_status = os.waitstatus_to_exitcode(status)
        self._ended.set()
