"""What a stream of server-sent events says, read without parsing every event.

`StreamMeter` stands between an engine's bytes and a client's. It passes whole events on as they are and keeps an account of
them: when the first content came, the gaps, the usage, how it ended. It does no I/O and takes the time as an argument, so
that any relay can use it.

What counts how:

- TTFT ends at the first event that carries content (text, reasoning, a refusal, a tool call). vLLM's opening event with the
  role alone, and keep-alive comments, are not content.
- ITL is the gap between two arrivals with content. Tokens that arrive together, as one event or as several events in one read, are one
  arrival: the client waited once for them. (vLLM's own `inter_token_latency_seconds` counts engine steps, likewise.)
- An event that only ends the stream (finish without text, usage, `[DONE]`) is no arrival of content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.error_map import error_event, event_refusal
from gateway.errors import EngineError, EngineRefused

MAX_EVENT_BYTES = 16 * 2**20
DONE = b"data: [DONE]\n\n"

_OPEN_EVENT = (
    b'"finish_reason":null'  # in every vLLM event that does not end its choice; a quote inside text is escaped
)
_CONTENT_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio")


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Event(msgspec.Struct):
    choices: list[dict[str, Any]] | None = None
    usage: Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode
_json = json.JSONDecoder()  # the one decoder at hand that stops where a value ends
_USAGE_KEY = re.compile(rb'"usage"\s*:\s*(?=\{)')


class StreamMeter:
    """Reads along a stream.

    `first` is called with the time of the first content, `gap` with each ITL sample in seconds and its time; None where gaps mean nothing
    (several choices in one stream). Attributes to read at any time: `last_content_at` (None before the first), `events` (with content),
    `usage`, `error` (an error event that the engine sent), `ended` (nothing but `[DONE]` is missing), `done` (`[DONE]` was seen).
    """

    __slots__ = (
        "_first",
        "_gap",
        "_held",
        "_keep_usage",
        "_separator",
        "done",
        "ended",
        "error",
        "events",
        "last_content_at",
        "usage",
    )

    def __init__(
        self, *, keep_usage: bool, first: Callable[[float], None], gap: Callable[[float, float], None] | None
    ) -> None:
        self._keep_usage = keep_usage
        self._first = first
        self._gap = gap
        self._held = b""
        self._separator = b"\n\n"
        self.last_content_at: float | None = None
        self.events = 0
        self.usage: Usage | None = None
        self.error: EngineRefused | None = None
        self.ended = False
        self.done = False

    def feed(self, data: bytes, now: float) -> bytes:
        """Take what arrived at `now`; give what the client gets, whole events only.

        Raises EngineError if an event grows beyond MAX_EVENT_BYTES.
        """
        if data.endswith(b"\n\n") and self.passes(data, now):
            return data
        return self._read(data, now)

    def passes(self, data: bytes, now: float) -> bool:
        """Whether `data` holds nothing but whole events in the middle of a stream; if so they are counted, and passed on as they are.

        `data` has to begin and end with an event, as it stands or in the framing of one chunk.
        """
        last = self.last_content_at
        if last is None or self._held:
            return False
        events = data.count(_OPEN_EVENT)
        if not events or events != data.count(b"data: "):
            return False
        self.events += events
        if self._gap is not None:
            self._gap(now - last, now)
        self.last_content_at = now
        return True

    def _read(self, data: bytes, now: float) -> bytes:
        """The careful way: event by event."""
        data = self._held + data
        if self._separator == b"\n\n" and b"\r\n\r\n" in data:
            self._separator = b"\r\n\r\n"
        end = data.rfind(self._separator)
        if end < 0:
            self._hold(data)
            return b""
        end += len(self._separator)
        self._hold(data[end:])
        passed, content = [], 0
        for event in data[:end].split(self._separator)[:-1]:
            kept, bears = self._one(event)
            content += bears
            if kept is not None:
                passed.append(kept)
        if content:
            self._arrived(content, now)
        return b"".join(passed)

    def _hold(self, rest: bytes) -> None:
        if len(rest) > MAX_EVENT_BYTES:
            raise EngineError(f"The engine sent an event of more than {MAX_EVENT_BYTES} bytes.")
        self._held = rest

    def _arrived(self, events: int, now: float) -> None:
        self.events += events
        if self.last_content_at is None:
            self._first(now)
        elif self._gap is not None:
            self._gap(now - self.last_content_at, now)
        self.last_content_at = now

    def _one(self, event: bytes) -> tuple[bytes | None, bool]:
        """What is passed on for one event (None: nothing), and whether it bears content."""
        whole = event + self._separator
        payload = _payload(event)
        if payload is None:
            return whole, False
        if payload == b"[DONE]":
            self.done = True
            return whole, False
        try:
            value = _decode_event(payload)
        except (msgspec.MsgspecError, RecursionError):
            return whole, False
        if value.error is not None:
            self.error = event_refusal(value.error)
            return error_event(self.error), False
        if value.usage is not None:
            self.usage = value.usage
            if not value.choices:
                self.ended = True  # the usage comes after the last choice
                return (whole if self._keep_usage else None), False
        return whole, self._bears_content(value.choices or [])

    def _bears_content(self, choices: list[dict[str, Any]]) -> bool:
        content = False
        for choice in choices:
            delta = choice.get("delta")
            content = (
                content
                or bool(choice.get("text"))
                or (isinstance(delta, dict) and any(delta.get(name) for name in _CONTENT_FIELDS))
            )
            if self._gap is not None and choice.get("finish_reason") is not None:  # the only choice
                self.ended = True
        return content


def _payload(event: bytes) -> bytes | None:
    """What follows `data:` in an event, its lines joined; None for comments and events without data."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


USAGE_TAIL_BYTES = 8 * 2**10
_SMALL_BODY_BYTES = 64 * 2**10


class _AnyUsage(msgspec.Struct):
    """OpenAI's two names for each, of which Anthropic shares one; its `input_tokens` leave out what was written to a cache or read from one."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None

    def as_usage(self) -> Usage:
        cached = (self.cache_creation_input_tokens or 0) + (self.cache_read_input_tokens or 0)
        return Usage(
            (self.input_tokens or 0) + cached if self.prompt_tokens is None else self.prompt_tokens,
            self.output_tokens or 0 if self.completion_tokens is None else self.completion_tokens,
        )


class _Body(msgspec.Struct):
    usage: _AnyUsage | None = None


_decode_small_body = msgspec.json.Decoder(_Body).decode


def usage_of_body(body: bytes) -> Usage | None:
    """The usage in a JSON answer: the whole of it, or of a large one at least the last USAGE_TAIL_BYTES.

    vLLM writes it after choices and data, so that a large answer need not be read. A quote inside text is escaped, so that
    `"usage":` can only be a key. None where there is none.
    """
    if len(body) <= _SMALL_BODY_BYTES:
        try:
            usage = _decode_small_body(body).usage
            return usage.as_usage() if usage is not None else None
        except (msgspec.MsgspecError, RecursionError):
            pass  # the end of a large answer, or a usage of another make
    tail = body[-USAGE_TAIL_BYTES:]
    starts = [match.end() for match in _USAGE_KEY.finditer(tail)]
    if not starts:
        return None
    try:
        value, _ = _json.raw_decode(tail[starts[-1] :].decode("utf-8", "replace"))
        return msgspec.convert(value, _AnyUsage).as_usage()
    except (ValueError, msgspec.ValidationError):
        return None
