"""Configurations by number: every gateway of one state directory calls the same configuration the same, and numbers only grow.

The number and the configuration's digest lie in a file. Who takes over a configuration that is not the file's adds one;
who comes second finds its digest there. A state directory that is not there, or cannot be written, leaves each process to count alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from pathlib import Path

from gateway.config import Config

log = logging.getLogger("sliceway.gateway")

_MOST_BYTES = 4096


def generation_header(number: int) -> tuple[bytes, bytes]:
    """The header that tells clients which configuration decided on their request."""
    return b"x-sliceway-generation", b"%d" % number


class Generations:
    """The numbers of one state directory, as one process sees them. The file is `{"generation": 3, "digest": "..."}`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = ""
        self._number = 0

    def of(self, config: Config) -> int:
        """The number of `config`, which counts from here on."""
        digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
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
