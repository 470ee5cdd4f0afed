"""Answers that have a form: values that satisfy a JSON schema, calls of tools, log probabilities. All of them made up."""

from __future__ import annotations

import json
from typing import Any

from placement.fake_engine.shapes import word

_PIECE_CHARS = 6  # of JSON, per token


def pieces_of(body: dict[str, Any], tokens: int) -> list[str]:
    """The text of an answer to `body`, token by token: JSON where a format is asked for, words elsewhere."""
    schema = _schema_of(body)
    if schema is None:
        return [word(index) for index in range(tokens)]
    text = json.dumps(sample(schema))
    return [text[i : i + _PIECE_CHARS] for i in range(0, len(text), _PIECE_CHARS)]


def finish_of(body: dict[str, Any]) -> str:
    """A form ends by itself, words are cut off."""
    return "length" if _schema_of(body) is None else "stop"


def _schema_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """Of chat's `response_format`, or of the `text.format` of a response."""
    wanted = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    if wanted.get("type") == "json_object":
        return {"type": "object"}
    if wanted.get("type") != "json_schema":
        return None
    schema = (wanted.get("json_schema") or wanted).get("schema")
    return schema if isinstance(schema, dict) else {}


def sample(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """A small value that satisfies `schema`, for the part of JSON schema that clients generate from types."""
    root = schema if root is None else root
    if "$ref" in schema:
        return sample(root.get("$defs", {}).get(schema["$ref"].rsplit("/", 1)[-1], {}), root)
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    if schema.get("anyOf"):
        return sample(schema["anyOf"][0], root)
    kind = schema.get("type", "object")
    return _of_kind(kind[0] if isinstance(kind, list) else kind, schema, root)


def _of_kind(kind: str, schema: dict[str, Any], root: dict[str, Any]) -> Any:
    if kind == "object":
        return {name: sample(part, root) for name, part in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [sample(schema.get("items") or {"type": "string"}, root)]
    simple: dict[str, Any] = {"string": "fox", "integer": 7, "number": 0.5, "boolean": True, "null": None}
    return simple.get(kind)


def tool_call_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """The call that a body with tools is answered with: of the tool that was chosen, else of the first; None without tools.

    A conversation that already ends in a tool's result is answered in words.
    """
    tools, choice = body.get("tools"), body.get("tool_choice")
    messages = body.get("messages") or [{}]
    if not tools or choice == "none" or messages[-1].get("role") == "tool":
        return None
    functions = [tool.get("function", tool) for tool in tools]
    wanted = (choice.get("function") or choice).get("name") if isinstance(choice, dict) else None
    chosen = next((f for f in functions if f.get("name") == wanted), functions[0])
    schema = chosen.get("parameters") or chosen.get("input_schema") or {"type": "object"}
    return {
        "id": "call_simulated0",
        "type": "function",
        "function": {"name": chosen.get("name", "tool"), "arguments": json.dumps(sample(schema))},
    }


def logprobs_of(pieces: list[str], top: int) -> dict[str, Any]:
    """Chat's log probabilities for `pieces`."""

    def one(text: str) -> dict[str, Any]:
        return {"token": text, "logprob": -0.5, "bytes": list(text.encode())}

    return {"content": [one(piece) | {"top_logprobs": [one(piece)] * min(top, 1)} for piece in pieces]}
