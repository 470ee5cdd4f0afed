"""Errors in the shape that a route's clients know, and the end of a stream that has begun. Pure.

OpenAI's shape is made in `gateway.error_map`; here stands what Anthropic's clients, and streams of named events, have instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from gateway.error_map import ErrorAnswer, Headers, error_answer, error_event, error_object, status_and_type
from gateway.errors import GatewayError
from gateway.sse import DONE
from gateway.surface import Route

# https://docs.anthropic.com/en/api/errors; 529 stays 503, which says the same to everything between here and the client.
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NOT_REPEATED = frozenset((502, 504))


def answer_to(
    route: Route, error: GatewayError, request_id: bytes, limits: Iterable[tuple[bytes, bytes]] = ()
) -> ErrorAnswer:
    """`error` as a whole response to a request to `route`, with its request id. `limits` are the headers that tell of the tenant's."""
    answer = error_answer(error)
    headers: Headers = [*answer.headers, *limits, (b"x-request-id", request_id)]
    if route.stored and route.body == "json" and answer.status in _NOT_REPEATED:
        headers.append((b"x-should-retry", b"false"))  # the engine may have called tools, and stored the answer
    if route.dialect == "openai":
        return ErrorAnswer(answer.status, answer.code, headers, answer.body)
    body = msgspec.json.encode(anthropic_error(error) | {"request_id": request_id.decode()})
    headers = [(name, value) for name, value in headers if name != b"content-length"]
    headers += [(b"content-length", b"%d" % len(body)), (b"request-id", request_id)]
    return ErrorAnswer(answer.status, answer.code, headers, body)


def anthropic_error(error: GatewayError) -> dict[str, Any]:
    """`error` as Anthropic's clients read it; `code` and `param` are OpenAI's, beside it."""
    told = error_object(error)
    status, _ = status_and_type(error)
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": told | {"type": kind}}


def last_words(route: Route, error: GatewayError) -> bytes:
    """What ends a stream of `route` that has begun and cannot go on."""
    if route.stream == "messages":
        return _named("error", anthropic_error(error))
    if route.stream == "responses":
        return _named("error", {"type": "error", "sequence_number": 0} | _without_type(error_object(error)))
    return error_event(error) + DONE


def proper_end(route: Route) -> bytes:
    """What a client still expects of a stream whose last choice it has."""
    return DONE if route.stream == "chunks" else b""


def _without_type(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name != "type"}


def _named(name: str, value: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
