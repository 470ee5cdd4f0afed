"""Laws of replicas that are there for demand in a cluster: they take what is left, keep it, and give way to what is more important."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig, ReplicaRange
from placement.assign import stem_of
from placement.cluster.members import NodeReport, Seat, Versions, slice_key
from placement.cluster.seating import Seating, seat_replicas
from placement.slices import Slice, SliceKind

NEEDS = {"a": 1, "b": 2}
VERSIONS = Versions(sliceway="1", python="3.11", ray="2")

Reports = Mapping[str, NodeReport]
Numbers = Mapping[str, int]


def fit(model: str, target: Slice) -> SliceFit:
    room = target.memory_bytes - NEEDS[model]
    return SliceFit(room >= 0, "why", target.memory_bytes, 0, 0, 0, 1, room)


@st.composite
def fleets(draw: st.DrawFn) -> Reports:
    reports = {}
    for node in ("n0", "n1", "n2")[: draw(st.integers(1, 3))]:
        sizes = draw(st.lists(st.sampled_from([1, 2]), max_size=3))
        slices = tuple(Slice(f"s-{i}", SliceKind.CPU, None, size, cores=(i,)) for i, size in enumerate(sizes))
        closed = tuple(s.id for s in slices if draw(st.integers(0, 5)) == 0)
        reports[node] = NodeReport(
            node=node, address="10.0.0.1", versions=VERSIONS, boot="b", slices=slices, cordoned=closed
        )
    return reports


@st.composite
def asked(draw: st.DrawFn) -> tuple[ModelConfig, ...]:
    return tuple(
        ModelConfig(
            name=name,
            source="org/x",
            replicas=ReplicaRange(min=(least := draw(st.integers(0, 2))), max=least + draw(st.integers(1, 3))),
            spread=draw(st.sampled_from(["none", "none", "nodes"])),
            priority=draw(st.integers(0, 1)),
        )
        for name in ("a", "b")
    )


numbers = st.fixed_dictionaries({"a": st.integers(0, 5), "b": st.integers(0, 5)})


def seat(models: tuple[ModelConfig, ...], reports: Reports, current: Mapping[str, Seat], wanted: Numbers) -> Seating:
    return seat_replicas(models, reports, fit, current, numbers=wanted)


def configured(models: tuple[ModelConfig, ...]) -> set[str]:
    return {f"{m.name}-{i}" for m in models for i in range(m.least_replicas)}


@settings(max_examples=60)
@given(asked(), fleets(), numbers, numbers, st.booleans())
def test_demand_takes_what_is_left_and_keeps_it(
    models: tuple[ModelConfig, ...], reports: Reports, before: Numbers, now: Numbers, lost: bool
) -> None:
    current = seat(models, reports, {}, before).seats
    left = {node: r for node, r in reports.items() if not (lost and node == "n0")}
    current = {replica: one for replica, one in current.items() if one.node in left}
    found, without = seat(models, left, current, now), seat(models, left, current, {})
    base, by_name = configured(models), {m.name: m for m in models}

    keys = [one.key for one in found.seats.values()]
    assert len(set(keys)) == len(keys), "a slice holds one engine"
    assert {r for r in found.unplaced if r in base} == set(without.unplaced), "who is configured loses nothing by it"
    for name, model in by_name.items():
        wanted = max(model.least_replicas, min(now[name], model.replicas.max))  # type: ignore[union-attr]
        everybody = [r for r in (*found.seats, *found.unplaced) if stem_of(r) == name]
        assert len(everybody) == len(set(everybody)) == wanted, "each is seated or told"
        there = [s.node for r, s in found.seats.items() if stem_of(r) == name]
        assert model.spread == "none" or len(set(there)) == len(there)

    closed = {slice_key(node, one) for node, report in left.items() for one in report.cordoned}
    for replica, one in found.seats.items():
        if replica not in base:
            assert (
                replica not in current or one == current[replica] or _taken(current[replica], found, by_name, replica)
            )
            assert one.key not in closed or current.get(replica) == one, "nothing new is put on what is cordoned"
    assert seat(models, left, found.seats, now).seats == found.seats, "and nothing moves afterwards"


def _taken(had: Seat, found: Seating, models: Mapping[str, ModelConfig], loser: str) -> bool:
    """Whether somebody who may has the slice that it had, or is too near to it."""
    mine = models[stem_of(loser)]
    near = (s for r, s in found.seats.items() if stem_of(r) == mine.name and r != loser and s.node == had.node)
    if mine.spread == "nodes" and any(near):
        return True
    by = next((r for r, s in found.seats.items() if s.key == had.key), None)
    return by is not None and (by in configured(tuple(models.values())) or models[stem_of(by)].priority > mine.priority)


@settings(max_examples=60)
@given(asked(), fleets(), numbers, numbers)
def test_nobody_waits_beside_a_slice_that_is_free_or_a_less_important_ones(
    models: tuple[ModelConfig, ...], reports: Reports, before: Numbers, now: Numbers
) -> None:
    current = seat(models, reports, {}, before).seats
    found, base = seat(models, reports, current, now), configured(models)
    by_name = {m.name: m for m in models}
    sits = {one.key: replica for replica, one in found.seats.items()}
    for replica in set(found.unplaced) - base:
        model = by_name[stem_of(replica)]
        for node, report in reports.items():
            for one in report.slices:
                by = sits.get(slice_key(node, one.id))
                weaker = by is None or (by not in base and by_name[stem_of(by)].priority < model.priority)
                suits = fit(model.name, one).fits and one.id not in report.cordoned and model.spread == "none"
                assert not (weaker and suits), f"{replica} could have {node}/{one.id}, where {by} is"
