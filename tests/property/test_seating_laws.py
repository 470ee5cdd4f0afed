"""Laws of seating: as the plain algorithm has it, apart as models ask, the most important first; against trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import Apart, Wanted, assign, natural
from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.seating import seat_replicas
from placement.slices import Gpu, Inventory, Slice, SliceKind

PROFILES = {1: "1g.10gb", 2: "2g.20gb", 4: "4g.40gb"}
NEEDS = {"a": 1, "b": 2, "c": 4}


def fit(model: str, target: Slice) -> SliceFit:
    room = target.memory_bytes - NEEDS[model]
    return SliceFit(room >= 0, "why", target.memory_bytes, 0, 0, 0, 1, room)


def accepts(wanted: Wanted, one: Slice) -> bool:
    profile = not wanted.profiles or one.profile in wanted.profiles
    return wanted.pin in (None, one.id) and profile and fit(wanted.model, one).fits


# ---- as the plain algorithm has it


def plainly(
    wanted: Sequence[Wanted], slices: Sequence[Slice], current: Mapping[str, str], *, may_move: bool
) -> dict[str, str]:
    """Every replica compared with every slice: what `assign` has to come to. Nobody is pinned to another's slice."""
    order = sorted(wanted, key=lambda w: (w.model, w.ordinal, w.replica))
    places = sorted(slices, key=lambda s: (s.memory_bytes, natural(s.id)))
    accepted = {w.replica: {s.id for s in places if accepts(w, s)} for w in order}
    seats: dict[str, str] = {}
    for one in order:
        if (place := current.get(one.replica)) in accepted[one.replica] and place not in seats.values():
            seats[one.replica] = str(place)
    held = frozenset(seats)
    for movable in (False, True) if may_move else (False,):
        for place in [s.id for s in places if s.id not in seats.values()]:
            seats |= _path(place, accepted, seats, frozenset() if movable else held)
    return seats


def _path(
    start: str, accepted: Mapping[str, set[str]], seats: Mapping[str, str], held: frozenset[str]
) -> dict[str, str]:
    if start in seats.values():
        return {}
    arrived: dict[str, str] = {}
    frontier = [start]
    for place in frontier:
        for replica, wishes in accepted.items():
            if replica in arrived or place not in wishes:
                continue
            arrived[replica] = place
            if replica not in seats:
                changed = {replica: place}
                sitting = {seat: r for r, seat in seats.items()}
                while (mover := sitting.get(place)) is not None:
                    place = changed[mover] = arrived[mover]
                return changed
            if replica not in held:
                frontier.append(seats[replica])
    return {}


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4]), max_size=9),
    asked=st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from([(), (), ("1g.10gb",)])), max_size=9
    ),
    pins=st.permutations(range(9)),
    here=st.permutations(range(9)),
    running=st.integers(0, 9),
    may_move=st.booleans(),
)
def test_seats_are_those_of_comparing_every_replica_with_every_slice(
    sizes: list[int],
    asked: list[tuple[str, bool, tuple[str, ...]]],
    pins: list[int],
    here: list[int],
    running: int,
    may_move: bool,
) -> None:
    slices = tuple(
        Slice(f"s-{i}", SliceKind.MIG, PROFILES[size], size, uuid=f"MIG-{i}") for i, size in enumerate(sizes)
    )
    wanted = [
        Wanted(f"{m}-{i}", m, i, pin=f"s-{pins[i]}" if pinned and i % 3 == 0 else None, profiles=profiles)
        for i, (m, pinned, profiles) in enumerate(asked)
    ]
    current = {w.replica: f"s-{at}" for w, at in zip(wanted[:running], here, strict=False)}
    fits = {(m, s.id): fit(m, s) for m in "abc" for s in slices}
    found = assign(wanted[::-1], fits, Inventory(slices), current=current, may_move=may_move)
    assert dict(found.slices) == plainly(wanted, slices, current, may_move=may_move)
    assert set(found.unplaced) == {w.replica for w in wanted} - set(found.slices)


# ---- apart, and the most important first


@dataclass(frozen=True)
class Fleet:
    """A few nodes of two cards with a few slices, and models that are spread in different ways."""

    reports: Mapping[str, NodeReport]
    models: tuple[ModelConfig, ...]

    @property
    def places(self) -> dict[str, tuple[str, Slice]]:
        return {f"{node}/{s.id}": (node, s) for node, report in self.reports.items() for s in report.slices}

    def order(self, running: Collection[str] = ()) -> list[tuple[str, ModelConfig]]:
        """Replicas, the most important first, and of equally important ones those that run."""
        every = [(f"{m.name}-{i}", m, i) for m in self.models for i in range(m.least_replicas)]
        every.sort(key=lambda one: (-one[1].priority, one[0] not in running, one[2], one[1].name))
        return [(replica, model) for replica, model, _ in every]

    def greedy(self, running: Collection[str]) -> list[tuple[str, ModelConfig]]:
        """Who is to be seated: one after another, as long as all so far can sit."""
        chosen: list[tuple[str, ModelConfig]] = []
        for one in self.order(running):
            if self.ways([*chosen, one]):
                chosen.append(one)
        return chosen

    def allowed(self, seats: Mapping[str, str]) -> bool:
        """Whether nobody who sits on these places (by replica) is too close to another."""
        models = {model.name: model for model in self.models}
        shared = set()
        for replica, key in seats.items():
            node, one = self.places[key]
            model = models[replica[0]]
            groups = {"none": key, "gpus": (node, one.gpu.uuid) if one.gpu else key, "nodes": node}
            shared.add((model.name, groups[model.spread]))
        return len(set(seats.values())) == len(seats) == len(shared)

    def ways(self, replicas: Sequence[tuple[str, ModelConfig]]) -> list[dict[str, str]]:
        """Every way to seat all of them."""
        options = [[key for key, (_, s) in self.places.items() if fit(m.name, s).fits] for _, m in replicas]
        names = [r for r, _ in replicas]
        choices = (dict(zip(names, keys, strict=True)) for keys in itertools.product(*options))
        return [seats for seats in choices if self.allowed(seats)]

    def memory(self, seats: Mapping[str, str]) -> int:
        return sum(self.places[key][1].memory_bytes for key in seats.values())


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    versions = Versions(sliceway="1", python="3.11", ray="2")
    reports = {}
    sizes = iter(draw(st.lists(st.sampled_from([1, 1, 2, 4]), min_size=1, max_size=5)))
    for number in range(draw(st.integers(1, 3))):
        own = []
        for i, size in enumerate(itertools.islice(sizes, draw(st.integers(1, 3)))):
            index = draw(st.integers(0, 1))
            known = draw(st.sampled_from([True, True, True, False]))
            gpu = Gpu(f"GPU-{index}", index, "H100", 8) if known else None
            name = f"GPU-{index}/{PROFILES[size]}@{i}"
            own.append(Slice(name, SliceKind.MIG, PROFILES[size], size, uuid=f"MIG-{number}-{i}", gpu=gpu))
        node = f"n{number}"
        reports[node] = NodeReport(node=node, address="10.0.0.1", versions=versions, boot="b", slices=tuple(own))
    models = [
        ModelConfig(
            name=name,
            source="org/x",
            replicas=draw(st.integers(0, 2 if name == "b" else 3)),
            spread=draw(st.sampled_from(["none", "gpus", "nodes"])),
            priority=draw(st.integers(0, 1)),
        )
        for name in draw(st.permutations(["a", "b"]))
    ]
    return Fleet(reports, tuple(models))


def seated(fleet: Fleet, current: Mapping[str, Seat]) -> tuple[dict[str, str], Mapping[str, Exception]]:
    found = seat_replicas(fleet.models, fleet.reports, fit, current)
    return {replica: seat.key for replica, seat in found.seats.items()}, found.unplaced


@given(fleets(), st.permutations(range(5)), st.integers(0, 5), st.booleans())
def test_the_most_important_are_seated_apart_on_as_little_memory_as_can_be(
    fleet: Fleet, places: list[int], running: int, latest: bool
) -> None:
    keys, order = sorted(fleet.places), fleet.order()
    current = {
        replica: Seat(
            replica=replica, model=model.name, node=fleet.places[keys[at]][0], slice_id=fleet.places[keys[at]][1].id
        )
        for (replica, model), at in list(zip(order[::-1] if latest else order, places, strict=False))[:running]
        if at < len(keys)
    }
    for now in ({}, current):
        seats, unplaced = seated(fleet, now)
        assert fleet.allowed(seats)
        assert set(seats) == {replica for replica, _ in fleet.greedy(now)}
        assert set(unplaced) == {replica for replica, _ in order} - set(seats)
        assert all(
            f"'{replica}'" in str(why) or "does not fit" in str(why)
            for replica, why in unplaced.items()
            if fleet.places
        )
    fresh, _ = seated(fleet, {})
    assert fleet.memory(fresh) == min(fleet.memory(seats) for seats in fleet.ways(fleet.greedy(())))


@given(fleets())
def test_who_sits_apart_stays_where_he_is(fleet: Fleet) -> None:
    seats = seat_replicas(fleet.models, fleet.reports, fit, {}).seats
    assert seat_replicas(fleet.models, fleet.reports, fit, seats).seats == seats


def test_only_the_limited_model_is_kept_apart() -> None:
    slices = tuple(Slice(f"s-{i}", SliceKind.CPU, None, 4, cores=(i,)) for i in range(3))
    apart = {"a": Apart("node", {"s-0": "x", "s-1": "x"})}
    wanted = [Wanted(f"{m}-{i}", m, i) for m in "ab" for i in range(2)]
    fits = {(m, s.id): fit(m, s) for m in "ab" for s in slices}
    found = assign(wanted, fits, Inventory(slices), apart=apart).slices
    assert found == {"a-0": "s-0", "a-1": "s-2", "b-0": "s-1"}
