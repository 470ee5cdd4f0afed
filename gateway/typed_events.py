"""What a stream of named events says: Anthropic's messages, and OpenAI's responses.

`TypedEventMeter` has the place that `gateway.sse.StreamMeter` has for chat's chunks, and the same attributes. Usage comes by itself
in these streams and is part of their shape, so nothing is taken out; their last event ends them, without a `[DONE]`.

- TTFT ends at the first `*.delta` event (`content_block_delta`); ITL is the gap between two arrivals with one.
- `message_delta` and the last event of a response carry the usage; `message_start` carries that of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.error_map import event_refusal
from gateway.errors import EngineError, EngineRefused
from gateway.sse import MAX_EVENT_BYTES, Usage

_LAST = frozenset(
    ("message_stop", "response.completed", "response.incomplete", "response.failed", "response.cancelled")
)
_TELLING = _LAST | {"message_start", "message_delta", "error"}
_NAME = re.compile(rb"^event: ?([a-zA-Z0-9._-]+)", re.MULTILINE)
_DATA = re.compile(rb"^data: ?(.*)", re.MULTILINE)
_TYPE = re.compile(rb'"type" ?: ?"([a-zA-Z0-9._-]+)"')


class Tokens(msgspec.Struct, frozen=True):
    """Usage as both shapes have it; Anthropic's later events add to its first, and its `input_tokens` leave out what a cache is about."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """All tokens of the prompt, cached or not; None where nothing is said of it."""
        if self.input_tokens is None:
            return None
        return self.input_tokens + (self.cache_creation_input_tokens or 0) + (self.cache_read_input_tokens or 0)


class _Holder(msgspec.Struct, frozen=True):
    usage: Tokens | None = None


class _Event(msgspec.Struct, frozen=True):
    usage: Tokens | None = None
    message: _Holder | None = None
    response: _Holder | None = None
    error: Any = None
    code: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class TypedEventMeter:
    """Reads along a stream of named events; see `gateway.sse.StreamMeter` for its attributes."""

    __slots__ = (
        "_first",
        "_gap",
        "_held",
        "done",
        "ended",
        "error",
        "events",
        "last_content_at",
        "usage",
    )

    def __init__(self, *, first: Callable[[float], None], gap: Callable[[float, float], None] | None) -> None:
        self._first = first
        self._gap = gap
        self._held = b""
        self.last_content_at: float | None = None
        self.events = 0
        self.usage: Usage | None = None
        self.error: EngineRefused | None = None
        self.ended = False
        self.done = False

    def feed(self, data: bytes, now: float) -> bytes:
        """Take what arrived at `now`; give what the client gets, whole events only. Raises EngineError for an endless event."""
        data = self._held + data
        separator = b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n"
        end = data.rfind(separator)
        end = 0 if end < 0 else end + len(separator)
        self._held = data[end:]
        if len(self._held) > MAX_EVENT_BYTES:
            raise EngineError(f"The engine sent an event of more than {MAX_EVENT_BYTES} bytes.")
        passed: list[bytes] = []
        content = 0
        for event in data[:end].split(separator)[:-1]:
            if event.strip() == b"data: [DONE]":
                continue  # no part of these shapes; where the engine adds it, the last event has ended the stream
            content += self._one(event)
            passed.append(event + separator)
        if content:
            self._arrived(content, now)
        return b"".join(passed)

    def _arrived(self, events: int, now: float) -> None:
        self.events += events
        if self.last_content_at is None:
            self._first(now)
        elif self._gap is not None:
            self._gap(now - self.last_content_at, now)
        self.last_content_at = now

    def _one(self, event: bytes) -> bool:
        """Whether the event bears content; the few that say something about the stream are read."""
        name = _name(event)
        if name in _TELLING:
            self._read(name, event)
            return False
        return name.endswith("delta")

    def _read(self, name: str, event: bytes) -> None:
        data = _DATA.search(event)
        try:
            value = _decode(data.group(1) if data else b"{}")
        except (msgspec.MsgspecError, RecursionError):
            value = _Event()
        if name == "error":
            self.error = event_refusal(value.error or _loose(data.group(1) if data else b""))
            self.done = self.ended = True
        holder = value.message or value.response
        self._count(value.usage or (holder.usage if holder else None))
        if name in _LAST:
            self.done = self.ended = True

    def _count(self, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        known = self.usage or Usage()
        self.usage = Usage(
            known.prompt_tokens if tokens.prompt_tokens is None else tokens.prompt_tokens,
            known.completion_tokens if tokens.output_tokens is None else tokens.output_tokens,
        )


def _name(event: bytes) -> str:
    """From the event's own line, or from `type` in its data, which both shapes repeat there."""
    match = _NAME.search(event[:200]) or _TYPE.search(event[:200])
    return match.group(1).decode() if match else ""


def _loose(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return data.decode("utf-8", "replace")
