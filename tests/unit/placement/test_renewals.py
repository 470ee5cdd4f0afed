"""Replicas that take another one's place: where they may start, what they are called, and what outlives a kill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_registry.catalogue import load_catalogue
from model_registry.errors import ConfigError, IllegalLayout
from model_registry.geometry import Geometry, Layout, Option, Placement
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.errors import StateLocked
from placement.goals import Goals, PlacementConfig, Workshop, plan_goals
from placement.launch import SizedModel
from placement.orders import Orders
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.planner.fragmentation import Fragmentation
from placement.planner.types import WHOLE, FleetGpu, Instance
from placement.renewals import (
    RENEWALS_FILE,
    Renewals,
    RenewalsFile,
    Renewed,
    Successor,
    as_planned,
    fresh_name,
    place_beside,
    with_successors,
)
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.state import StatePaths
from placement.transition.room import room_for
from placement.transition.steps import Place

GPUS = tuple(Gpu(f"GPU-{n}", n, "H100", 80 * 2**30) for n in range(2))


def mig(gpu: int, start: int, *, profile: str = "1g.10gb", gib: int = 10) -> Slice:
    uuid = GPUS[gpu].uuid
    return Slice(f"{uuid}/{profile}@{start}", SliceKind.MIG, profile, gib * 2**30, f"MIG-{gpu}-{start}", GPUS[gpu])


class Shelf:
    """A registry where every model fits a slice of its least memory."""

    def describe(self, model: ModelConfig) -> SizedModel:
        return SizedModel(model, str(model.source), "generate", 512)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        return SliceFit(target.memory_bytes >= 10 * 2**30, "fits", target.memory_bytes, 0, 0, 0, 0, 0)


def goals_of(
    tmp_path: Path,
    slices: tuple[Slice, ...],
    *models: dict[str, object],
    seats: Mapping[str, str] | None = None,
    names: tuple[str, ...] = (),
    current: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Goals:
    config = PlacementConfig.model_validate(
        {"engine": {"command": ["engine", "{uds}", str(seed)]}, "models": models, "seats": seats}
    )
    workshop = Workshop(StatePaths(tmp_path), {})
    return plan_goals(config, Inventory(slices), Shelf(), workshop, current=current, names=names)


CHAT = {"name": "chat", "source": "org/chat"}


# ---- where


def test_a_free_slice_of_the_same_kind_is_taken_before_a_larger_one(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 2, profile="2g.20gb", gib=20), mig(1, 0))
    goals = goals_of(tmp_path, slices, CHAT)
    assert goals.replicas["chat-0"].slice == slices[0]
    assert place_beside(goals, "chat-0", ()) == slices[2]
    assert place_beside(goals, "chat-0", {slices[2].id}) == slices[1], "rather on a larger one than away"
    assert place_beside(goals, "chat-0", {slices[1].id, slices[2].id}) is None


def test_a_slice_that_does_not_fit_or_has_a_replica_is_not_free(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 1), mig(0, 2, profile="1c", gib=5))
    assert place_beside(goals_of(tmp_path, slices, CHAT | {"replicas": 2}), "chat-0", ()) is None


def test_a_planned_fleet_changes_no_kind_of_slice(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 2, profile="2g.20gb", gib=20))
    goals = goals_of(tmp_path, slices, CHAT, seats={"chat-0": slices[0].id})
    assert place_beside(goals, "chat-0", ()) is None
    more = goals_of(tmp_path, (*slices, mig(1, 3)), CHAT, seats={"chat-0": slices[0].id})
    assert place_beside(more, "chat-0", ()) == mig(1, 3), "the other GPU is left for it"
    both = {"chat-0": slices[0].id, "chat-1": mig(0, 1).id}
    crowd = goals_of(tmp_path, (*slices, mig(0, 1), mig(1, 3)), CHAT | {"replicas": 2}, seats=both)
    assert place_beside(crowd, "chat-0", ()) is None, "no GPU more is used than was planned"


def test_for_a_while_any_slice_that_fits_will_do(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 1), mig(0, 2, profile="2g.20gb", gib=20), mig(1, 3))
    both = {"chat-0": slices[0].id, "chat-1": slices[1].id}
    goals = goals_of(tmp_path, slices, CHAT | {"replicas": 2}, seats=both)
    assert place_beside(goals, "chat-0", ()) is None
    assert place_beside(goals, "chat-0", (), beyond=True) == slices[3], "the same kind first"
    assert place_beside(goals, "chat-0", {slices[3].id}, beyond=True) == slices[2]
    assert [as_planned(goals, "chat-0", s, ()) for s in slices[1:]] == [True, False, False]
    apart = goals_of(tmp_path, slices, CHAT | {"replicas": 2, "spread": "gpus"}, seats=both)
    assert place_beside(apart, "chat-0", {slices[3].id}, beyond=True) is None, "it is to be apart also then"


def test_who_is_away_for_a_while_opens_no_gpu_to_others_and_finds_the_way_back(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 1), mig(1, 3), mig(1, 4))
    seats = {"chat-2": slices[2].id, "chat-1": slices[1].id}
    goals = goals_of(tmp_path, slices, CHAT | {"replicas": 2}, seats=seats)
    away = {slices[2].id}
    assert place_beside(goals, "chat-1", {slices[0].id}, away=away) is None
    assert place_beside(goals, "chat-2", (), like=slices[0], away=away) == slices[0]
    assert as_planned(goals, "chat-2", slices[0], (), like=slices[0], away=away)
    assert not as_planned(goals, "chat-2", slices[3], (), like=slices[0], away=away)


def test_what_is_pinned_stays_where_it_is(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(1, 0))
    assert place_beside(goals_of(tmp_path, slices, CHAT | {"slices": [slices[0].id]}), "chat-0", ()) is None


def test_replicas_that_are_to_be_apart_stay_apart(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 1), mig(1, 0), mig(1, 1))
    seats = {"chat-0": slices[0].id, "chat-1": slices[2].id}
    goals = goals_of(tmp_path, slices, CHAT | {"replicas": 2, "spread": "gpus"}, seats=seats)
    assert place_beside(goals, "chat-0", ()) == slices[1], "its own GPU, which it leaves"
    assert place_beside(goals, "chat-0", {slices[1].id}) is None


def test_the_seat_of_a_replica_that_is_stopped_is_not_free(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(0, 1))
    seats = {"chat-0": slices[0].id, "chat-1": slices[1].id}
    goals = goals_of(tmp_path, slices, CHAT | {"replicas": 2}, seats=seats)
    stopped = replace(goals, replicas={"chat-0": goals.replicas["chat-0"]})
    assert place_beside(stopped, "chat-0", ()) is None

    old = {"chat-0": "another"}
    one = Successor("chat-2", "chat-0", slices[1].id)
    workshop = Workshop(StatePaths(tmp_path), {})
    assert with_successors(stopped, [one], old, (), workshop) == stopped


# ---- what is still to be done


def test_a_successor_has_a_goal_until_it_is_not_needed_or_has_no_place(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(1, 0))
    old = goals_of(tmp_path, slices, CHAT)
    new = goals_of(tmp_path, slices, CHAT, seed=1)
    runs_by = {"chat-0": str(old.replicas["chat-0"].spec_hash)}
    workshop = Workshop(StatePaths(tmp_path), {})
    one = Successor("chat-1", "chat-0", slices[1].id)
    told = with_successors(new, [one], runs_by, (), workshop)
    assert (told.replicas["chat-1"].in_place_of, told.replicas["chat-1"].slice) == ("chat-0", slices[1])
    assert told.replicas["chat-1"].spec_hash != old.replicas["chat-0"].spec_hash
    assert told.replicas["chat-0"] == new.replicas["chat-0"], "it goes on"

    assert "chat-1" not in with_successors(old, [one], runs_by, (), workshop).replicas, "the old one is right again"
    assert "chat-1" not in with_successors(new, [one], {}, (), workshop).replicas, "there is nothing to go on"
    assert "chat-1" not in with_successors(new, [one], runs_by, {slices[1].id}, workshop).replicas, "to be cut anew"
    two = goals_of(tmp_path, slices, CHAT | {"replicas": 2}, seed=1)
    assert with_successors(two, [one], runs_by, (), workshop) == two, "it is wanted for itself"
    without = replace(new, replicas={})
    assert with_successors(without, [one], runs_by, (), workshop) == without


# ---- names


def test_replicas_keep_the_names_that_they_have_by_now(tmp_path: Path) -> None:
    slices = tuple(mig(0, n) for n in range(4))
    goals = goals_of(tmp_path, slices, CHAT | {"replicas": 3}, names=("chat-2", "chat-0", "other-7"))
    assert list(goals.replicas) == ["chat-2", "chat-0", "chat-1"]
    assert list(goals_of(tmp_path, slices, CHAT, names=("chat-2", "chat-0")).replicas) == ["chat-2"]
    pinned = CHAT | {"slices": [slices[0].id]}
    assert list(goals_of(tmp_path, slices, pinned, names=("chat-2",)).replicas) == ["chat-0"]


def test_a_fresh_name_is_nobodys() -> None:
    assert fresh_name("chat-4", {"chat-0", "chat-1", "chat-4"}) == "chat-2"
    assert fresh_name("chat@acme-0", {"chat-0", "chat@acme-0"}) == "chat@acme-1"


@contextlib.contextmanager
def busy() -> Iterator[None]:
    raise StateLocked("a change of layouts is at work already")
    yield


@contextlib.contextmanager
def mistyped() -> Iterator[None]:
    raise ConfigError("not a mapping", where="sliceway.yaml:3")
    yield


def made(tmp_path: Path, *, replicas: int = 2) -> PlacementConfig:
    return PlacementConfig.model_validate({"models": [CHAT | {"replicas": replicas}]})


def test_names_outlive_the_controller_as_long_as_somebody_has_them(tmp_path: Path) -> None:
    paths, config = StatePaths(tmp_path), made(tmp_path)
    renewals = Renewals(paths, contextlib.nullcontext)
    one = Successor("chat-2", "chat-0", "cpu-2")
    renewals.begin(one)
    assert renewals.finish(one, config) == config
    assert (renewals.names, renewals.under_way) == (("chat-2", "chat-1"), ())
    two = Successor("chat-0", "chat-1", "cpu-0")
    renewals.begin(two)
    renewals.finish(two, config)
    assert renewals.names == ("chat-2", "chat-0")

    later = Renewals(paths, contextlib.nullcontext)
    later.find({"chat-2"}, config)
    assert later.names == ("chat-2", "chat-0")
    later.find(set(), config)
    assert later.names == ()
    assert not (tmp_path / RENEWALS_FILE).exists()


def test_replicas_that_came_for_demand_leave_no_name(tmp_path: Path) -> None:
    renewals = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    one = Successor("chat-5", "chat-4", "cpu-2")
    renewals.begin(one)
    renewals.finish(one, made(tmp_path))
    assert renewals.names == ()


def test_names_that_have_changed_stay_when_one_for_demand_goes(tmp_path: Path) -> None:
    config = made(tmp_path, replicas=1)
    renewals = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    renewals.finish(Successor("chat-1", "chat-0", "cpu-1"), config)
    assert renewals.names == ("chat-1",)
    assert set(RenewalsFile(tmp_path / RENEWALS_FILE).read().standing(config)) == {"chat-1"}, (
        "the other is there for demand"
    )
    renewals.finish(Successor("chat-2", "chat-0", "cpu-2"), config)
    assert renewals.names == ("chat-1",)


def test_the_plan_says_who_stands_where_there_is_one(tmp_path: Path) -> None:
    config = made(tmp_path).model_copy(update={"seats": {"chat-1": "X"}})
    assert set(Renewed().standing(config)) == {"chat-1"}


@pytest.mark.parametrize(
    ("alive", "left", "names"),
    [
        ({"chat-0", "chat-2"}, ("chat-2",), ()),
        ({"chat-2"}, (), ("chat-2", "chat-1")),
        ({"chat-0"}, (), ()),
        (set[str](), (), ()),
    ],
)
def test_the_next_controller_goes_on_with_what_is_left(
    tmp_path: Path, alive: set[str], left: tuple[str, ...], names: tuple[str, ...]
) -> None:
    Renewals(StatePaths(tmp_path), contextlib.nullcontext).begin(Successor("chat-2", "chat-0", "cpu-2"))
    later = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    later.find(alive, made(tmp_path))
    assert tuple(one.replica for one in later.under_way) == left
    assert later.names == names


def test_in_a_planned_fleet_the_seat_goes_over(tmp_path: Path) -> None:
    seats = PlannedSeats(tmp_path / SEATS_FILE)
    seats.begin({"chat-0": "X", "chat-1": "Z"})
    config = made(tmp_path).model_copy(update={"seats": seats.read()})
    renewals = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    one = Successor("chat-2", "chat-0", "Y")
    renewals.begin(one)
    told = renewals.finish(one, config)
    assert told is not None
    assert told.seats == seats.read() == {"chat-1": "Z", "chat-2": "Y"}
    assert (renewals.names, renewals.under_way) == ((), ())


@pytest.mark.parametrize("alone", [busy, mistyped])
def test_the_seat_waits_for_a_plan_that_is_carried_out_and_for_a_file_that_makes_sense(
    tmp_path: Path, alone: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    seats = PlannedSeats(tmp_path / SEATS_FILE)
    seats.begin({"chat-0": "X"})
    config = made(tmp_path).model_copy(update={"seats": seats.read()})
    renewals = Renewals(StatePaths(tmp_path), alone)
    one = Successor("chat-2", "chat-0", "Y")
    renewals.begin(one)
    assert renewals.finish(one, config) is None
    assert seats.read() == {"chat-0": "X"}
    assert renewals.under_way == (one,)
    assert renewals.find({"chat-2"}, config) == config, "nothing is lost: it is started anew"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"names": 3, "under_way": []}', '{"names": [], "under_way": [[1]]}'])
def test_a_damaged_file_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / RENEWALS_FILE
    path.write_text(text, encoding="utf-8")
    assert RenewalsFile(path).read() == Renewed()


def test_what_is_written_is_read_and_nothing_leaves_no_file(tmp_path: Path) -> None:
    file = RenewalsFile(tmp_path / RENEWALS_FILE)
    under_way = (Successor("chat-3", "chat-2", "GPU-0/1g.10gb@0"), Successor("a-1", "a-0", "GPU-1/x", "GPU-0/x"))
    told = Renewed(("chat-2", "chat@acme-0"), under_way, away=(("GPU-1/x", "GPU-0/x"),))
    file.write(told)
    assert file.read() == told
    file.write(Renewed())
    assert not file.path.exists()


def test_a_successor_without_a_goal_is_forgotten(tmp_path: Path) -> None:
    slices = (mig(0, 0), mig(1, 0))
    renewals = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    renewals.begin(Successor("chat-1", "chat-0", slices[1].id))
    goals = goals_of(tmp_path, slices, CHAT)
    renewals.give_up(goals)
    assert renewals.under_way == ()


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / RENEWALS_FILE
    path.write_text('{"names": ["chat-2"], "under_way": [["chat-3", "chat-2", "X"]], "spare": ["X"]}', encoding="utf-8")
    assert RenewalsFile(path).read() == Renewed(("chat-2",), (Successor("chat-3", "chat-2", "X"),), ("X",))


def test_an_older_configuration_has_the_seats_that_are_written_down_by_now(tmp_path: Path) -> None:
    renewals, seats = Renewals(StatePaths(tmp_path), contextlib.nullcontext), PlannedSeats(tmp_path / SEATS_FILE)
    unplanned = made(tmp_path)
    older = unplanned.model_copy(update={"seats": {"chat-0": "X"}})
    assert renewals.seated(older) == older, "there is no list"
    seats.begin({"chat-0": "X"})
    seats.hand_over("chat-0", "chat-1", "Y")
    assert renewals.seated(older).seats == {"chat-1": "Y"}
    assert renewals.seated(unplanned) == unplanned


# ---- room beyond the plan


def test_slices_beyond_the_plan_are_remembered_until_they_are_given_back(tmp_path: Path) -> None:
    seats = PlannedSeats(tmp_path / SEATS_FILE)
    seats.begin({"chat-0": "X"})
    config = made(tmp_path).model_copy(update={"seats": seats.read()})
    renewals = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    renewals.made("Y")
    one = Successor("chat-1", "chat-0", "Y")
    renewals.begin(one)
    assert Renewals(StatePaths(tmp_path), contextlib.nullcontext).spare == ("Y",)
    renewals.finish(one, config)
    assert renewals.spare == ("X",), "the plan has Y now, and X is free"
    later = Renewals(StatePaths(tmp_path), contextlib.nullcontext)
    later.find({"chat-1"}, config)
    assert later.spare == ("X",)
    later.given_back("X")
    assert later.spare == ()
    assert not (tmp_path / RENEWALS_FILE).exists()


H100 = load_catalogue().product("h100-sxm")


def card(gpu: str, *held: str, replicas: int = 0, **more: Any) -> FleetGpu:
    """A card that holds these placements, the first `replicas` of them with a replica."""
    instances = tuple(
        Instance(Placement.parse(text), *((f"m-{n}", "m") if n < replicas else (None, None)))
        for n, text in enumerate(held)
    )
    return FleetGpu(gpu, H100.name, H100, instances=instances, **more)


def test_room_is_found_on_gpus_in_use_first_and_where_it_costs_least() -> None:
    here, empty = card("A", "1g.10gb@0", replicas=1), card("B")
    like = Place("A", Placement.parse("1g.10gb@0"))
    found = room_for([empty, here], like)
    assert found is not None
    assert found.gpu == "A"
    losses = {
        start: Fragmentation(H100).of([like.placement, Placement.parse(f"1g.10gb@{start}")]) for start in range(1, 7)
    }
    assert losses[found.placement.start] == min(losses.values())
    assert room_for([here, empty], like) == found
    full, used = card("A", *(f"1g.10gb@{n}" for n in range(7)), replicas=7), card("C", "3g.40gb@4", replicas=1)
    elsewhere = room_for([full, empty, used], like)
    assert elsewhere is not None
    assert elsewhere.gpu == "C"
    assert room_for([full], like) is None
    assert room_for([full, empty], like) is None, "no GPU more is used"
    beyond = room_for([full, empty], like, beyond=True)
    assert beyond is not None
    assert beyond.gpu == "B"
    assert room_for([empty, here], like, beyond=True) == found, "only where there is no other room"
    whole = Placement.parse("7g.80gb@0")
    assert room_for([card("A", "7g.80gb@0", replicas=1), empty], Place("A", whole)) == Place("B", whole)


@pytest.mark.parametrize(
    "other", [{"cordoned": True}, {"draining": True}, {"geometry": None}, {"product": "a100-80gb"}]
)
def test_there_is_no_room_where_nothing_may_be_made(other: dict[str, Any]) -> None:
    home, like = card("A", "7g.80gb@0", replicas=1), Place("A", Placement.parse("7g.80gb@0"))
    assert room_for([home, card("B")], like) == Place("B", like.placement)
    assert room_for([home, replace(card("B"), **other)], like) is None
    full = card("A", "1g.10gb@0", "1g.10gb@1", "2g.20gb@2", "3g.40gb@4", replicas=4)
    there = room_for([full, replace(card("B"), **other)], Place("A", Placement.parse("1g.10gb@0")), beyond=True)
    assert there is None, "nor for a while"
    assert room_for([home, card("B")], like, not_on={"B"}, beyond=True) is None
    assert room_for([card("B")], like) is None, "nobody knows what it is like"
    assert room_for([home, card("B")], Place("A", WHOLE)) is None


@given(st.lists(st.sampled_from(Geometry(H100).options), max_size=6), st.sampled_from(Geometry(H100).options))
def test_room_is_legal_and_is_found_wherever_there_is_any(held: list[Option], like: Option) -> None:
    placements: list[Placement] = []
    for option in held:
        with contextlib.suppress(IllegalLayout):
            Layout(H100, (*placements, option.placement))
            placements.append(option.placement)
    gpu = FleetGpu("A", H100.name, H100, instances=tuple(Instance(p) for p in placements))
    found = room_for([gpu], Place("A", like.placement))

    def legal(one: Placement) -> bool:
        try:
            Layout(H100, (*placements, one))
        except IllegalLayout:
            return False
        return one not in placements

    possible = {o.placement for o in Geometry(H100).options if o.placement.profile == like.placement.profile}
    assert (found is not None) == any(map(legal, possible))
    assert found is None or legal(found.placement)


def test_who_is_replaced_in_its_place_and_why(tmp_path: Path) -> None:
    slices = tuple(mig(0, start) for start in range(4))
    goals = goals_of(tmp_path, slices, CHAT | {"replicas": 3}, {"name": "pin", "source": "x", "slices": [slices[3].id]})
    names = {"chat-0", "chat-1", "pin-0"}
    few = replace(goals, config=goals.config.model_copy(update={"seats": dict.fromkeys(names, "X")}))
    orders = Orders(drained=frozenset({"chat-0"}))
    assert Renewed().held(few, orders) == {
        "chat-0": "it is under orders of an operator",
        "chat-2": "it is there for demand only",
        "pin-0": "it is pinned to its slice",
    }
    assert "chat-1" in Renewed().held(few, Orders(seats={"chat-1": slices[1].id}))
