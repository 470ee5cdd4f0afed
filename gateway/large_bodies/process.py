"""The gateway's side of the process that reads large bodies: started with the first one, kept going, and one job at a time in it.

Tenants take turns, so that one with many bodies does not keep another with one waiting. A reader that ends takes the jobs that were
waiting for it along, each with an error that says when to come back; it is started again for the next, later and later if it keeps ending.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from gateway.errors import BodyReaderGone, GatewayError
from gateway.large_bodies.jobs import Answer, Job, decode_answer, encode

log = logging.getLogger("sliceway.bodies")

ANSWER_BYTES = 256 * 2**10
JOB_SECONDS = 60.0  # a job that takes longer is given up, with the reader
REAP_SECONDS = 0.1
FIRST_DELAY_SECONDS, MOST_DELAY_SECONDS = 0.5, 30.0


class Process(Protocol):
    """As much of `subprocess.Popen` as is used."""

    def poll(self) -> int | None:
        """The exit status, once it has ended."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self) -> int:
        """Until it has ended."""
        ...


Start = Callable[[int], tuple[socket.socket, Process]]
"""Starts a reader that may take so many bytes of memory; gives a line to it."""


class Ticket:
    """One job. `answer` is there when `on_done` is called, and with it the file, for a body that was written; never after `cancel`."""

    def __init__(self, job: Job, file: int, on_done: Callable[[], None]) -> None:
        self.job = job
        self.file = file
        self.answer: Answer | GatewayError | None = None
        self.written: int | None = None
        self._on_done: Callable[[], None] | None = on_done

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        return self._on_done is not None

    def cancel(self) -> None:
        """Nobody does any longer."""
        self._on_done = None

    def done(self, answer: Answer | GatewayError, written: int | None = None) -> None:
        """It is over."""
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            self.answer, self.written = answer, written
            on_done()


class ReaderProcess:
    """See the module. Everything happens in the event loop of the first `ask`."""

    def __init__(self, start: Start | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._start = start or start_reader
        self._clock = clock
        self._queues: dict[str, deque[Ticket]] = {}  # in the order of their turns
        self._running: Ticket | None = None
        self._line: socket.socket | None = None
        self._process: Process | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._failures = 0
        self._not_before = float("-inf")
        self.starts = 0

    def ask(self, tenant: str, job: Job, file: int, memory_bytes: int, on_done: Callable[[], None]) -> Ticket:
        """Have `job` done with the body in `file`, which stays the caller's, and open until the job is done or cancelled.

        `memory_bytes` counts where a reader has to be started. Raises BodyReaderGone where none is to be had for a while.
        """
        if self._line is None:
            self._begin(memory_bytes)
        ticket = Ticket(job, file, on_done)
        self._queues.setdefault(tenant, deque()).append(ticket)
        self._next()
        return ticket

    @property
    def waiting(self) -> int:
        """Jobs that somebody waits for."""
        running = self._running is not None and self._running.wanted
        return running + sum(ticket.wanted for queue in self._queues.values() for ticket in queue)

    def _begin(self, memory_bytes: int) -> None:
        now = self._clock()
        if now < self._not_before:
            raise _gone(self._not_before - now)
        try:
            self._line, self._process = self._start(memory_bytes)
        except OSError as error:
            log.error("no process can be started to read large bodies: %s", error)
            raise _gone(self._back_off()) from error
        self.starts += 1
        asyncio.get_running_loop().add_reader(self._line.fileno(), self._heard)

    def _next(self) -> None:
        """Send the next job, if there is one and none is being done."""
        while self._running is None and self._line is not None and (ticket := self._take_turn()) is not None:
            self._running = ticket
            self._watch = asyncio.get_running_loop().call_later(JOB_SECONDS, self._overdue)
            try:
                socket.send_fds(self._line, [encode(ticket.job)], [ticket.file])
            except OSError as error:
                self._lost(f"does not take a job ({error})")

    def _take_turn(self) -> Ticket | None:
        """The first ticket of the tenant whose turn it is, which goes to the end of the row."""
        while self._queues:
            tenant = next(iter(self._queues))
            queue = self._queues.pop(tenant)
            while queue:
                ticket = queue.popleft()
                if ticket.wanted:
                    if queue:
                        self._queues[tenant] = queue
                    return ticket
        return None

    def _heard(self) -> None:
        """An answer, or the end."""
        assert self._line is not None
        try:
            words, files, _, _ = socket.recv_fds(self._line, ANSWER_BYTES, 1)
            answer = decode_answer(words) if words else None
        except BlockingIOError:
            return
        except (OSError, msgspec.DecodeError) as error:
            self._lost(f"does not answer ({error})")
            return
        if answer is None:
            self._lost("ended")
            return
        self._failures = 0
        ticket = self._over()
        written = files[0] if files else None
        if ticket is not None and ticket.wanted:
            ticket.done(answer, written)
        elif written is not None:
            close_later(written)
        self._next()

    def _over(self) -> Ticket | None:
        """The ticket that was being done."""
        ticket, self._running = self._running, None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        return ticket

    def _overdue(self) -> None:
        self._lost(f"was at one body for {JOB_SECONDS:g} s")

    def _lost(self, how: str) -> None:
        """The reader is gone: whoever waits for it is told."""
        delay = self._back_off()
        log.error("the process that reads large bodies %s; it may be started again in %.1f s", how, delay)
        self._end(delay)

    def _back_off(self) -> float:
        delay: float = min(MOST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**self._failures)
        self._failures += 1
        self._not_before = self._clock() + delay
        return delay

    def _end(self, delay: float) -> None:
        """Close the line, end the process behind it, and have everybody that waits told: not from here, where somebody may just be asking."""
        loop = asyncio.get_running_loop()
        line, self._line = self._line, None
        process, self._process = self._process, None
        if line is not None:
            loop.remove_reader(line.fileno())
            line.close()
        if process is not None:
            process.kill()
            _reap(process)
        queues, self._queues = self._queues, {}
        running = self._over()
        for ticket in (*((running,) if running else ()), *(ticket for queue in queues.values() for ticket in queue)):
            loop.call_soon(ticket.done, _gone(delay))

    async def close(self) -> None:
        """End the reader, and see it ended. Who waits for it is told."""
        process = self._process
        if process is None:
            return
        self._end(FIRST_DELAY_SECONDS)
        await asyncio.to_thread(process.wait)


def _gone(seconds: float) -> BodyReaderGone:
    return BodyReaderGone(
        "The process that reads long request bodies ended; it is started again.", retry_after_seconds=max(0.1, seconds)
    )


def _reap(process: Process) -> None:
    """Ask for its exit status until it is there, so that no dead process stays in the table."""
    if process.poll() is None:
        asyncio.get_running_loop().call_later(REAP_SECONDS, _reap, process)


def start_reader(memory_bytes: int) -> tuple[socket.socket, Process]:
    """A real one. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = (sys.executable, "-m", "gateway.large_bodies.reader", str(theirs.fileno()), str(memory_bytes))
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        except OSError:
            ours.close()
            raise
    ours.setblocking(False)
    return ours, process


def close_later(file: int) -> None:
    """Close a file of many pages away from the event loop: giving them back takes milliseconds."""
    try:
        asyncio.get_running_loop().run_in_executor(None, os.close, file)
    except RuntimeError:  # the loop is at its end
        os.close(file)
