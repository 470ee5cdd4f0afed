"""What gateways tell of demand, and what a controller makes of it: files, numbers of replicas, and the slices for them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from model_registry.sizing.throughput import THROUGHPUT_FILE, Throughput, ThroughputKey, ThroughputStore
from placement.autoscale import Signals
from placement.demand_slices import barred
from placement.figures import FiguresFile, GatewayFigures, ModelFigures, read_figures
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import SizedModel
from placement.reservations import RESERVATIONS_FILE, Reservations
from placement.scaling import Scaling
from placement.slices import Inventory, Slice, SliceKind
from placement.state import StatePaths

NOW = 1_000_000.0
SLICES = tuple(Slice(f"cpu-{i}", SliceKind.CPU, None, 2**30, cores=(i,)) for i in range(4))


def tell(directory: Path, process: str, at: float, **figures: float) -> None:
    row = ModelFigures.model_validate({"model": "a", **figures})
    FiguresFile(directory, process).write(GatewayFigures(at=at, models=(row,)))


# ---- figures


def test_gateways_add_up_and_of_latencies_the_worst_counts(tmp_path: Path) -> None:
    tell(tmp_path, "1", NOW, arrivals_per_second=1, waiting=2, in_flight=3, ttft_seconds=0.1, idle_seconds=9)
    tell(tmp_path, "2", NOW - 1, arrivals_per_second=2, waiting=1, in_flight=1, ttft_seconds=0.4, idle_seconds=0)
    assert read_figures(tmp_path, NOW) == {
        "a": Signals(arrivals_per_second=3, queued=3, running=4, ttft_seconds=0.4, itl_seconds=None, idle_seconds=0)
    }


def test_what_is_stale_or_damaged_does_not_count_and_what_is_forgotten_goes(tmp_path: Path) -> None:
    assert read_figures(tmp_path / "nowhere", NOW) is None
    tell(tmp_path, "hangs", NOW - 10, waiting=9)
    tell(tmp_path, "ended", NOW - 100, waiting=9)
    (tmp_path / "torn.json").write_text('{"at": 1e6, "models": [{"mo', encoding="utf-8")
    (tmp_path / "later.json").write_text(json.dumps({"version": 2, "at": NOW, "models": []}), encoding="utf-8")
    assert read_figures(tmp_path, NOW) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hangs.json", "later.json", "torn.json"]
    assert read_figures(tmp_path, NOW, fresh_seconds=20) == {"a": Signals(queued=9)}


def test_a_gateway_that_stops_takes_its_figures_along(tmp_path: Path) -> None:
    tell(tmp_path, "1", NOW)
    file = FiguresFile(tmp_path, "1")
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []


# ---- numbers


def config(**changes: object) -> PlacementConfig:
    model = {"name": "a", "source": "x", "replicas": {"min": 0, "max": 3}, "max_num_seqs": 4} | changes
    return PlacementConfig.model_validate(
        {
            "engine": {"command": ["engine", "{uds}"]},
            "fleet": {"autoscale": {"scale_up_after": "2s", "scale_down_after": "4s", "sleep_after": "10s"}},
            "models": [model],
        }
    )


class Controller:
    """The part of a controller that looks at demand, once a second."""

    def __init__(self, paths: StatePaths, *, now: float = 0.0, **changes: object) -> None:
        self.paths, self.now, self.config = paths, now, config(**changes)
        self.scaling = Scaling(paths)
        self.scaling.adopt(self.config)

    def after(self, seconds: int, **figures: float) -> int:
        for _ in range(seconds):
            self.now += 1
            if figures:
                tell(self.paths.figures, "1", NOW + self.now, **figures)
            self.scaling.look(self.config, now_seconds=self.now, wall_seconds=NOW + self.now)
        return self.scaling.numbers(self.config)["a"]


def test_a_request_wakes_load_adds_and_idleness_ends(tmp_path: Path) -> None:
    controller = Controller(StatePaths(tmp_path))
    assert controller.after(5, idle_seconds=100) == 0
    assert controller.after(1, waiting=1) == 1, "somebody waits"
    assert controller.after(59, waiting=9) == 1, "it was changed a moment ago"
    assert controller.after(3, waiting=9) == 3, "within the bounds"
    assert controller.after(64, idle_seconds=1) == 1
    assert controller.after(64, idle_seconds=100) == 0


def test_without_a_gateway_that_tells_anything_all_stays(tmp_path: Path) -> None:
    controller = Controller(StatePaths(tmp_path))
    assert controller.after(1, waiting=1) == 1
    assert controller.after(1000) == 1


def test_a_controller_goes_on_where_the_one_before_it_ended(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path)
    Controller(paths).after(1, waiting=3)
    decided = json.loads(paths.autoscale.read_bytes())["replicas"]["a"]
    assert decided >= 1
    assert Scaling(paths).numbers(config()) == {"a": decided}
    assert Scaling(paths).numbers(config(replicas=2)) == {}, "a fixed number is nobody's to decide on"
    assert Scaling(paths, on=False).numbers(config()) == {}
    paths.autoscale.write_text('{"replicas": [', encoding="utf-8")
    assert Scaling(paths).numbers(config(replicas={"min": 1, "max": 2})) == {"a": 1}


def test_what_a_plan_has_seated_is_the_least(tmp_path: Path) -> None:
    seated = config().model_copy(update={"seats": {"a-0": "cpu-0", "a-1": "cpu-1"}})
    assert Scaling(StatePaths(tmp_path)).numbers(seated) == {"a": 2}


# ---- slices


class Shelf:
    """A registry where every model fits everywhere."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


def goals(
    tmp_path: Path,
    demanded: dict[str, int],
    *models: dict[str, object],
    current: dict[str, str] | None = None,
    barred: frozenset[str] = frozenset(),
) -> Goals:
    raw = {"engine": {"command": ["engine", "{uds}"]}, "models": [{"source": "x"} | m for m in models]}
    return plan_goals(
        PlacementConfig.model_validate(raw),
        Inventory(SLICES),
        Shelf(),
        Workshop(StatePaths(tmp_path), {}),
        current=current,
        demanded=demanded,
        barred=barred,
    )


RANGE: dict[str, object] = {"name": "a", "replicas": {"min": 0, "max": 4}}


def seats(made: Goals) -> dict[str, str]:
    return {name: goal.slice.id for name, goal in made.replicas.items()}


def test_replicas_for_demand_come_after_those_that_are_configured(tmp_path: Path) -> None:
    made = goals(tmp_path, {"a": 4}, RANGE, {"name": "b", "replicas": 2})
    assert sorted(made.replicas) == ["a-0", "a-1", "b-0", "b-1"]
    assert made.unplaced == {}, "what demand would like besides is no fault of the configuration"


def test_a_new_model_gets_a_free_slice_before_one_that_serves_demand(tmp_path: Path) -> None:
    current = {"a-0": "cpu-0", "a-1": "cpu-1", "a-2": "cpu-2"}
    made = goals(tmp_path, {"a": 3}, RANGE, {"name": "b"}, current=current)
    assert seats(made) == current | {"b-0": "cpu-3"}
    crowded = goals(tmp_path, {"a": 3}, RANGE, {"name": "b", "replicas": 2}, current=current)
    assert set(seats(crowded)) >= {"b-0", "b-1"}
    assert len(crowded.replicas) == 4


def test_reserved_slices_are_nobodys_but_who_has_one_keeps_it(tmp_path: Path) -> None:
    not_for_demand = frozenset({"cpu-0", "cpu-1", "cpu-2"})
    made = goals(tmp_path, {"a": 4}, RANGE, current={"a-0": "cpu-0"}, barred=not_for_demand)
    assert seats(made) == {"a-0": "cpu-0", "a-1": "cpu-3"}


@given(number=st.integers(0, 9), fixed=st.integers(0, 4), used=st.permutations(range(4)))
def test_demand_never_takes_more_than_its_most_or_anothers_slice(number: int, fixed: int, used: list[int]) -> None:
    current = {f"a-{n}": f"cpu-{i}" for n, i in enumerate(used[: number % 5])}
    made = goals(Path("/nowhere"), {"a": number}, RANGE, {"name": "b", "replicas": fixed}, current=current)
    taken = list(seats(made).values())
    assert len(taken) == len(set(taken))
    mine = [name for name in made.replicas if name.startswith("a-")]
    assert len(mine) == min(number, 4, 4 - fixed)
    assert sum(name.startswith("b-") for name in made.replicas) == fixed


def test_reservations_bar_their_slices_and_a_damaged_list_bars_all(tmp_path: Path) -> None:
    paths, inventory = StatePaths(tmp_path), Inventory(SLICES)
    assert barred(config(), inventory, paths) == frozenset()
    Reservations(tmp_path / RESERVATIONS_FILE).add("cpu-2", "fine-tuning")
    assert barred(config(), inventory, paths) == {"cpu-2"}
    (tmp_path / RESERVATIONS_FILE).write_text("[", encoding="utf-8")
    assert barred(config(), inventory, paths) == {s.id for s in SLICES}


@pytest.mark.parametrize("field", ["arrivals_per_second", "waiting", "in_flight", "ttft_seconds", "idle_seconds"])
def test_figures_that_cannot_be_are_refused(tmp_path: Path, field: str) -> None:
    row = {"model": "a", field: -1}
    (tmp_path / "1.json").write_text(json.dumps({"at": NOW, "models": [row]}), encoding="utf-8")
    assert read_figures(tmp_path, NOW) is None


# ---- a dedicated tenant's replicas beside everybody else's


def apart(**changes: object) -> PlacementConfig:
    return config(**changes).model_copy(update={"pools": {"a": (None, "acme")}})


def test_each_pool_of_a_model_follows_its_own_demand(tmp_path: Path) -> None:
    paths, scaling = StatePaths(tmp_path), Scaling(StatePaths(tmp_path))
    scaling.adopt(apart())
    rows = [ModelFigures(model="a", waiting=1), ModelFigures(model="a@acme", idle_seconds=100)]
    for second in (1.0, 2.0):
        FiguresFile(paths.figures, "1").write(GatewayFigures(at=NOW + second, models=tuple(rows)))
        scaling.look(apart(), now_seconds=second, wall_seconds=NOW + second)
    assert scaling.numbers(apart()) == {"a": 1, "a@acme": 0}
    rows[1] = ModelFigures(model="a@acme", waiting=9)
    FiguresFile(paths.figures, "1").write(GatewayFigures(at=NOW + 3, models=tuple(rows)))
    scaling.look(apart(), now_seconds=3.0, wall_seconds=NOW + 3)
    assert scaling.numbers(apart()) == {"a": 1, "a@acme": 3}


def pooled(tmp_path: Path, demanded: dict[str, int], current: dict[str, str], **changes: object) -> Goals:
    made = apart(**changes)
    return plan_goals(
        made, Inventory(SLICES), Shelf(), Workshop(StatePaths(tmp_path), {}), current=current, demanded=demanded
    )


def test_replicas_of_a_pool_have_its_name_and_every_pool_its_least(tmp_path: Path) -> None:
    assert sorted(pooled(tmp_path, {"a": 1, "a@acme": 2}, {}).replicas) == ["a-0", "a@acme-0", "a@acme-1"]
    least = pooled(tmp_path, {}, {}, replicas={"min": 1, "max": 3})
    assert sorted(least.replicas) == ["a-0", "a@acme-0"]


def test_what_runs_for_demand_goes_on_under_its_own_number(tmp_path: Path) -> None:
    made = pooled(tmp_path, {"a": 2}, {"a-7": "cpu-2", "a-3": "cpu-0"})
    assert seats(made) == {"a-7": "cpu-2", "a-3": "cpu-0"}
    fewer = pooled(tmp_path, {"a": 1}, {"a-7": "cpu-2", "a-3": "cpu-0"})
    assert seats(fewer) == {"a-3": "cpu-0"}


# ---- what one replica bears


def record(
    rate: float, *, cores: int = 1, version: str | None = None, at: str = "2026-11-01T00:00:00+00:00"
) -> Throughput:
    key = ThroughputKey("x", "cpu", None, None, cores, 100, 50, {"ttft_seconds": 0.5}, version)
    return Throughput(key, "a", rate, None, 1.0, 1.0, 0.99, None, None, at)


def told(tmp_path: Path, **demand: object) -> tuple[Scaling, Goals]:
    asked = {"requests_per_second": 10, "prompt_tokens": 100, "output_tokens": 50} | demand
    made = goals(tmp_path, {"a": 1}, RANGE | {"demand": asked, "slo": {"ttft": "1s"}})
    scaling = Scaling(StatePaths(tmp_path), versions=lambda _: "0.33.0", now=lambda: datetime(2026, 11, 21, tzinfo=UTC))
    scaling.adopt(made.config, made)
    return scaling, made


def test_a_measured_capacity_decides_how_many_replicas_a_rate_takes(tmp_path: Path) -> None:
    scaling, made = told(tmp_path)
    row = scaling.rows(made)["a"]
    assert (row.requests_per_replica, row.capacity_source) == (None, "unknown")
    ThroughputStore(tmp_path / THROUGHPUT_FILE).put(record(2.5, version="0.33.0 (cpu)"))
    busy = ModelFigures(model="a", arrivals_per_second=7.0)
    FiguresFile(StatePaths(tmp_path).figures, "1").write(GatewayFigures(at=NOW, models=(busy,)))
    scaling.look(made.config, now_seconds=1.0, wall_seconds=NOW)
    row = scaling.rows(made)["a"]
    assert (row.requests_per_replica, row.capacity_source) == (2.5, "measured")
    assert row.capacity_reason == "measured on 1 core"
    assert row.replicas == 3, "7 requests/s at 2.5 each"


@pytest.mark.parametrize(
    ("kept", "demand", "said"),
    [
        (record(2.5, cores=4), {}, "on 4 cores, not on 1 core"),
        (record(2.5, version="0.32.0 (cpu)"), {}, "with vLLM 0.32.0 (cpu), 0.33.0 is used here"),
        (record(2.5, at="2026-01-01T00:00:00+00:00"), {}, "more than 90 days ago"),
        (record(2.5, at="long ago"), {}, "more than 90 days ago"),
        (record(2.5), {"prompt_tokens": 900}, "requests had 100 tokens in"),
    ],
)
def test_a_measurement_of_something_else_is_ignored_and_says_why(
    tmp_path: Path, kept: Throughput, demand: dict[str, object], said: str
) -> None:
    ThroughputStore(tmp_path / THROUGHPUT_FILE).put(kept)
    scaling, made = told(tmp_path, **demand)
    row = scaling.rows(made)["a"]
    assert (row.requests_per_replica, row.capacity_source) == (None, "unknown")
    assert said in row.ignored[0]


def test_a_damaged_list_of_measurements_takes_nothing_down(tmp_path: Path) -> None:
    (tmp_path / THROUGHPUT_FILE).write_text("{", encoding="utf-8")
    scaling, made = told(tmp_path)
    assert scaling.rows(made)["a"].capacity_source == "unknown"
