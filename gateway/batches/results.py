"""The answers of a running batch, written as they come: both the result and the journal of what is done.

A line is on disk before its request counts as done. After a crash the lines that are whole say what need not run again; half a line at
the end is cut off, and its request runs again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from gateway.files.store import sync


class _Done(msgspec.Struct, frozen=True):
    custom_id: str


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_decode = msgspec.json.Decoder(_Done).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. `status` is None if it was never answered; then there is an `error` with code and message."""

    custom_id: str
    request_id: str
    status: int | None
    body: bytes = b""
    error: tuple[str, str] | None = None

    @property
    def good(self) -> bool:
        """Whether it belongs into the output, not among the errors."""
        return self.status is not None and self.status < 400

    def line(self) -> bytes:
        """OpenAI's line of an output or error file."""
        response: dict[str, Any] | None = None
        if self.status is not None:
            response = {"status_code": self.status, "request_id": self.request_id, "body": _embedded(self.body)}
        error = {"code": self.error[0], "message": self.error[1]} if self.error else None
        row = {"id": f"batch_req_{self.request_id}", "custom_id": self.custom_id, "response": response, "error": error}
        return msgspec.json.encode(row) + b"\n"


def _embedded(body: bytes) -> Any:
    """A JSON body as it is, but on one line; anything else as a string."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return body.decode("utf-8", "replace")
    return value if b"\n" in body else msgspec.Raw(body)


class Results:
    """The two files of one batch while it runs. Its methods block, and are to be called from one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory / "output.jsonl"
        self.errors = directory / "errors.jsonl"

    def resume(self) -> tuple[set[str], set[str]]:
        """The custom ids that are answered and that have failed, as far as the files go; makes the directory."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _done(self.output), _done(self.errors)

    def append(self, answers: list[Answer]) -> None:
        """Write answers; they are on disk on return. Raises OSError."""
        for path, lines in (
            (self.output, [a.line() for a in answers if a.good]),
            (self.errors, [a.line() for a in answers if not a.good]),
        ):
            if lines:
                with os.fdopen(os.open(path, _APPEND, 0o600), "ab") as file:
                    file.write(b"".join(lines))
                    file.flush()
                    os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget them; they are kept elsewhere."""
        for path in (self.output, self.errors):
            path.unlink(missing_ok=True)
        if self.directory.is_dir():
            self.directory.rmdir()


def _done(path: Path) -> set[str]:
    """The ids in a file of results, whose torn end is cut off."""
    if not path.exists():
        return set()
    done: set[str] = set()
    with path.open("r+b") as file:
        whole = _whole_lines(file, done)
        file.truncate(whole)
    sync(path)
    return done


def _whole_lines(file: BinaryIO, done: set[str]) -> int:
    """Add the ids of the lines that are whole to `done`; the length of these lines."""
    whole = 0
    for line in file:
        try:
            if line.endswith(b"\n"):
                done.add(_decode(line).custom_id)
                whole += len(line)
                continue
        except (msgspec.MsgspecError, RecursionError):
            pass
        break
    return whole
