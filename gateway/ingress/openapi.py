"""The relayed routes in the OpenAPI document. FastAPI never serves them, so it cannot describe them by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.request import ROUTES

_SUMMARIES = {
    "/v1/chat/completions": "Chat, streamed or not; the body is OpenAI's, with vLLM's extra fields",
    "/v1/completions": "Completion of a prompt, streamed or not",
    "/v1/embeddings": "Embeddings of one or several inputs",
}
_ERRORS = {
    "400": "The request is malformed, too long for the model, or refused by the engine",
    "401": "No valid API key",
    "404": "No such model for this key",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "502": "The engine stopped in the middle",
    "503": "No replica takes requests at the moment; see Retry-After",
    "504": "The engine sent nothing for too long",
}


def describe_hot_routes(app: FastAPI) -> None:
    """Add ROUTES, the error shape and the key to the document of `app`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {})["Error"] = _ERROR_SCHEMA
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "sk-sliceway-..."}
            }
            for path in ROUTES:
                schema["paths"][path] = {"post": _operation(path)}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _operation(path: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if ROUTES[path].task == "generate":
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "tags": ["inference"],
        "summary": _SUMMARIES[path],
        "operationId": path.removeprefix("/v1/").replace("/", "_"),
        "security": [{"key": []}],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
                }
            },
        },
        "responses": {"200": {"description": "The engine's answer", "content": content}}
        | {status: {"description": text, "content": error} for status, text in _ERRORS.items()},
    }


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
