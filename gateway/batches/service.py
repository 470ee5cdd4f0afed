"""Files and batches as a whole: what the wiring makes, starts and stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from gateway.batches.api import add_batches
from gateway.batches.capacity import Gate, IdleCapacity, Standing
from gateway.batches.inprocess import AsgiApp, InProcess
from gateway.batches.job import Tools
from gateway.batches.runner import Runner
from gateway.batches.schema import BatchesConfig
from gateway.batches.store import BatchStore
from gateway.files.api import add_files
from gateway.files.database import Database
from gateway.files.store import FileStore
from gateway.keys import WallClock
from gateway.tenants import Tenant
from placement.state import StatePaths


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What batches need of the gateway. `standing` tells how busy a model's replicas are for a tenant; None if there is no such model."""

    relay: AsgiApp
    standing: Callable[[str, str], Standing | None]
    tenant: Callable[[str], Tenant | None]
    draining: Callable[[], bool]
    wall: WallClock
    max_body: int
    body_timeout_seconds: float


class BatchService:
    """See the module. Nothing is opened or made on disk before the first request, or `start`."""

    def __init__(self, config: BatchesConfig, state: StatePaths, around: Surroundings) -> None:
        self._config = config
        self._around = around
        self._database = Database(state.objects)
        self.files = FileStore(
            state.files, self._database, around.wall, max_bytes_per_tenant=config.max_kept_per_tenant
        )
        self.batches = BatchStore(self._database)
        capacity = IdleCapacity(around.standing, reserve_ratio=config.reserve_ratio)
        self.gate = Gate(capacity.room, max_concurrent=config.max_concurrent)
        tools = Tools(
            files=self.files,
            batches=self.batches,
            caller=InProcess(around.relay),
            gate=self.gate,
            tenant=around.tenant,
            config=config,
            max_line_bytes=around.max_body,
            work=state.batches,
            wall=around.wall,
            draining=around.draining,
        )
        self.runner = Runner(tools, lock=state.batches_lock)

    def add_to(self, app: FastAPI, who: Any) -> None:
        """Add the routes; `who` is the dependency that gives the tenant."""
        add_files(app, who, self.files, self._config, idle_seconds=self._around.body_timeout_seconds)
        add_batches(
            app,
            who,
            self.batches,
            self.files,
            self.runner,
            self._around.wall,
            idle_seconds=self._around.body_timeout_seconds,
        )

    async def start(self) -> None:
        """Begin to run batches."""
        self.runner.start()

    async def stop(self) -> None:
        """End; what is under way goes on after the next start."""
        await self.runner.stop()
        await self._database.close()
