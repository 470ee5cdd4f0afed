"""Which batches run: of each tenant the oldest, in one gateway per state directory, for as long as that gateway lives.

The gateway that holds the lock runs them; if it ends, however it ends, the next one goes on. All gateways take new batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from gateway.batches.job import Job, Tools
from gateway.errors import GatewayError
from placement.errors import StateLocked
from placement.locks import exclusive

log = logging.getLogger("sliceway.batches")

LOOK_SECONDS = 1.0
LOCK_SECONDS = 5.0
AGAIN_SECONDS = 5.0  # after a job that the disk or the database ended
SWEEP_SECONDS = 600.0
REMEMBERED_SECONDS = 90 * 86_400.0  # batches that have ended are shown for so long


class Runner:
    """See the module. `start` and `stop` are the gateway's."""

    def __init__(self, tools: Tools, *, lock: Path) -> None:
        self._tools = tools
        self._lock = lock
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._jobs: dict[str, tuple[str, Job, asyncio.Task[None]]] = {}  # by tenant: the batch's id and its job

    def start(self) -> None:
        """Begin to look for batches."""
        self._task = asyncio.create_task(self._live())

    async def stop(self) -> None:
        """End at once; what is under way stays where its journal says, and goes on in the next gateway."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """There is a new batch, or a cancelled one."""
        self._wake.set()

    async def _live(self) -> None:
        with contextlib.ExitStack() as held:
            while True:
                try:
                    lock = exclusive(self._lock, what="runner of batches", remedy="It is another gateway's.")
                    await asyncio.to_thread(held.enter_context, lock)
                    break
                except StateLocked:
                    await asyncio.sleep(LOCK_SECONDS)
            try:
                await self._run()
            finally:
                await self._end_jobs()

    async def _run(self) -> None:
        swept = float("-inf")
        while not self._tools.draining():
            self._wake.clear()
            try:
                if self._tools.wall() - swept >= SWEEP_SECONDS:
                    swept = self._tools.wall()
                    await self._tools.files.sweep()
                    await self._tools.batches.forget(swept - REMEMBERED_SECONDS)
                await self._look()
            except GatewayError as error:
                log.error("batches stand still: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
        await asyncio.gather(*(task for _, _, task in self._jobs.values()), return_exceptions=True)

    async def _look(self) -> None:
        """Take up the oldest batch of every tenant that has none under way, and pass cancellations on."""
        self._jobs = {tenant: job for tenant, job in self._jobs.items() if not job[2].done()}
        for batch in await self._tools.batches.open():
            known = self._jobs.get(batch.tenant)
            if known is None:
                job = Job(batch, self._tools)
                task = asyncio.create_task(self._carry(batch.id, job))
                task.add_done_callback(lambda _: self._wake.set())
                self._jobs[batch.tenant] = batch.id, job, task
            elif known[0] == batch.id and batch.status == "cancelling":
                known[1].cancel()

    async def _carry(self, batch_id: str, job: Job) -> None:
        try:
            await job.run()
        except Exception:
            log.exception("batch %s is interrupted, and taken up again in %g s", batch_id, AGAIN_SECONDS)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _end_jobs(self) -> None:
        tasks = [task for _, _, task in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
