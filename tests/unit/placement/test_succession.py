"""Replicas replaced beside what serves, by the real rules on engines that are none, with the controller killed before every write."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import placement.planned_seats
from model_registry.atomic import write_atomically
from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.accepted import AcceptedConfig
from placement.changeover import Changeover, Circumstances, RunningEngine, changeover
from placement.crew import Crew
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.gpus import GpuState
from placement.launch import SizedModel
from placement.orders import Orders
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.planner.types import FleetGpu, Instance
from placement.renewals import RENEWALS_FILE, Renewals, RenewalsFile, Renewed, with_successors
from placement.replicas.parts import Goal
from placement.replicas.replica import Replica
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.spare_slices import SpareSlices
from placement.state import StatePaths
from placement.succession import Succession
from placement.table import ReplicaState
from placement.transition.room import room_for
from placement.transition.steps import Place
from placement.turns import Turns

H100 = load_catalogue().product("h100-sxm")
MOST_STEPS = 200


class Killed(BaseException):
    """The controller is gone at this point."""


class Shelf:
    """A registry where every model fits everywhere."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(True, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


def slice_at(place: str) -> Slice:
    gpu, _, placement = place.partition("/")
    profile = placement.partition("@")[0]
    gib = int(profile.partition(".")[2].removesuffix("gb"))
    return Slice(place, SliceKind.MIG, profile, gib * 2**30, f"MIG-{place}", Gpu(gpu, ord(gpu), H100.name, 80 * 2**30))


@dataclass
class Machine:
    """GPUs whose slices outlive every controller. `before_write` is called before anything is changed that outlives one."""

    slices: dict[str, Slice]
    seats: PlannedSeats
    gpus: str = "AB"
    cuts: bool = True
    before_write: Callable[[], None] = lambda: None

    def fleet(self) -> list[FleetGpu]:
        taken = {there: name for name, there in (self.seats.read() or {}).items()}

        def instance(there: str) -> Instance:
            placement, who = Placement.parse(there.partition("/")[2]), taken.get(there)
            return Instance(placement, who, who.rpartition("-")[0] if who else None)

        return [
            FleetGpu(g, H100.name, H100, instances=tuple(instance(s) for s in self.slices if s.startswith(g)))
            for g in self.gpus
        ]

    def inventory(self) -> Inventory:
        gpus = tuple(GpuState(g, ord(g), "H100", H100.name, 80 * 2**30, 80 * 2**30, "580") for g in self.gpus)
        return Inventory(tuple(self.slices[s] for s in sorted(self.slices)), gpus=gpus)

    def find(self, like: str, not_on: Collection[str]) -> str | None:
        place = room_for(self.fleet(), Place.parse(like), not_on=not_on, beyond=True) if self.cuts else None
        return place.slice_id if place is not None else None

    def make(self, slice_id: str) -> None:
        self.before_write()
        self.slices[slice_id] = slice_at(slice_id)

    def give_back(self, slice_id: str) -> bool:
        if slice_id in (self.seats.read() or {}).values():
            return True
        self.before_write()
        self.slices.pop(slice_id, None)
        return True


@dataclass
class Engine:
    """A replica with an engine that is none."""

    goal: Goal
    running_hash: str | None
    serves: bool = False

    @property
    def view(self) -> Any:
        return SimpleNamespace(state=ReplicaState.READY if self.serves else ReplicaState.STARTING)

    def reconfigure(self, goal: Goal, _: object) -> None:
        self.goal = goal


@dataclass
class Hands:
    """What `placement.crew.Crew` is to those who replace replicas. `ended` are those that were ended in their places."""

    replicas: dict[str, Engine]
    goals: Goals | None = None
    orders: Orders = field(default_factory=Orders)
    leaving: dict[str, bool] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    @property
    def occupied(self) -> set[str]:
        return {r.goal.slice.id for r in self.replicas.values()}

    @property
    def in_use(self) -> set[str]:
        goals = self.goals.replicas.values() if self.goals else ()
        return {g.slice.id for g in goals} | self.occupied

    def launch(self, goal: Goal) -> None:
        self.replicas[goal.replica] = Engine(goal, goal.spec_hash)

    def restart(self, goal: Goal) -> None:
        self.ended.append(goal.replica)
        self.launch(goal)

    def dismiss(self, replica: Engine, *, gone: bool) -> None:
        assert gone
        self.leaving[replica.goal.replica] = True


class Site:
    """One machine with one planned model, and the controllers that work there one after the other."""

    def __init__(self, root: Path, profile: str, *starts: int, idle: tuple[str, ...] = (), cuts: bool = True) -> None:
        self.paths = StatePaths(root)
        self.workshop = Workshop(self.paths, {})
        planned = [f"A/{profile}@{start}" for start in starts]
        seats = PlannedSeats(root / SEATS_FILE)
        self.machine = Machine({s: slice_at(s) for s in (*planned, *idle)}, seats, cuts=cuts)
        self.number = len(starts)
        self.version = 0
        seats.begin({f"chat-{n}": place for n, place in enumerate(planned)})
        self.told: list[tuple[str, str]] = []
        self.engines: dict[str, Engine] = {}
        self.control()
        for engine in self.engines.values():
            engine.serves = True

    @property
    def config(self) -> PlacementConfig:
        models = [{"name": "chat", "source": "org/chat", "replicas": self.number}]
        engine = {"command": ["engine", "{uds}", str(self.version)]}
        config = PlacementConfig.model_validate({"engine": engine, "models": models})
        return config.model_copy(update={"seats": self.machine.seats.read()})

    @property
    def serving(self) -> int:
        return sum(e.serves for n, e in self.engines.items() if n not in self.crew.leaving)

    def control(self) -> None:
        """A controller starts, finds engines and files, and ends what nobody asks for."""
        self.crew = Hands(self.engines)
        self.renewals = Renewals(self.paths, contextlib.nullcontext)
        self.spare = SpareSlices(
            self.machine, self.renewals, asyncio.Lock(), replan=self.replan, postpone=lambda: None, changed=lambda: None
        )
        self.succession = Succession(
            cast(Crew, self.crew),
            self.renewals,
            self.spare,
            self.workshop,
            accepted=AcceptedConfig(self.paths.root / "accepted.json"),
            adopt=self.adopt,
            postpone=lambda: None,
        )
        self.turns = Turns(cast(Mapping[str, Replica], self.engines), self.crew.leaving)
        config = self.renewals.find(set(self.engines), self.config)
        assert config.seats == self.machine.seats.read()
        self.take_over()

    def take_over(self) -> None:
        """The configuration as it is by now."""
        goals = self.look()
        self.adopt(goals)
        for name in sorted(set(self.engines) - set(goals.replicas)):
            del self.engines[name]
            self.crew.leaving.pop(name, None)
        for name, goal in goals.replicas.items():
            if name in self.engines:
                self.engines[name].goal = goal
            else:
                self.crew.launch(goal)

    def look(self) -> Goals:
        current = {n: e.goal.slice.id for n, e in self.engines.items()}
        hashes = {n: str(e.running_hash) for n, e in self.engines.items()}
        goals = plan_goals(self.config, self.machine.inventory(), Shelf(), self.workshop, current=current)
        return with_successors(goals.complete(), self.renewals.under_way, hashes, (), self.workshop, self.renewals.away)

    def adopt(self, goals: Goals) -> None:
        self.crew.goals = goals
        self.renewals.give_up(goals)

    async def replan(self) -> None:
        self.adopt(self.look())

    @property
    def done(self) -> bool:
        """Whether nothing is to be replaced, nobody away, and nothing left over."""
        assert self.crew.goals is not None
        unsettled = self.renewals.under_way or self.crew.leaving or self.turns.outdated(self.crew.goals)
        return not (unsettled or self.renewals.away or self.renewals.spare) and self.serving == len(self.engines)

    async def step(self) -> None:
        """Whatever is next: an engine is gone, or serves, or the controller does something."""
        assert self.crew.goals is not None
        if self.crew.leaving:
            name = self.crew.leaving.popitem()[0]
            del self.engines[name]
        for engine in self.engines.values():
            engine.serves = True
        for one in self.renewals.under_way:
            before = self.engines[one.of].goal.slice.id
            await self.succession.hand_over(one)
            self.told.append((f"{before} beside", one.slice_id))
        for name in self.turns.now(self.crew.goals):
            ended = len(self.crew.ended)
            self.crew.goals = self.succession.renew(name, self.crew.goals)
            self.told += [("in place", self.engines[n].goal.slice.id) for n in self.crew.ended[ended:]]
        unsettled = self.renewals.under_way or self.crew.leaving or self.turns.outdated(self.crew.goals)
        if self.renewals.away and not unsettled:
            self.crew.goals = self.succession.come_home(self.crew.goals)
            unsettled = self.renewals.under_way
        self.spare.tidy_up(lambda: self.crew.in_use, unsettled=bool(unsettled))
        if self.spare.busy:
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    async def settle(self, guaranteed: int) -> None:
        for _ in range(MOST_STEPS):
            if self.done:
                return
            await self.step()
            assert self.serving >= guaranteed
        pytest.fail("it does not come to an end")

    def expect_as_planned(self, *idle: str) -> None:
        """Every engine by the newest settings, where its seat is, and no slice that nobody has, but for `idle`."""
        assert self.crew.goals is not None
        assert {n: e.goal.slice.id for n, e in self.engines.items()} == self.machine.seats.read()
        assert all(e.running_hash == self.crew.goals.replicas[n].spec_hash for n, e in self.engines.items())
        assert set(self.machine.slices) == {*(self.machine.seats.read() or {}).values(), *idle}
        assert all(there.startswith("A/") for there in (self.machine.seats.read() or {}).values()), "no GPU more"
        assert len(self.engines) == self.number
        assert not (self.paths.root / RENEWALS_FILE).exists()


FLEETS: dict[str, Callable[[Path], Site]] = {
    "room on its GPU": lambda root: Site(root, "1g.10gb", 0, 1, 2),
    "a slice left idle on its GPU": lambda root: Site(root, "1g.10gb", 0, 1, idle=("A/1g.10gb@3",), cuts=False),
    "room on a GPU that is not in use": lambda root: Site(root, "3g.40gb", 0, 4),
    "an idle slice on a GPU that is not in use": lambda root: Site(
        root, "3g.40gb", 0, 4, idle=("B/3g.40gb@0",), cuts=False
    ),
    "a larger idle slice": lambda root: Site(root, "2g.20gb", 0, 2, 4, idle=("B/4g.40gb@0",), cuts=False),
}
IDLE = {
    "a slice left idle on its GPU": 1,
    "an idle slice on a GPU that is not in use": 1,
    "a larger idle slice": 1,
}


def idle_of(site: Site) -> tuple[str, ...]:
    return tuple(set(site.machine.slices) - set((site.machine.seats.read() or {}).values()))


@pytest.mark.parametrize("fleet", FLEETS)
async def test_nothing_is_missing_and_everything_is_as_planned_again(tmp_path: Path, fleet: str) -> None:
    site = FLEETS[fleet](tmp_path)
    site.version = 1
    site.take_over()
    await site.settle(site.number)
    assert site.crew.ended == []
    assert len(idle_of(site)) == IDLE.get(fleet, 0)
    site.expect_as_planned(*idle_of(site))


async def test_where_there_is_no_place_they_are_replaced_in_their_own(tmp_path: Path) -> None:
    site = Site(tmp_path, "3g.40gb", 0, 4, cuts=False)
    site.version = 1
    site.take_over()
    await site.settle(0)
    assert site.crew.ended == ["chat-0", "chat-1"]
    site.expect_as_planned()


async def test_one_waits_for_a_slice_that_is_being_left_rather_than_going_in_its_place(tmp_path: Path) -> None:
    site = Site(tmp_path, "3g.40gb", 0, 4, idle=("B/3g.40gb@0",), cuts=False)
    site.version = 1
    site.take_over()
    await site.settle(2)
    assert [there for _, there in site.told] == ["B/3g.40gb@0", "A/3g.40gb@0", "A/3g.40gb@4"]


async def test_settings_that_change_while_one_is_away_bring_it_home(tmp_path: Path) -> None:
    site = Site(tmp_path, "3g.40gb", 0, 4)
    site.version = 1
    site.take_over()
    while not site.renewals.away:
        await site.step()
    site.version = 2
    site.take_over()
    await site.settle(2)
    site.expect_as_planned()


async def writes_of(root: Path, fleet: str, kill_before: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many writes a change of settings takes. Before the one of that number the controller is killed, and the next one starts."""
    site, number = FLEETS[fleet](root), 0

    def write(*_: object) -> None:
        nonlocal number
        number += 1
        if number == kill_before:
            raise Killed

    def keep(file: RenewalsFile, renewed: Renewed) -> None:
        write()
        whole(file, renewed)

    def seat(path: Path, content: bytes, *, mode: int) -> None:
        write()
        write_atomically(path, content, mode=mode)

    whole = RenewalsFile.write
    with monkeypatch.context() as patched:
        patched.setattr(RenewalsFile, "write", keep)
        patched.setattr(placement.planned_seats, "write_atomically", seat)
        site.machine.before_write = write
        site.version = 1
        site.take_over()
        with contextlib.suppress(Killed):
            await site.settle(site.number)
        site.machine.before_write = lambda: None
    if kill_before is not None:
        site.control()
        assert site.serving >= site.number, "who serves is found, and goes on"
        await site.settle(site.number)
        assert len(idle_of(site)) == IDLE.get(fleet, 0)
        site.expect_as_planned(*idle_of(site))
    return number


@pytest.mark.parametrize("fleet", FLEETS)
async def test_a_controller_killed_between_any_two_writes_leaves_nothing(
    tmp_path: Path, fleet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    writes = await writes_of(tmp_path / "whole", fleet, None, monkeypatch)
    assert writes >= 6, "a beginning, a seat and an end for each of two"
    for number in range(1, writes + 1):
        root = tmp_path / str(number)
        root.mkdir()
        await writes_of(root, fleet, number, monkeypatch)


# ---- what is told beforehand is what happens


def told(site: Site) -> Changeover:
    goals = site.look()
    running = {n: RunningEngine(str(e.running_hash), e.serves) for n, e in site.engines.items()}
    fleet = site.machine.fleet() if site.machine.cuts else ()
    return changeover(goals, running, Circumstances(lambda *_: (3.0, "usual"), fleet=fleet))


@pytest.mark.parametrize("fleet", [*FLEETS, "none"])
async def test_what_is_told_is_what_happens(tmp_path: Path, fleet: str) -> None:
    site = FLEETS[fleet](tmp_path) if fleet in FLEETS else Site(tmp_path, "3g.40gb", 0, 4, cuts=False)
    assert not told(site)
    site.version = 1
    expected = [("in place" if r.how == "in_place" else "beside", r.slice_id) for r in told(site).replacements]
    back = sum(r.for_a_while for r in told(site).replacements)
    site.take_over()
    await site.settle(0)
    happened = [(what.rpartition(" ")[2] if "beside" in what else what, there) for what, there in site.told]
    assert happened[: len(expected)] == expected
    assert len(happened) == len(expected) + back
