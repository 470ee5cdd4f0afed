"""The parent of one engine: pins it, starts it, waits for it, and writes down how it ended.

Run as a file by `python -I -S`, with the standard library only, so that it starts in milliseconds, stays small and needs
nothing that an upgrade could take away under it (docs/adr/0003). One JSON object on standard input says what to do:

    argv, env, cwd      the engine
    cores               hardware threads for it and everything it starts; empty: as they are
    log                 where its output is appended
    journal, entry      where to write down what runs here, and what; pids and start time are added
    exit_record         where its end is written to
    stop_seconds        from SIGTERM until what is left is killed
    oom_score_adj       how willingly the kernel kills it when memory runs out; None: as it is

One JSON line comes back on standard output: `{"engine_pid": N}` or `{"error": "..."}`.

SIGTERM is passed on to the engine, which may take `stop_seconds`. SIGUSR1 kills the engine and everything it started. The
shim ends only when all of it has ended, so the slice is free when the shim is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

Order = dict[str, Any]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
# An out-of-memory kill this long before the engine's end is taken as its cause.
_SAMPLE_SECONDS = 10.0
_REAP_SECONDS = 10.0


def main() -> int:
    """Run one engine to its end."""
    order = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        _become_parent(order, libc)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _answer({"error": f"{error.strerror}: {error.filename or order['cores']}"})
        return 1
    started = time.time()  # noqa: TID251 - a record for people and for the next controller
    engine, problem = _start(order, libc, log)
    if problem:
        _answer({"error": problem})
        return 1
    try:
        _write_journal(order, engine)
    except OSError as error:  # nobody could ever find this engine again
        os.killpg(engine, signal.SIGKILL)
        _answer({"error": f"{error.strerror}: {error.filename}"})
        return 1
    _answer({"engine_pid": engine})
    _detach_output(log)
    end = _Watch(engine, order["stop_seconds"]).until_it_ends()
    _end_the_rest()
    ended = time.time()  # noqa: TID251
    _write(order["exit_record"], {"engine_pid": engine, "started_at": started, "ended_at": ended, **end})
    return 0


def _become_parent(order: Order, libc: ctypes.CDLL) -> None:
    """Set what the engine inherits before its first instruction."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])


def _write_journal(order: Order, engine: int) -> None:
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - pathlib costs a third of the shim's start
        start_ticks = int(file.read().rpartition(")")[2].split()[19])
    identity = {"shim_pid": os.getpid(), "shim_start_ticks": start_ticks, "engine_pid": engine}
    _write(order["journal"], {**order["entry"], **identity})


def _start(order: Order, libc: ctypes.CDLL, log: int) -> tuple[int, str]:
    """Fork and execute. Returns the engine's pid and, where it could not be executed, why."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    shim = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            _exec(order, libc, log, shim)
        except OSError as error:
            os.write(tell, f"{error.strerror}: {error.filename or order['argv'][0]}".encode())
        finally:
            os._exit(127)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        problem = pipe.read().decode()
    if problem:
        os.waitpid(child, 0)
    return child, problem


def _exec(order: Order, libc: ctypes.CDLL, log: int, shim: int) -> None:
    os.setpgid(0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != shim:  # it died before the death signal was set
        os._exit(127)
    if order["oom_score_adj"] is not None:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(str(order["oom_score_adj"]))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.chdir(order["cwd"])
    os.execvpe(order["argv"][0], order["argv"], order["env"])


def _detach_output(log: int) -> None:
    """Let go of the controller's pipes, so that neither side's end disturbs the other."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(log, 2)


class _Watch:
    """Waits for the engine, passes signals on, and counts the kernel's out-of-memory kills."""

    def __init__(self, engine: int, stop_seconds: float) -> None:
        self._engine = engine
        self._stop_seconds = stop_seconds
        self._deadline: float | None = None
        self._kills = [_oom_kills(), _oom_kills()]

    def until_it_ends(self) -> Order:
        while True:
            received = signal.sigtimedwait(_SIGNALS, self._patience())
            if received is not None:
                self._pass_on(received.si_signo)
            ended = self._reap()
            if ended is not None:
                return self._describe(ended)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._signal_group(signal.SIGKILL)
                self._deadline = time.monotonic() + 1.0
            if received is None:
                self._kills = [self._kills[1], _oom_kills()]

    def _patience(self) -> float:
        if self._deadline is None:
            return _SAMPLE_SECONDS
        return min(_SAMPLE_SECONDS, max(0.05, self._deadline - time.monotonic()))

    def _pass_on(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self._signal_group(signal.SIGKILL)
        elif number == signal.SIGTERM and self._deadline is None:
            self._deadline = time.monotonic() + self._stop_seconds
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._engine, signal.SIGTERM)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._engine, number)

    def _reap(self) -> int | None:
        """Collect whatever has ended; the engine's status if it is among it."""
        ended = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._engine:
                    ended = status
        return ended

    def _describe(self, status: int) -> Order:
        return {
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "stop_requested": self._deadline is not None,
            "oom_kills": max(0, _oom_kills() - self._kills[0]),
        }


def _oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since boot (proc(5), /proc/vmstat)."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="utf-8") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _end_the_rest() -> None:
    """Kill what the engine left behind: everything of this session, and orphans that came to us as their reaper."""
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        for pid in _relatives():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        signal.sigtimedwait((signal.SIGCHLD,), 0.05)


def _relatives() -> Iterator[int]:
    me = os.getpid()
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit() or int(name) == me:
            continue
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file,  # noqa: PTH123
        ):
            fields = file.read().rpartition(")")[2].split()
            if me in (int(fields[1]), int(fields[3])):  # parent, session
                yield int(name)


def _answer(value: Order) -> None:
    with contextlib.suppress(BrokenPipeError):  # the controller has gone; the next one finds the journal
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def _write(path: str, value: Order) -> None:
    draft = f"{path}.{os.getpid()}"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)  # noqa: PTH105


if __name__ == "__main__":
    raise SystemExit(main())
