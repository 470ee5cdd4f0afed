"""Transitions: their order, what is refused, how they end when a step fails, and what is left on disk."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.errors import UnknownProfile
from model_registry.geometry import Placement
from placement.errors import PlacementError, PlanError, StalePlan, TransitionBlocked
from placement.planner.types import (
    WHOLE,
    FleetGpu,
    FleetPlan,
    Instance,
    ModelDemand,
    Option,
    PlannedGpu,
    PlannedSlice,
    fingerprint,
)
from placement.testing import FakeClock
from placement.transition import (
    SIMULATED,
    Executor,
    Place,
    Step,
    Timings,
    Transition,
    TransitionJournal,
    forecast,
    plan_transition,
    without_engines,
)
from placement.transition.journal import Record
from placement.transition.testing import FakeFleet, Killed, nothing

H100 = load_catalogue().product("h100-sxm")


def at(text: str) -> Placement:
    return Placement.parse(text) if "@" in text and not text.startswith("gpu") else WHOLE


def gpu(name: str, *instances: tuple[str, str | None]) -> FleetGpu:
    held = tuple(Instance(at(p), r, r.partition("-")[0] if r else None) for p, r in instances)
    return FleetGpu(name, H100.name, H100, instances=held)


def planned(before: FleetGpu, *slices: tuple[str, str | None]) -> PlannedGpu:
    """`before` with these slices and replicas; the change follows."""
    there = {i.placement: i.replica for i in before.instances}
    told = []
    for text, replica in slices:
        place = at(text)
        old = there.get(place, "")
        change = "create" if place not in there else "keep" if old == replica else "reuse" if replica else "idle"
        told.append(PlannedSlice(place, change, replica, replica.partition("-")[0] if replica else None))  # type: ignore[arg-type]
    return PlannedGpu(before, tuple(told), tuple(p for p in there if p not in {s.placement for s in told}))


def plan(*gpus: PlannedGpu) -> FleetPlan:
    return FleetPlan(gpus, (), (), (), fingerprint(g.gpu for g in gpus))


def demand(name: str, rate: float) -> ModelDemand:
    options = tuple(Option(H100.name, p.name, float(p.g)) for p in H100.base_profiles)
    return ModelDemand(name, name, options, rate=rate)


def told(transition: Transition) -> list[str]:
    return [str(step) for step in transition.steps]


MOVE = plan(
    planned(gpu("A", ("3g.40gb@0", "chat-0")), ("7g.80gb@0", "code-0")),
    planned(gpu("B"), ("3g.40gb@4", "chat-0")),
)
CHAT, CODE = demand("chat", 3.0), demand("code", 7.0)
IN_PLACE = plan(planned(gpu("A", ("7g.80gb@0", "chat-0")), ("3g.40gb@0", "chat-1"), ("3g.40gb@4", "chat-2")))


def test_the_new_one_starts_before_the_old_one_stops_where_there_is_room() -> None:
    assert told(plan_transition(MOVE, (CHAT, CODE))) == [
        "create B/3g.40gb@4",
        "start chat-1 on B/3g.40gb@4",
        "check chat-1 on B/3g.40gb@4",
        "drain chat-0 on A/3g.40gb@0",
        "stop chat-0 on A/3g.40gb@0",
        "destroy A/3g.40gb@0",
        "create A/7g.80gb@0",
        "start code-0 on A/7g.80gb@0",
        "check code-0 on A/7g.80gb@0",
    ]


def test_what_cannot_be_done_without_a_dip_is_refused_and_says_who_would_suffer() -> None:
    with pytest.raises(TransitionBlocked) as caught:
        plan_transition(IN_PLACE, (demand("chat", 6.0),))
    assert "chat would serve 0 of the 6 it is guaranteed" in caught.value.message
    assert "--allow-dip" in str(caught.value.remedy)
    assert "3g.40gb" in str(caught.value.remedy)


def test_with_leave_the_dip_is_taken_and_told() -> None:
    transition = plan_transition(IN_PLACE, (demand("chat", 6.0),), allow_dip=True)
    assert [(d.demand, d.guaranteed, d.lowest) for d in transition.dips] == [("chat", 6.0, 0.0)]
    assert told(transition)[0] == "drain chat-0 on A/7g.80gb@0"


def test_head_room_may_be_used_on_the_way() -> None:
    two = planned(
        gpu("A", ("3g.40gb@0", "chat-0"), ("3g.40gb@4", "chat-1")), ("3g.40gb@0", "chat-0"), ("4g.40gb@0", None)
    )
    moved = plan(replace(two, slices=two.slices[:1]), planned(gpu("B"), ("3g.40gb@0", "chat-1")))
    assert plan_transition(moved, (demand("chat", 3.0),)).dips == ()


def test_engines_of_one_gpu_start_one_at_a_time() -> None:
    fresh = plan(planned(gpu("A"), *((f"1g.10gb@{i}", f"chat-{i}") for i in range(4))))
    steps = plan_transition(fresh, (demand("chat", 4.0),)).steps
    checks = [s.number for s in steps if s.kind == "check"]
    for earlier, start in zip(checks, [s for s in steps if s.kind == "start"][1:], strict=False):
        assert earlier in start.after


def test_a_whole_card_is_emptied_first_and_cut_again_last() -> None:
    to_whole = plan(planned(gpu("A", ("1g.10gb@0", "embed-0"), ("1g.10gb@1", None)), ("gpu@0", "chat-0")))
    steps = plan_transition(to_whole, (), allow_dip=True).steps
    switch = next(s for s in steps if s.kind == "create")
    assert str(switch) == "set A to MIG off"
    assert set(switch.after) == set(range(switch.number))
    back = plan(planned(gpu("A", ("gpu@0", "chat-0")), ("1g.10gb@0", "embed-0")))
    assert "set A to MIG on" in told(plan_transition(back, (), allow_dip=True))


def test_reservations_are_created_and_carry_their_note() -> None:
    kept = PlannedGpu(gpu("A"), (PlannedSlice(at("4g.40gb@0"), "create", reserved="fine-tuning"),))
    (step,) = plan_transition(plan(kept), ()).steps
    assert (step.kind, step.reserved) == ("create", "fine-tuning")
    assert "fine-tuning" in str(step)


def test_the_forecast_follows_the_longest_chain_and_tells_each_dip() -> None:
    transition = plan_transition(IN_PLACE, (demand("chat", 6.0),), allow_dip=True)
    product = IN_PLACE.gpus[0].gpu.product
    timings = Timings(starts={("chat", product, "3g.40gb"): 60.0})
    found = forecast(transition, IN_PLACE, {"chat": demand("chat", 6.0)}, timings)
    (chat,) = found.models
    assert (chat.before, chat.lowest, chat.then) == (7.0, 0.0, 6.0)
    assert (chat.start_seconds, chat.start_source) == (60.0, "measured")
    # drain, stop, destroy, two instances, and two engines after one another
    assert found.seconds == 30 + 5 + 2 + 2 + 2 + 2 * (60 + 1) - 2
    assert chat.dip_seconds == found.seconds


def test_a_start_is_counted_as_it_was_measured_or_else_as_is_usual() -> None:
    timings = Timings(starts={("chat", "H100", "1g.10gb"): 40.0, ("chat", "A100", "2g.20gb"): 55.0})
    assert timings.start("chat@acme", "H100", "1g.10gb") == (40.0, "measured")
    assert timings.start("chat", "H100", "3g.40gb") == (55.0, "measured elsewhere"), "the slower one"
    assert timings.start("code", "H100", "1g.10gb") == (90.0, "usual")
    seconds, source = SIMULATED.start("code", "H100", "1g.10gb")
    assert (source, seconds < 90.0) == ("simulated", True)


def test_steps_survive_being_written_down() -> None:
    for step in plan_transition(MOVE, (CHAT, CODE)).steps:
        assert Step.of_public(step.as_public()) == step
    assert Place.parse("GPU-1/3g.40gb@4") == Place("GPU-1", Placement(4, "3g.40gb"))
    assert Place.parse("GPU-1") == Place("GPU-1", WHOLE)
    assert Place.parse("GPU-node/GPU-1") == Place("GPU-node/GPU-1", WHOLE)
    assert Place.parse("a/GPU-1/1g.10gb@0") == Place("a/GPU-1", Placement(0, "1g.10gb"))


@pytest.mark.parametrize("text", ["", "GPU-1/", "GPU-1/rubbish", "a/GPU-1/1g.10gb", "GPU-1/1g.10gb@x", "a/GPU-1/mps-0"])
def test_what_is_no_place_on_a_gpu_is_refused(text: str) -> None:
    with pytest.raises(UnknownProfile):
        Place.parse(text)


async def test_a_step_that_fails_stops_the_transition_and_what_runs_goes_on(tmp_path: Path) -> None:
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))
    broken = True

    async def fail(step: Step) -> None:
        if step.kind == "start" and broken:
            raise PlacementError("the engine ended at once", where=str(step.place), remedy="See its log.")

    fleet.before = fail
    journal = TransitionJournal(tmp_path / "transition.json")
    executor = Executor(fleet, journal, FakeClock())
    outcome = await executor.begin(plan_transition(MOVE, (CHAT, CODE)))
    assert not outcome.ok
    assert [str(s) for s in outcome.done] == ["create B/3g.40gb@4"]
    assert str(outcome.failed) == "start chat-1 on B/3g.40gb@4"
    assert outcome.error is not None
    assert outcome.error.message == "the engine ended at once"
    assert len(outcome.not_done) == 8
    assert fleet.lowest == {"chat": 3.0}, "the old engine serves on"
    assert outcome.as_public()["ok"] is False

    broken = False
    again = await Executor(fleet, journal, FakeClock()).resume()
    assert again is not None
    assert again.ok
    assert journal.read() is None
    assert fleet.capacity() == {"chat": 3.0, "code": 7.0}


async def test_what_was_done_before_a_kill_is_not_done_again(tmp_path: Path) -> None:
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))

    class Gone(Exception):
        pass

    async def die_after_start(step: Step) -> None:
        if step.kind == "start":
            fleet.after = _nothing
            raise Gone

    async def _nothing(_: Step) -> None:
        return

    fleet.after = die_after_start
    journal = TransitionJournal(tmp_path / "transition.json")
    with pytest.raises(Gone):
        await Executor(fleet, journal, FakeClock()).begin(plan_transition(MOVE, (CHAT, CODE)))
    record = journal.read()
    assert record is not None
    assert [s.kind for s in record.transition.steps if s.number in record.done] == ["create"]
    outcome = await Executor(fleet, journal, FakeClock()).resume()
    assert outcome is not None
    assert outcome.ok
    starts = [str(s) for s in fleet.taken if s.kind == "start"]
    assert starts == ["start chat-1 on B/3g.40gb@4", "start code-0 on A/7g.80gb@0"]


async def test_a_plan_made_from_another_fleet_is_refused(tmp_path: Path) -> None:
    transition = plan_transition(MOVE, (CHAT, CODE))
    journal = TransitionJournal(tmp_path / "transition.json")
    changed = FakeFleet.of([gpu("A", ("1g.10gb@0", None)), gpu("B")])
    with pytest.raises(StalePlan, match="changed on the GPUs since the plan was made"):
        await Executor(changed, journal, FakeClock()).begin(transition)
    missing = FakeFleet.of([gpu("A", ("3g.40gb@0", "chat-0"))])
    with pytest.raises(StalePlan, match="GPU B, which is gone"):
        await Executor(missing, journal, FakeClock()).begin(transition)
    assert journal.read() is None


async def test_a_gpu_that_vanishes_on_the_way_stops_the_transition(tmp_path: Path) -> None:
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))

    async def lose(step: Step) -> None:
        if step.kind == "create":
            del fleet.gpus["B"]

    fleet.after = lose
    journal = TransitionJournal(tmp_path / "transition.json")
    outcome = await Executor(fleet, journal, FakeClock()).begin(plan_transition(MOVE, (CHAT, CODE)))
    assert isinstance(outcome.error, StalePlan)
    assert "GPU B does not answer any more" in outcome.error.message
    with pytest.raises(StalePlan, match="GPU B, which is gone"):
        await Executor(fleet, journal, FakeClock()).resume()
    assert fleet.lowest["chat"] == 3.0


async def test_one_transition_at_a_time(tmp_path: Path) -> None:
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))

    async def fail(_: Step) -> None:
        raise PlacementError("no")

    fleet.before = fail
    executor = Executor(fleet, TransitionJournal(tmp_path / "transition.json"), FakeClock())
    await executor.begin(plan_transition(MOVE, (CHAT, CODE)))
    with pytest.raises(StalePlan, match="another transition is under way, 9 of 9 steps are left"):
        await executor.begin(plan_transition(MOVE, (CHAT, CODE)))


async def test_nothing_to_do_leaves_no_trace(tmp_path: Path) -> None:
    same = plan(planned(gpu("A", ("1g.10gb@0", "chat-0")), ("1g.10gb@0", "chat-0")))
    journal = TransitionJournal(tmp_path / "transition.json")
    fleet = FakeFleet.of(g.gpu for g in same.gpus)
    outcome = await Executor(fleet, journal, FakeClock()).begin(plan_transition(same, (CHAT,)))
    assert outcome.ok
    assert outcome.done == ()
    assert not journal.path.exists()
    assert await Executor(fleet, journal, FakeClock()).resume() is None


@pytest.mark.parametrize("content", ["", "{}", '{"version": 2}', "[1]", "null"])
def test_a_damaged_journal_says_what_to_do(tmp_path: Path, content: str) -> None:
    journal = TransitionJournal(tmp_path / "transition.json")
    journal.path.write_text(content, encoding="utf-8")
    with pytest.raises(PlanError, match="cannot be read"):
        journal.read()


@dataclass(frozen=True, slots=True)
class FullDisk(TransitionJournal):
    """There is room for so many writes."""

    room: list[int] = field(default_factory=lambda: [0])

    def write(self, record: Record) -> None:
        if not self.room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.room[0] -= 1
        TransitionJournal.write(self, record)


async def test_without_room_for_the_journal_nothing_is_begun(tmp_path: Path) -> None:
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))
    with pytest.raises(PlanError, match="cannot be written down: No space left") as found:
        await Executor(fleet, FullDisk(tmp_path / "transition.json"), FakeClock()).begin(
            plan_transition(MOVE, (CHAT, CODE))
        )
    assert "Make room there" in str(found.value.remedy)
    assert fleet.taken == []


@pytest.mark.parametrize("room", range(1, 9))
async def test_a_disk_that_fills_up_on_the_way_stops_it_and_the_next_run_goes_on(tmp_path: Path, room: int) -> None:
    transition = plan_transition(MOVE, (CHAT, CODE))
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))
    journal = FullDisk(tmp_path / "transition.json", [room])
    outcome = await Executor(fleet, journal, FakeClock()).begin(transition)
    assert outcome.error is not None
    assert "cannot be written down" in outcome.error.message
    assert set(fleet.taken) == set(outcome.done), "what is told as done is what was done, noted or not"
    assert fleet.lowest["chat"] >= transition.guaranteed["chat"]
    journal.room[0] = 100
    resumed = await Executor(fleet, journal, FakeClock()).resume()
    assert resumed is not None
    assert resumed.ok
    assert fingerprint(fleet.state()) == transition.target
    assert not journal.path.exists()


async def test_what_the_system_refuses_fails_the_step_and_nothing_else(tmp_path: Path) -> None:
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))

    async def full(step: Step) -> None:
        if step.kind == "start":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "planned.json")

    fleet.before = full
    journal = TransitionJournal(tmp_path / "transition.json")
    outcome = await Executor(fleet, journal, FakeClock()).begin(plan_transition(MOVE, (CHAT, CODE)))
    assert outcome.failed is not None
    assert outcome.failed.kind == "start"
    assert outcome.error is not None
    assert (outcome.error.message, outcome.error.where) == (
        "the system refuses it: No space left on device",
        "planned.json",
    )
    record = journal.read()
    assert record is not None
    assert record.failed is not None


async def test_without_a_controller_seats_are_written_and_nothing_is_said_to_be_started_or_checked(
    tmp_path: Path,
) -> None:
    whole = plan_transition(MOVE, (CHAT, CODE))
    bare = without_engines(whole)
    kinds = {"start": "seat", "stop": "unseat"}
    left = [s for s in whole.steps if s.kind not in ("drain", "check")]
    assert [(s.kind, s.place, s.replica) for s in bare.steps] == [
        (kinds.get(s.kind, s.kind), s.place, s.replica) for s in left
    ]
    assert [s.number for s in bare.steps] == list(range(len(left)))
    new = {s.number: n for n, s in enumerate(left)}
    for before, after in zip(left, bare.steps, strict=True):
        assert set(after.after) >= {new[n] for n in before.after if n in new}, "no wait is lost"
    (drained,) = (s for s in whole.steps if s.kind == "drain" and s.after)
    (unseated,) = (s for s in bare.steps if s.kind == "unseat" and s.place == drained.place)
    seated = {s.number for s in bare.steps if s.kind == "seat" and s.demand == drained.demand}
    assert seated & set(unseated.after), "the old seat is given up after the new one is there"


async def test_a_stop_is_taken_again_after_a_kill_so_that_its_orders_are_forgotten(tmp_path: Path) -> None:
    """The engine had gone, the order to drain it was still there: another replica of its name would never take requests."""
    fleet = FakeFleet.of((g.gpu for g in MOVE.gpus), (CHAT, CODE))

    async def killed(step: Step) -> None:
        if step.kind == "stop":
            raise Killed

    fleet.after = killed
    journal = TransitionJournal(tmp_path / "transition.json")
    with pytest.raises(Killed):
        await Executor(fleet, journal, FakeClock()).begin(plan_transition(MOVE, (CHAT, CODE)))
    (stopped,) = (s for s in fleet.taken if s.kind == "stop")
    fleet.after = nothing
    resumed = await Executor(fleet, journal, FakeClock()).resume()
    assert resumed is not None
    assert resumed.ok
    assert fleet.taken.count(stopped) == 2
