"""The process that reads large bodies, from the gateway's side: whose turn it is, what its end does, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import socket
from io import FileIO

import pytest

from gateway.errors import BodyReaderGone
from gateway.large_bodies.jobs import Job, ReadJob, Refused, WriteJob, Written, decode_job, encode
from gateway.large_bodies.process import FIRST_DELAY_SECONDS, ReaderProcess, Ticket, start_reader
from gateway.testing import FakeClock

CHAT = "/v1/chat/completions"


class Reader:
    """The other end of the line, which answers when the test says so. It is its own process."""

    def __init__(self) -> None:
        self.line: socket.socket | None = None
        self.fails = False
        self.hangs_up = False
        self.starts = 0

    def start(self, _: int) -> tuple[socket.socket, Reader]:
        if self.fails:
            raise OSError("no process")
        self.starts += 1
        ours, self.line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        if self.hangs_up:
            self.line.close()
        return ours, self

    def asked(self) -> str:
        """The path of the job that came, which tells the jobs of a test apart."""
        assert self.line is not None
        words, files, _, _ = socket.recv_fds(self.line, 65536, 1)
        os.close(files[0])
        job: Job = decode_job(words)
        return job.path

    def answer(self, *, written: bytes | None = None) -> None:
        assert self.line is not None
        files = [os.memfd_create("answer")] if written is not None else []
        socket.send_fds(self.line, [encode(Refused("no", None) if written is None else Written())], files)
        for file in files:
            os.close(file)

    def poll(self) -> int | None:
        return 0 if self.line is None else None

    def kill(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def wait(self) -> int:
        self.kill()
        return 0


class Desk:
    """A reader process in front of `Reader`, with a file to read."""

    def __init__(self) -> None:
        self.far, self.clock = Reader(), FakeClock()
        self.near = ReaderProcess(self.far.start, self.clock)
        self.done: list[str] = []
        self.file = os.memfd_create("body")

    def ask(self, tenant: str, name: str, job: Job | None = None) -> Ticket:
        return self.near.ask(tenant, job or ReadJob(name), self.file, 2**30, lambda: self.done.append(name))

    async def next_done(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.done) < count:  # noqa: ASYNC110  # what is done is done by the loop
                await asyncio.sleep(0)

    async def close(self) -> None:
        await self.near.close()
        os.close(self.file)


async def test_it_is_started_with_the_first_body_and_not_before() -> None:
    desk = Desk()
    assert desk.far.starts == 0
    desk.ask("a", "1")
    desk.ask("a", "2")
    assert desk.far.starts == 1
    await desk.close()


async def test_tenants_take_turns_and_one_job_is_done_at_a_time() -> None:
    desk = Desk()
    for tenant, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1")):
        desk.ask(tenant, name)
    order = []
    for count in range(1, 6):
        order.append(desk.far.asked())
        desk.far.answer()
        await desk.next_done(count)
    assert order[0] == "a1"
    assert set(order[1:4]) == {"a2", "b1", "c1"}, "nobody has a second turn before everybody had one"
    assert order[4] == "a3"
    assert desk.done == order
    assert desk.near.waiting == 0
    await desk.close()


async def test_what_nobody_wants_any_more_is_not_done_and_what_is_being_done_is_thrown_away() -> None:
    desk = Desk()
    running, waiting, _ = desk.ask("a", "1"), desk.ask("a", "2"), desk.ask("a", "3")
    running.cancel()
    waiting.cancel()
    assert desk.far.asked() == "1"
    desk.far.answer(written=b"x")
    desk.far.answer()
    await desk.next_done(1)
    assert desk.done == ["3"]
    assert desk.far.asked() == "3"
    assert running.written is None
    await desk.close()


async def test_its_end_tells_all_that_wait_when_to_come_back_and_it_is_started_again_later() -> None:
    desk = Desk()
    tickets = [desk.ask("a", "1"), desk.ask("a", "2"), desk.ask("b", "3")]
    desk.far.kill()
    await desk.next_done(3)
    for ticket in tickets:
        assert isinstance(ticket.answer, BodyReaderGone)
        assert ticket.answer.retry_after_seconds == FIRST_DELAY_SECONDS
    with pytest.raises(BodyReaderGone):
        desk.ask("a", "4")
    desk.clock.turn(FIRST_DELAY_SECONDS)
    desk.ask("a", "5")
    assert desk.far.starts == 2
    assert desk.near.waiting == 1
    desk.far.answer()
    await desk.next_done(4)
    await desk.close()


async def test_one_that_keeps_ending_is_started_later_and_later() -> None:
    desk, delays = Desk(), []
    for count in range(1, 9):
        desk.ask("a", str(count))
        desk.far.kill()
        await desk.next_done(count)
        with pytest.raises(BodyReaderGone) as refused:
            desk.ask("a", "too soon")
        delays.append(refused.value.retry_after_seconds)
        desk.clock.turn(delays[-1])
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30]
    await desk.close()


async def test_a_machine_that_starts_no_process_refuses_the_body_and_nothing_else() -> None:
    desk = Desk()
    desk.far.fails = True
    with pytest.raises(BodyReaderGone):
        desk.ask("a", "1")
    desk.far.fails = False
    desk.clock.turn(60)
    desk.ask("a", "2")
    await desk.close()


async def test_who_asks_one_that_takes_no_job_has_the_ticket_before_it_is_told() -> None:
    desk = Desk()
    desk.far.hangs_up = True
    ticket = desk.ask("a", "1")
    assert desk.done == []
    await desk.next_done(1)
    assert isinstance(ticket.answer, BodyReaderGone)
    await desk.close()


async def test_what_waits_at_the_end_is_told() -> None:
    desk = Desk()
    ticket = desk.ask("a", "1")
    await desk.close()
    assert isinstance(ticket.answer, BodyReaderGone)


def test_a_real_one_reads_and_writes_and_ends_when_the_gateway_is_gone() -> None:
    line, process = start_reader(2**30)
    with line, FileIO(os.memfd_create("body"), "w+") as body:
        line.setblocking(True)
        line.settimeout(60)
        body.write(b'{"model":"m"}')
        for job in (ReadJob(CHAT), WriteJob(CHAT, None, b"", ("stream_options",), ask_usage=True)):
            socket.send_fds(line, [encode(job)], [body.fileno()])
            words, files, _, _ = socket.recv_fds(line, 65536, 1)
        assert words == encode(Written())
        with FileIO(files[0]) as written:
            written.seek(0)
            assert written.read() == b"}"
    assert process.wait() == 0, "it ends by itself: nobody has told it to"


def test_a_body_that_needs_more_memory_than_there_is_is_refused_and_the_next_one_read() -> None:
    line, process = start_reader(2**28)
    with line, FileIO(os.memfd_create("body"), "w+") as body:
        line.setblocking(True)
        line.settimeout(60)
        body.write(b'{"model":"m","n":[' + b"[]," * 3_500_000 + b"[]]}")
        answers = []
        for _ in range(2):
            socket.send_fds(line, [encode(ReadJob(CHAT))], [body.fileno()])
            answers.append(line.recv(65536))
            body.truncate(0)
            os.pwrite(body.fileno(), b'{"model":"m"}', 0)
    assert b'"too much"' in answers[0]
    assert b'"read"' in answers[1]
    assert process.wait() == 0
