"""Configurations by number: every gateway of one state directory calls the same configuration the same, and numbers only grow.

The number and the configuration's digest lie in a file. Who takes over a configuration that is not the file's adds one;
who comes second finds its digest there. A state directory that is not there, or cannot be written, leaves each process to count alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.config import Config
from placement.replicas.procfs import ProcessIdentity, boot_id

log = logging.getLogger("sliceway.gateway")

_MOST_BYTES = 4096


def generation_header(number: int) -> tuple[bytes, bytes]:
    """The header that tells clients which configuration decided on their request."""
    return b"x-sliceway-generation", b"%d" % number


def digest_of(config: Config) -> str:
    """The same for the same configuration."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def served_digest(config: Config) -> str:
    """The same for configurations that make no difference to requests: `--listen` and `--simulate` are left out."""
    left_out = {"fleet": {"discover", "slices"}, "gateway": {"listen"}}
    return hashlib.sha256(config.model_dump_json(exclude=left_out).encode()).hexdigest()


class Generations:
    """The numbers of one state directory, as one process sees them. The file is `{"generation": 3, "digest": "..."}`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = ""
        self._number = 0

    def of(self, config: Config) -> int:
        """The number of `config`, which counts from here on."""
        digest = digest_of(config)
        if digest != self._digest:
            self._digest, self._number = digest, self._numbered(digest)
        return self._number

    def _numbered(self, digest: str) -> int:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # no state directory: nothing but this gateway is here
            return self._number + 1
        except OSError as error:
            log.warning("the configuration's number cannot be kept, this gateway counts alone: %s", error)
            return self._number + 1
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # for microseconds
            last, known = _parsed(os.pread(file, _MOST_BYTES, 0))
            if known == digest:
                return last
            number = max(last, self._number) + 1
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps({"generation": number, "digest": digest}).encode(), 0)
            return number
        finally:
            os.close(file)


def _parsed(data: bytes) -> tuple[int, str]:
    """Number and digest; 0 for a file that is new or damaged."""
    try:
        raw = json.loads(data)
        return max(0, int(raw["generation"])), str(raw["digest"])
    except (ValueError, KeyError, TypeError):
        return 0, ""


class Announcement(BaseModel):
    """What one gateway process goes by: the digest of its configuration's file, and the last request to read it again that
    it has seen to, whether the file was good or not; and where it listens, which `--listen` may have chosen.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    start_ticks: int
    boot_id: str
    digest: str
    reloads: int
    listen: str = ""


class Announcements:
    """What the gateways of one state directory go by, each in a file of its own, for who changes the configuration under them."""

    def __init__(self, directory: Path, *, listen: str = "") -> None:
        self._directory = directory
        self._listen = listen

    def write(self, config: Config, reloads: int) -> None:
        """Tell what this process goes by. Where that cannot be written, nobody waits for this gateway."""
        own = ProcessIdentity.of(os.getpid())
        told = Announcement(
            pid=os.getpid(),
            start_ticks=own.start_ticks if own else 0,
            boot_id=boot_id(),
            digest=served_digest(config),
            reloads=reloads,
            listen=self._listen,
        )
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            draft = self._own().with_suffix(".draft")
            draft.write_text(told.model_dump_json(), encoding="utf-8")
            draft.replace(self._own())
        except FileNotFoundError:  # no state directory: nothing but this gateway is here
            return
        except OSError as error:
            log.warning("what this gateway goes by cannot be told: %s", error)

    def remove(self) -> None:
        """This process goes by nothing any more."""
        with contextlib.suppress(OSError):
            self._own().unlink(missing_ok=True)

    def read(self) -> tuple[Announcement, ...]:
        """Those of gateways that run."""
        return tuple(self._alive())

    def _alive(self) -> Iterator[Announcement]:
        for path in sorted(self._directory.glob("*.json")):
            try:
                told = Announcement.model_validate_json(path.read_bytes())
            except (OSError, ValidationError):
                continue
            if ProcessIdentity(told.pid, told.start_ticks, told.boot_id).alive:
                yield told
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _own(self) -> Path:
        return self._directory / f"{os.getpid()}.json"
