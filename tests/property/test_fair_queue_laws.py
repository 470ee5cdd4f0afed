"""The fair queue's promises: the published bound on service, weights, priorities with ageing, and a cost that idle tenants do not add to."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue


@dataclass(eq=False)
class Request:
    tenant: str
    input_tokens: int = 10
    output_tokens: int = 10
    weight: float = 1.0
    priority: int = 0
    since: float = 0.0
    ticket: int = -1
    charged: float = 0.0
    left: int = 0


class Engine:
    """Runs requests as an engine with continuous batching does: at each step every running one makes a token.

    Requests are taken while all their tokens fit into `memory_tokens`. Every lane is refilled at once, so that its tenant never stops waiting.
    """

    def __init__(self, memory_tokens: int, queue: FairQueue[Request]) -> None:
        self.memory_tokens = memory_tokens
        self.queue = queue
        self.running: list[Request] = []
        self.service: dict[str, float] = {}
        self.now = 0.0

    def fill(self) -> None:
        while (first := self.queue.first(self.now)) is not None:
            taken = sum(r.input_tokens + r.output_tokens for r in self.running)
            if taken + first.input_tokens + first.output_tokens > self.memory_tokens:
                return
            self.queue.remove(first)
            output = self.queue.predicted_output(first.tenant, first.output_tokens)
            first.charged = INPUT_WEIGHT * first.input_tokens + OUTPUT_WEIGHT * output
            self.queue.charge(first.tenant, first.weight, first.charged)
            first.left = first.output_tokens
            self.running.append(first)
            self.serve(first, INPUT_WEIGHT * first.input_tokens)
            self.arrive(first.tenant)

    def arrive(self, tenant: str) -> None:
        raise NotImplementedError

    def serve(self, request: Request, amount: float) -> None:
        self.service[request.tenant] = self.service.get(request.tenant, 0.0) + amount

    def step(self) -> None:
        self.now += 0.01
        for request in list(self.running):
            request.left -= 1
            self.serve(request, OUTPUT_WEIGHT)
            if not request.left:
                self.running.remove(request)
                real = INPUT_WEIGHT * request.input_tokens + OUTPUT_WEIGHT * request.output_tokens
                self.queue.charge(request.tenant, request.weight, real - request.charged)
                self.queue.learn(request.tenant, request.output_tokens)
        self.fill()


SHAPE = st.tuples(st.integers(1, 60), st.integers(1, 60))


@settings(deadline=None, max_examples=60)
@given(st.lists(SHAPE, min_size=2, max_size=4), st.integers(120, 400), st.integers(0, 2**32))
def test_two_tenants_that_wait_all_the_time_get_service_within_the_bound(
    shapes: list[tuple[int, int]], memory_tokens: int, seed: int
) -> None:
    """Sheng et al., Theorem 4.4: over any span in which both wait, |S_f - S_g| <= 2 max(w_in L_input, w_out M)."""
    queue: FairQueue[Request] = FairQueue(ageing_seconds=1e9)
    chance = random.Random(seed)

    class Greedy(Engine):
        def arrive(self, tenant: str) -> None:
            longest_in, longest_out = shapes[int(tenant)]
            queue.push(Request(tenant, chance.randint(1, longest_in), chance.randint(1, longest_out), since=self.now))

    engine = Greedy(memory_tokens, queue)
    for tenant in range(len(shapes)):
        for _ in range(3):
            engine.arrive(str(tenant))
    engine.fill()
    bound = 2 * max(INPUT_WEIGHT * max(i for i, _ in shapes), OUTPUT_WEIGHT * memory_tokens)
    history: list[list[float]] = []
    for _ in range(250):
        engine.step()
        history.append([engine.service.get(str(t), 0.0) for t in range(len(shapes))])
    for f in range(len(shapes)):
        for g in range(f):
            gaps = [row[f] - row[g] for row in history]
            assert max(gaps) - min(gaps) <= bound


def drain(queue: FairQueue[Request], now: float = 0.0) -> list[str]:
    order = []
    while (first := queue.first(now)) is not None:
        queue.remove(first)
        queue.charge(
            first.tenant, first.weight, INPUT_WEIGHT * first.input_tokens + OUTPUT_WEIGHT * first.output_tokens
        )
        order.append(first.tenant)
    return order


def test_a_flood_does_not_delay_who_comes_later() -> None:
    queue: FairQueue[Request] = FairQueue(ageing_seconds=60)
    for _ in range(1000):
        queue.push(Request("flood"))
    for _ in range(50):
        first = queue.first(0.0)
        assert first is not None
        queue.remove(first)
        queue.charge("flood", 1.0, 30.0)
    queue.push(Request("late"))
    assert "late" in drain(queue)[:2]


def test_idleness_saves_nothing_up() -> None:
    queue: FairQueue[Request] = FairQueue(ageing_seconds=60)
    for _ in range(200):
        queue.push(Request("busy"))
    queue.push(Request("sleeper"))
    drain(queue)
    for _ in range(20):
        queue.push(Request("busy"))
        queue.push(Request("sleeper"))
    assert abs(drain(queue)[:20].count("sleeper") - 10) <= 1


@given(st.integers(1, 5), st.integers(1, 5))
def test_weights_are_shares(mine: int, yours: int) -> None:
    queue: FairQueue[Request] = FairQueue(ageing_seconds=60)
    for _ in range(200):
        queue.push(Request("mine", weight=mine))
        queue.push(Request("yours", weight=yours))
    served = drain(queue)[:120]
    assert served.count("mine") == pytest.approx(120 * mine / (mine + yours), abs=2)


def test_priorities_go_first_and_age_overtakes_them() -> None:
    queue: FairQueue[Request] = FairQueue(ageing_seconds=10)
    low = Request("batch", priority=-2, since=0.0)
    queue.push(low)
    for now in (1.0, 5.0, 15.0):
        queue.push(high := Request("chat", since=now))
        assert queue.first(now) is high
        queue.remove(high)
    queue.push(Request("chat", since=31.0))
    assert queue.first(31.0) is low


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.booleans(), st.integers(-40, 40)), max_size=80)
)
def test_every_request_leaves_once_and_nothing_is_left(steps: list[tuple[str, int, bool, int]]) -> None:
    queue: FairQueue[Request] = FairQueue(ageing_seconds=5)
    pushed: list[Request] = []
    for number, (tenant, priority, cancel, cost) in enumerate(steps):
        pushed.append(Request(tenant, priority=priority, since=float(number)))
        queue.push(pushed[-1])
        queue.charge(tenant, 1.0, cost)
        if cancel:
            queue.remove(pushed[number // 2])
    waiting = [request for request in pushed if request.ticket >= 0]
    assert len(queue) == len(waiting)
    assert sum(queue.waiting_of.values()) == len(waiting)
    assert sorted(drain(queue, 100.0)) == sorted(request.tenant for request in waiting)
    assert (len(queue), queue.waiting_of, queue.first(0.0)) == (0, {}, None)


def lines_run(work: Any) -> int:
    """How many lines of Python `work` executes: a count of operations that does not depend on the machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def cost_of_a_request(idle: int, waiting: int) -> int:
    queue: FairQueue[Request] = FairQueue(ageing_seconds=60)
    for number in range(idle):
        queue.push(Request(f"idle-{number}"))
    drain(queue)
    for number in range(waiting):
        queue.push(Request(f"waiting-{number}"))

    def one_request() -> None:
        request = Request("me")
        queue.push(request)
        first = queue.first(0.0)
        assert first is not None
        queue.remove(first)
        queue.charge(first.tenant, 1.0, 30.0)
        queue.charge(first.tenant, 1.0, -5.0)

    one_request()
    return lines_run(one_request)


def test_idle_tenants_cost_nothing() -> None:
    assert cost_of_a_request(0, 8) == cost_of_a_request(10_000, 8)


def test_waiting_tenants_cost_next_to_nothing() -> None:
    assert cost_of_a_request(0, 4096) <= cost_of_a_request(0, 4) + 20
