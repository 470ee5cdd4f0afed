"""What a streamed answer took, from the bytes and the times they came in. Pure: no socket and no clock in here.

Definitions (times from the client's side, all from the moment the request was due to be sent):
TTFT ends at the first event that carries text, never at the headers and never at an event with only a role in it.
ITL is each gap between two such events. E2E ends at `[DONE]`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Reads = Iterable[tuple[float, bytes]]
"""What a socket gave: (seconds on some monotonic clock, bytes), in order."""


class AnswerFailed(Exception):
    """An answer that is none, however fast it came. `kind` is a stable word to count by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer's times in seconds. `itl_seconds` has one gap fewer than there were events with text.

    `ttft_seconds` is None for an answer that is not streamed. `output_tokens` is what the server counted (`usage`), or the
    number of events with text where it sent no usage; `prompt_tokens` is 0 there. `text` is the answer itself, of a stream
    or a chat completion in one piece.
    """

    ttft_seconds: float | None
    itl_seconds: tuple[float, ...]
    e2e_seconds: float
    output_tokens: int
    prompt_tokens: int = 0
    text: str = ""


def events(reads: Reads) -> Iterator[tuple[float, str]]:
    """Server-sent events as (time, data): the time is that of the read which completed the event.

    Comments and other fields are skipped, `data` lines of one event are joined by newlines, and an event that the stream
    ends in the middle of is dropped, as https://html.spec.whatwg.org/multipage/server-sent-events.html asks.
    """
    held = b""
    data: list[str] = []
    for at, chunk in reads:
        *lines, held = (held + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield at, "\n".join(data)
                data = []


def measure_stream(reads: Reads, started: float) -> Timing:
    """The times of a streamed chat completion or completion.

    Raises AnswerFailed: `error_event` for an event with an error in it, `bad_event` for one that is no JSON object,
    `truncated` where `[DONE]` is missing, and `empty` where no event carried text.
    """
    texts: list[float] = []
    said: list[str] = []
    usage: dict[str, Any] = {}
    for at, data in events(reads):
        if data.startswith("[DONE]"):
            return _timing(texts, usage, started, at, "".join(said))
        body = _object(data)
        if "error" in body:
            raise AnswerFailed("error_event", _error_message(body["error"]))
        if _has_text(body):
            texts.append(at)
            said.append(_content(body))
        usage |= body.get("usage") or {}
    raise AnswerFailed("truncated", f"the stream ended without [DONE] after {len(texts)} events with text")


def measure_whole(reads: Reads, started: float) -> Timing:
    """The time of an answer that comes in one piece (an embedding, or a completion that is not streamed).

    Raises AnswerFailed: `bad_body` where it is no JSON object, `error_body` where it is an error in spite of its status.
    """
    read = list(reads)
    try:
        body = json.loads(b"".join(chunk for _, chunk in read))
    except ValueError as error:
        raise AnswerFailed("bad_body", f"the answer is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise AnswerFailed("bad_body", "the answer is no JSON object")
    if "error" in body:
        raise AnswerFailed("error_body", _error_message(body["error"]))
    usage = body.get("usage") or {}
    return Timing(
        ttft_seconds=None,
        itl_seconds=(),
        e2e_seconds=read[-1][0] - started,
        output_tokens=usage.get("completion_tokens") or 0,
        prompt_tokens=usage.get("prompt_tokens") or 0,
        text=_content(body),
    )


def refusal(status: int, reads: Reads) -> AnswerFailed:
    """The failure that a status other than 200 is, with the server's own words where it has some."""
    body = b"".join(chunk for _, chunk in reads)
    try:
        message = _error_message(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    return AnswerFailed(f"http_{status}", message)


def _timing(texts: list[float], usage: dict[str, Any], started: float, done: float, said: str) -> Timing:
    if not texts:
        raise AnswerFailed("empty", "the stream ended properly, but no event carried text")
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(texts))
    return Timing(
        ttft_seconds=texts[0] - started,
        itl_seconds=gaps,
        e2e_seconds=done - started,
        output_tokens=usage.get("completion_tokens") or len(texts),
        prompt_tokens=usage.get("prompt_tokens") or 0,
        text=said,
    )


def _content(body: dict[str, Any]) -> str:
    """The text of the first choice of an event or an answer."""
    for choice in body.get("choices") or ():
        message = choice.get("delta") or choice.get("message") or {}
        return str(choice.get("text") or message.get("content") or "")
    return ""


def _object(data: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise AnswerFailed("bad_event", f"an event is no JSON object: {data[:200]}")
    return body


def _has_text(body: dict[str, Any]) -> bool:
    for choice in body.get("choices") or ():
        delta = choice.get("delta") or {}
        fields = (
            choice.get("text"),
            delta.get("content"),
            delta.get("reasoning_content"),
            delta.get("reasoning"),
            delta.get("tool_calls"),
        )
        if any(fields):
            return True
    return False


def _error_message(error: object) -> str:
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return str(error)
