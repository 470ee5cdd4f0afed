"""Engines replaced beside what serves, walked step by step with kills anywhere: nothing is missing where a slice is free."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import stem_of
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import SizedModel
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.renewals import Renewals, Successor, fresh_name, place_beside, with_successors
from placement.rolling import Standing, next_turn
from placement.slices import Inventory, Slice, SliceKind
from placement.state import StatePaths


class Shelf:
    """A registry where every model fits everywhere."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


@dataclass
class Engine:
    """One engine: where it is, what it runs by, and whether it serves."""

    slice_id: str
    spec_hash: str
    serves: bool


@dataclass
class Fleet:
    """Engines that outlive controllers, and the files that these leave. One controller at a time walks it."""

    root: Path
    replicas: dict[str, int]
    slices: tuple[Slice, ...]
    planned: bool
    version: int = 0
    engines: dict[str, Engine] = field(default_factory=dict)
    in_turn: str | None = None

    def __post_init__(self) -> None:
        self.seats = PlannedSeats(self.root / SEATS_FILE)
        self.control()
        for name, goal in self.goals.replicas.items():
            self.engines[name] = Engine(goal.slice.id, str(goal.spec_hash), serves=True)
        if self.planned:
            self.seats.begin({name: engine.slice_id for name, engine in self.engines.items()})
        self.control()

    @property
    def config(self) -> PlacementConfig:
        models = [{"name": m, "source": f"org/{m}", "replicas": n} for m, n in self.replicas.items()]
        engine = {"command": ["engine", "{uds}", str(self.version)]}
        config = PlacementConfig.model_validate({"engine": engine, "models": models})
        return config.model_copy(update={"seats": self.seats.read() if self.planned else None})

    def control(self) -> None:
        """A controller starts: it takes over what it finds, and ends what nobody asks for."""
        self.renewals = Renewals(StatePaths(self.root), contextlib.nullcontext)
        self.renewals.find(set(self.engines), self.config)
        self.look()
        for name in set(self.engines) - set(self.goals.replicas):
            del self.engines[name]

    def look(self) -> Goals:
        """What should run, as the controller works it out."""
        current = {name: e.slice_id for name, e in self.engines.items()}
        workshop = Workshop(StatePaths(self.root), {})
        inventory = Inventory(self.slices)
        goals = plan_goals(
            self.config, inventory, Shelf(), workshop, current=current, names=self.renewals.names
        ).complete()
        hashes = {name: e.spec_hash for name, e in self.engines.items()}
        self.goals = with_successors(goals, self.renewals.under_way, hashes, (), workshop)
        self.renewals.give_up(self.goals)
        return self.goals

    def step(self) -> bool:
        """The next thing that a controller does, whichever it is; False if there is nothing to do."""
        goals = self.look()
        for one in self.renewals.under_way:
            if self.engines.get(one.replica, Engine("", "", serves=False)).serves:
                assert self.renewals.finish(one, self.config) is not None
                return True
        for name in sorted(set(self.engines) - set(goals.replicas)):
            del self.engines[name]
            return True
        for name, goal in goals.replicas.items():
            if name not in self.engines:
                self.engines[name] = Engine(goal.slice.id, str(goal.spec_hash), serves=False)
                return True
            if not self.engines[name].serves:
                self.engines[name].serves = True
                return True
        return self._turn(goals)

    def _turn(self, goals: Goals) -> bool:
        hashes = {name: e.spec_hash for name, e in self.engines.items()}
        rows = [
            Standing(n, g.model, g.spec_hash != hashes[n], self.engines[n].serves) for n, g in goals.replicas.items()
        ]
        self.in_turn = next_turn(rows, self.in_turn)
        if self.in_turn is None or goals.replicas[self.in_turn].spec_hash == hashes[self.in_turn]:
            return False
        target = place_beside(goals, self.in_turn, {e.slice_id for e in self.engines.values()})
        assert target is not None, "a slice was free before, and one is given back for each that is taken"
        self.renewals.begin(
            Successor(fresh_name(self.in_turn, {*goals.replicas, *self.engines}), self.in_turn, target.id)
        )
        return True

    def check(self, guaranteed: Mapping[str, int]) -> None:
        """What is promised, at every moment."""
        serving = self.serving()
        assert all(serving[model] >= number for model, number in guaranteed.items()), serving
        places = [e.slice_id for e in self.engines.values()]
        assert len(set(places)) == len(places), "one engine in each place"

    def serving(self) -> dict[str, int]:
        return {m: sum(e.serves for n, e in self.engines.items() if stem_of(n) == m) for m in self.replicas}


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.sampled_from(("chat", "code")), st.integers(1, 3), min_size=1),
    st.booleans(),
    st.integers(1, 2),
    st.lists(st.sampled_from(("", "", "kill", "settings")), max_size=24),
)
def test_nothing_is_missing_while_a_slice_is_free_whoever_is_killed(
    replicas: dict[str, int], planned: bool, free: int, events: list[str]
) -> None:
    slices = tuple(
        Slice(f"cpu-{i}", SliceKind.CPU, None, 2**30, cores=(i,)) for i in range(sum(replicas.values()) + free)
    )
    with tempfile.TemporaryDirectory() as directory:
        fleet = Fleet(Path(directory), replicas, slices, planned)
        fleet.version = 1
        for event in events:
            if event == "kill":
                fleet.control()
            elif event == "settings":
                fleet.version += 1
            else:
                fleet.step()
            fleet.check(replicas)
        steps = 0
        while fleet.step():
            fleet.check(replicas)
            steps += 1
            assert steps < 12 * len(slices), "it comes to an end"
        assert not fleet.step()
        assert fleet.serving() == replicas
        assert len(fleet.engines) == sum(replicas.values())
        assert all(e.spec_hash == fleet.goals.replicas[n].spec_hash for n, e in fleet.engines.items())
        assert fleet.renewals.under_way == ()
