from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from model_registry.errors import ConfigError, ModelNotFound
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.errors import EngineMissing, NoSliceApart
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import SizedModel
from placement.publish import routing_table
from placement.replicas.parts import View
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.state import StatePaths
from placement.table import ReplicaState, RoutingTable

NOW = datetime(2026, 11, 21, tzinfo=UTC)
SLICES = tuple(Slice(f"cpu-{i}", SliceKind.CPU, None, 2**30, cores=(i,)) for i in range(3))


class Shelf:
    """A registry where every model fits everywhere, but those that are missing."""

    def __init__(self, *missing: str) -> None:
        self.missing = missing

    def describe(self, model: ModelConfig) -> SizedModel:
        if model.name in self.missing:
            raise ModelNotFound(f"no {model.name}", where=f"models.{model.name}.source")
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


def plan(
    tmp_path: Path,
    *models: dict[str, object],
    missing: tuple[str, ...] = (),
    current: dict[str, str] | None = None,
    slices: tuple[Slice, ...] = SLICES,
    seats: dict[str, str] | None = None,
    demanded: dict[str, int] | None = None,
    **engine: object,
) -> Goals:
    settings = {"command": ["engine", "{uds}", "{served_name}"], **engine}
    config = PlacementConfig.model_validate({"engine": settings, "models": models, "seats": seats})
    workshop = Workshop(StatePaths(tmp_path), {}, find_python=_missing_engine)
    return plan_goals(config, Inventory(slices), Shelf(*missing), workshop, current=current, demanded=demanded)


def _missing_engine(kind: str, configured: str | None) -> Path:
    raise EngineMissing(f"no vLLM for {kind}", remedy="sliceway engine install")


A = {"name": "a", "source": "org/a", "replicas": 2}
B = {"name": "b", "source": "org/b"}


def test_every_replica_gets_a_slice_and_a_way_to_be_started(tmp_path: Path) -> None:
    goals = plan(tmp_path, A, B).complete()
    assert {name: g.slice.id for name, g in goals.replicas.items()} == {"a-0": "cpu-0", "a-1": "cpu-1", "b-0": "cpu-2"}
    assert all(g.spec and g.spec.argv[-1] == g.model for g in goals.replicas.values())


def test_a_model_that_cannot_be_read_takes_nothing_from_the_others(tmp_path: Path) -> None:
    goals = plan(tmp_path, A, B, missing=("a",))
    assert set(goals.replicas) == {"b-0"}
    assert set(goals.unplaced) == {"a-0", "a-1"}
    with pytest.raises(ModelNotFound):
        goals.complete()


def test_its_engines_that_run_keep_their_slices(tmp_path: Path) -> None:
    goals = plan(tmp_path, A, B, missing=("a",), current={"a-0": "cpu-0"})
    assert goals.replicas["b-0"].slice.id == "cpu-1"


def test_without_an_engine_every_replica_says_what_to_install(tmp_path: Path) -> None:
    goals = plan(tmp_path, B, command=())
    assert isinstance(goals.unplaced["b-0"], EngineMissing)


def test_a_wrong_command_is_the_configurations_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="placeholder"):
        plan(tmp_path, B, command=["engine", "{sock}"])


# ---- apart

CARDS = tuple(Gpu(f"GPU-{n}", n, "H100", 80 * 2**30) for n in range(2))
CUT = tuple(
    Slice(f"{c.uuid}/1g.10gb@{n}", SliceKind.MIG, "1g.10gb", 2**33, f"MIG-{c.index}-{n}", c)
    for c in CARDS
    for n in range(2)
)


def cards_of(goals: Goals) -> dict[str, str]:
    return {name: g.slice.gpu.uuid for name, g in goals.replicas.items() if g.slice.gpu}


def test_replicas_are_kept_apart_on_one_machine_as_in_a_cluster(tmp_path: Path) -> None:
    def of(spread: str, **more: Any) -> Goals:
        return plan(tmp_path, A | {"replicas": 3, "spread": spread}, slices=CUT, **more)

    assert of("none").unplaced == {}
    goals = of("gpus")
    assert cards_of(goals) == {"a-0": "GPU-0", "a-1": "GPU-1"}
    assert isinstance(goals.unplaced["a-2"], NoSliceApart)
    assert cards_of(of("gpus", current={"a-0": CUT[3].id}))["a-0"] == "GPU-1", "who runs stays"
    nodes = of("nodes")
    assert list(nodes.replicas) == ["a-0"]
    assert "spread: gpus or" in str(nodes.unplaced["a-1"])
    seats = {"a-0": CUT[0].id, "a-1": CUT[1].id}
    assert plan(tmp_path, A | {"spread": "gpus"}, slices=CUT, seats=seats).unplaced == {}, "who plans has decided"


def test_what_comes_for_demand_keeps_apart_too(tmp_path: Path) -> None:
    model = {"name": "a", "source": "org/a", "replicas": {"min": 1, "max": 3}, "spread": "gpus"}
    goals = plan(tmp_path, model, slices=CUT, demanded={"a": 3})
    assert cards_of(goals) == {"a-0": "GPU-0", "a-1": "GPU-1"}
    assert goals.unplaced == {}, "it is left out where there is no place"
    planned = plan(tmp_path, model, slices=CUT, demanded={"a": 3}, seats={"a-0": CUT[0].id})
    assert cards_of(planned) == {"a-0": "GPU-0", "a-1": "GPU-1"}, "also beside those that a plan has seated"


# ---- publishing


def test_the_table_tells_why_replicas_have_no_slice(tmp_path: Path) -> None:
    goals = plan(tmp_path, A | {"replicas": 4}, B | {"replicas": 0})
    table = routing_table(goals, views(goals, a_0=ReplicaState.READY), RoutingTable(generation=0), NOW)  # type: ignore[arg-type]
    (a, b) = table.models
    assert list(a.unplaced) == ["a-3"]
    assert "no slice is left for 'a-3'" in a.unplaced["a-3"]
    assert b.unplaced == {}


def views(goals: Goals, **states: ReplicaState) -> list[tuple[object, View]]:
    return [(goals.replicas[n.replace("_", "-")], View(s, NOW, endpoint="unix:/x")) for n, s in states.items()]


def test_the_table_tells_who_serves_and_which_slices_are_idle(tmp_path: Path) -> None:
    goals = plan(tmp_path, A)
    table = routing_table(
        goals, views(goals, a_0=ReplicaState.READY, a_1=ReplicaState.STARTING), RoutingTable(generation=6), NOW
    )  # type: ignore[arg-type]
    assert table.generation == 7
    assert [r.replica for r in table.ready("a")] == ["a-0"]
    assert [s.id for s in table.idle] == ["cpu-2"]
    assert table.models[0].max_model_len == 512
    assert table.models[0].created == int(NOW.timestamp())


def test_a_table_that_says_the_same_is_the_same(tmp_path: Path) -> None:
    goals = plan(tmp_path, A)
    seen = views(goals, a_0=ReplicaState.READY)
    first = routing_table(goals, seen, RoutingTable(generation=0), NOW)  # type: ignore[arg-type]
    later = datetime(2027, 1, 1, tzinfo=UTC)
    assert routing_table(goals, seen, first, later) == first, "a model's age does not change with the clock"  # type: ignore[arg-type]
    moved = [(goals.replicas["a-0"], replace(seen[0][1], state=ReplicaState.FAILED, reason="why"))]
    second = routing_table(goals, moved, first, later)
    assert second.generation == first.generation + 1
    assert second.replicas[0].reason == "why"


def test_a_replica_that_has_stopped_is_in_no_table(tmp_path: Path) -> None:
    goals = plan(tmp_path, B)
    table = routing_table(goals, views(goals, b_0=ReplicaState.STOPPED), RoutingTable(generation=0), NOW)  # type: ignore[arg-type]
    assert table.replicas == ()
    assert len(table.idle) == 3
