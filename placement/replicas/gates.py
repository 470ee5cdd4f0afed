"""Which engines may start at the same time.

Engines on one GPU start one after another: each measures free memory and expects it not to change under it (vLLM's memory
profiling asserts that). Engines on different GPUs start side by side, as many as the host's cores bear. And where a
compilation cache is empty the first engine fills it alone, so that the others load instead of compiling the same again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from placement.slices import Slice

_FILLED = ".filled"
_LEAST_AT_ONCE = 2
_CORES_PER_START = 4

Say = Callable[[str], None]
"""Tells people what is waited for."""


class StartGates:
    """The gates of one controller. All waiting is first come, first served."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._gpus: dict[str, asyncio.Lock] = {}
        self._caches: dict[Path, asyncio.Lock] = {}
        self._starting = 0
        self._room = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def turn(self, target: Slice, cache: Path | None, say: Say) -> AsyncIterator[None]:
        """Hold it from an engine's start until it is ready or has ended.

        The order of the three waits is the same for everyone, so none waits for another in a circle.
        """
        async with contextlib.AsyncExitStack() as held:
            if target.gpu is not None:
                lock = self._gpus.setdefault(target.gpu.uuid, asyncio.Lock())
                await _enter(held, lock, say, "waiting for another engine to start on this GPU")
            if cache is not None and not is_filled(cache):
                filling = self._caches.setdefault(cache, asyncio.Lock())
                mine = await held.enter_async_context(contextlib.AsyncExitStack())
                await _enter(mine, filling, say, "waiting for an engine that fills the compilation cache")
                if is_filled(cache):
                    await mine.aclose()
            if target.gpu is not None:
                await held.enter_async_context(self._one_of_many(say))
            yield

    @contextlib.asynccontextmanager
    async def _one_of_many(self, say: Say) -> AsyncIterator[None]:
        async with self._room:
            if self._starting >= self.at_once:
                say(f"waiting, {self._starting} engines are starting on this machine")
            await self._room.wait_for(lambda: self._starting < self.at_once)
            self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1
            async with self._room:
                self._room.notify_all()


def starts_at_once(cores: int) -> int:
    """How many engines may start side by side on GPUs: each reads weights, compiles and warms up on several cores."""
    return max(_LEAST_AT_ONCE, cores // _CORES_PER_START)


def is_filled(cache: Path) -> bool:
    """Whether an engine has become ready with this cache."""
    return (cache / _FILLED).exists()


def mark_filled(cache: Path) -> None:
    """Note that an engine has become ready with this cache. A disk that refuses costs later starts their speed, no more."""
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        (cache / _FILLED).touch()


async def _enter(held: contextlib.AsyncExitStack, lock: asyncio.Lock, say: Say, waiting: str) -> None:
    if lock.locked():
        say(waiting)
    await held.enter_async_context(lock)
