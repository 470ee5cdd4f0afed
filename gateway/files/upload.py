"""An upload as it comes: the fields of a form in memory, its file straight to disk, both bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from gateway.errors import BodyTooLarge, MalformedRequest, RequestTimeout
from gateway.forms import MAX_PARTS, PartHeaders, boundary_of, part_of

MAX_FIELD_BYTES = 4096
FILE = "file"


@dataclass(slots=True)
class Upload:
    """What came beside the file's contents, which are in the file handed in. `filename` is None if no file came."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def receive(
    pieces: AsyncIterator[bytes], content_type: bytes | None, into: BinaryIO, *, max_bytes: int, idle_seconds: float
) -> Upload:
    """Read a form with one file, whose contents go to `into`.

    Raises MalformedRequest, BodyTooLarge (the file is larger than `max_bytes`), RequestTimeout (nothing came for `idle_seconds`).
    """
    reader = _Reader(into, max_bytes)
    parser = MultipartParser(boundary_of(content_type), reader.callbacks())  # type: ignore[arg-type]
    try:
        async for piece in in_time(pieces, idle_seconds):
            parser.write(piece)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"The body is not a valid form: {error}.") from error
    if not reader.ended:
        raise MalformedRequest("The form ends too early: its last boundary is missing.")
    if reader.upload.filename is None:
        raise MalformedRequest("The form has no file; send it in the field `file`.", param=FILE)
    return reader.upload


async def in_time(pieces: AsyncIterator[bytes], idle_seconds: float) -> AsyncIterator[bytes]:
    """`pieces` as they come. Raises RequestTimeout where none comes for `idle_seconds`."""
    source = aiter(pieces)
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                piece = await anext(source)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise RequestTimeout(f"Nothing of the body arrived for {idle_seconds:g} s.") from error
        yield piece


class _Reader(PartHeaders):
    """Collects fields and writes the file."""

    def __init__(self, into: BinaryIO, max_bytes: int) -> None:
        super().__init__()
        self.upload = Upload()
        self.ended = False
        self._into = into
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._parts = 0
        self._field: str | None = None  # None while a file comes
        self._value = b""

    def callbacks(self) -> dict[str, object]:
        return {
            **self.header_callbacks(),
            "on_part_begin": self._begin,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise MalformedRequest(f"The form has more than {MAX_PARTS} parts.")
        self.headers, self._value = {}, b""

    def _headers_finished(self) -> None:
        name, filename, _ = part_of(self.headers)
        if name == FILE and filename is not None:
            if self.upload.filename is not None:
                raise MalformedRequest("The form must have one file.", param=FILE)
            self._field, self.upload.filename = None, filename
        else:
            self._field = name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise MalformedRequest(f"The field `{self._field[:80]}` is too long.", param=self._field[:80])
            return
        self._left -= end - start
        if self._left < 0:
            raise BodyTooLarge(f"The file is larger than {self._max_bytes} bytes (batches.max_file).")
        self._into.write(data[start:end])

    def _part_end(self) -> None:
        if self._field is not None:
            self.upload.fields[self._field] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True
