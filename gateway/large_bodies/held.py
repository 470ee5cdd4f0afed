"""One large body: it lies in a file in memory, goes to the reader and to an engine from there, and no step moves more than a part of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from gateway.config import GatewayConfig
from gateway.errors import BodyTooLarge, GatewayError, InternalError, MalformedRequest
from gateway.large_bodies.jobs import Job, Read, ReadJob, Refused, TooMuch, WriteJob, Written
from gateway.large_bodies.process import ReaderProcess, Ticket, close_later
from gateway.large_bodies.room import Room
from gateway.request import Body, Form, Route, beginning_for, front_of, too_large

LARGE_BYTES = 256 * 2**10
"""Longer bodies are held here. One of this length is read in a millisecond or two, and no read from a client is longer."""

Kind = TypeVar("Kind", Read, Written)

PIECE_BYTES = 128 * 2**10
READER_BYTES = 2**30  # what a reader may take besides copies of the body
_COPIES = 8
_HEADER_BYTES = 16 * 2**10


class LargeBodies:
    """All large bodies of one gateway process. Nothing is started or held before the first one."""

    def __init__(self, reader: ReaderProcess | None = None) -> None:
        self.room = Room()
        self.reader = reader or ReaderProcess()

    def open(self, tenant: str, route: Route, limits: GatewayConfig, announced: int = 0) -> LargeBody:
        """Room for a body of `announced` bytes; of a chunked one it is taken as it comes. Raises RateLimited, BodiesFull, MalformedRequest."""
        if route.body == "none":
            raise MalformedRequest("This path takes no body.")
        body = LargeBody(self, tenant, route, limits)
        body.reserve(announced)
        return body

    async def close(self) -> None:
        """End the reader."""
        await self.reader.close()


class LargeBody:
    """See the module. `close` gives everything back, at any time and more than once.

    The order of calls is: `append` for each part, `read` and then `result`, `make_way` and, where that took its time, `way_made`; then for each
    engine that is asked `fits`, and `pieces`.
    `largest_step` is the most bytes that one call of this or of its pieces has handled.
    """

    def __init__(self, all_of_them: LargeBodies, tenant: str, route: Route, limits: GatewayConfig) -> None:
        self._all = all_of_them
        self._tenant = tenant
        self._route = route
        self._limits = limits
        self._reserved = 0
        self._file: int | None = None
        self._ticket: Ticket | None = None
        self._content_type: str | None = None
        self._read: Read | None = None
        self._body = Body()
        self._without: tuple[str, ...] | None = None  # what the file is without, where it was written anew
        self.size = 0
        self.sent = False  # an engine has all of it
        self.closed = False
        self.largest_step = 0

    # ---- as it comes

    def reserve(self, size: int) -> None:
        """Have room for `size` bytes in all. Raises RateLimited, BodiesFull."""
        if (more := size - self._reserved) > 0:
            self._all.room.take(self._tenant, more, self._limits)
            self._reserved = size

    @property
    def left(self) -> int:
        """How many bytes more it may have."""
        return self._limits.max_body - self.size

    def append(self, part: bytes) -> None:
        """A part of the body. Raises BodyTooLarge, RateLimited, BodiesFull, and GatewayError where the machine has no memory left."""
        size = self.size + len(part)
        if size > self._limits.max_body:
            raise too_large(self._limits.max_body)
        self.reserve(size)
        self.size = size
        self.largest_step = max(self.largest_step, len(part))
        if self._file is None:
            self._file = os.memfd_create("sliceway-body", os.MFD_CLOEXEC)
        view = memoryview(part)
        while view:
            view = view[os.write(self._file, view) :]

    # ---- what it says

    def read(self, content_type: bytes | None, on_done: Callable[[], None]) -> None:
        """Have it read; `on_done` is called once, not from here, unless this is closed before. Raises MalformedRequest, BodyReaderGone."""
        if self._route.body == "form":
            if content_type is not None and len(content_type) > _HEADER_BYTES:
                raise MalformedRequest("The header content-type is too long.")
            self._content_type = content_type.decode("latin-1") if content_type is not None else None
        self._ask(ReadJob(self._route.path, self._content_type), on_done)

    def result(self) -> tuple[Body, bytes]:
        """The body's fields, and the beginning of its prompt. Raises MalformedRequest, BodyTooLarge, BodyReaderGone."""
        self._read = read = self._answer(Read)
        self._body = read.body(form=self._route.body == "form")
        return self._body, read.beginning

    # ---- to an engine

    def fits(self, engine_model: str, names: Iterable[str], *, ask_usage: bool) -> bool:
        """Whether an engine can have it at once under its name for the model, with the gateway's fields of these `names`."""
        if self._without is not None:
            return set(names) <= set(self._without)
        if isinstance(self._body, Form):
            return False
        return self._beginning(engine_model, dict.fromkeys(names), ask_usage=ask_usage) is not None

    def make_way(self, names: Iterable[str], *, ask_usage: bool, on_done: Callable[[], None]) -> None:
        """Have it written without what the gateway says itself: the model, and the fields of these `names`. It `fits` every engine then.

        `on_done` is called once, and then `way_made` has to be. Raises BodyReaderGone.
        """
        boundary = self._body.boundary if isinstance(self._body, Form) else b""
        self._ask(WriteJob(self._route.path, self._content_type, boundary, tuple(names), ask_usage), on_done)

    def way_made(self) -> None:
        """It lies there, in the place of what came. Raises MalformedRequest, BodyTooLarge, BodyReaderGone where it could not be written."""
        self._answer(Written)
        assert self._ticket is not None
        assert isinstance(self._ticket.job, WriteJob)
        came, self._file = self._file, self._ticket.written
        self._without, self._ticket = self._ticket.job.without, None
        if came is not None:
            close_later(came)

    def pieces(self, engine_model: str, sets: Mapping[str, Any], *, ask_usage: bool) -> Pieces:
        """What an engine gets that it `fits`, with `sets` said by the gateway."""
        assert self._file is not None
        self.sent = False
        if self._without is not None:
            begin = front_of(self._body, engine_model=engine_model, sets=sets)
            return Pieces(self, begin, self._file, 0, os.fstat(self._file).st_size)
        plain = self._beginning(engine_model, sets, ask_usage=ask_usage)
        assert plain is not None, "asked for an engine that it does not fit"
        assert self._read is not None
        begin, at = (b"", 0) if plain == b"{" else (plain, self._read.first + 1)
        return Pieces(self, begin, self._file, at, self.size)

    def _beginning(self, engine_model: str, sets: Mapping[str, Any], *, ask_usage: bool) -> bytes | None:
        return beginning_for(self._body, engine_model=engine_model, sets=sets, ask_usage=ask_usage)

    # ---- the reader

    def _ask(self, job: Job, on_done: Callable[[], None]) -> None:
        assert self._file is not None
        memory_bytes = READER_BYTES + _COPIES * self._limits.max_body
        self._ticket = self._all.reader.ask(self._tenant, job, self._file, memory_bytes, on_done)

    def _answer(self, kind: type[Kind]) -> Kind:
        assert self._ticket is not None
        answer = self._ticket.answer
        if isinstance(answer, GatewayError):
            raise answer
        if isinstance(answer, Refused):
            raise MalformedRequest(answer.message, param=answer.param)
        if isinstance(answer, TooMuch):
            raise BodyTooLarge("The body has too many parts: reading it takes more memory than there is for one.")
        if not isinstance(answer, kind):
            raise InternalError("The gateway failed to read the request's body. Its log has the reason.")
        return answer

    # ---- the end

    def close(self) -> None:
        """Nobody wants it any more."""
        if self.closed:
            return
        self.closed = True
        if self._ticket is not None:
            self._ticket.cancel()
            if self._ticket.written is not None:
                close_later(self._ticket.written)
                self._ticket.written = None
        if self._file is not None:
            close_later(self._file)
            self._file = None
        self._all.room.give_back(self._tenant, self._reserved)
        self._reserved = 0


class Pieces:
    """A body on its way to an engine. `length` is of all of it, in bytes."""

    def __init__(self, body: LargeBody, begin: bytes, file: int, at: int, end: int) -> None:
        self._body = body
        self._begin = begin
        self._file = file
        self._at = at
        self._end = end
        self.length = len(begin) + end - at

    def take(self) -> bytes | None:
        """The next piece; nothing when there are no more, None when the body has been given back before its end."""
        if self._at >= self._end and not self._begin:
            return b""
        if self._body.closed:
            return None
        begin, self._begin = self._begin, b""
        piece = begin + os.pread(self._file, min(PIECE_BYTES, self._end - self._at), self._at)
        self._at += len(piece) - len(begin)
        self._body.largest_step = max(self._body.largest_step, len(piece))
        self._body.sent = self._at >= self._end
        return piece
