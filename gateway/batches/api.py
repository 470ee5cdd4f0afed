"""`/v1/batches`, with FastAPI: OpenAI's shapes."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from msgspec.structs import replace
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from gateway.batches.record import MAX_METADATA, OPEN, Batch, window_seconds
from gateway.batches.runner import Runner
from gateway.batches.store import BatchStore
from gateway.errors import BatchNotOpen, BodyTooLarge, MalformedRequest
from gateway.files.api import MAX_LIFETIME_SECONDS, MIN_LIFETIME_SECONDS, After, listed
from gateway.files.store import FileStore
from gateway.files.upload import in_time
from gateway.keys import WallClock
from gateway.request import wrong_value
from gateway.surface import ROUTES
from gateway.tenants import Tenant

MAX_BODY_BYTES = 64 * 2**10
ENDPOINTS = tuple(path for path, route in ROUTES.items() if route.batch)


class OutputExpiry(BaseModel):
    """When the files of answers go away."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFETIME_SECONDS, le=MAX_LIFETIME_SECONDS)


class NewBatch(BaseModel):
    """What makes a batch."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=80)]
    endpoint: str = Field(json_schema_extra={"enum": list(ENDPOINTS)})
    completion_window: str = Field(default="24h", description="How long it may take: `24h`, `90m`, `2d`; at most 7d.")
    metadata: (
        dict[
            Annotated[str, StringConstraints(max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ]
        | None
    ) = Field(default=None, max_length=MAX_METADATA)
    output_expires_after: OutputExpiry | None = None


def _schema() -> dict[str, Any]:
    """NewBatch without references, which would lead into a document of their own."""
    schema = NewBatch.model_json_schema()
    parts = schema.pop("$defs")
    options = schema["properties"]["output_expires_after"]["anyOf"]
    options[:] = [parts[one["$ref"].rsplit("/", 1)[-1]] if "$ref" in one else one for one in options]
    return schema


async def _small_body(request: Request, idle_seconds: float) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is too long, RequestTimeout if nothing comes for `idle_seconds`."""
    body = b""
    async for piece in in_time(request.stream(), idle_seconds):
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The description of a batch has at most {MAX_BODY_BYTES} bytes.")
    return body


def _wanted(body: bytes) -> NewBatch:
    """Raises MalformedRequest."""
    try:
        return NewBatch.model_validate_json(body)
    except ValidationError as error:
        raise wrong_value(error.errors(include_url=False, include_context=False, include_input=False)) from error


def add_batches(
    app: FastAPI,
    who: Any,
    batches: BatchStore,
    files: FileStore,
    runner: Runner,
    wall: WallClock,
    *,
    idle_seconds: float,
) -> None:
    """Add the routes. `who` is the dependency that gives the tenant; `idle_seconds` how long a body may stand still."""

    @app.post(
        "/v1/batches",
        tags=["batches"],
        summary="Have a file of requests answered in idle capacity",
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}},
    )
    async def create(request: Request, tenant: Tenant = who) -> dict[str, Any]:
        wanted = _wanted(await _small_body(request, idle_seconds))
        if wanted.endpoint not in ENDPOINTS:
            raise MalformedRequest(
                f"Batches are for {', '.join(ENDPOINTS)}, not {wanted.endpoint[:80]!r}.", param="endpoint"
            )
        seconds = window_seconds(wanted.completion_window)
        source = await files.get(wanted.input_file_id, tenant.name)
        if source.purpose != "batch":
            raise MalformedRequest("The input file must have the purpose `batch`.", param="input_file_id")
        now = int(wall())
        expiry = wanted.output_expires_after
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=tenant.name,
            endpoint=wanted.endpoint,
            input_file_id=source.id,
            completion_window=wanted.completion_window,
            created_at=now,
            expires_at=now + seconds,
            metadata=wanted.metadata,
            output_lifetime_seconds=float(expiry.seconds) if expiry else None,
        )
        await batches.add(batch)
        runner.wake()
        return batch.as_public()

    @app.get("/v1/batches", tags=["batches"], summary="This tenant's batches, the newest first")
    async def list_batches(
        tenant: Tenant = who, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: After = None
    ) -> dict[str, Any]:
        found, more = await batches.page(tenant.name, limit=limit, after=after)
        return listed([batch.as_public() for batch in found], more)

    @app.get("/v1/batches/{batch_id}", tags=["batches"], summary="How far a batch is")
    async def get_batch(batch_id: str, tenant: Tenant = who) -> dict[str, Any]:
        return (await batches.get(batch_id, tenant.name)).as_public()

    @app.post("/v1/batches/{batch_id}/cancel", tags=["batches"], summary="Take up no more of a batch's requests")
    async def cancel(batch_id: str, tenant: Tenant = who) -> dict[str, Any]:
        def cancelled(batch: Batch) -> Batch:
            if batch.status in ("cancelling", "finalizing"):
                return batch
            if batch.status not in OPEN:
                raise BatchNotOpen(f"The batch is {batch.status} and cannot be cancelled.")
            return replace(batch, status="cancelling", cancelling_at=int(wall()))

        batch = await batches.change(batch_id, tenant.name, cancelled)
        runner.wake()
        return batch.as_public()
