"""A replica's whole life, without processes and without waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest

from placement.errors import PlacementError
from placement.launch import LaunchSpec
from placement.proof import Finding, Proof, Verdict
from placement.replicas.parts import Goal
from placement.replicas.probe import Activity
from placement.replicas.replica import DRAINED, Replica
from placement.schema import EngineConfig
from placement.slices import Gpu, Slice, SliceKind
from placement.table import ReplicaState
from placement.testing import FakeProcess, FakeWorld, fake_entry

CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,))
GPU = Gpu("GPU-a", 0, "H100", 2**33)


def goal(name: str = "chat-0", target: Slice = CPU, *, planned: bool = True) -> Goal:
    spec = LaunchSpec(name, "chat", "generate", target, ("engine", "{uds}"))
    return Goal(name, "chat", "generate", target, 16, spec if planned else None)


def replica(world: FakeWorld, wanted: Goal | None = None, **config: object) -> Replica:
    return Replica(wanted or goal(), EngineConfig.model_validate(config), world.hands())


async def until(condition: Callable[[], object]) -> None:
    """Let tasks run until it holds. The fake clock runs as well, so this ends quickly or never."""
    async with asyncio.timeout(45):
        while not condition():  # noqa: ASYNC110 - the condition is anything, and nothing here takes time
            await asyncio.sleep(0)


async def test_it_is_ready_only_after_a_real_answer() -> None:
    world = FakeWorld()
    world.engine.does_answer = False
    one = replica(world)
    one.begin()
    await until(lambda: world.engine.asked > 3)
    assert one.view.state is ReplicaState.STARTING
    assert one.view.stage == "answering a first request"
    world.engine.does_answer = True
    await until(lambda: one.view.state is ReplicaState.READY)
    assert world.started[0].entry.ready_at is not None, "the next controller must know it"
    assert world.secured[-1] == world.started[0].endpoint
    await one.stop()


async def test_an_engine_in_the_wrong_place_is_ended_before_it_is_ready_and_given_up_with_what_was_seen() -> None:
    elsewhere = Finding("processes", Verdict.REFUTED, "its processes on cpu-0", "pid 7 on cpu-1")
    world = FakeWorld(proof=Proof(CPU, (elsewhere,), ok=False))
    one = replica(world, restart={"max_fast_failures": 2})
    one.begin()
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert [process.received for process in world.started] == [["kill"], ["kill"]]
    assert [process.entry.ready_at for process in world.started] == [None, None], "no controller takes it for ready"
    assert one.view.reason == (
        "not proven to run on slice cpu-0: processes refuted: expected its processes on cpu-0; saw pid 7 on cpu-1"
    )
    assert "docs/pinning.md" in (one.view.remedy or "")
    await one.stop()


async def test_what_was_found_out_about_its_place_stays_visible_while_it_serves() -> None:
    world = FakeWorld(proof=Proof(CPU, (Finding("cores", Verdict.PROVEN, "core 0", "core 0"),), ok=True))
    one = replica(world)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    assert one.view.proof is world.proof
    await one.stop()


async def test_an_adopted_engine_that_serves_is_not_ended_by_a_new_look() -> None:
    wrong = Proof(CPU, (Finding("processes", Verdict.REFUTED, "here", "there"),), ok=False)
    world = FakeWorld(proof=wrong)
    wanted = goal()
    assert wanted.spec
    process = FakeProcess(fake_entry(wanted.spec).model_copy(update={"ready_at": world.clock.now()}))
    one = replica(world, wanted)
    one.begin(process)
    await until(lambda: one.view.state is ReplicaState.READY)
    assert process.received == []
    await one.stop()


async def test_what_it_is_loading_is_shown() -> None:
    world = FakeWorld(log="INFO Loading safetensors checkpoint shards:  50% Completed | 1/2")
    world.engine.is_healthy = False
    one = replica(world)
    one.begin()
    await until(lambda: one.view.stage)
    assert one.view.stage == "loading weights 50%"
    await one.stop()


async def test_an_engine_that_dies_is_started_again_with_a_growing_delay_and_then_given_up() -> None:
    world = FakeWorld(log="RuntimeError: bad weights\n", on_start=lambda p: p.end(code=1))
    one = replica(world, restart={"first_delay_seconds": 2, "max_fast_failures": 4, "max_delay_seconds": 5})
    one.begin()
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert len(world.started) == 4
    assert [s for s in world.clock.slept if s >= 1] == [1.0, 2.0, 2.5], "half of 2, 4 and 5: no jitter here"
    assert one.view.reason == "exit code 1: RuntimeError: bad weights"
    assert one.view.restarts.total == 3
    await one.stop()


async def test_a_long_life_makes_up_for_old_failures() -> None:
    world = FakeWorld()
    one = replica(world, restart={"fast_failure_seconds": 60, "max_fast_failures": 2})
    one.begin()
    for number in range(1, 5):
        await until(lambda number=number: len(world.started) == number and one.view.state is ReplicaState.READY)
        await until(lambda: world.clock.now() - world.started[-1].entry.started_at > timedelta(seconds=61))
        world.started[-1].end(signal=9)
    await until(lambda: len(world.started) == 5)
    assert one.view.restarts.fast_failures == 0
    await one.stop()


async def test_the_reason_of_the_last_end_stays_visible_while_it_starts_again() -> None:
    world = FakeWorld()
    one = replica(world)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    world.engine.is_healthy = False
    world.started[0].end(signal=11)
    await until(lambda: one.view.state is ReplicaState.BACKOFF)
    assert one.view.retry_at is not None
    await until(lambda: one.view.state is ReplicaState.STARTING)
    assert one.view.reason == "killed by SIGSEGV"
    world.engine.is_healthy = True
    await until(lambda: one.view.state is ReplicaState.READY)
    assert one.view.reason is None
    await one.stop()


async def test_one_that_cannot_be_started_at_all_counts_as_a_failure() -> None:
    world = FakeWorld(refuse=PlacementError("no such file", remedy="Install it."))
    one = replica(world)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert (one.view.reason, one.view.remedy) == ("no such file", "Install it.")
    await one.stop()


async def test_one_that_never_gets_ready_is_ended() -> None:
    world = FakeWorld()
    world.engine.is_healthy = False
    one = replica(world, start_timeout_seconds=30, restart={"max_fast_failures": 1})
    one.begin()
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert world.started[0].received == ["kill"]
    assert str(one.view.reason).startswith("it was not ready after 30 s")


async def test_one_that_no_longer_answers_is_ended_after_several_checks() -> None:
    world = FakeWorld()
    one = replica(world, liveness={"interval_seconds": 5, "failures": 3})
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    world.engine.is_healthy = False
    await until(lambda: one.view.reason)
    assert "it did not serve for 10 s" in str(one.view.reason), "three checks, five seconds apart"
    assert world.started[0].received == ["kill"]
    await one.stop()


async def test_one_that_hangs_while_its_server_says_all_is_well_is_ended() -> None:
    world = FakeWorld()
    world.engine.doing = Activity(running=3, waiting=9, steps=100)
    one = replica(world, liveness={"stall_seconds": 60})
    one.begin()
    await until(lambda: world.started and world.started[0].ended)
    await until(lambda: one.view.reason)
    assert "it did not serve for 60 s" in str(one.view.reason)
    await one.stop()


async def test_one_over_its_budget_is_ended_and_called_out_of_memory() -> None:
    world = FakeWorld()
    one = replica(world, restart={"max_fast_failures": 1})
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    one.exceed(3 * 2**29)
    one.exceed(2**31)
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert world.started[0].received == ["kill"]
    assert one.view.reason == "it used 1.50 GiB of memory; its slice has 1.00 GiB"


# ---- stopping


async def test_requests_may_finish_before_it_is_asked_to_stop() -> None:
    world = FakeWorld()
    one = replica(world)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    world.engine.doing = Activity(running=2, waiting=1, steps=1)
    stopping = asyncio.create_task(one.stop())
    await until(lambda: one.view.state is ReplicaState.DRAINING)
    for _ in range(50):
        await asyncio.sleep(0)
    assert world.started[0].received == []
    world.engine.doing = Activity(running=0, waiting=0, steps=2)
    await stopping
    assert world.started[0].received == ["terminate"]
    assert one.view.state is ReplicaState.STOPPED


async def test_requests_that_do_not_finish_are_cut_off_after_the_drain_timeout() -> None:
    world = FakeWorld()
    one = replica(world, drain_timeout_seconds=20, stop_timeout_seconds=10)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    world.engine.doing = Activity(running=1, waiting=0, steps=1)
    world.started[0].stubborn = True
    before = world.clock.monotonic()
    await one.stop()
    assert world.started[0].received == ["terminate", "kill"]
    assert 30 <= world.clock.monotonic() - before <= 32


async def test_stopping_while_it_waits_to_start_again_starts_nothing() -> None:
    world = FakeWorld(on_start=lambda p: p.end(code=1))
    one = replica(world, restart={"first_delay_seconds": 500, "max_delay_seconds": 500, "max_fast_failures": 3})
    one.begin()
    await until(lambda: one.view.state is ReplicaState.BACKOFF)
    await one.stop()
    started = len(world.started)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(world.started) == started
    assert one.view.state is ReplicaState.STOPPED


# ---- adoption


async def test_an_engine_that_served_goes_on_without_a_new_proof() -> None:
    world = FakeWorld()
    world.engine.does_answer = False  # it would not pass the proof of a new engine
    wanted = goal()
    assert wanted.spec is not None
    found = FakeProcess(fake_entry(wanted.spec))
    found.mark_ready(world.clock.now())
    one = replica(world, wanted)
    one.begin(found)
    await until(lambda: one.view.state is ReplicaState.READY)
    assert world.started == []
    assert one.view.adopted
    await one.stop()


async def test_an_engine_that_was_starting_goes_on_starting() -> None:
    world = FakeWorld()
    wanted = goal()
    assert wanted.spec is not None
    one = replica(world, wanted)
    one.begin(FakeProcess(fake_entry(wanted.spec)))
    await until(lambda: one.view.state is ReplicaState.READY)
    assert world.started == []
    await one.stop()


async def test_days_of_life_under_the_last_controller_count() -> None:
    world = FakeWorld()
    wanted = goal()
    assert wanted.spec is not None
    found = FakeProcess(fake_entry(wanted.spec, started_at=world.clock.now() - timedelta(days=3)))
    found.mark_ready(world.clock.now())
    one = replica(world, wanted, restart={"max_fast_failures": 1})
    one.begin(found)
    await until(lambda: one.view.state is ReplicaState.READY)
    found.end(signal=9)
    await until(lambda: world.started)
    await one.stop()


async def test_one_that_cannot_be_planned_runs_on_but_is_not_started_again() -> None:
    world = FakeWorld()
    planned = goal()
    assert planned.spec is not None
    found = FakeProcess(fake_entry(planned.spec))
    one = replica(world, goal(planned=False))
    one.begin(found)
    await until(lambda: one.view.state is ReplicaState.READY)
    found.end(code=0)
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert world.started == []


# ---- several


async def test_engines_on_one_gpu_start_one_after_another() -> None:
    world = FakeWorld()
    world.engine.is_healthy = False
    slices = [Slice(f"GPU-a/1g.10gb@{i}", SliceKind.MIG, "1g.10gb", 2**30, uuid=f"MIG-{i}", gpu=GPU) for i in range(2)]
    both = [replica(world, goal(f"chat-{i}", s)) for i, s in enumerate(slices)]
    for one in both:
        one.begin()
    await until(lambda: world.engine.asked > 5)
    assert len(world.started) == 1
    world.engine.is_healthy = True
    await until(lambda: all(one.view.state is ReplicaState.READY for one in both))
    assert len(world.started) == 2
    for one in both:
        await one.stop()


async def test_a_fault_of_ours_is_shown_and_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    world = FakeWorld()

    def fault() -> None:
        raise ZeroDivisionError("oops")

    world.engine.on_ask = fault
    one = replica(world)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.FAILED)
    assert "ZeroDivisionError" in str(one.view.reason)
    assert world.started[0].received == ["kill"]
    assert "a fault of sliceway itself" in caplog.text


@pytest.mark.parametrize(("kind", "moved"), [(SliceKind.MIG, [(2, 3), (4, 5)]), (SliceKind.CPU, [])])
async def test_cores_of_a_gpu_slice_change_under_a_running_engine(
    kind: SliceKind, moved: list[tuple[int, ...]]
) -> None:
    world = FakeWorld()
    before, after = (
        Slice("one", kind, None, 2**30, uuid=None if kind is SliceKind.CPU else "MIG-1", gpu=GPU, cores=cores)
        for cores in ((2, 3), (4, 5))
    )
    old, new = goal(target=before), goal(target=after)
    assert (old.spec_hash == new.spec_hash) is bool(moved), "a cpu slice with other cores is another slice"
    assert old.spec
    process = FakeProcess(fake_entry(old.spec).model_copy(update={"ready_at": world.clock.now()}))
    one = replica(world, old)
    one.begin(process)
    await until(lambda: one.view.state is ReplicaState.READY)
    one.reconfigure(old, EngineConfig())
    one.reconfigure(new, EngineConfig())
    assert process.pinned == moved
    await one.stop()


async def test_a_held_replica_takes_no_requests_finishes_those_it_has_and_comes_back_with_the_same_engine() -> None:
    world = FakeWorld()
    world.engine.doing = Activity(running=1, waiting=1, steps=1.0)
    one = replica(world)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    one.hold(True)
    await until(lambda: one.view.state is ReplicaState.DRAINING)
    asked = world.engine.asked
    await until(lambda: world.engine.asked > asked + 6)
    assert one.view.stage == "finishing requests"
    world.engine.doing = Activity(running=0, waiting=0, steps=2.0)
    await until(lambda: one.view.stage == DRAINED)
    one.hold(False)
    await until(lambda: one.view.state is ReplicaState.READY)
    assert len(world.started) == 1
    await one.stop()


async def test_a_replica_that_is_held_while_it_starts_never_serves_until_it_is_released() -> None:
    world = FakeWorld()
    states: list[ReplicaState] = []
    one = replica(world)
    one.hold(True)
    one.begin()
    await until(lambda: states.append(one.view.state) or one.view.state is ReplicaState.DRAINING)
    assert ReplicaState.READY not in states
    one.hold(False)
    await until(lambda: one.view.state is ReplicaState.READY)
    await one.stop()
