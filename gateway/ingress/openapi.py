"""The relayed routes in the OpenAPI document. FastAPI never serves them, so it cannot describe them by itself.

Bodies are described as far as the gateway reads them: `additionalProperties` is true everywhere, because the rest is the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.surface import BY_ID, ROUTES, Route

_ERRORS = {
    "400": "The request is malformed, too long for the model, or refused by the engine",
    "401": "No valid API key",
    "403": "The key may not do this",
    "404": "No such model, or stored response, for this key",
    "405": "The path takes another method",
    "408": "The body came too slowly",
    "409": "It has ended, and cannot be changed any more",
    "413": "The body is too large",
    "422": "The engine could not process the request",
    "429": "A limit of this tenant is reached; see Retry-After",
    "431": "The headers are too large",
    "500": "A fault of the gateway or the engine",
    "502": "The engine stopped in the middle",
    "503": "No replica takes requests at the moment; see Retry-After",
    "504": "The engine sent nothing for too long",
}
_COLD_ERRORS = ("400", "401", "403", "404", "405", "408", "409", "413", "429", "500", "503")
_SECURITY: list[dict[str, list[str]]] = [{"key": []}, {"x-api-key": []}]
_TEXT = {"type": "string"}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": {}}]}
_MESSAGES = {"type": "array", "items": {"type": "object"}}
_MODEL = {"type": "string", "minLength": 1, "description": "As GET /v1/models lists it"}
_STREAM = {"type": ["boolean", "null"]}

# The fields that a body must have beside `model`, and those that the gateway reads, by path.
_FIELDS: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _MESSAGES, "stream": _STREAM},
    "/v1/completions": {"prompt": _TEXTS, "stream": _STREAM},
    "/v1/embeddings": {"input": _TEXTS},
    "/v1/responses": {"input": _TEXTS, "stream": _STREAM, "previous_response_id": {"type": ["string", "null"]}},
    "/v1/messages": {"messages": _MESSAGES, "max_tokens": {"type": "integer", "minimum": 1}, "stream": _STREAM},
    "/v1/messages/count_tokens": {"messages": _MESSAGES},
    **{key: {"query": {}, "documents": _TEXTS} for key in ("/v1/rerank", "/rerank", "/v2/rerank")},
    **{key: {"text_1": {}, "text_2": {}} for key in ("/v1/score", "/score")},
    "/classify": {"input": _TEXTS},
    "/pooling": {"input": _TEXTS},
    "/tokenize": {"prompt": _TEXT, "messages": _MESSAGES},
    "/detokenize": {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
    **{
        key: {"file": {"type": "string", "format": "binary"}, "stream": {"type": "boolean"}}
        for key in ("/v1/audio/transcriptions", "/v1/audio/translations")
    },
}
_NOT_NEEDED = frozenset(("stream", "previous_response_id", "prompt", "text_1", "text_2"))


def describe_hot_routes(app: FastAPI) -> None:
    """Add the relayed routes, the error shapes and the keys to the document of `app`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(Error=_ERROR_SCHEMA, AnthropicError=_ANTHROPIC_ERROR_SCHEMA)
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "sk-sliceway-..."},
                "admin": {"type": "http", "scheme": "bearer", "description": "The administrators' key"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _correct(operation, of_tenants=path.startswith("/v1/"))
            for unused in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(unused, None)
            for route in (*ROUTES.values(), *BY_ID):
                schema["paths"].setdefault(route.path, {})[route.method.lower()] = _operation(route)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _correct(operation: dict[str, Any], *, of_tenants: bool) -> None:
    """What FastAPI cannot know of a route of its own: the keys, and that what it calls 422 is told as all other errors are."""
    responses, error = operation["responses"], _error_content("Error")
    if responses.pop("422", None) is not None:
        responses["400"] = {"description": _ERRORS["400"], "content": error}
    if not of_tenants:
        if "401" in responses:
            operation["security"] = [{"admin": []}]
        return
    operation["security"] = _SECURITY
    responses |= {status: {"description": _ERRORS[status], "content": error} for status in _COLD_ERRORS}


def _error_content(shape: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}


def _operation(route: Route) -> dict[str, Any]:
    shape = "AnthropicError" if route.dialect == "anthropic" else "Error"
    error = _error_content(shape)
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if route.body == "form":
        content["text/plain"] = {"schema": _TEXT}
    if route.stream is not None:
        content["text/event-stream"] = {"schema": _TEXT}
    operation: dict[str, Any] = {
        "tags": ["inference"],
        "summary": route.summary,
        "operationId": _operation_id(route),
        "security": _SECURITY,
        "responses": {"200": {"description": "The engine's answer", "content": content}}
        | {status: {"description": text, "content": error} for status, text in _ERRORS.items()},
    }
    if route.body == "none":
        return operation | {"parameters": _parameters(route)}
    kind = "application/json" if route.body == "json" else "multipart/form-data"
    return operation | {"requestBody": {"required": True, "content": {kind: {"schema": _body(route)}}}}


def _operation_id(route: Route) -> str:
    words = [route.method.lower()] if route.method == "GET" else []
    words += [part for part in route.path.split("/") if part and not part.startswith("{")]
    return "_".join(words)


def _body(route: Route) -> dict[str, Any]:
    fields = _FIELDS[route.path]
    return {
        "type": "object",
        "required": ["model", *(name for name in fields if name not in _NOT_NEEDED)]
        if route.path != "/tokenize"
        else ["model"],
        "properties": {"model": _MODEL} | fields,
        "additionalProperties": True,
    }


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    if route.method == "GET":
        parameters += [
            {"name": "stream", "in": "query", "required": False, "schema": {"type": "boolean"}},
            {"name": "starting_after", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 0}},
        ]
    return parameters


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ANTHROPIC_ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}
