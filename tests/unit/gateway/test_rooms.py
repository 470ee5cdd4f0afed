"""Slices beyond the plan on simulated GPUs: where they may be made, and that a transition under way has the GPUs to itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from gateway.applying import apply_plan
from gateway.config import Config, load_config
from gateway.layouts import machine_of, seats
from gateway.planning import answer
from gateway.rooms import PlannedRooms
from model_registry.geometry import Placement
from placement.errors import PlacementError, StateLocked
from placement.nvml.partition import NvmlPartitioner
from placement.partition import plan as plan_layouts
from placement.transition import TransitionJournal
from placement.transition.journal import JOURNAL_FILE, Record
from placement.transition.steps import Place, Step


@pytest.fixture
def config(simulator_binding: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """One simulated GPU on which a replica has its slice by the plan."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    monkeypatch.setenv("SLICEWAY_NVML_STATE", "")
    monkeypatch.delenv("SLICEWAY_NVML_PRIVILEGE", raising=False)
    monkeypatch.setattr("gateway.layouts.NvmlPartitioner", lambda: NvmlPartitioner(simulator_binding))
    content = {
        "version": "v1",
        "state_dir": str(tmp_path / "state"),
        "fleet": {"discover": {"simulate": {"h100-sxm": 1}}, "partition": "planned"},
        "engine": {
            "command": ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]
        },
        "models": [{"name": "chat", "source": "simulated", "replicas": 1, "profile": "3g.40gb"}],
    }
    path = tmp_path / "sliceway.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    loaded = load_config(path)
    assert apply_plan(loaded, machine_of(loaded)).ok
    return loaded


def held(config: Config) -> set[str]:
    (gpu,) = machine_of(config).driver.observe()
    return {f"{gpu.uuid}/{i.name}" for i in gpu.instances}


def test_a_transition_under_way_has_the_gpus_to_itself_until_it_has_failed(config: Config) -> None:
    rooms, (own,) = PlannedRooms(lambda: config), (seats(config).read() or {}).values()
    room = rooms.find(own, ())
    assert room is not None
    assert room != own
    journal = TransitionJournal(config.state / JOURNAL_FILE)
    transition = answer(config, plan_layouts(machine_of(config).driver.observe(), ())).transition
    assert transition is not None
    step = Step(0, "create", Place(Place.parse(own).gpu, Placement.parse("1g.10gb@0")))
    record = Record(replace(transition, steps=(step,)), datetime(2026, 1, 1, tzinfo=UTC))
    journal.write(record)
    assert rooms.find(own, ()) is None
    with pytest.raises(StateLocked, match="a plan is being carried out"):
        rooms.make(room)
    assert held(config) == {own}
    journal.write(record.with_failure(0, PlacementError("no")))
    assert rooms.find(own, ()) == room
    rooms.make(room)
    assert held(config) == {own, room}
    assert rooms.give_back(room)
    assert held(config) == {own}
