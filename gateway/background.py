"""Responses that run in the background: held and followed here until they end, then charged for what they used.

A response with `background: true` is answered at once and goes on in its engine, whether its client asks for it again or not. So what
it holds (its seat and KV tokens on the replica, its tenant's concurrency and reserved tokens) is held on here, and the engine is asked how it stands
until it has ended, by itself or by a cancel.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

import msgspec

from gateway.admission import Admission, Claim
from gateway.errors import EngineError
from gateway.stats import Stats
from gateway.typed_events import Tokens
from placement.table import ReplicaRow

log = logging.getLogger("sliceway.gateway")

ASK_SECONDS = 0.5
ASK_TIMEOUT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # an engine that says nothing for so long has lost what it ran
MOST_SECONDS = 3600.0  # a response that has not ended by then is charged for all it might use, and followed no longer

_RUNS = frozenset(("queued", "in_progress"))


class Asked(Protocol):
    """The part of `gateway.upstream.Engines` that is needed here."""

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        """Status and body. Raises EngineError."""
        ...


class _Standing(msgspec.Struct, frozen=True):
    status: str
    usage: Tokens | None = None


@dataclass(slots=True)
class _Followed:
    response_id: str
    replica: ReplicaRow
    claim: Claim
    since: float
    heard_at: float


class BackgroundResponses:
    """Every response that this gateway follows. `tick` is to be called every ASK_SECONDS or so, `stop` at the end."""

    def __init__(self, engines: Asked, admission: Admission, stats: Stats) -> None:
        self._engines = engines
        self._admission = admission
        self._stats = stats
        self._followed: dict[str, _Followed] = {}

    def __len__(self) -> int:
        return len(self._followed)

    def follow(self, response_id: str, replica: ReplicaRow, claim: Claim) -> None:
        """Hold `claim` until the response has ended on `replica`, then end it."""
        now = self._admission.now()
        self._followed[response_id] = _Followed(response_id, replica, claim, now, now)

    async def tick(self) -> None:
        """Ask after all of them."""
        await asyncio.gather(*(self._ask(one) for one in list(self._followed.values())))

    def stop(self) -> None:
        """Follow none any longer. What was reserved for them goes on counting in their tenants' windows, as nobody will tell what they use."""
        followed, self._followed = self._followed, {}
        for one in followed.values():
            one.claim.leave(self._admission.now())

    async def _ask(self, one: _Followed) -> None:
        try:
            status, body = await self._engines.get(
                one.replica, f"/v1/responses/{one.response_id}", timeout_seconds=ASK_TIMEOUT_SECONDS
            )
        except EngineError:
            status, body = 0, b""
        now = self._admission.now()
        if status == 404 or (status != 200 and now - one.heard_at >= SILENT_SECONDS):
            self._lost(one, now)
        elif status == 200:
            one.heard_at = now
            self._heard(one, _standing(body), now)
        if one.response_id in self._followed and now - one.since >= MOST_SECONDS:
            log.warning("response %s still runs after %g s; it is followed no longer", one.response_id, MOST_SECONDS)
            estimate = one.claim.estimate
            self._end(one, now, Tokens(estimate.prompt, estimate.output))

    def _heard(self, one: _Followed, standing: _Standing | None, now: float) -> None:
        if standing is None or standing.status in _RUNS:
            return
        if standing.usage is None and standing.status == "failed":
            self._lost(one, now)
        else:  # a cancelled one may tell no usage: its prompt was read
            self._end(one, now, standing.usage or Tokens(one.claim.estimate.prompt, 0))

    def _end(self, one: _Followed, now: float, used: Tokens) -> None:
        del self._followed[one.response_id]
        claim, prompt, output = one.claim, used.input_tokens or 0, used.output_tokens or 0
        self._stats.tokens[claim.model, claim.tenant, "prompt"] += prompt
        self._stats.tokens[claim.model, claim.tenant, "completion"] += output
        claim.settle(now, prompt, output, complete=False)  # how long it took is not known well enough to learn from it

    def _lost(self, one: _Followed, now: float) -> None:
        """The engine has forgotten it, or has gone: it costs nothing, as nobody can have it."""
        del self._followed[one.response_id]
        one.claim.refund(now)


def _standing(body: bytes) -> _Standing | None:
    try:
        return msgspec.json.decode(body, type=_Standing)
    except (msgspec.MsgspecError, RecursionError):
        return None
