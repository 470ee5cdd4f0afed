"""Engine processes of this machine: starting one under its shim, finding one again, waiting, ending.

A pidfd stands for the shim in all of it, so that no signal can reach a stranger that got the same pid, and so that an
adopted engine, which is no child of this process, is waited for like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import select
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from placement import engine_tls
from placement.errors import PlacementError
from placement.guarding import guard_environment, new_secret
from placement.launch import Endpoint, LaunchSpec
from placement.mps import end_servers, ensure_server
from placement.plugin import plugin_environment
from placement.replicas import shim
from placement.replicas.journal import ExitRecord, Journal, JournalEntry
from placement.replicas.procfs import ProcessIdentity, boot_id, sessions, threads_of
from placement.schema import EngineConfig
from placement.sharing import mps_directory
from placement.slices import Slice, SliceKind
from placement.state import StatePaths, socket_name

LOG_LIMIT_BYTES = 16 * 2**20
KEPT_LOGS = 2
# Engines go before the controller and the gateway when the machine runs out of memory.
OOM_SCORE_ADJ = 500
_SHIM_SECONDS = 10.0


class EngineProcess:
    """One engine that runs, or has ended."""

    def __init__(self, entry: JournalEntry, pidfd: int, journal: Journal) -> None:
        self.entry = entry
        self._pidfd = pidfd
        self._journal = journal
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens, or will."""
        return Endpoint.parse(self.entry.endpoint, secret=self.entry.secret)

    @property
    def session(self) -> int:
        """The session that all its processes are in."""
        return self.entry.shim_pid

    @property
    def ended(self) -> bool:
        """Whether all of it has ended."""
        return self._ended.is_set()

    async def wait(self) -> ExitRecord | None:
        """Wait for the end of all of it. None if its shim could not tell how the engine ended."""
        await self._ended.wait()
        return self._journal.exit_record(self.entry)

    def terminate(self) -> None:
        """Ask it to finish what it does and stop. The shim kills what is left after the time it was given at the start."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all of it now."""
        self._signal(signal.SIGUSR1)

    def pin(self, cores: Sequence[int]) -> None:
        """Move all of it to these hardware threads. What may not be moved stays where it is."""
        with contextlib.suppress(OSError):  # it ended
            if os.sched_getaffinity(self.session) == frozenset(cores):
                return
        for pid in sessions([self.session])[self.session]:
            for thread in threads_of(pid):
                with contextlib.suppress(OSError):  # it ended, or the cores are not this process's to give
                    os.sched_setaffinity(thread, cores)

    def mark_ready(self, at: datetime) -> None:
        """Write down that it has answered a real request."""
        self.entry = self.entry.model_copy(update={"ready_at": at})
        self._journal.write(self.entry)

    def mark_asleep(self, asleep: bool) -> None:
        """Write down that it was put to sleep, or woke."""
        self.entry = self.entry.model_copy(update={"asleep": asleep})
        self._journal.write(self.entry)

    def release(self) -> None:
        """Stop watching; the engine goes on."""
        if self._pidfd >= 0:
            with contextlib.suppress(RuntimeError):  # the loop may be closed already
                asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_end(self) -> None:
        self.release()
        with contextlib.suppress(ChildProcessError):  # adopted: someone else's child
            os.waitpid(self.entry.shim_pid, 0)
        kill_session(self.entry.shim)
        self._ended.set()


@dataclass(frozen=True, slots=True)
class LocalLauncher:
    """Starts engines on this machine and finds those that run."""

    paths: StatePaths
    journal: Journal
    environ: Mapping[str, str]
    python: Path = Path(sys.executable)

    def _ready_card(self, target: Slice) -> None:
        """A card that MPS shares needs its server before the first engine; a simulated one has none."""
        if target.kind is SliceKind.MPS and target.gpu is not None and not target.simulated:
            directory = mps_directory(target.gpu.uuid, self.paths.runtime(self.environ))
            ensure_server(target.gpu.uuid, directory, self.environ)

    def end_cards(self) -> None:
        """Take down what was started for shared cards. Only when no engine is left."""
        end_servers(self.paths.runtime(self.environ), self.environ)

    def start(self, spec: LaunchSpec, config: EngineConfig) -> EngineProcess:
        """Start `spec`'s engine. Returns as soon as it runs, long before it is ready.

        On TCP it gets a secret of its own. Raises PlacementError where it cannot be started at all.
        """
        self._ready_card(spec.slice)
        endpoint = self._endpoint(spec.replica, config)
        home = self.paths.replica(spec.replica)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.paths.exit_record(spec.replica).unlink(missing_ok=True)
        log = self.paths.log(spec.replica)
        entry = JournalEntry(
            replica=spec.replica,
            model=spec.model,
            task=spec.task,
            slice_id=spec.slice.id,
            spec_hash=spec.spec_hash,
            place_hash=spec.place_hash,
            endpoint=str(endpoint),
            secret=endpoint.secret,
            log_offset=_begin_log(log, spec),
            started_at=datetime.now(UTC),
            boot_id=boot_id(),
        )
        order = {
            "argv": spec.command(endpoint, drain_seconds=config.drain_timeout_seconds),
            "env": self._environment(spec, endpoint.secret),
            "cwd": str(home),
            "cores": list(spec.slice.cores),
            "log": str(log),
            "journal": str(self.paths.journal(spec.replica)),
            "entry": entry.model_dump(mode="json"),
            "exit_record": str(self.paths.exit_record(spec.replica)),
            "stop_seconds": config.drain_timeout_seconds + config.stop_timeout_seconds,
            "oom_score_adj": OOM_SCORE_ADJ,
        }
        pidfd = self._run_shim(spec.replica, order)
        written = self.journal.of(spec.replica)
        if written is None:
            os.close(pidfd)
            raise PlacementError("the engine's journal entry vanished", where=str(self.paths.journal(spec.replica)))
        return EngineProcess(written, pidfd, self.journal)

    def adopt(self, entry: JournalEntry) -> EngineProcess | None:
        """The engine of `entry`, if it is the same process and runs; None otherwise."""
        if entry.shim_pid <= 0:
            return None
        try:
            pidfd = os.pidfd_open(entry.shim_pid)
        except OSError:
            return None
        # Asked after the pidfd was opened: if it is the same process, the pidfd is that process's.
        if not entry.shim.alive:
            os.close(pidfd)
            return None
        return EngineProcess(entry, pidfd, self.journal)

    def discard(self, replica: str) -> None:
        """Remove what is left of a replica that runs no longer, but its logs."""
        self._socket(replica).unlink(missing_ok=True)
        self.journal.forget(replica)

    def _environment(self, spec: LaunchSpec, secret: str) -> dict[str, str]:
        """The engine's whole environment. The secret, and what others put in front of its path, are added here and not in
        `spec`: another one is no reason to restart an engine that runs.
        """
        environment, plugins = spec.full_environment(self.environ), self.paths.root / "plugin"
        environment |= plugin_environment(spec.slice, plugins, environment)
        return environment | guard_environment(spec.argv, secret, plugins, environment)

    def _endpoint(self, replica: str, config: EngineConfig) -> Endpoint:
        if config.transport == "tcp":
            host = config.network.address if config.network else "127.0.0.1"
            if config.tls is not None:
                engine_tls.check(config.tls, host)
            return Endpoint(port=_free_port(host), host=host, tls=config.tls is not None, secret=new_secret())
        path = self._socket(replica)
        path.unlink(missing_ok=True)
        return Endpoint(uds=path)

    def _socket(self, replica: str) -> Path:
        return self.paths.runtime(self.environ) / socket_name(replica)

    def _run_shim(self, replica: str, order: Mapping[str, object]) -> int:
        """Start the shim and hand it its order. Returns a pidfd.

        Some 50 ms, and not interruptible on purpose: nobody can be cancelled between an engine's start and knowing it.
        """
        pid, problem = _spawn([str(self.python), "-I", "-S", str(Path(shim.__file__))], json.dumps(order).encode())
        if problem is None:
            return os.pidfd_open(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise PlacementError(
            f"the engine could not be started: {problem}", where=replica, remedy=_start_remedy(problem)
        )


def _spawn(argv: list[str], order: bytes) -> tuple[int, str | None]:
    """Run a shim in a session of its own. Returns its pid, and what it complains of.

    `posix_spawn`, because asyncio's and subprocess's objects end or wait for a child when they are collected.
    """
    order_read, order_write = os.pipe()
    answer_read, answer_write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, order_read, 0), (os.POSIX_SPAWN_DUP2, answer_write, 1)]
    pid = os.posix_spawn(argv[0], argv, dict(os.environ), file_actions=actions, setsid=True)
    os.close(order_read)
    os.close(answer_write)
    with contextlib.suppress(BrokenPipeError), os.fdopen(order_write, "wb") as pipe:
        pipe.write(order)
    with os.fdopen(answer_read, "rb") as pipe:
        answered, _, _ = select.select([pipe], [], [], _SHIM_SECONDS)
        line = pipe.readline() if answered else b""
    if not line:
        return pid, "its shim ended without a word" if answered else f"its shim said nothing for {_SHIM_SECONDS:g} s"
    return pid, json.loads(line).get("error")


def kill_session(leader: ProcessIdentity) -> None:
    """Kill what is left of a shim's session after the shim has ended, however it ended."""
    if leader.boot_id != boot_id() or ProcessIdentity.of(leader.pid) is not None:
        # Another boot, or another process has the pid: as long as one member lived, the kernel would not give it again.
        return
    for pid in sessions([leader.pid])[leader.pid]:
        found = ProcessIdentity.of(pid)
        if found and found.start_ticks >= leader.start_ticks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def secure(endpoint: Endpoint) -> None:
    """Mode 0600 for the engine's socket: engines make it with the umask's. Its directory is 0700 all along."""
    if endpoint.uds is not None:
        with contextlib.suppress(FileNotFoundError):
            endpoint.uds.chmod(0o600)


def read_log(path: Path, offset: int, *, limit_bytes: int = 256 * 1024) -> str:
    """The last `limit_bytes` of a log after `offset`."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            start = offset if offset <= end else 0  # it was set aside meanwhile
            file.seek(max(start, end - limit_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _begin_log(path: Path, spec: LaunchSpec) -> int:
    """Set a large log aside, write a line that separates this start from the last, and return where it begins."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT_BYTES:
            for i in range(KEPT_LOGS, 0, -1):
                older = path.with_name(f"{path.name}.{i - 1}") if i > 1 else path
                with contextlib.suppress(FileNotFoundError):
                    older.replace(path.with_name(f"{path.name}.{i}"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        begins = file.seek(0, os.SEEK_END)
        file.write(
            f"--- {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {spec.replica} on {spec.slice.id}: {shlex.join(spec.argv)}\n"
        )
    return begins


def _free_port(host: str) -> int:
    """A port of this address that was free a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _start_remedy(problem: str) -> str:
    if os.strerror(errno.ENOENT) in problem:
        return "Check engine.python or engine.command: that file is not there."
    if os.strerror(errno.EINVAL) in problem:
        return "The slice's cores are not this process's to use; `sliceway slices` shows what is."
    return "`sliceway doctor` looks for what is wrong with this machine."
