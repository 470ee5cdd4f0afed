"""What becomes of engines that run by earlier settings, told before it happens: places, turns, seconds and promises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.changeover import Changeover, Circumstances, RunningEngine, changeover
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import SizedModel
from placement.planner.types import ModelDemand, Option
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.state import StatePaths
from placement.transition.forecast import Timings

H100 = load_catalogue().product("h100-sxm")
GPU = Gpu("A", 0, H100.name, 80 * 2**30)
TAKES = Timings(drain_seconds=10.0, stop_seconds=2.0, check_seconds=1.0)
IN_PLACE_SECONDS = 10.0 + 2.0 + 20.0 + 1.0


class Shelf:
    """A registry where every model fits everywhere."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


def goals_of(path: Path, slices: int, replicas: int, *, seats: bool = False, **model: Any) -> Goals:
    there = tuple(Slice(f"A/1g.10gb@{n}", SliceKind.MIG, "1g.10gb", 10 * 2**30, f"MIG-{n}", GPU) for n in range(slices))
    content = {
        "engine": {"command": ["engine", "{uds}"]},
        "models": [{"name": "chat", "source": "org/chat", "replicas": replicas} | model],
        "seats": {f"chat-{n}": f"A/1g.10gb@{n}" for n in range(replicas)} if seats else None,
    }
    return plan_goals(
        PlacementConfig.model_validate(content), Inventory(there), Shelf(), Workshop(StatePaths(path), {})
    )


def told(
    goals: Goals,
    *,
    running: Mapping[str, RunningEngine] | None = None,
    held: Mapping[str, str] | None = None,
    demand: ModelDemand | None = None,
) -> Changeover:
    earlier = running if running is not None else {name: RunningEngine("earlier") for name in goals.replicas}
    demands = {demand.name: demand} if demand is not None else {}
    about = Circumstances(lambda *_: (20.0, "measured"), TAKES, held or {}, demands=demands)
    return changeover(goals, earlier, about)


@pytest.mark.parametrize("seats", [False, True])
def test_without_room_one_after_the_other_is_missing(tmp_path: Path, seats: bool) -> None:
    found = told(goals_of(tmp_path, 2, 2, seats=seats), demand=ModelDemand("chat", "chat", (), replicas=2))
    assert [(r.replica, r.how, r.slice_id) for r in found.replacements] == [
        ("chat-0", "in_place", "A/1g.10gb@0"),
        ("chat-1", "in_place", "A/1g.10gb@1"),
    ]
    assert [(r.serving, r.missing, r.dip_seconds) for r in found.replacements] == [(2, 1, IN_PLACE_SECONDS)] * 2
    assert [r.begins_seconds for r in found.replacements] == [0.0, IN_PLACE_SECONDS]
    assert found.seconds == 2 * IN_PLACE_SECONDS
    (model,) = found.undercut
    assert (model.before, model.lowest, model.guaranteed, model.then) == (2.0, 1.0, 2.0, 2.0)
    assert model.dip_seconds == 2 * IN_PLACE_SECONDS
    public = found.as_public()
    assert public["models"] == [model.as_public() | {"guarantee_kept": False}]


def test_a_single_one_is_away_meanwhile(tmp_path: Path) -> None:
    found = told(goals_of(tmp_path, 1, 1))
    (row,), (model,) = found.replacements, found.undercut
    assert (row.serving, row.missing, row.start_seconds, row.start_source) == (1, 1, 20.0, "measured")
    assert (model.lowest, model.guaranteed) == (0.0, 1.0)


def test_with_a_slice_to_spare_nothing_is_missing_and_the_next_one_waits_until_it_is_left(tmp_path: Path) -> None:
    found = told(goals_of(tmp_path, 3, 2, seats=True))
    assert [(r.how, r.slice_id) for r in found.replacements] == [("beside", "A/1g.10gb@2"), ("beside", "A/1g.10gb@0")]
    assert [r.dip_seconds for r in found.replacements] == [0.0, 0.0]
    assert [r.begins_seconds for r in found.replacements] == [0.0, 21.0 + 10.0 + 2.0]
    assert found.seconds == 33.0 + 21.0
    assert found.undercut == ()
    assert [(m.lowest, m.dip_seconds) for m in found.models] == [(2.0, 0.0)]


def test_a_rate_with_head_room_is_kept_with_one_less(tmp_path: Path) -> None:
    option = Option(H100.name, "1g.10gb", capacity=2.0)
    for rate, kept in ((4.0, True), (4.5, False)):
        demand = ModelDemand("chat", "chat", (option,), rate=rate)
        found = told(goals_of(tmp_path, 3, 3), demand=demand)
        (model,) = found.models
        assert (model.before, model.lowest, model.guaranteed) == (6.0, 4.0, rate)
        assert (found.undercut == ()) is kept


def test_what_stays_where_it_is_says_why(tmp_path: Path) -> None:
    goals = goals_of(tmp_path, 2, 1)
    (row,) = told(goals, held={"chat-0": "it is under orders of an operator"}).replacements
    assert (row.how, row.reason, row.missing) == ("in_place", "it is under orders of an operator", 1)
    (row,) = told(goals, running={"chat-0": RunningEngine("earlier", serves=False)}).replacements
    assert (row.how, row.missing, row.dip_seconds) == ("in_place", 0, 0.0)


def test_who_runs_by_the_newest_settings_or_not_at_all_is_left_alone(tmp_path: Path) -> None:
    goals = goals_of(tmp_path, 2, 2)
    right = {name: RunningEngine(str(goal.spec_hash)) for name, goal in goals.replicas.items()}
    assert not told(goals, running=right)
    assert not told(goals, running={})
    assert told(goals, running={}).as_public() == {"replacements": [], "seconds": 0.0, "models": []}
    (row,) = told(goals, running=right | {"chat-1": RunningEngine("earlier")}).replacements
    assert row.replica == "chat-1"
