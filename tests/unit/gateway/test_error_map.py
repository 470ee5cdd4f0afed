from __future__ import annotations

import json
from typing import Any

import pytest

from gateway import errors
from gateway.error_map import (
    BY_CLASS,
    engine_refusal,
    error_answer,
    error_event,
    error_object,
    event_refusal,
    unexpected,
)
from gateway.errors import EngineRefused, GatewayError, MethodNotAllowed, NoReadyReplica, RequestError

TOLD_TO_OPERATORS = {
    errors.KeystoreError,
    errors.OperatorError,
    errors.UnknownTenant,
    errors.UnknownKey,
    errors.StoreUnavailable,
    errors.UnknownReplica,
    errors.UnknownSlice,
    errors.ConflictingChange,
    errors.OverlayError,
    errors.SecretUnavailable,
    errors.AuditError,
    errors.TlsError,
    errors.AddressInUse,
    errors.InternalError,
    errors.EngineRefused,
}


def classes(root: type[GatewayError]) -> list[type[GatewayError]]:
    return [c for sub in root.__subclasses__() if sub.__module__ == "gateway.errors" for c in (sub, *classes(sub))]


@pytest.mark.parametrize("cls", [c for c in classes(GatewayError) if c not in TOLD_TO_OPERATORS])
def test_every_error_that_clients_see_has_its_own_line(cls: type[GatewayError]) -> None:
    assert cls in BY_CLASS
    assert isinstance(cls.code, str)


def body_of(error: GatewayError) -> dict[str, Any]:
    answer = error_answer(error)
    assert dict(answer.headers)[b"content-length"] == str(len(answer.body)).encode()
    return dict(json.loads(answer.body)["error"])


def test_the_shape_is_openais() -> None:
    error = RequestError("It is wrong.", param="model", remedy="Do it right.")
    assert body_of(error) == {
        "message": "It is wrong. Do it right.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "invalid_request",
    }
    assert error_event(error) == b"data: " + error_answer(error).body + b"\n\n"


def test_capacity_says_when_to_come_back_in_both_headers() -> None:
    headers = dict(error_answer(NoReadyReplica("Not now.", retry_after_seconds=2.4)).headers)
    assert headers[b"retry-after"] == b"3"  # whole seconds, and never too early
    assert headers[b"retry-after-ms"] == b"2400"
    soon = dict(error_answer(NoReadyReplica("Not now.", retry_after_seconds=0.05)).headers)
    assert soon[b"retry-after"] == b"1"


def test_methods_are_listed() -> None:
    assert dict(error_answer(MethodNotAllowed("No.", allowed=("GET", "HEAD"))).headers)[b"allow"] == b"GET, HEAD"


def test_a_replicas_name_is_not_told_to_clients() -> None:
    assert "m-0" not in error_answer(errors.EngineDied("It died.", replica="m-0")).body.decode()


def test_our_own_faults_tell_nothing_of_the_inside() -> None:
    error = unexpected(ValueError("/etc/secret"))
    assert body_of(error)["code"] == "internal_error"
    assert error_answer(error).status == 500
    assert "secret" not in body_of(error)["message"]


VLLM_TOO_LONG = "This model's maximum context length is 100 tokens. However, your prompt contains 120 input tokens."


@pytest.mark.parametrize(
    ("status", "body", "got"),
    [
        (
            400,
            {"error": {"message": VLLM_TOO_LONG, "type": "BadRequestError", "param": "input_tokens", "code": 400}},
            (400, "context_length_exceeded", "input_tokens"),
        ),
        (
            400,
            {"object": "error", "message": VLLM_TOO_LONG, "type": "BadRequestError", "code": 400},
            (400, "context_length_exceeded", None),
        ),
        (
            404,
            {
                "error": {
                    "message": "The model `x` does not exist. Valid aliases: y.",
                    "type": "NotFoundError",
                    "param": "model",
                    "code": 404,
                }
            },
            (404, "model_not_found", "model"),
        ),
        (404, {"detail": "Not Found"}, (400, "unsupported_operation", None)),
        (
            501,
            {"error": {"message": "The model does not support Chat Completions API", "code": 501}},
            (400, "unsupported_operation", None),
        ),
        (401, {"error": "Unauthorized"}, (502, "engine_unauthorized", None)),
        (
            422,
            {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "field required", "type": "missing"}]},
            (422, "invalid_request", "messages.0.role"),
        ),
        (429, {"error": {"message": "queue full", "code": 429}}, (503, "engine_overloaded", None)),
        (503, {"error": {"message": "queue full", "code": 503}}, (503, "engine_overloaded", None)),
        (
            500,
            {"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}},
            (500, "engine_error", None),
        ),
        (502, {"message": None}, (502, "engine_error", None)),
        (400, [], (400, "invalid_request", None)),
        (418, {"error": {}}, (418, "invalid_request", None)),
        (599, {"error": [{"msg": "a"}, {"msg": "b"}]}, (599, "engine_error", None)),
    ],
)
def test_engine_errors_are_sorted(status: int, body: Any, got: tuple[int, str, str | None]) -> None:
    refused = engine_refusal(status, json.dumps(body).encode())
    assert (refused.status, refused.code, refused.param) == got
    assert refused.message
    assert body_of(refused)["code"] == got[1]
    assert (refused.retry_after_seconds is not None) == (got[1] == "engine_overloaded")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html><head><title>502 Bad &amp; Gateway</title></head><body>...</body></html>", "502 Bad & Gateway"),
        (b"<h1>\n  Oh no\n</h1>", "Oh no"),
        (b"upstream connect error", "upstream connect error"),
        (b"", "The engine answered 502 Bad Gateway."),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, "[" * 300),
        (b'{"error": "cut of', '{"error": "cut of'),
    ],
)
def test_what_is_not_json_is_still_told(body: bytes, said: str) -> None:
    assert engine_refusal(502, body).message == said


def test_a_message_has_an_end() -> None:
    assert len(engine_refusal(400, json.dumps({"error": {"message": "x" * 10_000}}).encode()).message) == 2000


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"message": "m", "code": 400}, 400),
        ({"message": "m", "code": "x"}, 500),
        ("m", 500),
        (["m"], 500),
        ({"code": 200, "message": "m"}, 500),
    ],
)
def test_error_events_have_the_status_that_they_name(value: Any, status: int) -> None:
    refused = event_refusal(value)
    assert isinstance(refused, EngineRefused)
    assert (refused.status, refused.message) == (status, "m")


def test_a_field_that_was_wrong_in_every_shape_is_told_once() -> None:
    """As vLLM 0.32 answers an embedding without its input, which might have been a text or a chat."""
    lines = [
        f"  {{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required', 'input': '<dict of 2 items>'}}"
        for field in ("input", "messages", "messages", "input")
    ]
    message = "\n".join(["4 validation errors:", *lines])
    error = engine_refusal(
        400, json.dumps({"error": {"message": message, "param": "body.input", "code": 400}}).encode()
    )
    assert str(error) == "Field required, in `input`; or Field required, in `messages`."
    assert error_object(error)["param"] == "input"
    for other in ("3 validation errors: none is shown", "no validation errors: 'loc': 'a', 'msg': 'b'"):
        assert str(engine_refusal(400, json.dumps({"error": {"message": other}}).encode())) == other
