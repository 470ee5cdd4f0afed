"""Who changed what, when: an append-only log in which every line vouches for the one before.

::

    STATE/audit/audit.jsonl           one JSON object per line, fsynced before the change it tells of is made
    STATE/audit/audit-00000001.jsonl  older lines, named after the first one's number
    STATE/audit/head.json             the last line's number and mac
    STATE/audit/lock                  held (flock) while a line is added

A line's `mac` is HMAC-SHA256 over the line up to it, `prev` (the mac of the line before) included. Its key is derived from the
keystore's secret, so that who can write the files but lacks the secret can neither change, drop nor insert a line unseen, nor cut
the end off without head.json telling. Putting back older copies of both is seen only by who has written a head down elsewhere
(`sliceway audit verify --head`). Who has the secret can write anything: keep it elsewhere (`gateway.keys_secret`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from gateway.config import Config
from gateway.errors import AuditError
from gateway.keys import Keystore
from model_registry.atomic import write_atomically

ROTATE_BYTES = 16 * 2**20
NO_LINE = "0" * 64  # the `prev` of the first line
_MAC = b',"mac":"'
_TAIL_BYTES = 64 * 2**10


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line. `at` is UTC, ISO 8601. `torn` is the SHA-256 of an unfinished line that a lost machine left before it."""

    seq: int
    at: str
    actor: str
    action: str
    target: str
    detail: dict[str, Any]
    prev: str
    torn: str | None = None
    mac: str = ""

    def as_public(self) -> dict[str, Any]:
        """For people and `--json`."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        return shown


class Head(msgspec.Struct, frozen=True):
    """A line by its number and mac. `0` is the beginning."""

    seq: int = 0
    mac: str = NO_LINE


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found. `problems` is empty where every line is as it was written."""

    entries: int
    head: Head
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class AuditLog:
    """The log in one state directory. Any number of processes may add to it. `key` is asked for when it is first needed."""

    root: Path
    key: Callable[[], bytes]
    rotate_bytes: int = ROTATE_BYTES

    @classmethod
    def of(cls, config: Config) -> AuditLog:
        """The one that `config` means."""
        keystore = Keystore.of(config)
        return cls(config.state / "audit", lambda: keystore.derived(b"sliceway audit v1"))

    @property
    def path(self) -> Path:
        """The file that lines are added to."""
        return self.root / "audit.jsonl"

    def append(
        self, *, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None, now: float
    ) -> Entry:
        """Add a line, on disk when this returns. `now` is seconds since 1970. `detail` must hold no secret.

        Raises AuditError or KeystoreError, and then nothing may be changed.
        """
        key = self.key()
        with self._locked():
            self._rotate_if_large()
            last, rest = self._end()
            torn = b"" if _entry(rest) else rest
            when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            entry = Entry(last.seq + 1, when, actor, action, target, dict(detail or {}), last.mac, _torn_mark(torn))
            body = msgspec.json.encode(entry)
            mac = hmac.digest(key, body, "sha256").hex()
            self._write((b"\n" if rest else b"") + body[:-1] + _MAC + mac.encode() + b'"}\n')
            write_atomically(self.root / "head.json", msgspec.json.encode(Head(entry.seq, mac)) + b"\n", mode=0o600)
        return msgspec.structs.replace(entry, mac=mac)

    def tail(self, count: int) -> list[Entry]:
        """The last `count` lines, oldest first. What is no line of ours is left out; `verify` tells of it."""
        found: list[Entry] = []
        for file in reversed(self.files()):
            with _told(file):
                lines = file.read_bytes().splitlines()
            for line in reversed(lines):
                if len(found) == count:
                    return found[::-1]
                if (entry := _entry(line)) is not None:
                    found.append(entry)
        return found[::-1]

    def verify(self, expected: Head | None = None) -> Verdict:
        """Check every line against the one before. `expected` is a head that was written down elsewhere, to be found on the way."""
        key, problems, last, count = self.key(), list[str](), Head(), 0
        wanted = [head for head in (self._head(), expected) if head is not None and head.seq > 0]
        torn: bytes | None = None
        for file in self.files():
            with _told(file):
                lines = file.read_bytes().splitlines()
            for number, line in enumerate(lines, 1):
                entry = _entry(line)
                if entry is None:
                    torn = line
                    continue
                count += 1
                problems += [f"{file.name}:{number}: {what}" for what in _faults(entry, line, last, torn, key)]
                torn, last = None, Head(entry.seq, entry.mac)
                wanted = [head for head in wanted if head != last]
        if torn is not None:
            problems.append("the last line is unfinished")
        problems += [f"line {head.seq} is not there as it was written (mac {head.mac[:12]}...)" for head in wanted]
        return Verdict(count, last, tuple(problems))

    def files(self) -> list[Path]:
        """Every file of the log, oldest first."""
        older = sorted(self.root.glob("audit-*.jsonl"))
        return [*older, self.path] if self.path.exists() else older

    def _head(self) -> Head | None:
        try:
            return msgspec.json.decode((self.root / "head.json").read_bytes(), type=Head)
        except (OSError, msgspec.MsgspecError):
            return None

    def _end(self) -> tuple[Head, bytes]:
        """The last line of ours, and what the file ends with instead of a line's end."""
        files = self.files()
        for file in reversed(files):
            with _told(file), file.open("rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size - _TAIL_BYTES))
                *whole, rest = opened.read().split(b"\n")
            for line in (rest, *reversed(whole)):
                if (entry := _entry(line)) is not None:
                    return Head(entry.seq, entry.mac), rest if file == self.path else b""
        if files:
            raise AuditError(
                "the audit log holds no line that can be read",
                where=str(self.path),
                remedy="`sliceway audit verify` tells more. Move the folder away to begin a new log.",
            )
        return Head(), b""

    def _rotate_if_large(self) -> None:
        with _told(self.path):
            if not self.path.exists() or self.path.stat().st_size < self.rotate_bytes:
                return
            with self.path.open("rb") as file:
                first = _entry(file.readline().rstrip(b"\n"))
            self.path.rename(self.root / f"audit-{first.seq if first else 0:08d}.jsonl")

    def _write(self, line: bytes) -> None:
        with _told(self.path):
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                written = os.write(file, line)
                os.fsync(file)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _told(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _entry(line: bytes) -> Entry | None:
    try:
        entry = msgspec.json.decode(line, type=Entry)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return entry if entry.mac else None


def _faults(entry: Entry, line: bytes, last: Head, torn: bytes | None, key: bytes) -> Iterator[str]:
    body = line[: line.rfind(_MAC)] + b"}"
    if not hmac.compare_digest(hmac.digest(key, body, "sha256").hex(), entry.mac):
        yield "the line is not as it was written"
    if entry.seq != last.seq + 1:
        yield f"line {entry.seq} follows line {last.seq}"
    elif entry.prev != last.mac:
        yield "the line before is another one than when this was written"
    if entry.torn != _torn_mark(torn or b""):
        yield "something stands before it that no lost machine left"


def _torn_mark(torn: bytes) -> str | None:
    return hashlib.sha256(torn).hexdigest() if torn else None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AuditError(
            f"the audit log cannot be used: {error.strerror}",
            where=str(path),
            remedy="Nothing is changed without it. Check the disk, and who owns `state_dir`.",
        ) from error
