"""Errors on the wire, in OpenAI's shape: ours by class, the engines' by reading what they say.

`{"error": {"message", "type", "param", "code"}}` with a string `code` is what OpenAI's clients unwrap. vLLM (0.32.0, 0.33.0)
sends an int `code`, `{"error": "Unauthorized"}` for a missing key, and FastAPI's `detail` where a route is missing; proxies in
between send HTML. All of it leaves here in the one shape.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from gateway import errors
from gateway.errors import CapacityError, EngineRefused, GatewayError, MethodNotAllowed

Headers = list[tuple[bytes, bytes]]

INVALID = "invalid_request_error"
SERVER = "server_error"

# class -> (status, type); the code is the class's own. A subclass without a row has its parent's.
BY_CLASS: dict[type[GatewayError], tuple[int, str]] = {
    errors.RequestError: (400, INVALID),
    errors.MalformedRequest: (400, INVALID),
    errors.WrongTask: (400, INVALID),
    errors.MissingKey: (401, INVALID),
    errors.InvalidKey: (401, INVALID),
    errors.InvalidToken: (401, INVALID),
    errors.UnknownModel: (404, INVALID),
    errors.UnknownResponse: (404, INVALID),
    errors.UnknownPreviousResponse: (400, INVALID),
    errors.UnknownObject: (404, INVALID),
    errors.BatchNotOpen: (409, INVALID),
    errors.StorageFull: (413, INVALID),
    errors.UnknownPath: (404, INVALID),
    errors.MethodNotAllowed: (405, INVALID),
    errors.RequestTimeout: (408, INVALID),
    errors.BodyTooLarge: (413, INVALID),
    errors.RateLimited: (429, "requests"),
    errors.HeadTooLarge: (431, INVALID),
    errors.CapacityError: (503, SERVER),
    errors.NoReadyReplica: (503, SERVER),
    errors.QueueFull: (503, SERVER),
    errors.QueueTimeout: (503, SERVER),
    errors.DeadlineTooClose: (503, SERVER),
    errors.BodiesFull: (503, SERVER),
    errors.BodyReaderGone: (503, SERVER),
    errors.Draining: (503, SERVER),
    errors.TokenKeysUnavailable: (503, SERVER),
    errors.StorageError: (500, SERVER),
    errors.EngineError: (502, SERVER),
    errors.EngineUnreachable: (503, SERVER),
    errors.EngineDied: (502, SERVER),
    errors.EngineTimeout: (504, SERVER),
    errors.GatewayError: (500, SERVER),
}

ENGINE_RETRY_SECONDS = 1.0  # an engine that refuses for load, or died, is worth asking again soon
MESSAGE_CHARS = 2000
ERROR_BODY_BYTES = 64 * 2**10  # as much of an engine's error page as is read

_TOO_LONG = re.compile(
    r"maximum context length|longer than the maximum model length|exceeds? the (model's )?(maximum|context)"
    r"|exceeds model's maximum context|cannot be greater than max_(model_len|total_tokens)",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"model .{1,200} does not exist", re.IGNORECASE | re.DOTALL)
_NO_RESPONSE = re.compile(r"response .{1,200}not found", re.IGNORECASE | re.DOTALL)
_MANY_FAULTS = re.compile(r"\d+ validation errors?:")
_FAULT = re.compile(r"'loc': '([^']+)', 'msg': '([^']+)'")
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>|<h1[^>]*>(.*?)</h1>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A whole error response. `headers` lacks the request id, which the sender adds."""

    status: int
    code: str
    headers: Headers
    body: bytes


def status_and_type(error: GatewayError) -> tuple[int, str]:
    """The HTTP status and OpenAI error type of `error`."""
    if isinstance(error, EngineRefused):
        return error.status, error.kind
    if isinstance(error, errors.RateLimited):
        return 429, error.kind
    for cls in type(error).__mro__:
        if cls in BY_CLASS:
            return BY_CLASS[cls]
    return BY_CLASS[GatewayError]


def error_object(error: GatewayError) -> dict[str, Any]:
    """What stands under `error` in the body, or in a stream's error event."""
    _, kind = status_and_type(error)
    message = f"{error.message} {error.remedy}" if error.remedy else error.message
    return {"message": message, "type": kind, "param": getattr(error, "param", None), "code": error.code}


def error_answer(error: GatewayError) -> ErrorAnswer:
    """`error` as an HTTP response."""
    status, _ = status_and_type(error)
    body = msgspec.json.encode({"error": error_object(error)})
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if (wait := _retry_after(error)) is not None:
        headers += [
            (b"retry-after", b"%d" % max(1, math.ceil(wait))),
            (b"retry-after-ms", b"%d" % math.ceil(wait * 1000)),
        ]
    if isinstance(error, errors.RateLimited):
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 431):
        headers.append((b"connection", b"close"))  # where this request ends is unknown, so nothing can follow it
    return ErrorAnswer(status, error.code, headers, body)


def error_event(error: GatewayError) -> bytes:
    """`error` as a server-sent event, for a stream that has begun."""
    return b"data: " + msgspec.json.encode({"error": error_object(error)}) + b"\n\n"


def _retry_after(error: GatewayError) -> float | None:
    if isinstance(error, CapacityError | EngineRefused | errors.RateLimited):
        return error.retry_after_seconds
    return ENGINE_RETRY_SECONDS if isinstance(error, errors.EngineUnreachable | errors.EngineDied) else None


def engine_refusal(status: int, body: bytes) -> EngineRefused:
    """What an engine answered with `status` (400 or above), in OpenAI's terms.

    `body` may be cut off at ERROR_BODY_BYTES, be of any type, or be empty.
    """
    message, param = _read(body)
    return _classify(status, message or _phrase(status), param)


def event_refusal(value: Any) -> EngineRefused:
    """The same for the value under `error` of an event in a stream."""
    message, param = _message(value)
    code = value.get("code") if isinstance(value, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return _classify(status, message or _phrase(status), param)


def _classify(status: int, message: str, param: str | None) -> EngineRefused:
    message = message[:MESSAGE_CHARS]
    if _TOO_LONG.search(message) and status < 500:
        return EngineRefused(message, status=400, kind=INVALID, code="context_length_exceeded", param=param)
    if status == HTTPStatus.NOT_FOUND and _NO_MODEL.search(message):
        return EngineRefused(message, status=404, kind=INVALID, code="model_not_found", param="model")
    if status == HTTPStatus.NOT_FOUND and _NO_RESPONSE.search(message):
        return EngineRefused(message, status=404, kind=INVALID, code="response_not_found", param=param)
    if status in (401, 403):  # our own standing with the engine, nothing the client could mend
        return EngineRefused(
            "The engine refused the gateway's own access.", status=502, kind=SERVER, code="engine_unauthorized"
        )
    if status in (404, 405, 501):
        return EngineRefused(message, status=400, kind=INVALID, code="unsupported_operation", param=param)
    if status in (429, 503):
        return EngineRefused(
            message, status=503, kind=SERVER, code="engine_overloaded", retry_after_seconds=ENGINE_RETRY_SECONDS
        )
    if status < 500:
        return EngineRefused(message, status=status, kind=INVALID, code="invalid_request", param=param)
    return EngineRefused(message, status=status, kind=SERVER, code="engine_error", param=param)


def _read(body: bytes) -> tuple[str, str | None]:
    """Message and param of an error body of whatever kind."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return _text(body.decode("utf-8", "replace")), None
    if not isinstance(value, dict):
        return str(value)[:MESSAGE_CHARS], None
    for key in ("error", "detail"):
        if value.get(key):
            return _message(value[key])
    return _message(value)


def _message(value: Any) -> tuple[str, str | None]:
    """Of `"text"`, of OpenAI's object, or of FastAPI's list of `{loc, msg}`."""
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and value:
        text, param = _message(value[0])
        return (f"{text} (and {len(value) - 1} more)" if len(value) > 1 else text), param
    if not isinstance(value, dict):
        return "", None
    message = _faults(str(value.get("message") or value.get("msg") or ""))
    param = value.get("param")
    if isinstance(param, str):
        param = param.removeprefix("body.")
    if param is None and isinstance(value.get("loc"), list):
        param = ".".join(str(part) for part in value["loc"] if part != "body") or None
    return message, str(param) if param is not None else None


def _faults(message: str) -> str:
    """vLLM tells a wrong field once for every shape that the body might have had, as Python's mappings; here each once."""
    if not _MANY_FAULTS.match(message):
        return message
    told = dict.fromkeys(f"{what}, in `{at.removeprefix('body.')}`" for at, what in _FAULT.findall(message))
    return "; or ".join(told) + "." if told else message


def _text(text: str) -> str:
    """The title of a page of HTML, or the first words of a plain text."""
    if "<" in text and (title := _TITLE.search(text)):
        text = html.unescape(title.group(1) or title.group(2))
    return " ".join(text.split())[:300]


def _phrase(status: int) -> str:
    try:
        return f"The engine answered {status} {HTTPStatus(status).phrase}."
    except ValueError:
        return f"The engine answered {status}."


def unexpected(_: BaseException) -> GatewayError:
    """What a client is told of a fault of our own: nothing of its inside, which is in the log under the request id."""
    return errors.InternalError(
        "The gateway failed to handle the request. Its log has the reason under this request id."
    )
