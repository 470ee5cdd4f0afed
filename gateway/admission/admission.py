"""Admission: a tenant's limits first, then a replica with room, or a place in a queue.

Everything is in memory and synchronous; the usual request is admitted and seated in a few microseconds. What other processes have
used of the same limits comes in beside the requests (`gateway.admission.sharing`); only a request that would have to be refused for
lack of a share waits for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from gateway.admission.affinity import key_of, prefix_key
from gateway.admission.claim import NONE, Claim
from gateway.admission.domains import owners
from gateway.admission.estimate import TokenRatio, estimate, refers_outside
from gateway.admission.limits import Gauge, Limits, Need
from gateway.admission.loads import Loads
from gateway.admission.pools import Pool
from gateway.admission.schema import QueueConfig, TenantLimits
from gateway.errors import GatewayError, RateLimited
from gateway.routes import ModelRoute, Routes
from placement.table import ModelRow, ReplicaRow

LEAST_ANSWER_TOKENS = 128  # an answer is not cut shorter than this to make it fit into a limit
SYNCS_TO_WAIT = (
    8  # how often the store is asked for a share before a request is refused: others hear of it within a second
)


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """What a reload replaces. `dedicated` are the tenants with replicas of their own: model -> tenants, in order.

    `waking` are the models that sleep without requests: their requests wait for a replica to come, instead of being refused.
    `named` are those whose replicas say in their names whose they are. `planned`: so do all of them, once they are there.
    """

    limits: Mapping[str, TenantLimits] = field(default_factory=dict)
    dedicated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    queue: QueueConfig = field(default_factory=QueueConfig)
    waking: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()
    planned: bool = False


class Ask(Struct, frozen=True):
    """A request as admission sees it. `raw` is its body; `deadline` is on the gateway's clock.

    Of a large body there is its length, `large_bytes`, and `raw` is the beginning of its prompt (`affinity.beginning_of`).
    """

    tenant: str
    model: str
    raw: bytes
    weight: float = 1.0
    priority: int = 0
    max_tokens: Any = None
    sequences: int = 1
    generates: bool = True
    is_completion: bool = False
    deadline: float = float("inf")
    only: str | None = None
    large_bytes: int = 0


class Admission:
    """Limits, pools and loads of one gateway process. To be used by one thread."""

    def __init__(
        self,
        routes: Callable[[], Routes],
        loads: Loads,
        clock: Callable[[], float],
        policy: AdmissionPolicy | None = None,
    ) -> None:
        self._routes = routes
        self._clock = clock
        self._policy = policy or AdmissionPolicy()
        self._pools: dict[tuple[str, str | None], Pool] = {}
        self._ratios: dict[str, TokenRatio] = {}
        self._adopted: Routes | None = None
        self._joining: set[tuple[str, str]] = set()  # (model, tenant) whose own replicas are still to come
        self._short: list[Claim] = []
        self.loads = loads
        self.limits = Limits(self._policy.limits)
        self.shared = False  # whether other processes may hold shares of the limits
        self.shares_until = float("inf")  # after this, the store may have given this process's shares to others
        self.ask_store: Callable[[], None] = lambda: None
        self.shares_lapsed: Callable[[], None] = lambda: None
        self.ask_room: Callable[[], None] = lambda: None  # other gateways may have room left on a replica

    # ---- requests

    def claim(self, ask: Ask, route: ModelRoute, now: float) -> Claim:
        """A claim for one request; it holds nothing yet."""
        raw, gauges = ask.raw, self.limits.of(ask.tenant, ask.model)
        body_bytes = ask.large_bytes or len(raw)
        size = estimate(
            body_bytes,
            self.ratio(ask.model),
            max_tokens=ask.max_tokens,
            max_model_len=route.card.max_model_len,
            sequences=ask.sequences,
            generates=ask.generates,
            is_completion=ask.is_completion,
            by_reference=bool(gauges) and (ask.large_bytes > 0 or refers_outside(raw)),
        )
        claim = Claim(
            ask.tenant,
            ask.model,
            size,
            gauges,
            now,
            body_bytes=body_bytes,
            weight=ask.weight,
            priority=ask.priority,
            deadline=ask.deadline,
            only=ask.only,
            prefix=(key_of if ask.large_bytes else prefix_key)(ask.tenant, raw) if len(route.ready) > 1 else None,
        )
        claim.open_ended = ask.max_tokens is None and ask.generates and not ask.is_completion
        return claim

    def place(
        self,
        claim: Claim,
        on_placed: Callable[[], None],
        now: float,
        avoid: frozenset[str] = NONE,
        rather_not: frozenset[str] = NONE,
    ) -> ReplicaRow | None:
        """Seat `claim`: its replica, or None if it has to wait, after which `on_placed` is called once and `claim.placed` tells.

        Raises RateLimited (nothing is held then), or CapacityError or EngineUnreachable (limits stay reserved until the claim is ended).
        """
        if self._routes() is not self._adopted:
            self.follow_routes()
        claim.avoid, claim.rather_not, claim.refusal = avoid, rather_not, None
        if claim.gauges and claim.reservation is None:
            if now > self.shares_until:
                self.shares_lapsed()
            try:
                self._reserve(claim, now)
            except RateLimited as refusal:
                if self._wait_for_share(claim, refusal):
                    claim.on_placed = on_placed
                    return None
                raise
        pool = self.pool(claim.model, claim.tenant)
        if pool.place(claim, now):
            return claim.load.row  # type: ignore[union-attr]
        claim.on_placed = on_placed
        if self.loads.shared and pool.partial:
            self.ask_room()
        return None

    def abandon(self, claim: Claim) -> None:
        """`claim` waits for a share no longer."""
        if claim.syncs and claim.reservation is None and claim in self._short:
            self._short.remove(claim)

    def _reserve(self, claim: Claim, now: float) -> None:
        size = claim.estimate
        least = size.output
        if claim.open_ended:
            least = min(least, LEAST_ANSWER_TOKENS * size.sequences)
        need = Need(size.prompt_bound + size.output, size.prompt + least)
        claim.reservation = reservation = self.limits.reserve(claim.gauges, need, now)
        if claim.open_ended and (tokens := reservation.tokens) is not None and tokens < need.bound:
            claim.output_cap = max(1, (tokens - size.prompt) // size.sequences)

    def _wait_for_share(self, claim: Claim, refusal: RateLimited) -> bool:
        """Let it wait for the store's next answer, if other processes may have something left of what is missing."""
        gauge = refusal.gauge
        if self.shared and isinstance(gauge, Gauge) and gauge.spare and claim.syncs < SYNCS_TO_WAIT:
            claim.syncs += 1
            self._short.append(claim)
            if claim.syncs == 1:  # later ones wait for what the others give back at their next round
                self.ask_store()
            return True
        self.limits.count_refusal(claim.tenant, claim.model, refusal.limit)
        return False

    def shares_came(self) -> None:
        """The store has answered: those that waited for it go on, in the order they came."""
        now = self._clock()
        short, self._short = self._short, []
        for claim in short:
            callback = claim.on_placed or _nothing
            claim.on_placed = None
            try:
                placed = self.place(claim, callback, now, claim.avoid, claim.rather_not)
            except GatewayError as error:
                claim.refusal = error
                callback()
            else:
                if placed is not None:
                    callback()

    def ratio(self, model: str) -> TokenRatio:
        """Tokens per byte of the bodies that `model` gets."""
        ratio = self._ratios.get(model)
        if ratio is None:
            ratio = self._ratios[model] = TokenRatio()
        return ratio

    # ---- the world

    def now(self) -> float:
        """The clock's time."""
        return self._clock()

    def pool(self, model: str, tenant: str) -> Pool:
        """The pool that requests of `tenant` to `model` go to."""
        own = tenant in self._policy.dedicated.get(model, ()) and (model, tenant) not in self._joining
        return self._pool_at((model, tenant if own else None))

    def wakes(self, model: str, route: ModelRoute) -> bool:
        """Whether a request wakes `model`: it sleeps without them, and its engines have not all failed."""
        return model in self._policy.waking and not route.failed

    def _pool_at(self, key: tuple[str, str | None]) -> Pool:
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(*key, self._policy.queue)
        return pool

    def pools(self) -> tuple[Pool, ...]:
        """Every pool there is."""
        return tuple(self._pools.values())

    def tick(self) -> None:
        """Time has passed, which changes whose turn it is: to be called a few times a second."""
        now = self._clock()
        for pool in self._pools.values():
            if pool.waiting:
                pool.dispatch(now)

    def configure(self, policy: AdmissionPolicy) -> None:
        """Take another policy; what is held and what waits stays."""
        fresh = _dedicated_pairs(policy) - _dedicated_pairs(self._policy)
        self._joining = (self._joining | fresh) & _dedicated_pairs(policy) if policy.planned else set()
        self._policy = policy
        self.limits.configure(policy.limits)
        for pool in self._pools.values():
            pool.config = policy.queue
            pool.queue.ageing_seconds = policy.queue.ageing_seconds
        self._adopted = None
        self.follow_routes()
        self.ask_store()

    def _dedicated(self, name: str, model: ModelRoute) -> tuple[str, ...]:
        """The tenants with replicas of their own. In a planned fleet one that becomes such a tenant while requests run stays
        with all others until the first replica of its own serves: it is refused at no moment of the change.
        """
        told = self._policy.dedicated.get(name, ())
        if self._joining:
            on_gpu = any(row.slice.kind in _PLANNED_KINDS for row in model.replicas)
            stems = {row.replica.rpartition("-")[0] for row in model.ready}
            self._joining -= {(name, tenant) for tenant in told if not on_gpu or f"{name}@{tenant}" in stems}
        return tuple(tenant for tenant in told if (name, tenant) not in self._joining)

    def follow_routes(self) -> None:
        """Take over the routes of this moment, and seat whom they have room for."""
        routes, now = self._routes(), self._clock()
        self._adopted = routes
        shares: dict[tuple[str, str | None], tuple[ReplicaRow, ...]] = {}
        for name, model in routes.models.items():
            dedicated = self._dedicated(name, model)
            owner = owners((row.replica for row in model.replicas), dedicated, named=name in self._policy.named)
            for key in {(name, None), *((name, tenant) for tenant in dedicated)}:
                shares[key] = tuple(row for row in model.ready if owner.get(row.replica) == key[1])
        for key in shares.keys() | self._pools.keys():
            pool = self._pool_at(key)
            route = routes.models.get(key[0], _NO_ROUTE)
            loads = tuple(self.loads.of(row) for row in shares.get(key, ()))
            for load in loads:
                load.trial = load.row.replica in routes.on_trial
            pool.wakes = self.wakes(key[0], route)
            pool.follow(loads, route.why_not_ready(), route.retry_after_seconds(), now)
            if self.loads.shared and pool.partial:
                self.ask_room()
        self.loads.retain(row.replica for row in routes.replicas())
        for key in [key for key in self._pools if key[0] not in routes.models and not self._pools[key].waiting]:
            del self._pools[key]


def _nothing() -> None:
    """Nobody waits."""


def _dedicated_pairs(policy: AdmissionPolicy) -> set[tuple[str, str]]:
    return {(model, tenant) for model, tenants in policy.dedicated.items() for tenant in tenants}


_PLANNED_KINDS = ("mig", "gpu")

_NO_ROUTE = ModelRoute(card=ModelRow(name=""))
