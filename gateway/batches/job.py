"""One batch from its first line to its files. It may be interrupted anywhere, and a later job goes on where it was."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from gateway.batches.capacity import Gate
from gateway.batches.inprocess import Reply
from gateway.batches.lines import Input, Place, Request, read, scan
from gateway.batches.record import Batch, Counts, LineError, Status
from gateway.batches.results import Answer, Results
from gateway.batches.schema import BatchesConfig
from gateway.batches.store import BatchStore
from gateway.files.store import FileStore, new_file_id
from gateway.keys import WallClock
from gateway.request import parse_body
from gateway.surface import ROUTES, Route
from gateway.tenants import Tenant

log = logging.getLogger("sliceway.batches")

ROOM_SECONDS = 0.1  # how soon a request that found no room asks again
WAIT_SECONDS = 5.0  # after a refusal for load that says no time of its own
MAX_WAIT_SECONDS = 60.0
_BUSY = frozenset((429, 503))  # nothing is wrong with the request
_FAILED = frozenset((408, 500, 502, 504))  # it may go better next time


class Caller(Protocol):
    """Sends one request; `gateway.batches.inprocess.InProcess`."""

    async def post(self, route: Route, tenant: Tenant, request_id: str, body: bytes) -> Reply:
        """The whole answer."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What every job works with. `pause` waits; `tenant` finds who a name belongs to; `draining` is true once the gateway stops."""

    files: FileStore
    batches: BatchStore
    caller: Caller
    gate: Gate
    tenant: Callable[[str], Tenant | None]
    config: BatchesConfig
    max_line_bytes: int
    work: Path
    wall: WallClock
    draining: Callable[[], bool]
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep


class _Stopped(Exception):
    """The batch takes up no further requests: it was cancelled, has expired, or the gateway stops."""


class Job:
    """See the module. `cancel` may be called at any time."""

    def __init__(self, batch: Batch, tools: Tools) -> None:
        self._batch = batch
        self._tools = tools
        self._results = Results(tools.work / batch.id)
        self._pending: list[Answer] = []
        self._writing = asyncio.Lock()
        self._cancelled = False
        self._done: set[str] = set()
        self._counts = batch.counts

    def cancel(self) -> None:
        """Take up no further requests; what is under way ends by itself."""
        self._cancelled = True

    async def run(self) -> None:
        """Carry the batch as far as it goes: to its end, or until the gateway stops. Raises StorageError, OSError: try again later."""
        if self._batch.status == "validating":
            await self._validate()
        if self._batch.status in ("in_progress", "cancelling"):
            await self._answer_all()
        if self._batch.status == "finalizing":
            await self._finalize()

    # ---- before

    async def _validate(self) -> None:
        found = await self._scan()
        now = self._tools.wall()
        if found.errors:
            await self._change(lambda batch: _unless_cancelled(batch, "failed", now, errors=found.errors))
            return
        counts = Counts(total=len(found.places))
        await self._change(lambda batch: _unless_cancelled(batch, "in_progress", now, counts=counts))

    async def _scan(self) -> Input:
        """The lines of the input file; one that is gone has an error and no lines."""
        path = self._tools.files.path(self._batch.input_file_id)
        try:
            return await asyncio.to_thread(
                scan,
                path,
                url=self._batch.endpoint,
                max_requests=self._tools.config.max_requests,
                max_line_bytes=self._tools.max_line_bytes,
            )
        except FileNotFoundError:
            gone = LineError("input_file_not_found", f"The input file {self._batch.input_file_id!r} is gone.")
            return Input((), (gone,))

    async def _change(self, change: Callable[[Batch], Batch]) -> None:
        self._batch = await self._tools.batches.change(self._batch.id, self._batch.tenant, change)

    # ---- the requests

    async def _answer_all(self) -> None:
        answered, failed = await asyncio.to_thread(self._results.resume)
        self._done = answered | failed
        self._cancelled = self._cancelled or self._batch.status == "cancelling"
        found = await self._scan()
        self._counts = Counts(max(self._batch.counts.total, len(found.places)), len(answered), len(failed))
        outcome: Status = "completed"
        if found.errors:
            outcome = "failed"
        elif (tenant := self._tools.tenant(self._batch.tenant)) is None:
            outcome, found = "failed", Input(found.places, (LineError("tenant_unknown", "The tenant is gone."),))
        else:
            try:
                await self._dispatch([place for place in found.places if place.custom_id not in self._done], tenant)
            except _Stopped:
                if self._tools.draining():
                    return
                outcome = "cancelled" if self._cancelled else "expired"
        await self._give_up([place for place in found.places if place.custom_id not in self._done], outcome)
        await self._begin_finalizing(outcome, found.errors)

    async def _dispatch(self, places: list[Place], tenant: Tenant) -> None:
        """Have every request answered. Raises _Stopped once those that were under way have ended."""
        in_hand = asyncio.Semaphore(2 * self._tools.config.max_concurrent)  # waiting for room or for their next attempt
        tasks: set[asyncio.Task[None]] = set()
        try:
            for place in places:
                await in_hand.acquire()
                self._check()
                _raise_first(tasks)
                request = await asyncio.to_thread(read, self._input, place)
                task = asyncio.create_task(self._answer(request, tenant))
                tasks.add(task)
                task.add_done_callback(lambda _: in_hand.release())
            await _all(tasks)
        except _Stopped:
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    @property
    def _input(self) -> Path:
        return self._tools.files.path(self._batch.input_file_id)

    async def _answer(self, request: Request, tenant: Tenant) -> None:
        """One request, again and again until it has an answer to keep. Raises _Stopped."""
        route = ROUTES[self._batch.endpoint]
        model = tenant.resolve(parse_body(bytes(request.body)).model or "")
        failures = 0
        while True:
            await self._enter(model, tenant.name)
            request_id = f"req_{secrets.token_hex(12)}"
            try:
                reply = await self._tools.caller.post(route, tenant, request_id, bytes(request.body))
            finally:
                self._tools.gate.leave(model)
            failures += reply.status in _FAILED
            if reply.status not in _BUSY and (reply.status not in _FAILED or failures >= self._tools.config.attempts):
                await self._record(Answer(request.custom_id, request_id, reply.status, reply.body))
                return
            self._check()
            wait = WAIT_SECONDS if reply.retry_after_seconds is None else reply.retry_after_seconds
            await self._pause(min(wait * 2 ** max(0, failures - 1), MAX_WAIT_SECONDS))

    async def _enter(self, model: str, tenant: str) -> None:
        """Wait until the model's replicas have room that nobody else wants."""
        self._check()
        while not self._tools.gate.try_enter(model, tenant):
            await self._tools.pause(ROOM_SECONDS)
            self._check()

    async def _pause(self, seconds: float) -> None:
        """Wait, in pieces, so that a stop is noticed."""
        until = self._tools.wall() + seconds
        while (left := until - self._tools.wall()) > 0:
            await self._tools.pause(min(left, 1.0))
            self._check()

    def _check(self) -> None:
        if self._cancelled or self._tools.draining() or self._tools.wall() >= self._batch.expires_at:
            raise _Stopped

    async def _record(self, answer: Answer) -> None:
        """Have it on disk, together with what else came meanwhile."""
        self._pending.append(answer)
        async with self._writing:
            if not self._pending:
                return  # the one before has written it
            answers, self._pending = self._pending, []
            await _to_its_end(self._results.append, answers)
            self._done |= {a.custom_id for a in answers}
            good = sum(a.good for a in answers)
            counts = self._counts
            self._counts = replace(
                counts, completed=counts.completed + good, failed=counts.failed + len(answers) - good
            )
            await self._change(lambda batch: replace(batch, counts=self._counts))

    # ---- after

    async def _give_up(self, places: list[Place], outcome: Status) -> None:
        """Write down that these requests were never answered."""
        if outcome == "completed" or not places:
            return
        error = (
            f"batch_{outcome}",
            f"The batch {'was' if outcome == 'cancelled' else 'has'} {outcome} before this request was answered.",
        )
        answers = [Answer(place.custom_id, secrets.token_hex(12), None, error=error) for place in places]
        await _to_its_end(self._results.append, answers)
        self._counts = replace(self._counts, failed=self._counts.failed + len(answers))

    async def _begin_finalizing(self, outcome: Status, errors: tuple[LineError, ...]) -> None:
        """Name the files before they are moved, so that whoever comes after a crash moves them to the same names."""
        output = new_file_id() if self._results.output.exists() else None
        failures = new_file_id() if self._results.errors.exists() else None
        now = self._tools.wall()
        await self._change(
            lambda batch: replace(
                batch.moved("finalizing", now),
                outcome=outcome,
                output_file_id=output,
                error_file_id=failures,
                counts=self._counts,
                errors=errors,
            )
        )

    async def _finalize(self) -> None:
        for file_id, path, name in (
            (self._batch.output_file_id, self._results.output, "output"),
            (self._batch.error_file_id, self._results.errors, "error"),
        ):
            if file_id is not None:
                await self._tools.files.adopt(
                    file_id,
                    path,
                    tenant=self._batch.tenant,
                    filename=f"{self._batch.id}_{name}.jsonl",
                    purpose="batch_output",
                    lifetime_seconds=self._batch.output_lifetime_seconds or self._tools.config.file_lifetime_seconds,
                )
        now = self._tools.wall()
        await self._change(lambda batch: batch.moved(batch.outcome or "completed", now, outcome=None))
        await asyncio.to_thread(self._results.remove)
        log.info("batch %s of tenant %s %s", self._batch.id, self._batch.tenant, self._batch.status)


def _unless_cancelled(batch: Batch, status: Status, now: float, **fields: object) -> Batch:
    """The next state, unless a cancellation came first: that one goes on from there."""
    return replace(batch, **fields) if batch.status == "cancelling" else batch.moved(status, now, **fields)


async def _to_its_end(write: Callable[[list[Answer]], None], answers: list[Answer]) -> None:
    """Write in a thread. Whoever cancels this waits for it: nothing may still be written when the next job reads."""
    writing = asyncio.create_task(asyncio.to_thread(write, answers))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


def _raise_first(tasks: set[asyncio.Task[None]]) -> None:
    """Forget the tasks that ended well; raise what ended another."""
    for task in [t for t in tasks if t.done()]:
        tasks.discard(task)
        task.result()


async def _all(tasks: set[asyncio.Task[None]]) -> None:
    while tasks:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        _raise_first(tasks)
