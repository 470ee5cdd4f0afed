from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.admission import Admission, AdmissionPolicy, Ask, Claim, Loads, TenantLimits
from gateway.background import MOST_SECONDS, SILENT_SECONDS, BackgroundResponses
from gateway.errors import EngineError
from gateway.routes import build_routes
from gateway.stats import Stats
from gateway.testing import FakeClock, replica_row
from placement.table import ModelRow, ReplicaRow, RoutingTable

ROW = replica_row("m@0", "m", "unix:/0")
ROUTES = build_routes(
    RoutingTable(generation=1, models=(ModelRow(name="m", max_model_len=1000),), replicas=(ROW,)), (), {}
)


class Engine:
    """Answers with what `says` holds: a status and a body, or None where it cannot be reached."""

    def __init__(self) -> None:
        self.says: tuple[int, Any] | None = (200, {"status": "queued"})
        self.asked: list[str] = []

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        self.asked.append(path)
        if self.says is None:
            raise EngineError("away", replica=replica.replica)
        status, body = self.says
        return status, body if isinstance(body, bytes) else json.dumps(body).encode()


class World:
    def __init__(self) -> None:
        self.clock, self.engine, self.stats = FakeClock(), Engine(), Stats()
        policy = AdmissionPolicy(limits={"t": TenantLimits(tokens_per_minute=10_000, max_concurrent=3)})
        self.admission = Admission(lambda: ROUTES, Loads(bound=10), self.clock, policy)
        self.background = BackgroundResponses(self.engine, self.admission, self.stats)
        self.claim = self.started()
        self.background.follow("resp_1", ROW, self.claim)

    def started(self) -> Claim:
        claim = self.admission.claim(Ask("t", "m", b'{"input": "x"}', max_tokens=500), ROUTES.models["m"], self.clock())
        assert self.admission.place(claim, lambda: None, self.clock()) is not None
        return claim

    @property
    def used(self) -> dict[str, int]:
        return {gauge.kind: gauge.window.used for gauge in self.admission.limits}

    @property
    def tokens(self) -> list[int]:
        return [self.stats.tokens["m", "t", kind] for kind in ("prompt", "completion")]

    async def later(self, seconds: float = 0.5) -> None:
        self.clock.turn(seconds)
        await self.background.tick()


@pytest.fixture
def world() -> World:
    return World()


async def test_what_runs_is_held_and_what_has_ended_is_charged(world: World) -> None:
    for status in ("queued", "in_progress"):
        world.engine.says = (200, {"status": status, "usage": None})
        await world.later()
        assert (world.admission.loads.total(), world.used["max_concurrent"]) == (1, 1)
        assert world.used["tokens_per_minute"] > 500
    world.engine.says = (
        200,
        {"status": "completed", "usage": {"input_tokens": 7, "output_tokens": 40, "total_tokens": 47}},
    )
    await world.later()
    assert (world.admission.loads.total(), world.used) == (0, {"max_concurrent": 0, "tokens_per_minute": 47})
    assert (world.tokens, len(world.background)) == ([7, 40], 0)
    asked = len(world.engine.asked)
    await world.later()
    assert len(world.engine.asked) == asked
    assert set(world.engine.asked) == {"/v1/responses/resp_1"}


async def test_a_cancelled_one_pays_for_its_prompt(world: World) -> None:
    world.engine.says = (200, {"status": "cancelled", "usage": None})
    await world.later()
    assert world.used == {"max_concurrent": 0, "tokens_per_minute": world.claim.estimate.prompt}


@pytest.mark.parametrize("says", [(404, {"error": {"message": "not found"}}), (200, {"status": "failed"})])
async def test_what_nobody_can_have_costs_nothing(world: World, says: tuple[int, Any]) -> None:
    world.engine.says = says
    await world.later()
    assert (world.used, world.tokens) == ({"max_concurrent": 0, "tokens_per_minute": 0}, [0, 0])


@pytest.mark.parametrize("says", [None, (503, b""), (500, b"boom")])
async def test_an_engine_that_says_nothing_is_waited_for_a_while(world: World, says: tuple[int, Any] | None) -> None:
    world.engine.says = says
    await world.later(SILENT_SECONDS / 2)
    assert len(world.background) == 1
    world.engine.says = (200, {"status": "in_progress"})
    await world.later(1.0)
    world.engine.says = says
    await world.later(SILENT_SECONDS - 1)
    assert len(world.background) == 1
    await world.later(1.0)
    assert (len(world.background), world.used["tokens_per_minute"], world.admission.loads.total()) == (0, 0, 0)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"status": 1}', b"[" * 100_000])
async def test_an_answer_that_makes_no_sense_ends_nothing_but_time_does(world: World, body: bytes) -> None:
    world.engine.says = (200, body)
    await world.later()
    assert len(world.background) == 1
    await world.later(MOST_SECONDS)
    assert len(world.background) == 0
    estimate = world.claim.estimate
    assert world.tokens == [estimate.prompt, estimate.output]
    assert world.admission.loads.total() == 0


async def test_what_was_reserved_goes_on_counting_when_the_gateway_stops(world: World) -> None:
    reserved = world.used["tokens_per_minute"]
    world.background.stop()
    assert (world.admission.loads.total(), world.used["tokens_per_minute"], len(world.background)) == (0, reserved, 0)
