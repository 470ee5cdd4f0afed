"""The OpenAPI document against the gateway it describes: every route that is told is there, and every one that is there is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route as StarletteRoute

from gateway.surface import BY_ID, ROUTES
from tests.integration.surface_harness import Surface, surface

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
HIDDEN = {"/openapi.json", "/docs", "/docs/oauth2-redirect"}  # they describe themselves
MODEL = {"generate": "chat", "embed": "pool", "any": "chat"}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    with surface(tmp_path_factory.mktemp("state")) as made:
        yield made


@pytest.fixture(scope="module")
def document(system: Surface) -> dict[str, Any]:
    answer = system.send("GET", "/openapi.json", tenant=None)
    assert answer.status_code == 200
    loaded: dict[str, Any] = answer.json()
    return loaded


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def filled(path: str) -> str:
    """The path with something in the place of its parameters."""
    parts = path.split("/")
    return "/".join(
        "chat" if part == "{model}" else f"x{i}" if part.startswith("{") else part for i, part in enumerate(parts)
    )


def sample(schema: dict[str, Any], document: dict[str, Any]) -> Any:
    """A small value that satisfies a schema of the document."""
    if "$ref" in schema:
        return sample(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]], document)
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    if "anyOf" in schema:
        return sample(schema["anyOf"][0], document)
    kind = schema.get("type", "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            wanted = schema.get("required", ())
            return {
                name: sample(part, document) for name, part in schema.get("properties", {}).items() if name in wanted
            }
        case "array":
            return [sample(schema["items"], document)]
        case "integer":
            return schema.get("minimum", 1)
        case "boolean":
            return False
    return "one two"


def test_every_route_that_is_served_is_described(system: Surface, document: dict[str, Any]) -> None:
    described = {(method, path) for method, path, _ in operations(document)}
    relayed = {(route.method, route.path) for route in (*ROUTES.values(), *BY_ID)}
    cold = system.gateway.server.config.app._cold
    own = {
        (method, route.path.replace(":path", ""))
        for route in cold.routes
        if isinstance(route, StarletteRoute) or hasattr(route, "methods")
        for method in (route.methods or ()) - {"HEAD"}
        if route.path not in HIDDEN
    }
    assert described == relayed | own


def test_every_route_that_is_described_is_served(system: Surface, document: dict[str, Any]) -> None:
    """Without a key it is refused for that and nothing else, where the document asks for one."""
    for method, path, operation in operations(document):
        answer = system.send(method, filled(path), tenant=None)
        assert str(answer.status_code) in operation["responses"], (method, path, answer.text)
        assert (answer.status_code == 401) == bool(operation.get("security")), (method, path, answer.text)


def test_every_other_method_is_refused_with_those_there_are(system: Surface, document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for method in set(METHODS) - {name.upper() for name in methods}:
            answer = system.send(method, filled(path))
            assert answer.status_code == 405, (method, path)
            assert answer.headers["allow"]
            assert answer.json()["error"]["code"] == "method_not_allowed"


def test_what_the_document_describes_as_a_body_is_understood(system: Surface, document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" not in content or path.startswith("/v1/batches"):
            continue
        body = sample(content["application/json"]["schema"], document)
        body["model"] = MODEL[ROUTES[path].task]
        answer = system.send(method, path, json=body)
        assert answer.status_code == 200, (path, body, answer.text)
        assert answer.headers["content-type"].split(";")[0] in operation["responses"]["200"]["content"]


def test_errors_look_as_the_document_says(system: Surface, document: dict[str, Any]) -> None:
    shapes = document["components"]["schemas"]
    for method, path, operation in operations(document):
        if "400" not in operation["responses"] or operation.get("requestBody") is None:
            continue
        answer = system.send(method, path, content=b"[", headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, answer.text)
        told = operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]
        assert set(shapes[told.rsplit("/", 1)[-1]]["required"]) <= set(answer.json()), path


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    """Ids are unique, and every reference leads somewhere."""
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    for reference in json.dumps(document).split('"$ref": "')[1:]:
        name = reference.split('"')[0].rsplit("/", 1)[-1]
        assert name in document["components"]["schemas"]
