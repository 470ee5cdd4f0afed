"""A reader for tests, without a process: what is asked is done when the test says so, by the function that the process runs."""

from __future__ import annotations

import os
from collections.abc import Callable

from gateway.large_bodies.jobs import Job, carry_out
from gateway.large_bodies.process import ReaderProcess, Ticket


class InlineReader(ReaderProcess):
    """`at_once` does every job within `ask`; else `work` does those that wait."""

    def __init__(self, *, at_once: bool = True) -> None:
        super().__init__()
        self.tickets: list[Ticket] = []
        self._at_once = at_once

    def ask(self, tenant: str, job: Job, file: int, memory_bytes: int, on_done: Callable[[], None]) -> Ticket:
        """As ReaderProcess has it."""
        ticket = Ticket(job, file, on_done)
        self.tickets.append(ticket)
        if self._at_once:
            self.work()
        return ticket

    def work(self) -> None:
        """Do what waits and is still wanted."""
        tickets, self.tickets = self.tickets, []
        for ticket in tickets:
            if ticket.wanted:
                raw = os.pread(ticket.file, os.fstat(ticket.file).st_size, 0)
                answer, written = carry_out(ticket.job, raw)
                ticket.done(answer, _file_of(written) if written else None)


def _file_of(data: bytes) -> int:
    file = os.memfd_create("sliceway-test", os.MFD_CLOEXEC)
    os.write(file, data)
    return file
