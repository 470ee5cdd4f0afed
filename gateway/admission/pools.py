"""The replicas that serve one model for one group of tenants, and the queue in front of them.

A pool seats requests where there is room, and lets the others wait in a fair queue. Every seat that is given back, and every change of
the routes, seats as many as fit. The request whose turn it is waits until it fits: no smaller one overtakes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from gateway.admission.affinity import home_of
from gateway.admission.claim import Claim
from gateway.admission.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue
from gateway.admission.loads import Load, choose
from gateway.admission.schema import QueueConfig
from gateway.errors import (
    CapacityError,
    DeadlineTooClose,
    EngineUnreachable,
    GatewayError,
    NoReadyReplica,
    QueueFull,
    QueueTimeout,
)
from model_registry.words import are, counted

_LEARNING = 0.1
_MOST_RETRY_SECONDS = 60.0
_LOOKED_AT = 64
_NEVER = float("inf")


@dataclass(slots=True)
class PoolCounts:
    """Totals since the start."""

    queued: int = 0
    refused: int = 0
    too_late: int = 0


class Pool:
    """See the module. `model` is what clients call it, `tenant` the one it is dedicated to, None for everybody else."""

    def __init__(self, model: str, tenant: str | None, config: QueueConfig) -> None:
        self.model = model
        self.tenant = tenant
        self.config = config
        self.queue: FairQueue[Claim] = FairQueue(ageing_seconds=config.ageing_seconds)
        self.loads: tuple[Load, ...] = ()
        self.not_ready = "it has no replica"
        self.not_ready_seconds = 30.0
        self.wakes = False  # whether requests wait where there is no replica, because they bring one
        self.waiting_tokens = 0
        self.waiting_bytes = 0
        self.hold_seconds = 0.0  # how long a request keeps its seat, on average
        self.counts = PoolCounts()
        self._running: dict[Claim, None] = {}
        self._held_by: dict[str, list[int]] = {}  # tenant -> [requests, bytes] of those that wait
        # Those that only some replicas can take (retries, stored state) stand beside the queue, so that they hold up nobody.
        self._bound: dict[Claim, None] = {}
        self._turn = 0

    # ---- placing

    def place(self, claim: Claim, now: float) -> bool:
        """Seat `claim`, or let it wait: whether it is seated. Raises a CapacityError, or EngineUnreachable if no replica is left to try."""
        claim.pool = self
        able = self._able(claim)
        first = self.queue.first(now) if self._held_by else None
        if first is None or (_is_bound(claim) and self._may_overtake(claim, first)):
            load = self._room_for(claim, able)
            if load is not None:
                self._seat(claim, load, now)
                return True
        self._check_wait(claim, now)
        self._enqueue(claim)
        self.dispatch(now)  # its priority may have made it the first
        return claim.load is not None

    def _able(self, claim: Claim) -> Sequence[Load]:
        """The replicas that `claim` may be given to, with room or without. Raises if there is none."""
        loads: Sequence[Load] = self.loads
        if claim.only is not None:
            loads = [load for load in loads if load.row.replica == claim.only]
        if claim.avoid:
            if loads and not (left := [load for load in loads if load.row.replica not in claim.avoid]):
                raise EngineUnreachable(f"No replica of model {self.model!r} accepts connections at the moment.")
            loads = left if loads else loads
        if not loads and self.wakes and claim.only is None:
            return ()
        if not loads:
            raise NoReadyReplica(
                f"Model {self.model!r} takes no requests at the moment: {self.not_ready}.",
                retry_after_seconds=self.not_ready_seconds,
            )
        if claim.rather_not:
            loads = [load for load in loads if load.row.replica not in claim.rather_not] or loads
        return loads

    def _room_for(self, claim: Claim, able: Sequence[Load]) -> Load | None:
        sequences, kv_tokens = claim.estimate.sequences, claim.estimate.prompt + claim.estimate.output
        if len(able) == 1:
            return able[0] if able[0].has_room(sequences, kv_tokens) else None
        fitting = [load for load in able if load.has_room(sequences, kv_tokens)]
        if not fitting:
            return None
        self._turn += 1
        home = home_of(claim.prefix, able) if claim.prefix is not None else None
        return choose(fitting, self._turn % len(fitting), home)

    def _may_overtake(self, claim: Claim, first: Claim) -> bool:
        """Whether a request that only some replicas can take may be seated before the one whose turn it is."""
        return self.queue.counter(claim.tenant) <= self.queue.counter(first.tenant)

    def _seat(self, claim: Claim, load: Load, now: float) -> None:
        estimate, queue = claim.estimate, self.queue
        load.take(estimate.sequences, estimate.prompt + estimate.output)
        claim.load, claim.seated_at = load, now
        self._running[claim] = None
        output = queue.predicted_output(claim.tenant, estimate.output)
        claim.charged = INPUT_WEIGHT * estimate.prompt + OUTPUT_WEIGHT * output
        queue.charge(claim.tenant, claim.weight, claim.charged)

    # ---- waiting

    def _check_wait(self, claim: Claim, now: float) -> None:
        """Raises QueueFull or DeadlineTooClose. A tenant may fill half of what is free, so that others always find room."""
        config, waiting = self.config, self.waiting
        mine, held = self._held_by.get(claim.tenant, (0, 0))
        if waiting >= config.max_requests or mine >= max(1, config.max_requests - waiting):
            raise self._full(
                claim, f"{counted(mine, 'request')} of yours {'waits' if mine == 1 else 'wait'} already", now
            )
        if waiting and claim.body_bytes + held > config.max_bytes - self.waiting_bytes:
            raise self._full(claim, f"the bodies that wait take {self.waiting_bytes} bytes", now)
        wait = self.expected_wait_seconds(claim.tenant, now) if claim.deadline < _NEVER else 0.0
        if now + wait > claim.deadline:
            self.counts.too_late += 1
            raise DeadlineTooClose(
                f"The request would wait about {wait:.1f} s for model {self.model!r}, and its deadline is in "
                f"{max(0.0, claim.deadline - now):.1f} s; {_waiting(waiting)}.",
                retry_after_seconds=self._retry_seconds(now),
                remedy="Send it with a later deadline, or when less is waiting.",
            )

    def _full(self, claim: Claim, why: str, now: float) -> QueueFull:
        self.counts.refused += 1
        first = self.queue.first(now)
        oldest = now - first.since if first is not None else 0.0
        return QueueFull(
            f"Every replica of model {claim.model!r} is busy and its queue takes no more: {why}; "
            f"{counted(self.waiting, 'request')} {are(self.waiting)} ahead, the next one has waited {oldest:.1f} s.",
            retry_after_seconds=self._retry_seconds(now),
        )

    def expected_wait_seconds(self, tenant: str, now: float) -> float:
        """How long a new request of `tenant` would wait, going by how long requests keep their seats."""
        mine = self._held_by.get(tenant, (0, 0))[0]
        ahead = min(self.waiting, (mine + 1) * max(1, len(self._held_by)))
        return (ahead + 1) * self._turn_seconds(now)

    def _turn_seconds(self, now: float) -> float:
        """How long it takes until the next seat is given back.

        One that is kept for longer than usual is expected to be kept for as long again: requests that ended say nothing of longer
        ones that still run. Of many seats every k-th is looked at.
        """
        if not self._running:
            return self.hold_seconds / max(1, self.seats)
        step = 1 + len(self._running) // _LOOKED_AT
        usual = max(self.hold_seconds, 1e-6)
        looked_at = [1 / max(usual, now - claim.seated_at) for claim in islice(self._running, 0, None, step)]
        return len(looked_at) / sum(looked_at) / len(self._running)

    def _retry_seconds(self, now: float) -> float:
        return min(_MOST_RETRY_SECONDS, max(0.5, self.waiting * self._turn_seconds(now)))

    @property
    def seats(self) -> int:
        """Requests that the ready replicas run at once for this gateway."""
        return sum(max(1, load.seat_share) for load in self.loads)

    def next_ones(self, now: float) -> Iterator[Claim]:
        """Whose turn it is, and those that stand aside."""
        yield from self._bound
        first = self.queue.first(now)
        if first is not None:
            yield first

    @property
    def partial(self) -> bool:
        """Whether other gateways hold room of its replicas."""
        return any(load.partial for load in self.loads)

    def waiting_by_tenant(self) -> dict[str, int]:
        """Requests that wait, by tenant; those of tenants that have none are left out."""
        return {tenant: requests for tenant, (requests, _) in self._held_by.items()}

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self.queue) + len(self._bound)

    def _enqueue(self, claim: Claim) -> None:
        if _is_bound(claim):
            self.queue.lift(claim.tenant)
            self._bound[claim] = None
        else:
            self.queue.push(claim)
        self.counts.queued += 1
        self.waiting_tokens += claim.estimate.likely
        self.waiting_bytes += claim.body_bytes
        mine = self._held_by.setdefault(claim.tenant, [0, 0])
        mine[0] += 1
        mine[1] += claim.body_bytes

    def _dequeue(self, claim: Claim) -> None:
        if claim in self._bound:
            del self._bound[claim]
        else:
            self.queue.remove(claim)
        self.waiting_tokens -= claim.estimate.likely
        self.waiting_bytes -= claim.body_bytes
        mine = self._held_by[claim.tenant]
        mine[0] -= 1
        mine[1] -= claim.body_bytes
        if not mine[0]:
            del self._held_by[claim.tenant]

    # ---- leaving

    def leave(self, claim: Claim, now: float, prompt_tokens: int, output_tokens: int, *, complete: bool) -> None:
        """Take `claim` out of the queue or off its seat, charge what it got, and seat who can be."""
        load, claim.load, claim.pool = claim.load, None, None
        if load is None:
            if claim.ticket >= 0 or claim in self._bound:
                self._dequeue(claim)
                self.dispatch(now)  # it may have been the one that was too large for what is free
            return
        estimate, queue = claim.estimate, self.queue
        load.give(estimate.sequences, estimate.prompt + estimate.output)
        del self._running[claim]
        real = INPUT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
        if real != claim.charged:
            queue.charge(claim.tenant, claim.weight, real - claim.charged)
        if complete:
            held = now - claim.seated_at
            load.served(held, output_tokens)
            self.hold_seconds += (_LEARNING if self.hold_seconds else 1.0) * (held - self.hold_seconds)
            queue.learn(claim.tenant, output_tokens)
        if self._held_by:
            self.dispatch(now)

    def dispatch(self, now: float) -> None:
        """Seat those that wait, in their order, until the next one does not fit."""
        seated = []
        while (claim := self._next(now)) is not None:
            seated.append(claim)
        for claim in seated:
            claim.wake()

    def _next(self, now: float) -> Claim | None:
        """The next one, seated or refused; None if everybody has to wait on."""
        first = self.queue.first(now)
        for claim in self._bound:
            if (first is None or self._may_overtake(claim, first)) and self._try(claim, now):
                return claim
        return first if first is not None and self._try(first, now) else None

    def _try(self, claim: Claim, now: float) -> bool:
        """Seat a waiting claim, or refuse it where nothing can take it any more: whether its wait is over."""
        try:
            load = self._room_for(claim, self._able(claim))
        except GatewayError as error:
            claim.refusal = error
            self._dequeue(claim)
            return True
        if load is None:
            return False
        self._dequeue(claim)
        self._seat(claim, load, now)
        return True

    # ---- the world changes

    def follow(self, loads: tuple[Load, ...], not_ready: str, retry_seconds: float, now: float) -> None:
        """These are the replicas now. Nobody waits for replicas that are not there, unless a request `wakes` them."""
        self.loads, self.not_ready, self.not_ready_seconds = loads, not_ready, retry_seconds
        if self._held_by:
            self.dispatch(now)

    def give_up(self, claim: Claim, now: float) -> CapacityError:
        """`claim` has waited as long as it may: the refusal it gets."""
        waited = now - claim.since
        late = now >= claim.deadline
        what = "its deadline" if late else f"{self.config.max_wait_seconds:g} s, as long as requests may"
        return (DeadlineTooClose if late else QueueTimeout)(
            f"The request waited {waited:.1f} s for a replica of model {self.model!r}, until {what}; {_waiting(self.waiting)}.",
            retry_after_seconds=self._retry_seconds(now),
        )


def _waiting(count: int) -> str:
    return f"{counted(count, 'request')} {are(count)} waiting"


def _is_bound(claim: Claim) -> bool:
    return bool(claim.only is not None or claim.avoid or claim.rather_not)
