"""One request's claim: everything it holds of limits, queues and replicas, and its one way out.

Whatever happens to a request, its claim is ended once, by `end`; then its tenant's concurrency, its seat on a replica, its KV tokens and
its place in a queue are free again. Nothing else counts anything up or down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from gateway.admission.estimate import Estimate
from gateway.admission.limits import Gauge, Reservation
from gateway.admission.loads import Load
from gateway.errors import GatewayError
from placement.table import ReplicaRow

if TYPE_CHECKING:
    from gateway.admission.pools import Pool

NONE: frozenset[str] = frozenset()


class Claim(Struct, eq=False):
    """See the module. Made by `Admission.claim`, which says what the fields mean that come from the request.

    A claim waits in its pool's queue while `ticket` is not negative. `since` is when it was made, `deadline` when it is worth nothing
    any more, infinite where nobody said; both on the gateway's clock. `open_ended` is a request that lets its answer be as long as the model can;
    `output_cap` is how many tokens its tenant's limits leave it, where that is less. `seated_at` counts where there is a `load`.
    """

    tenant: str
    model: str
    estimate: Estimate
    gauges: tuple[Gauge, ...]
    since: float
    body_bytes: int = 0
    weight: float = 1.0
    priority: int = 0
    deadline: float = float("inf")
    only: str | None = None
    prefix: int | None = None
    open_ended: bool = False
    output_cap: int | None = None
    avoid: frozenset[str] = NONE
    rather_not: frozenset[str] = NONE
    reservation: Reservation | None = None
    pool: Pool | None = None
    load: Load | None = None
    seated_at: float = 0.0
    charged: float = 0.0
    ticket: int = -1
    syncs: int = 0
    on_placed: Callable[[], None] | None = None
    refusal: GatewayError | None = None

    @property
    def replica(self) -> ReplicaRow | None:
        """Where it is seated."""
        return self.load.row if self.load is not None else None

    def placed(self) -> ReplicaRow:
        """Where its wait led to. Raises the GatewayError that ended it."""
        if self.refusal is not None:
            raise self.refusal
        assert self.load is not None, "asked before `on_placed`"
        return self.load.row

    def wake(self) -> None:
        """Tell whoever waits, once."""
        callback, self.on_placed = self.on_placed, None
        if callback is not None:
            callback()

    def leave(self, now: float, prompt_tokens: int = 0, output_tokens: int = 0, *, complete: bool = False) -> None:
        """Give the seat or the place in the queue back; limits stay reserved, so that another replica may be tried."""
        self.on_placed = None
        if self.pool is not None:
            self.pool.leave(self, now, prompt_tokens, output_tokens, complete=complete)

    def refund(self, now: float) -> None:
        """End it as if it had never come: the request was refused, or failed through no fault of its sender."""
        self.leave(now)
        if self.reservation is not None:
            self.reservation.refund(now)

    def settle(self, now: float, prompt_tokens: int, output_tokens: int, *, complete: bool) -> None:
        """End it with what it has used. `complete`: the engine answered it to its end."""
        self.leave(now, prompt_tokens, output_tokens, complete=complete)
        if self.reservation is not None:
            self.reservation.settle(prompt_tokens + output_tokens, now)
