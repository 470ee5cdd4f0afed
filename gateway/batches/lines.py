"""The input of a batch: one request per line. Pure, but for reading the file.

Each line is `{"custom_id", "method": "POST", "url", "body"}`, as OpenAI has it. A wrong line makes the whole batch fail before anything
runs, with what is wrong in each line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gateway.batches.record import LineError

MAX_ERRORS = 100  # as many as are told
_ID_CHARS = 512


class Request(msgspec.Struct, frozen=True):
    """One line. `body` is passed on as it is written."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Look(msgspec.Struct, frozen=True):
    model: str | None = None
    stream: Any = None
    background: Any = None


_decode = msgspec.json.Decoder(Request).decode
_look = msgspec.json.Decoder(_Look).decode


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line lies in the file, and whose it is."""

    custom_id: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Input:
    """Every request of a file, or what is wrong with it."""

    places: tuple[Place, ...]
    errors: tuple[LineError, ...]


def scan(path: Path, *, url: str, max_requests: int, max_line_bytes: int) -> Input:
    """Read and check a whole input file; blank lines are no requests. Raises OSError."""
    places: list[Place] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    for number, offset, line in _lines(path, max_line_bytes):
        if not line.strip():
            continue
        error, custom_id = _check(line, url, seen, max_line_bytes)
        if error is not None:
            errors.append(msgspec.structs.replace(error, line=number))
            if len(errors) == MAX_ERRORS:
                break
            continue
        if len(places) == max_requests:
            errors.append(LineError("too_many_requests", f"A batch may have {max_requests} requests.", number))
            break
        seen.add(custom_id)
        places.append(Place(custom_id, offset, len(line)))
    if not places and not errors:
        errors.append(LineError("empty_file", "The input file has no requests."))
    return Input(tuple(places), tuple(errors))


def read(path: Path, place: Place) -> Request:
    """One request of a file that was scanned. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _decode(os.pread(descriptor, place.length, place.offset))
    finally:
        os.close(descriptor)


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of every line; one that is too long comes cut, so that it is seen to be too long."""
    offset, number = 0, 0
    with path.open("rb") as file:
        while line := file.readline(max_line_bytes + 2):
            number += 1
            yield number, offset, line
            if len(line) > max_line_bytes + 1 and not line.endswith(b"\n"):
                while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                    pass
            offset = file.tell()


def _check(line: bytes, url: str, seen: set[str], max_line_bytes: int) -> tuple[LineError | None, str]:
    """What is wrong with a line, without its number; else None and its custom_id."""
    if len(line) > max_line_bytes:
        return LineError("line_too_long", f"The line is longer than {max_line_bytes} bytes (gateway.max_body)."), ""
    try:
        request = _decode(line)
        looked = _look(request.body)
    except msgspec.ValidationError as error:
        return LineError("invalid_request", f"{error}."), ""
    except (msgspec.DecodeError, RecursionError) as error:
        return LineError("invalid_json_line", f"The line is not valid JSON: {error}."), ""
    return _wrong(request, looked, url, seen), request.custom_id


def _wrong(request: Request, looked: _Look, url: str, seen: set[str]) -> LineError | None:
    if not 0 < len(request.custom_id) <= _ID_CHARS:
        return LineError("invalid_custom_id", f"`custom_id` must have 1 to {_ID_CHARS} characters.", param="custom_id")
    if request.custom_id in seen:
        return LineError("duplicate_custom_id", f"The custom_id {request.custom_id!r} comes twice.", param="custom_id")
    if request.method != "POST":
        return LineError("invalid_method", f"`method` must be POST, not {request.method[:20]!r}.", param="method")
    if request.url != url:
        return LineError("mismatched_url", f"`url` must be the batch's endpoint {url!r}.", param="url")
    if not looked.model:
        return LineError("missing_required_parameter", "`body.model` is missing.", param="body.model")
    if looked.stream:
        return LineError(
            "unsupported_parameter", "A batch cannot stream; leave out `body.stream`.", param="body.stream"
        )
    if looked.background:
        said = "A batch runs in the background as a whole; leave out `body.background`."
        return LineError("unsupported_parameter", said, param="body.background")
    return None
