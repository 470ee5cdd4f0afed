"""A batch as it is stored and shown. Values only."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from gateway.errors import MalformedRequest

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OPEN: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""In these there is something left to do."""

_WINDOW = re.compile(r"(\d{1,4})(m|h|d)")
_SECONDS = {"m": 60, "h": 3600, "d": 86_400}
MAX_WINDOW_SECONDS = 7 * 86_400
MAX_METADATA = 16


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with an input file, in OpenAI's terms. `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(msgspec.Struct, frozen=True):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. Times are seconds since 1970; every state that was reached has its time."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    outcome: Status | None = None  # what a batch that is finalizing will be
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()
    counts: Counts = Counts()
    metadata: dict[str, str] | None = None
    output_lifetime_seconds: float | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    def moved(self, status: Status, now: float, **fields: Any) -> Batch:
        """The batch in another state, reached at `now`."""
        return msgspec.structs.replace(self, status=status, **{f"{status}_at": int(now)}, **fields)

    def as_public(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        for ours in ("tenant", "counts", "outcome", "output_lifetime_seconds"):
            del shown[ours]
        if self.status == "finalizing":  # the files have their names, but are not there yet
            shown |= {"output_file_id": None, "error_file_id": None}
        errors = {"object": "list", "data": shown["errors"]} if self.errors else None
        return shown | {"object": "batch", "errors": errors, "request_counts": msgspec.to_builtins(self.counts)}


def window_seconds(window: str) -> int:
    """How long a batch may take: `24h`, `90m`, `2d`. Raises MalformedRequest."""
    match = _WINDOW.fullmatch(window)
    seconds = int(match.group(1)) * _SECONDS[match.group(2)] if match else 0
    if not 0 < seconds <= MAX_WINDOW_SECONDS:
        raise MalformedRequest(
            f"The completion window must be a time such as `24h`, at most 7d, not {window[:40]!r}.",
            param="completion_window",
        )
    return seconds
