"""The routes that are not in a hurry, with FastAPI: models, health, metrics, slices, documentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gateway.batches.service import BatchService
from gateway.engine_metrics import CONTENT_TYPE
from gateway.error_map import error_answer, unexpected
from gateway.errors import GatewayError, MethodNotAllowed, RequestError, UnknownPath
from gateway.ingress.openapi import describe_hot_routes
from gateway.request import credentials, wrong_value
from gateway.router import unknown_model
from gateway.routes import ModelRoute, Routes
from gateway.tenants import Tenant


class Backstage(Protocol):
    """What the cold routes show."""

    def routes(self) -> Routes:
        """The routes at this moment."""
        ...

    def authenticate(self, authorization: bytes | None) -> Tenant:
        """The tenant behind an Authorization header. Raises MissingKey, InvalidKey."""
        ...

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests can be served, and why not."""
        ...

    async def slices(self) -> list[dict[str, Any]]:
        """The list of `/slices`."""
        ...

    def metrics(self) -> tuple[bytes, str]:
        """Text and content type of `/metrics`."""
        ...


def cold_app(
    backstage: Backstage,
    *,
    version: str,
    batches: BatchService | None = None,
    console: Callable[[FastAPI], None] | None = None,
    engine_metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """The application for every path that is not relayed. Without `batches` there are neither files nor batches.

    `console` adds the operators' page, `engine_metrics` gives the text of `/metrics/engines`; None where there is none.
    """
    app = FastAPI(
        title="sliceway",
        version=version,
        description="OpenAI-compatible inference on GPU slices.",
        redoc_url=None,
        redirect_slashes=False,
    )
    _handle_errors(app)
    who = _who(backstage)
    _add_models(app, backstage, who)
    if batches is not None:
        batches.add_to(app, who)
    _add_operations(app, backstage)
    if engine_metrics is not None:
        _add_engine_metrics(app, engine_metrics)
    if console is not None:
        console(app)
    describe_hot_routes(app)
    return app


def _who(backstage: Backstage) -> Any:
    """The tenant of a request, as a default of a parameter, because annotations are looked up in the module."""

    async def tenant(request: Request) -> Tenant:
        return backstage.authenticate(credentials(dict(request.scope["headers"])))

    return Depends(tenant)


def _add_models(app: FastAPI, backstage: Backstage, who: Any) -> None:
    @app.get("/v1/models", tags=["models"], summary="The models this key may use")
    async def list_models(tenant: Tenant = who) -> dict[str, Any]:
        visible = _visible(tenant, backstage.routes().models)
        names = sorted(visible)
        first, last = (names[0], names[-1]) if names else (None, None)
        pages = {"first_id": first, "last_id": last, "has_more": False}  # Anthropic's; there is one page
        return {"object": "list", "data": [_card(name, visible[name]) for name in names]} | pages

    @app.get("/v1/models/{model:path}", tags=["models"], summary="One model; its name may be URL-quoted")
    async def get_model(model: str, tenant: Tenant = who) -> dict[str, Any]:
        known = _visible(tenant, backstage.routes().models).get(model)
        if known is None:
            raise unknown_model(model)
        return _card(model, known)


def _visible(tenant: Tenant, models: Mapping[str, ModelRoute]) -> dict[str, ModelRoute]:
    """What this tenant may name: its models, and the aliases that lead to one."""
    own = {name: model for name, model in models.items() if tenant.may_use(name)}
    return own | {alias: own[name] for alias, name in tenant.aliases.items() if name in own}


def _card(name: str, model: ModelRoute) -> dict[str, Any]:
    """OpenAI's fields, vLLM's `root`, `parent` and `max_model_len`, and Anthropic's `type`, `display_name` and `created_at`: each
    kind of client reads its own. `root` is what an alias leads to."""
    card = model.card
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "sliceway",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z"),
    }


def _add_operations(app: FastAPI, backstage: Backstage) -> None:
    @app.get("/healthz", tags=["operations"], summary="The process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operations"],
        summary="Requests can be served",
        responses={503: {"description": "Not yet, or stopping"}},
    )
    async def readyz() -> JSONResponse:
        ready, why = backstage.readiness()
        return JSONResponse(why, status_code=200 if ready else 503)

    @app.get("/metrics", tags=["operations"], summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        text, content_type = backstage.metrics()
        return Response(text, media_type=content_type)

    @app.get("/slices", tags=["operations"], summary="State and p50/p99 of every slice, and of each tenant on it")
    async def slices() -> Response:
        return Response(msgspec.json.encode(await backstage.slices()), media_type="application/json")


def _add_engine_metrics(app: FastAPI, page: Callable[[], Awaitable[bytes]]) -> None:
    @app.get(
        "/metrics/engines",
        tags=["operations"],
        summary="Prometheus metrics of the engines, by replica and slice",
        response_class=Response,
    )
    async def engine_metrics() -> Response:
        return Response(await page(), media_type=CONTENT_TYPE)


def _handle_errors(app: FastAPI) -> None:
    async def gateway_error(_: Request, error: Exception) -> Response:
        return _answer(error if isinstance(error, GatewayError) else unexpected(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 405:
            allowed = tuple((error.headers or {}).get("allow", (error.headers or {}).get("Allow", "GET")).split(", "))
            return _answer(
                MethodNotAllowed(f"{path} takes {', '.join(allowed)}, not {request.method}.", allowed=allowed)
            )
        if error.status_code == 404:
            return _answer(
                UnknownPath(f"There is no {request.method} {path[:200]} here.", remedy="GET /docs lists what there is.")
            )
        return _answer(RequestError(str(error.detail)))

    async def wrong_parameter(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _answer(wrong_value(error.errors(), skip=1))

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        GatewayError: gateway_error,
        HTTPException: http_error,
        RequestValidationError: wrong_parameter,
        Exception: gateway_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _answer(error: GatewayError) -> Response:
    answer = error_answer(error)
    headers = {name.decode(): value.decode("latin-1") for name, value in answer.headers if name != b"content-length"}
    return Response(answer.body, status_code=answer.status, headers=headers)
