"""The orderly end of an engine: let requests finish, ask it to stop, and kill what does not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from placement.clock import Clock
from placement.replicas.parts import Prober, Process
from placement.schema import EngineConfig

POLL_SECONDS = 0.5
NEWS_SECONDS = 0.75
"""Gateways look at the table four times a second; after this they send nothing new to what is no longer in it."""
_STARTING_STOP_SECONDS = 5.0


async def end_process(process: Process, probe: Prober, config: EngineConfig, clock: Clock, *, serving: bool) -> None:
    """Drain, ask to stop, and kill what does not; returns when all of it has ended.

    Requests get `drain_timeout_seconds` to finish and the engine then `stop_timeout_seconds` to end itself.
    """
    if serving:
        await first_of(clock.sleep(NEWS_SECONDS), process.wait())
        drained = await drain(process, probe, config.drain_timeout_seconds, clock)
    else:
        drained = True
    process.terminate()
    patience = config.stop_timeout_seconds if serving else min(config.stop_timeout_seconds, _STARTING_STOP_SECONDS)
    # An engine that does not tell what it runs drains by itself after it was asked to stop.
    patience += config.drain_timeout_seconds if drained is None else 0.0
    await first_of(clock.sleep(patience), process.wait())
    if not process.ended:
        process.kill()
        await process.wait()


async def drain(process: Process, probe: Prober, seconds: float, clock: Clock) -> bool | None:
    """Whether every request has finished in time; None where the engine does not tell."""
    deadline = clock.monotonic() + seconds
    while not process.ended:
        activity = await probe.activity(timeout_seconds=2.0)
        if activity is None:
            return None
        if activity.running + activity.waiting == 0:
            return True
        if clock.monotonic() >= deadline:
            return False
        await first_of(clock.sleep(POLL_SECONDS), process.wait())
    return True


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when the first of these coroutines has; the others are cancelled. What the first one raises is raised."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def all_of(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Return when all of these have ended; those that somebody gave up meanwhile have. What one raises is raised."""
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
