from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.dialects import answer_to, last_words, proper_end
from gateway.errors import EngineDied, InvalidKey, NoReadyReplica, UnknownModel
from gateway.surface import BY_ID, CANCEL_RESPONSE, GET_RESPONSE, PLAIN, ROUTES, by_id

CHAT, MESSAGES, RESPONSES = ROUTES["/v1/chat/completions"], ROUTES["/v1/messages"], ROUTES["/v1/responses"]


def test_the_relay_below_asgi_gets_what_is_plain() -> None:
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/tokenize"} <= set(PLAIN)
    assert not {"/v1/messages", "/v1/responses", "/v1/audio/transcriptions"} & set(PLAIN)
    assert all(route.path == path and route.method == "POST" for path, route in ROUTES.items())


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/responses/resp_1", (GET_RESPONSE, "resp_1")),
        ("/v1/responses/resp_1/cancel", (CANCEL_RESPONSE, "resp_1")),
        ("/v1/responses/", None),
        ("/v1/responses//cancel", None),
        ("/v1/responses/resp_1/", None),
        ("/v1/responses/resp_1/input_items", None),
        ("/v1/responses/resp_1/cancel/x", None),
        ("/v1/responses", None),
        ("/v1/messages/x", None),
    ],
)
def test_stored_responses_are_told_by_their_path(path: str, found: Any) -> None:
    assert by_id(path) == found


def test_operations_of_engines_are_not_on_the_surface() -> None:
    """What opens an engine to whoever can reach it (facts/vllm.md, 7) is on no list of ours."""
    operations = """health ping version load metrics v1/load_lora_adapter v1/unload_lora_adapter kv_event_sources
        scale_elastic_ep fault_tolerance/apply sleep wake_up is_sleeping pause resume reset_prefix_cache collective_rpc server_info
        abort_requests invocations inference/v1/generate v1/chat/completions/render tokenizer_info start_profile"""
    paths = {route.path for route in (*ROUTES.values(), *BY_ID)}
    assert not paths & {f"/{name}" for name in operations.split()}


def test_errors_of_messages_are_anthropics() -> None:
    for error, status, kind in (
        (InvalidKey("no"), 401, "authentication_error"),
        (UnknownModel("no"), 404, "not_found_error"),
        (NoReadyReplica("no", retry_after_seconds=2), 503, "overloaded_error"),
        (EngineDied("no"), 502, "api_error"),
    ):
        answer = answer_to(MESSAGES, error, b"req_1")
        headers = dict(answer.headers)
        body = json.loads(answer.body)
        assert (answer.status, body["error"]["type"], body["request_id"]) == (status, kind, "req_1")
        assert headers[b"request-id"] == headers[b"x-request-id"] == b"req_1"
        assert int(headers[b"content-length"]) == len(answer.body)


def test_only_what_may_have_had_effects_is_not_to_be_repeated() -> None:
    died = EngineDied("gone")
    assert (b"x-should-retry", b"false") in answer_to(RESPONSES, died, b"r").headers
    assert b"x-should-retry" not in dict(answer_to(CHAT, died, b"r").headers)
    assert b"x-should-retry" not in dict(answer_to(GET_RESPONSE, died, b"r").headers)


def test_each_kind_of_stream_ends_in_its_own_words() -> None:
    died = EngineDied("gone")
    assert last_words(CHAT, died).endswith(b"\n\ndata: [DONE]\n\n")
    for route in (MESSAGES, RESPONSES):
        words = last_words(route, died)
        assert words.startswith(b"event: error\ndata: {")
        assert json.loads(words.split(b"data: ")[1])["type"] == "error"
        assert proper_end(route) == b""
    assert proper_end(CHAT) == b"data: [DONE]\n\n"
