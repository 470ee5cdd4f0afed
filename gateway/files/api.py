"""`/v1/files`, with FastAPI: OpenAI's shapes, for the files of batches."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse

from gateway.batches.schema import BatchesConfig
from gateway.errors import BodyTooLarge, MalformedRequest
from gateway.files.store import FileRecord, FileStore
from gateway.files.upload import Upload, receive
from gateway.request import check_head
from gateway.tenants import Tenant

FORM_ROOM = 64 * 2**10  # what an upload's body may have beside its file
MIN_LIFETIME_SECONDS, MAX_LIFETIME_SECONDS = 3600, 30 * 86_400  # OpenAI's bounds of `expires_after`
_DIGITS = re.compile(r"\d{1,9}")

_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"const": "batch"},
                    "expires_after[anchor]": {"const": "created_at"},
                    "expires_after[seconds]": {
                        "type": "integer",
                        "minimum": MIN_LIFETIME_SECONDS,
                        "maximum": MAX_LIFETIME_SECONDS,
                    },
                },
            }
        }
    },
}
Limit = Annotated[int, Query(ge=1, le=10_000)]
After = Annotated[str | None, Query(max_length=80)]


def add_files(app: FastAPI, who: Any, files: FileStore, config: BatchesConfig, *, idle_seconds: float) -> None:
    """Add the routes. `who` is the dependency that gives the tenant; `idle_seconds` how long an upload may stand still."""

    @app.post(
        "/v1/files", tags=["files"], summary="Upload the input of a batch", openapi_extra={"requestBody": _UPLOAD}
    )
    async def upload(request: Request, tenant: Tenant = who) -> dict[str, Any]:
        check_head(dict(request.scope["headers"]), max_body_bytes=config.max_file + FORM_ROOM)
        with files.writing() as (path, into):
            content_type = request.headers.get("content-type", "").encode("latin-1")
            got = await receive(
                _bounded(request.stream(), config.max_file + FORM_ROOM),
                content_type,
                into,
                max_bytes=config.max_file,
                idle_seconds=idle_seconds,
            )
            into.flush()
            lifetime = _checked(got) or config.file_lifetime_seconds
            record = await files.keep(
                path, tenant=tenant.name, filename=got.filename or "", purpose="batch", lifetime_seconds=lifetime
            )
        return record.as_public()

    @app.get("/v1/files", tags=["files"], summary="This tenant's files")
    async def list_files(
        tenant: Tenant = who,
        purpose: Literal["batch", "batch_output"] | None = None,
        limit: Limit = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: After = None,
    ) -> dict[str, Any]:
        found, more = await files.page(tenant.name, purpose=purpose, limit=limit, after=after, ascending=order == "asc")
        return listed([record.as_public() for record in found], more)

    @app.get("/v1/files/{file_id}", tags=["files"], summary="One file's description")
    async def get_file(file_id: str, tenant: Tenant = who) -> dict[str, Any]:
        return (await files.get(file_id, tenant.name)).as_public()

    @app.get("/v1/files/{file_id}/content", tags=["files"], summary="One file's contents", response_class=FileResponse)
    async def get_content(file_id: str, tenant: Tenant = who) -> FileResponse:
        record: FileRecord = await files.get(file_id, tenant.name)
        return FileResponse(files.path(record.id), media_type="application/octet-stream", filename=record.filename)

    @app.delete("/v1/files/{file_id}", tags=["files"], summary="Remove a file")
    async def delete_file(file_id: str, tenant: Tenant = who) -> dict[str, Any]:
        await files.delete(file_id, tenant.name)
        return {"id": file_id, "object": "file", "deleted": True}


def listed(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """OpenAI's list."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


def _checked(got: Upload) -> int | None:
    """The lifetime that was asked for, if one was; the other fields are checked. Raises MalformedRequest."""
    purpose = got.fields.get("purpose")
    if purpose != "batch":
        raise MalformedRequest(f"The purpose must be `batch`, not {purpose!r}.", param="purpose")
    seconds = got.fields.get("expires_after[seconds]")
    if seconds is None:
        return None
    if got.fields.get("expires_after[anchor]") != "created_at":
        raise MalformedRequest(
            "Files expire by their creation: send expires_after[anchor]=created_at.", param="expires_after"
        )
    lifetime = int(seconds) if _DIGITS.fullmatch(seconds) else 0
    if not MIN_LIFETIME_SECONDS <= lifetime <= MAX_LIFETIME_SECONDS:
        raise MalformedRequest(
            f"expires_after[seconds] must be {MIN_LIFETIME_SECONDS} to {MAX_LIFETIME_SECONDS}.", param="expires_after"
        )
    return lifetime


async def _bounded(pieces: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    """Whatever a form is made of, it is not longer than this."""
    left = max_bytes
    async for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise BodyTooLarge(f"The upload is larger than {max_bytes} bytes (batches.max_file).")
        yield piece
