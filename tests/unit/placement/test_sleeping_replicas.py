"""Sleep mode as a state of a replica: it sleeps where it is, wakes when it is asked for, and is stopped where it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.autoscale import WakeFigures, choose_sleep
from placement.fake_engine.__main__ import parse
from placement.fake_engine.engine import Behaviour, FakeEngine, listening
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import Endpoint, LaunchSpec, SizedModel
from placement.policy import AutoscalePolicy
from placement.replicas.parts import Goal
from placement.replicas.probe import Probe
from placement.replicas.replica import Replica
from placement.resting import Rester, Resting, available_memory
from placement.schema import EngineConfig
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.state import StatePaths
from placement.table import ReplicaState
from placement.testing import FakeProcess, FakeWorld, fake_entry
from placement.wake_times import WakeTimes

CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,))
SPEC = LaunchSpec("chat-0", "chat", "generate", CPU, ("engine", "{uds}"))
AWAKE = Goal("chat-0", "chat", "generate", CPU, 16, SPEC, may_sleep=True)
ASLEEP = replace(AWAKE, asleep=True)


def world(is_asleep: bool | None = False) -> FakeWorld:
    made = FakeWorld()
    made.engine.is_asleep = is_asleep
    return made


def replica(made: FakeWorld, goal: Goal = AWAKE) -> Replica:
    return Replica(goal, EngineConfig(drain_timeout_seconds=1), made.hands())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(45):
        while not condition():  # noqa: ASYNC110 - the condition is anything, and nothing here takes time
            await asyncio.sleep(0)


async def serving(made: FakeWorld) -> Replica:
    one = replica(made)
    one.begin()
    await until(lambda: one.view.state is ReplicaState.READY)
    return one


# ---- a replica


async def test_it_sleeps_and_wakes_with_the_same_process() -> None:
    made = world()
    one = await serving(made)
    assert one.view.can_sleep
    one.reconfigure(ASLEEP, EngineConfig())
    await until(lambda: one.view.state is ReplicaState.ASLEEP)
    assert made.engine.is_asleep
    assert made.started[0].entry.asleep, "the next controller must know it"
    one.reconfigure(AWAKE, EngineConfig())
    await until(lambda: one.view.state is ReplicaState.READY)
    assert not made.engine.is_asleep
    assert not made.started[0].entry.asleep
    assert len(made.started) == 1
    assert [what for _, what, _ in made.learned] == ["start", "wake"]
    await one.stop()


async def test_a_wake_that_fails_is_a_restart_and_is_not_tried_again() -> None:
    made = world()
    one = await serving(made)
    one.reconfigure(ASLEEP, EngineConfig())
    await until(lambda: one.view.state is ReplicaState.ASLEEP)
    made.engine.does_wake, made.started[0].stubborn = False, True
    one.reconfigure(AWAKE, EngineConfig())
    await until(lambda: one.view.state is ReplicaState.READY)
    assert made.started[0].received == ["kill"]
    assert len(made.started) == 2
    assert one.view.can_sleep is False
    assert ("chat-0", "no_wake", 0.0) in made.learned
    await one.stop()


@pytest.mark.parametrize(("has_it", "falls_asleep"), [(None, True), (False, False)])
async def test_an_engine_that_cannot_sleep_goes_on_and_says_so(has_it: bool | None, falls_asleep: bool) -> None:
    made = world(has_it)
    made.engine.does_sleep = falls_asleep
    one = await serving(made)
    one.reconfigure(ASLEEP, EngineConfig())
    await until(lambda: one.view.can_sleep is False and one.view.state is ReplicaState.READY)
    await one.stop()


async def test_a_sleeping_engine_that_ends_is_not_started_again_until_it_is_asked_for() -> None:
    made = world()
    one = await serving(made)
    one.reconfigure(ASLEEP, EngineConfig())
    await until(lambda: one.view.state is ReplicaState.ASLEEP)
    made.started[0].end(signal=9)
    await until(lambda: one.view.state is ReplicaState.STOPPED)
    assert len(made.started) == 1
    await one.stop()


@pytest.mark.parametrize("goal", [ASLEEP, AWAKE])
async def test_a_sleeping_engine_is_adopted_as_it_is(goal: Goal) -> None:
    made = world(is_asleep=True)
    entry = fake_entry(SPEC).model_copy(update={"ready_at": made.clock.now(), "asleep": True})
    one = replica(made, goal)
    one.begin(FakeProcess(entry))
    wanted = ReplicaState.ASLEEP if goal.asleep else ReplicaState.READY
    await until(lambda: one.view.state is wanted)
    assert made.engine.is_asleep is goal.asleep
    assert made.started == []
    await one.stop()


async def test_whoever_is_asked_for_again_while_it_finishes_requests_does_not_sleep() -> None:
    made = world()
    one = await serving(made)
    made.engine.on_ask = lambda: one.reconfigure(AWAKE, EngineConfig()) if one.view.state == "draining" else None
    one.reconfigure(ASLEEP, EngineConfig())
    await until(lambda: one.view.state is ReplicaState.DRAINING)
    await until(lambda: one.view.state is ReplicaState.READY)
    assert made.engine.is_asleep is False
    await one.stop()


# ---- which of them


class Shelf:
    """A registry where every model fits everywhere."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


SLICES = tuple(Slice(f"cpu-{i}", SliceKind.CPU, None, 2**30, cores=(i,)) for i in range(2))
CURRENT = {"a-0": "cpu-0"}


def goals(
    tmp_path: Path, demanded: dict[str, int], *more: dict[str, object], rest: bool = True, **changes: object
) -> Goals:
    model = {"name": "a", "source": "x", "replicas": {"min": 0, "max": 2}}
    raw = {"engine": {"command": ["engine", "{uds}"]} | changes, "models": [model, *more]}
    config, inventory = PlacementConfig.model_validate(raw), Inventory(SLICES)
    workshop = Workshop(StatePaths(tmp_path), {})
    alone = PlacementConfig.model_validate(raw | {"models": [model]})
    first = plan_goals(alone, inventory, Shelf(), workshop, demanded={"a": 1}, current=CURRENT)
    resting = {"a-0": str(first.replicas["a-0"].spec_hash)} if rest else {}
    return plan_goals(config, inventory, Shelf(), workshop, current=CURRENT, demanded=demanded, resting=resting)


def told(made: Goals) -> dict[str, tuple[str, bool]]:
    return {name: (goal.slice.id, goal.asleep) for name, goal in made.replicas.items()}


def test_a_sleeping_replica_keeps_its_slice_and_wakes_there(tmp_path: Path) -> None:
    assert told(goals(tmp_path, {"a": 0})) == {"a-0": ("cpu-0", True)}
    assert told(goals(tmp_path, {"a": 0}, rest=False)) == {}
    assert told(goals(tmp_path, {"a": 1})) == {"a-0": ("cpu-0", False)}


def test_nobody_is_put_where_one_sleeps_unless_there_is_no_other_place(tmp_path: Path) -> None:
    other: dict[str, object] = {"name": "b", "source": "x"}
    assert told(goals(tmp_path, {"a": 0}, other)) == {"a-0": ("cpu-0", True), "b-0": ("cpu-1", False)}
    two = told(goals(tmp_path, {"a": 0}, other | {"replicas": 2}))
    assert two == {"b-0": ("cpu-0", False), "b-1": ("cpu-1", False)}, "who sleeps gives way, and is stopped"
    demanded = told(goals(tmp_path, {"a": 0, "b": 2}, other | {"replicas": {"min": 1, "max": 2}}))
    assert sorted(demanded) == ["b-0", "b-1"], "so it does for another model's demand"


def test_sleep_mode_is_for_engines_behind_a_socket_of_our_own_and_models_that_may_go_to_zero(tmp_path: Path) -> None:
    assert goals(tmp_path, {"a": 1}).replicas["a-0"].may_sleep
    command = ["engine", "{port}"]
    assert not goals(tmp_path, {"a": 1}, transport="tcp", command=command, rest=False).replicas["a-0"].may_sleep
    fixed = goals(tmp_path, {"a": 0}, {"name": "b", "source": "x"})
    assert not fixed.replicas["b-0"].may_sleep


def rester(name: str, *, asleep: bool = False, can_sleep: bool | None = True) -> Rester:
    return Rester(name, name.partition("@")[0].rpartition("-")[0] or "a", "hash", asleep, can_sleep, CPU)


def test_one_replica_of_a_pool_sleeps_and_the_others_are_stopped(tmp_path: Path) -> None:
    resting = Resting(WakeTimes(tmp_path / "w.json"), lambda: 2**34)
    policy = AutoscalePolicy()
    three = [rester("a-1"), rester("a-0"), rester("a-2", asleep=True)]
    assert resting.choose(policy, {"a": 0}, three, None) == {"a-2": "hash"}
    assert resting.choose(policy, {"a": 0}, three[:2], None) == {"a-0": "hash"}
    assert resting.choose(policy, {"a": 1}, three, None) == {}
    assert resting.choose(policy, {}, three, None) == {}, "its number is nobody's to decide on"
    assert resting.choose(policy, {"a": 0}, [rester("a-0", can_sleep=False)], None) == {}
    assert resting.choices["a"].reason == "its engine has no sleep mode"


def test_what_was_measured_is_kept_and_decides(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    times = WakeTimes(path)
    times.learn(AWAKE, "start", 2.0)
    times.learn(AWAKE, "wake", 9.0)
    assert dict(WakeTimes(path).of("chat", CPU)) == {"start": 2.0, "wake": 9.0}
    resting = Resting(WakeTimes(path), lambda: 2**34)
    one = Rester("chat-0", "chat", "hash", False, True, CPU)
    assert resting.choose(AutoscalePolicy(), {"chat": 0}, [one], None) == {}
    assert "a stopped engine wakes in 2.0 s (measured)" in resting.choices["chat"].reason
    times.learn(AWAKE, "no_wake", 0.0)
    asked = AutoscalePolicy(sleep="sleep-mode")
    again = Resting(WakeTimes(path), lambda: 2**34)
    assert again.choose(asked, {"chat": 0}, [one], None) == {}
    assert again.choices["chat"].reason == "it did not wake from sleep mode the last time"
    path.write_text("[1]", encoding="utf-8")
    assert dict(WakeTimes(path).of("chat", CPU)) == {}


def test_starts_on_gpus_are_told_by_model_product_and_profile(tmp_path: Path) -> None:
    times, card = WakeTimes(tmp_path / "w.json"), Gpu("GPU-a", 0, "H100 SXM", 80 * 2**30)
    mig = Slice("GPU-a/1g.10gb@0", SliceKind.MIG, "1g.10gb", 2**33, "MIG-a", card)
    whole = Slice("GPU-a", SliceKind.GPU, None, 2**36, "GPU-a", card, cores=(0, 1))
    times.learn(AWAKE, "start", 2.0)
    times.learn(replace(AWAKE, model="on on it", slice=mig), "start", 30.0)
    times.learn(replace(AWAKE, slice=whole), "start", 50.0)
    times.learn(replace(AWAKE, model="code", slice=mig), "wake", 1.0)
    assert times.starts() == {("on on it", "H100 SXM", "1g.10gb"): 30.0, ("chat", "H100 SXM", "gpu"): 50.0}


def test_weights_that_do_not_fit_the_hosts_memory_are_not_put_there() -> None:
    figures = WakeFigures(2**34)
    assert choose_sleep(AutoscalePolicy(), figures, host_free_bytes=2**33).sleep == "stop"
    assert choose_sleep(AutoscalePolicy(), figures, host_free_bytes=2**34).sleep == "sleep-mode"


def test_available_memory_is_the_kernels_estimate(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable:   7 kB\n", encoding="utf-8")
    assert available_memory(tmp_path / "meminfo") == 7 * 1024
    assert available_memory(tmp_path / "missing") == 0


# ---- the simulated engine, over HTTP


async def test_the_simulated_engine_speaks_vllms_sleep_mode(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    engine = FakeEngine(Behaviour(names=("m",), sleep_mode=True))
    async with listening(engine, uds=socket):
        probe = Probe(Endpoint(uds=socket), "m", "generate")
        assert await probe.asleep(timeout_seconds=5) is False
        assert await probe.sleep(timeout_seconds=5)
        assert await probe.asleep(timeout_seconds=5) is True
        assert await probe.healthy(timeout_seconds=5), "as vLLM's, its server answers"
        assert not await probe.answers(timeout_seconds=5)
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(socket))) as session,
            session.post("http://engine/sleep?level=7") as answer,
        ):
            assert answer.status == 422
        assert await probe.wake(timeout_seconds=5)
        assert await probe.answers(timeout_seconds=5)


async def test_an_engine_without_sleep_mode_says_so(tmp_path: Path) -> None:
    for behaviour, has_it in (
        (Behaviour(names=("m",)), None),
        (Behaviour(names=("m",), sleep_mode=True, wake_fails=True), False),
    ):
        socket = tmp_path / f"s{has_it}"
        async with listening(FakeEngine(behaviour), uds=socket):
            probe = Probe(Endpoint(uds=socket), "m", "generate")
            assert await probe.asleep(timeout_seconds=5) is has_it
            assert await probe.sleep(timeout_seconds=5) is (has_it is False)
            assert not await probe.wake(timeout_seconds=5)


def test_the_flag_alone_opens_no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--uds", "/tmp/x", "--model", "m", "--enable-sleep-mode"]
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    assert not parse(words)[0].sleep_mode
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    assert parse(words)[0].sleep_mode
