"""Slices beyond the plan, for replicas that start beside the one they replace: when they are made, and when they go again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from model_registry.errors import ConfigError, SlicewayError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.errors import PlacementError, StateLocked
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import SizedModel
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.renewals import Renewals, Successor
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.spare_slices import SpareSlices
from placement.state import StatePaths

GPU = Gpu("GPU-0", 0, "H100", 80 * 2**30)
PLANNED = "GPU-0/1g.10gb@0"
MADE = "GPU-0/1g.10gb@1"
LOCKED = StateLocked("a change of layouts is at work already")
TORN = ConfigError("the list of seats is half a file")
REFUSED = PlacementError("the driver refused")


class Shelf:
    """A registry where every model fits everywhere."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


class Machine:
    """A machine room that has room for `room`, or raises `error` where it is to do something, and remembers what it did."""

    def __init__(self, room: str | None = MADE, error: SlicewayError | None = None, *, claimed: bool = False) -> None:
        self.room = room
        self.error = error
        self.claimed = claimed
        self.asked: list[tuple[str, Collection[str]]] = []
        self.cut: list[str] = []
        self.taken_away: list[str] = []

    def find(self, like: str, not_on: Collection[str]) -> str | None:
        self.asked.append((like, not_on))
        return self.room

    def make(self, slice_id: str) -> None:
        if self.error is not None:
            raise self.error
        self.cut.append(slice_id)

    def give_back(self, slice_id: str) -> bool:
        if self.error is not None:
            raise self.error
        if not self.claimed:
            self.taken_away.append(slice_id)
        return not self.claimed


class Scene:
    """Spare slices of one state directory, and what they told whoever works out goals."""

    def __init__(self, path: Path, machine: Machine | None) -> None:
        self.renewals = Renewals(StatePaths(path), contextlib.nullcontext)
        self.told: list[str] = []
        self.deciding = asyncio.Lock()
        self.spare = SpareSlices(
            machine,
            self.renewals,
            self.deciding,
            replan=self._replan,
            postpone=lambda: self.told.append("postponed"),
            changed=lambda: self.told.append("changed"),
        )

    async def _replan(self) -> None:
        async with self.deciding:
            self.told.append("planned anew")

    async def done(self) -> None:
        """Everything that was begun has ended."""
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        assert not self.spare.busy


def goals_of(
    path: Path, *, seats: Mapping[str, str] | None, kind: SliceKind = SliceKind.MIG, command: str = "engine"
) -> Goals:
    here = Slice(PLANNED, kind, "1g.10gb", 10 * 2**30, "MIG-0", GPU)
    models = [{"name": "chat", "source": "org/chat"}]
    config = PlacementConfig.model_validate(
        {"engine": {"command": [command, "{uds}"]}, "models": models, "seats": seats}
    )
    return plan_goals(config, Inventory((here,)), Shelf(), Workshop(StatePaths(path), {}))


SEATED = {"chat-0": PLANNED}


def in_use() -> Collection[str]:
    return {PLANNED}


async def test_one_is_made_for_a_specification_and_not_again(tmp_path: Path) -> None:
    machine = Machine()
    scene, goals = Scene(tmp_path, machine), goals_of(tmp_path, seats=SEATED)
    assert scene.spare.seek("chat-0", goals)
    assert scene.spare.busy
    await scene.done()
    assert (machine.asked, machine.cut) == ([(PLANNED, frozenset())], [MADE])
    assert scene.renewals.spare == (MADE,)
    assert scene.told == ["planned anew", "changed"]
    assert not scene.spare.seek("chat-0", goals), "the next one has it, or nobody"
    assert scene.spare.seek("chat-0", goals_of(tmp_path, seats=SEATED, command="other"))
    await scene.done()


async def test_its_id_is_written_down_while_nobody_else_writes_down_what_becomes_of_seats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, goals, held = Scene(tmp_path, Machine()), goals_of(tmp_path, seats=SEATED), list[bool]()
    made = scene.renewals.made

    def written(slice_id: str) -> None:
        held.append(scene.deciding.locked())
        made(slice_id)

    monkeypatch.setattr(scene.renewals, "made", written)
    assert scene.spare.seek("chat-0", goals)
    await scene.done()
    assert (held, scene.renewals.spare) == ([True], (MADE,))


async def test_none_is_made_where_nothing_is_planned_or_cut_or_nobody_makes_any(tmp_path: Path) -> None:
    machine = Machine()
    scene = Scene(tmp_path, machine)
    assert not scene.spare.seek("chat-0", goals_of(tmp_path, seats=None))
    assert not scene.spare.seek("chat-0", goals_of(tmp_path, seats=SEATED, kind=SliceKind.GPU))
    assert not Scene(tmp_path, None).spare.seek("chat-0", goals_of(tmp_path, seats=SEATED))
    assert machine.asked == []


async def test_where_there_is_no_room_none_is_sought_again(tmp_path: Path) -> None:
    scene, goals = Scene(tmp_path, Machine(room=None)), goals_of(tmp_path, seats=SEATED)
    assert scene.spare.seek("chat-0", goals)
    await scene.done()
    assert (scene.renewals.spare, scene.told) == ((), ["changed"])
    assert not scene.spare.seek("chat-0", goals)


@pytest.mark.parametrize(
    ("error", "again", "told"),
    [(LOCKED, True, ["postponed"]), (TORN, True, ["postponed"]), (REFUSED, False, ["changed"])],
    ids=["locked", "half a file", "refused"],
)
async def test_what_is_not_made_is_written_down_and_tried_again_only_where_somebody_was_in_the_way(
    tmp_path: Path, error: SlicewayError, again: bool, told: list[str]
) -> None:
    scene, goals = Scene(tmp_path, Machine(error=error)), goals_of(tmp_path, seats=SEATED)
    assert scene.spare.seek("chat-0", goals)
    await scene.done()
    assert (scene.renewals.spare, scene.told) == ((MADE,), told), "the driver may have made it all the same"
    assert scene.spare.seek("chat-0", goals) is again
    await scene.done()


async def test_they_are_given_back_when_all_is_settled_less_those_that_somebody_has(tmp_path: Path) -> None:
    machine = Machine()
    scene = Scene(tmp_path, machine)
    scene.spare.tidy_up(in_use, unsettled=True)
    assert scene.told == [], "there is nothing to give back"
    scene.renewals.made(MADE)
    scene.renewals.made(PLANNED)
    scene.spare.tidy_up(in_use, unsettled=True)
    assert (scene.told, scene.spare.busy) == (["postponed"], False)
    scene.spare.tidy_up(in_use, unsettled=False)
    await scene.done()
    assert machine.taken_away == [MADE]
    assert scene.renewals.spare == ()
    assert scene.told == ["postponed", "planned anew"]


@pytest.mark.parametrize("error", [LOCKED, TORN, REFUSED], ids=["locked", "half a file", "refused"])
async def test_what_cannot_be_given_back_is_remembered_and_tried_again(tmp_path: Path, error: SlicewayError) -> None:
    scene = Scene(tmp_path, Machine(error=error))
    scene.renewals.made(MADE)
    scene.spare.tidy_up(in_use, unsettled=False)
    await scene.done()
    assert (scene.renewals.spare, scene.told) == ((MADE,), ["postponed"])


async def test_one_that_somebody_has_a_claim_on_for_now_is_looked_at_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Machine(claimed=True))
    scene.renewals.made(MADE)
    scene.spare.tidy_up(in_use, unsettled=False)
    await scene.done()
    assert (scene.renewals.spare, scene.told) == ((MADE,), ["postponed"]), "later, and not at once again and again"


async def test_one_where_a_replica_is_for_a_while_is_kept_in_mind(tmp_path: Path) -> None:
    machine = Machine()
    seats = PlannedSeats(tmp_path / SEATS_FILE)
    seats.begin(SEATED)
    scene = Scene(tmp_path, machine)
    scene.renewals.made(MADE)
    one = Successor("chat-1", "chat-0", MADE, home=PLANNED)
    scene.renewals.begin(one)
    config = goals_of(tmp_path, seats=SEATED).config
    assert scene.renewals.finish(one, config) is not None
    scene.spare.tidy_up(in_use, unsettled=False)
    assert (scene.spare.busy, scene.renewals.spare, scene.renewals.away) == (False, (MADE,), {MADE: PLANNED})
    back = Successor("chat-0", "chat-1", PLANNED)
    scene.renewals.begin(back)
    assert scene.renewals.finish(back, config.model_copy(update={"seats": seats.read()})) is not None
    scene.spare.tidy_up(in_use, unsettled=False)
    await scene.done()
    assert (machine.taken_away, scene.renewals.spare, scene.renewals.away) == ([MADE], (), {})


async def test_giving_back_waits_for_goals_that_are_being_worked_out_and_can_be_given_up(tmp_path: Path) -> None:
    machine = Machine()
    scene = Scene(tmp_path, machine)
    scene.renewals.made(MADE)
    async with scene.deciding:
        scene.spare.tidy_up(in_use, unsettled=False)
        await asyncio.sleep(0)  # it begins, and waits
        await scene.spare.stop()
    assert (machine.taken_away, scene.spare.busy) == ([], False)
    assert scene.renewals.spare == (MADE,), "the next controller gives it back"
