"""Multipart forms: what a client sends to the audio routes, read whole and written anew. Pure.

A form is never passed on as it came. The engine gets the parts that were understood here, written in one canonical way under a boundary
of our own, so that no second reading of the same bytes can find another model, or another part, than the gateway did.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.errors import MalformedRequest

MAX_PARTS = 64
_NOT_IN_QUOTES = str.maketrans({'"': "_", "\\": "_", "\r": "_", "\n": "_", "\0": "_"})


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form; `filename` is None where it is a field."""

    name: str
    value: bytes
    filename: str | None = None
    content_type: str | None = None


def boundary_of(content_type: bytes | None) -> bytes:
    """The boundary in a Content-Type header. Raises MalformedRequest where it is not that of a form."""
    kind, options = parse_options_header(content_type or b"")
    boundary = options.get(b"boundary")
    if kind.lower() != b"multipart/form-data" or not boundary:
        raise MalformedRequest("This path takes a form: send content-type multipart/form-data, with its boundary.")
    if len(boundary) > 70:  # RFC 2046, 5.1.1
        raise MalformedRequest("The form's boundary is longer than 70 characters.")
    return boundary


def read_form(raw: bytes, content_type: bytes | None) -> tuple[Part, ...]:
    """The parts of a whole form, in order. Raises MalformedRequest."""
    reader = _Reader()
    try:
        parser = MultipartParser(boundary_of(content_type), reader.callbacks())  # type: ignore[arg-type]
        parser.write(raw)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"The body is not a valid form: {error}.") from error
    if not reader.ended:
        raise MalformedRequest("The form ends too early: its last boundary is missing.")
    return tuple(reader.parts)


def write_form(parts: tuple[Part, ...], boundary: bytes) -> bytes:
    """`parts` as a body under `boundary`."""
    return b"".join([write_parts(parts, boundary), b"--", boundary, b"--\r\n"])


def write_parts(parts: tuple[Part, ...], boundary: bytes) -> bytes:
    """As `write_form`, without the end: more may follow."""
    pieces: list[bytes] = []
    for part in parts:
        head = f'content-disposition: form-data; name="{_quoted(part.name)}"'
        if part.filename is not None:
            head += f'; filename="{_quoted(part.filename)}"'
        if part.content_type is not None:
            head += f"\r\ncontent-type: {_quoted(part.content_type)}"
        pieces += [b"--", boundary, b"\r\n", head.encode("utf-8"), b"\r\n\r\n", part.value, b"\r\n"]
    return b"".join(pieces)


def new_boundary() -> bytes:
    """One that no sender can have foreseen, so that it is in no part."""
    return b"sliceway-" + secrets.token_hex(16).encode()


def field(parts: tuple[Part, ...], name: str) -> str | None:
    """The text of the field `name`; None where there is none. Raises MalformedRequest if it comes twice, is a file, or is not text."""
    found = [part for part in parts if part.name == name]
    if not found:
        return None
    if len(found) > 1 or found[0].filename is not None:
        raise MalformedRequest(f"The form must have the field `{name}` once, and not as a file.", param=name)
    try:
        return found[0].value.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"The field `{name}` is not UTF-8.", param=name) from error


def part_of(headers: dict[bytes, bytes]) -> tuple[str, str | None, str | None]:
    """Name, file name and content type from the headers of a part, names in lower case. Raises MalformedRequest."""
    kind, options = parse_options_header(headers.get(b"content-disposition", b""))
    name = options.get(b"name")
    if kind.lower() != b"form-data" or name is None:
        raise MalformedRequest("A part of the form has no name.")
    filename, told = options.get(b"filename"), headers.get(b"content-type")
    return (
        name.decode("utf-8", "replace"),
        filename.decode("utf-8", "replace") if filename is not None else None,
        told.decode("latin-1") if told is not None else None,
    )


def _quoted(text: str) -> str:
    return text.translate(_NOT_IN_QUOTES)


class PartHeaders:
    """Collects the headers of the part at hand (`headers`), for a reader that takes its data. Each callback gets the bytes in hand
    and a range in them.
    """

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""

    def header_callbacks(self) -> dict[str, object]:
        """What a parser is to call."""
        return {
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
        }

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self.headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""


class _Reader(PartHeaders):
    """Collects what the parser finds."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self.ended = False
        self._data: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        return {
            **self.header_callbacks(),
            "on_part_begin": self._begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise MalformedRequest(f"The form has more than {MAX_PARTS} parts.")
        self.headers, self._data = {}, []

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _part_end(self) -> None:
        name, filename, content_type = part_of(self.headers)
        self.parts.append(Part(name, b"".join(self._data), filename, content_type))

    def _end(self) -> None:
        self.ended = True
