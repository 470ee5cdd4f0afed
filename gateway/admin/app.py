"""The admin API, with FastAPI: on a listener of its own, for operators and their tools.

Handlers are plain functions, which FastAPI runs on threads: they wait for files and locks, and the event loop serves tenants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gateway.admin import schema
from gateway.admin.access import PEER_UID, Access
from gateway.admin.operations import Operations
from gateway.config import TenantConfig
from gateway.error_map import unexpected
from gateway.errors import (
    ConflictingChange,
    InvalidKey,
    MissingKey,
    OperatorError,
    UnknownKey,
    UnknownReplica,
    UnknownTenant,
)
from gateway.ingress.app import AsgiApp
from gateway.relay import Receive, Scope, Send
from model_registry.errors import ConfigError, SlicewayError
from placement.table import ReplicaRow

MAX_BODY_BYTES = 2**20

_STATUS: tuple[tuple[type[SlicewayError], int], ...] = (
    (MissingKey, 401),
    (InvalidKey, 401),
    (UnknownTenant, 404),
    (UnknownKey, 404),
    (UnknownReplica, 404),
    (ConflictingChange, 409),
    (OperatorError, 422),
    (ConfigError, 422),
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.ProblemBody, "description": "The body is not JSON"},
    401: {"model": schema.ProblemBody, "description": "No admin key, or a wrong one"},
    404: {"model": schema.ProblemBody, "description": "No such tenant, key or replica"},
    411: {"model": schema.ProblemBody, "description": "The body does not say how long it is"},
    413: {"model": schema.ProblemBody, "description": "The body is too large"},
    409: {"model": schema.ProblemBody, "description": "What is there stands in the way"},
    422: {"model": schema.ProblemBody, "description": "The change does not go together with the rest, or is malformed"},
    500: {"model": schema.ProblemBody, "description": "A file that is needed cannot be used; nothing was changed"},
}
KeyId = Annotated[str, Path(max_length=128, description="As GET /admin/keys lists it.")]


class Backstage(Protocol):
    """What the API shows of the running gateway. Called from threads: only what may be read from one."""

    def replicas(self) -> list[ReplicaRow]:
        """Every replica at this moment."""
        ...

    def limits(self) -> list[dict[str, Any]]:
        """Every limit with what is used of it: the fields of `schema.LimitShown`."""
        ...


def admin_app(
    operations: Operations, backstage: Backstage, access: Access, *, wall: Callable[[], float], version: str
) -> AsgiApp:
    """The ASGI application; bodies are bounded."""
    scheme: Any = Depends(
        HTTPBearer(auto_error=False, description="The admin key; none is asked for on a Unix socket without one.")
    )

    def actor(request: Request, _: Any = scheme) -> str:
        return access.actor(request.headers.get("authorization"), request.scope.get(PEER_UID))

    app = FastAPI(
        title="sliceway admin",
        version=version,
        description="Tenants, keys, limits, replicas and the audit log of a sliceway gateway.",
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
        dependencies=[Depends(actor)],
    )
    who: Any = Depends(actor)
    _handle_errors(app)
    _add_keys(app, operations, who, wall)
    _add_tenants(app, operations, who)
    _add_replicas(app, operations, backstage, who)
    _add_audit(app, operations, who)
    return _bounded(app)


def _add_keys(app: FastAPI, operations: Operations, who: Any, wall: Callable[[], float]) -> None:
    @app.get("/admin/keys", tags=["keys"], summary="Every key, by id")
    def list_keys(tenant: str | None = None) -> schema.Keys:
        now, uses = wall(), operations.key_uses()
        return schema.Keys(keys=[schema.KeyShown(**schema.key_fields(r, now, uses)) for r in operations.keys(tenant)])

    @app.post("/admin/keys", tags=["keys"], summary="Make a key; it is shown this once", status_code=201)
    def create_key(body: schema.NewKey, actor: str = who) -> schema.MadeKey:
        key, record = operations.create_key(
            body.tenant, actor=actor, name=body.name, lifetime_seconds=body.lifetime_seconds
        )
        return schema.MadeKey(key=key, **schema.key_fields(record, wall()))

    @app.post("/admin/keys/{key_id}/rotate", tags=["keys"], summary="Hand a key over to a new one", status_code=201)
    def rotate_key(key_id: KeyId, body: schema.Rotation, actor: str = who) -> schema.RotatedKey:
        key, record, old = operations.rotate_key(
            key_id, actor=actor, overlap_seconds=body.overlap_seconds, lifetime_seconds=body.lifetime_seconds
        )
        now = wall()
        replaced = schema.KeyShown(**schema.key_fields(old, now, operations.key_uses()))
        return schema.RotatedKey(key=key, replaced=replaced, **schema.key_fields(record, now))

    @app.post("/admin/keys/{key_id}/revoke", tags=["keys"], summary="Make a key worthless, for good")
    def revoke_key(key_id: KeyId, actor: str = who) -> schema.KeyShown:
        record = operations.revoke_key(key_id, actor=actor)
        return schema.KeyShown(**schema.key_fields(record, wall(), operations.key_uses()))


def _add_tenants(app: FastAPI, operations: Operations, who: Any) -> None:
    @app.get("/admin/tenants", tags=["tenants"], summary="Every tenant as it counts")
    def list_tenants() -> schema.Tenants:
        return schema.Tenants(tenants=[schema.tenant_shown(view) for view in operations.tenants()])

    @app.post("/admin/tenants", tags=["tenants"], summary="Add a tenant", status_code=201)
    def add_tenant(body: TenantConfig, actor: str = who) -> schema.TenantShown:
        fields = body.model_dump(mode="json", exclude_unset=True, exclude={"name"})
        return schema.tenant_shown(operations.add_tenant(body.name, fields, actor=actor))

    @app.get("/admin/tenants/{name:path}", tags=["tenants"], summary="One tenant")
    def get_tenant(name: str) -> schema.TenantShown:
        return schema.tenant_shown(operations.tenant(name))

    def change_tenant(name: str, body: BaseModel, actor: str = who) -> schema.TenantShown:
        fields = body.model_dump(mode="json", exclude_unset=True)
        return schema.tenant_shown(operations.change_tenant(name, fields, actor=actor))

    change_tenant.__annotations__["body"] = schema.tenant_change()
    summary = "Set fields over the configuration; null takes one back"
    app.patch("/admin/tenants/{name:path}", tags=["tenants"], summary=summary)(change_tenant)

    @app.delete("/admin/tenants/{name:path}", tags=["tenants"], summary="Remove an added tenant", status_code=204)
    def remove_tenant(name: str, actor: str = who) -> None:
        operations.remove_tenant(name, actor=actor)

    @app.delete(
        "/admin/overrides/{name:path}", tags=["tenants"], summary="Take back all that was set over the configuration"
    )
    def reset_tenant(name: str, actor: str = who) -> schema.TenantShown:
        return schema.tenant_shown(operations.reset_tenant(name, actor=actor))


def _add_replicas(app: FastAPI, operations: Operations, backstage: Backstage, who: Any) -> None:
    @app.get("/admin/limits", tags=["limits"], summary="Every limit, and what this process counts as used of it")
    def list_limits() -> schema.Limits:
        return schema.Limits(limits=[schema.LimitShown.model_validate(limit) for limit in backstage.limits()])

    @app.get("/admin/replicas", tags=["replicas"], summary="Every replica")
    def list_replicas() -> schema.Replicas:
        drained = set(operations.drained())
        return schema.Replicas(replicas=[_replica(row, drained) for row in backstage.replicas()])

    @app.put("/admin/drains/{replica:path}", tags=["replicas"], summary="Send a replica no new requests")
    def drain(replica: str, actor: str = who) -> schema.Drained:
        operations.drain(replica, actor=actor)
        return schema.Drained(drained=operations.drained())

    @app.delete("/admin/drains/{replica:path}", tags=["replicas"], summary="Send it requests again")
    def undrain(replica: str, actor: str = who) -> schema.Drained:
        operations.undrain(replica, actor=actor)
        return schema.Drained(drained=operations.drained())

    @app.post("/admin/reload", tags=["configuration"], summary="Have every gateway read the configuration again")
    def reload(actor: str = who) -> schema.Reloaded:
        config = operations.reload(actor=actor)
        return schema.Reloaded(models=len(config.models), tenants=len(config.tenants))


def _add_audit(app: FastAPI, operations: Operations, who: Any) -> None:
    @app.get("/admin/audit", tags=["audit"], summary="The last changes, oldest first")
    def audit(last: Annotated[int, Query(ge=1, le=10_000)] = 100) -> schema.AuditTail:
        return schema.AuditTail(entries=[schema.entry_shown(entry) for entry in operations.audit().tail(last)])

    @app.get("/admin/audit/verify", tags=["audit"], summary="Whether the log is as it was written")
    def verify() -> schema.AuditVerdict:
        return schema.verdict_shown(operations.audit().verify())


def _replica(row: ReplicaRow, drained: set[str]) -> schema.ReplicaShown:
    return schema.ReplicaShown(
        replica=row.replica,
        model=row.model,
        slice=row.slice.id,
        state=row.state.value,
        reason=row.reason,
        drained=row.replica in drained,
    )


def _handle_errors(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> JSONResponse:
        told = error if isinstance(error, SlicewayError) else unexpected(error)
        status = next((status for kind, status in _STATUS if isinstance(told, kind)), 500)
        return _answer(status, told.as_dict())

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return _answer(error.status_code, _problem(code, message), headers=dict(error.headers or {}))

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        faults = error.errors()
        status = 400 if any(fault["type"] == "json_invalid" for fault in faults) else 422
        # Not what was given: it may hold a key.
        message = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:10])
        return _answer(status, _problem("invalid_request", message))

    app.add_exception_handler(SlicewayError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(Exception, ours)


def _problem(code: str, message: str) -> dict[str, str | None]:
    return {"code": code, "message": message, "where": None, "remedy": None}


def _answer(status: int, problem: dict[str, str | None], headers: dict[str, str] | None = None) -> JSONResponse:
    extra = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"error": problem}, status_code=status, headers=(headers or {}) | extra)


def _bounded(app: AsgiApp) -> AsgiApp:
    """`app`, with bodies refused that are large, or do not say how large they are."""

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(dict(scope.get("headers", ())))
        if refusal is None:
            await app(scope, receive, send)
        else:
            status, message = refusal
            await _answer(status, _problem("body_too_large", message), {"connection": "close"})(scope, receive, send)

    return bounded


def _refusal(headers: dict[bytes, bytes]) -> tuple[int, str] | None:
    if b"transfer-encoding" in headers:
        return 411, "Send the body with its length."
    if int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
        return 413, f"The body is larger than {MAX_BODY_BYTES} bytes."
    return None
