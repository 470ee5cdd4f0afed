"""The console's routes, on the gateway's public listener: a page without secrets, and its data for who has the admin key."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from gateway.admin.access import Access
from gateway.console.state import console_state
from gateway.errors import UnknownPath
from model_registry.errors import SlicewayError
from placement.state import StatePaths
from placement.status import running_status
from placement.table import ReplicaRow
from placement.transition.journal import JOURNAL_FILE, Record, TransitionJournal

_TYPES = {"console.html": "text/html", "console.css": "text/css", "console.js": "text/javascript"}
# Nothing from elsewhere, nothing inline, and no frame around it: a page that is given keys runs only our own script.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Backstage(Protocol):
    """What the console shows of the running gateway."""

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests can be served, and why not."""
        ...

    async def slices(self) -> list[dict[str, Any]]:
        """The list of `/slices`."""
        ...

    def limits_in_force(self) -> list[dict[str, Any]]:
        """Every limit with what is used of it, and since when it refuses."""
        ...

    def replicas(self) -> list[ReplicaRow]:
        """Every replica at this moment."""
        ...


def add_console(app: FastAPI, backstage: Backstage, access: Callable[[], Access], state: Path) -> None:
    """Add `/console` to `app`. `access` is asked at every request; `state` is the state directory."""

    @app.get("/console", tags=["console"], summary="The operators' page", response_class=Response)
    async def page() -> Response:
        # The page names the file with the key, which is made when the key is first asked for. What goes wrong there, the data tells.
        with suppress(SlicewayError, OSError):
            await run_in_threadpool(access)
        return _asset("console.html")

    @app.get(
        "/console/state",
        tags=["console"],
        summary="What the page shows; asks for the admin key",
        responses={401: {"description": "No admin key, or a wrong one"}},
    )
    async def data(request: Request) -> Response:
        allowed = await run_in_threadpool(access)
        allowed.actor(request.headers.get("authorization"), None)
        _, readiness = backstage.readiness()
        reasons = {row.replica: row.reason for row in backstage.replicas()}
        under_way = await run_in_threadpool(_transition, state)
        controller = await run_in_threadpool(running_status, StatePaths(state))
        shown = console_state(
            await backstage.slices(), readiness, backstage.limits_in_force(), reasons, under_way, controller
        )
        return Response(
            msgspec.json.encode(shown), media_type="application/json", headers={"cache-control": "no-store"}
        )

    @app.get(
        "/console/{asset}",
        tags=["console"],
        summary="The page's script and style",
        response_class=Response,
        responses={404: {"description": "No such file"}},
    )
    async def asset(asset: str) -> Response:
        return _asset(asset)


def _asset(name: str) -> Response:
    if name not in _TYPES:
        raise UnknownPath(f"There is no /console/{name[:100]} here.")
    content = (files("gateway.console") / "static" / name).read_bytes()
    return Response(content, media_type=f"{_TYPES[name]}; charset=utf-8", headers=_HEADERS)


def _transition(state: Path) -> Record | None:
    """What is under way; a record that makes no sense is the command line's to complain of."""
    try:
        return TransitionJournal(state / JOURNAL_FILE).read()
    except SlicewayError:
        return None
