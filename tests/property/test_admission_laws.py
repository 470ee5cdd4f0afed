"""Admission as a whole: no replica ever has more than fits, nobody is forgotten, and nothing is left when all have gone."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.admission import Admission, AdmissionPolicy, Ask, Claim, Loads, QueueConfig, RateLimits, TenantLimits
from gateway.errors import GatewayError
from gateway.routes import Routes, build_routes
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

SEATS, KV_TOKENS = 3, 900


def row(number: int, state: ReplicaState) -> ReplicaRow:
    return ReplicaRow(
        replica=f"m@{number}",
        model="m",
        engine_model="m",
        endpoint=f"unix:/{number}",
        slice=SliceRow(id=f"s{number}", kind="cpu"),
        state=state,
        max_num_seqs=SEATS,
        kv_cache_tokens=KV_TOKENS,
    )


class Storm(RuleBasedStateMachine):
    """Requests of several tenants, one of them dedicated, while replicas come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.states = [ReplicaState.READY] * 3
        self.routes = self.built()
        self.woken: list[Claim] = []
        self.claims: list[Claim] = []
        policy = AdmissionPolicy(
            limits={"a": TenantLimits(max_concurrent=6, models={"m": RateLimits(tokens_per_minute=20_000)})},
            dedicated={"m": ("own",)},
            queue=QueueConfig(max_requests=8, ageing_seconds=5),
        )
        self.loads = Loads(bound=64)
        self.admission = Admission(lambda: self.routes, self.loads, lambda: self.now, policy)

    def built(self) -> Routes:
        rows = tuple(row(number, state) for number, state in enumerate(self.states))
        table = RoutingTable(generation=1, models=(ModelRow(name="m", max_model_len=512),), replicas=rows)
        return build_routes(table, (), {})

    @rule(
        tenant=st.sampled_from(["a", "b", "own"]),
        size=st.integers(1, 600),
        max_tokens=st.sampled_from([None, 1, 40, 400]),
        sequences=st.integers(1, 2),
        priority=st.integers(-2, 2),
        deadline=st.sampled_from([0.0, 3.0, float("inf")]),
        only=st.sampled_from([None, None, "m@1", "m@2"]),
    )
    def come(self, tenant: str, size: int, only: str | None, deadline: float, **rest: Any) -> None:
        ask = Ask(tenant, "m", b"x" * size, deadline=self.now + deadline, only=only, **rest)
        claim = self.admission.claim(ask, self.routes.models["m"], self.now)
        self.place(claim)

    def place(self, claim: Claim, avoid: frozenset[str] = frozenset()) -> None:
        try:
            seated = self.admission.place(claim, lambda: self.woken.append(claim), self.now, avoid)
        except GatewayError:
            claim.refund(self.now)
            return
        assert (seated is None) == (claim.load is None)
        if claim not in self.claims:
            self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(pick=st.integers(0, 99), complete=st.booleans(), tokens=st.integers(0, 50))
    def end(self, pick: int, complete: bool, tokens: int) -> None:
        claim = self.claims.pop(pick % len(self.claims))
        if complete:
            claim.settle(self.now, claim.estimate.prompt, tokens, complete=True)
        claim.refund(self.now)
        claim.refund(self.now)

    @precondition(lambda self: any(claim.load for claim in self.claims))
    @rule(pick=st.integers(0, 99))
    def try_another(self, pick: int) -> None:
        seated = [claim for claim in self.claims if claim.load]
        claim = seated[pick % len(seated)]
        assert claim.load is not None
        refused = claim.load.row.replica
        claim.leave(self.now)
        self.claims.remove(claim)
        self.place(claim, frozenset({refused}))

    @rule(number=st.integers(0, 2), state=st.sampled_from([ReplicaState.READY, ReplicaState.DRAINING]))
    def change(self, number: int, state: ReplicaState) -> None:
        self.states[number] = state
        self.routes = self.built()
        self.admission.follow_routes()

    @rule(seconds=st.sampled_from([0.1, 2.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.admission.tick()

    @invariant()
    def the_woken_know_why(self) -> None:
        for claim in self.woken:
            assert (claim.load is None) != (claim.refusal is None)
            assert claim.ticket < 0
            if claim.refusal is not None and claim in self.claims:
                self.claims.remove(claim)
                claim.refund(self.now)
        self.woken.clear()

    @invariant()
    def no_replica_has_more_than_fits(self) -> None:
        for number in range(3):
            load = self.loads.get(f"m@{number}")
            if load is None:
                continue
            here = [claim for claim in self.claims if claim.load is load]
            assert load.requests == len(here)
            assert load.sequences == sum(claim.estimate.sequences for claim in here)
            assert load.sequences <= SEATS
            assert load.kv_tokens <= KV_TOKENS or len(here) == 1

    @invariant()
    def the_dedicated_replica_serves_its_tenant_alone(self) -> None:
        for claim in self.claims:
            if claim.load is not None:
                assert (claim.load.row.replica == "m@0") == (claim.tenant == "own")

    @invariant()
    def nobody_waits_beside_a_free_replica(self) -> None:
        for pool in self.admission.pools():
            first = pool.queue.first(self.now)
            if first is not None and first.only is None and not first.avoid:
                sequences, tokens = first.estimate.sequences, first.estimate.likely
                assert pool.loads
                assert not any(load.has_room(sequences, tokens) for load in pool.loads)

    def teardown(self) -> None:
        for claim in self.claims:
            claim.refund(self.now)
        assert self.loads.total() == 0
        for pool in self.admission.pools():
            assert (pool.waiting, pool.waiting_tokens, pool.waiting_bytes) == (0, 0, 0)
            assert pool.expected_wait_seconds("own", self.now) == pool.hold_seconds / max(1, pool.seats)
            for load in pool.loads:
                assert (load.requests, load.sequences, load.kv_tokens) == (0, 0, 0)
        for gauge in self.admission.limits:
            gauge.window.advance(self.now + 200_000)
            assert gauge.window.used == 0


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
