"""`spread` holds over all pools of a model: in every plan, after it was carried out, and with whoever seats replicas next."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from model_registry.catalogue import Product, load_catalogue
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import Apart, assign, wanted_replicas
from placement.cluster.members import NodeReport, Seat, Versions, in_cluster
from placement.cluster.seating import seat_replicas
from placement.errors import TransitionBlocked
from placement.planner.plan import plan
from placement.planner.types import Constraints, FleetGpu, FleetPlan, ModelDemand, Option, Problem
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.testing import FakeClock
from placement.transition import Executor, TransitionJournal, plan_transition
from placement.transition.testing import FakeFleet

FITS = {"chat": ("1g.6gb", "2g.12gb"), "code": ("1g.6gb",)}
TENANTS: tuple[str | None, ...] = ("acme", "bee", None)
Asked = tuple[tuple[ModelConfig, tuple[str | None, ...]], ...]
"""Models with the tenants that have replicas of their own of each."""


@cache
def a30() -> Product:
    return load_catalogue().product("a30")


@st.composite
def workloads(draw: st.DrawFn) -> Asked:
    """Two models, each spread in some way, with as many replicas for each of its pools."""
    return tuple(
        (
            ModelConfig(
                name=name,
                source="org/x",
                replicas=draw(st.integers(1, 2)),
                spread=draw(st.sampled_from(["none", "gpus", "gpus", "nodes"])),
                profiles=FITS[name],
            ),
            tuple(draw(st.lists(st.sampled_from(TENANTS), min_size=1, max_size=2, unique=True))),
        )
        for name in FITS
    )


def demands(asked: Asked) -> tuple[ModelDemand, ...]:
    return tuple(
        ModelDemand(
            name=model.name if tenant is None else f"{model.name}@{tenant}",
            model=model.name,
            options=tuple(Option(a30().name, p) for p in FITS[model.name]),
            replicas=model.least_replicas,
            tenant=tenant,
            max_per_gpu=None if model.spread == "none" else 1,
            max_per_node=1 if model.spread == "nodes" else None,
        )
        for model, tenants in asked
        for tenant in tenants
    )


def bare(nodes: Iterable[int]) -> list[FleetGpu]:
    return [
        FleetGpu(f"n{node}/GPU-{i}", a30().name, a30(), f"n{node}", whole=False) for i, node in enumerate(sorted(nodes))
    ]


def held_apart(fleet: Iterable[FleetGpu], asked: Asked) -> bool:
    """Whether no GPU, or no node, has two replicas of a model, whoever they serve."""
    models = {model.name: model for model, _ in asked}
    there = [(g, str(i.demand).partition("@")[0]) for g in fleet for i in g.instances if i.demand is not None]
    on_gpu = Counter((name, g.id) for g, name in there if models[name].spread != "none")
    on_node = Counter((name, g.node) for g, name in there if models[name].spread == "nodes")
    return max((*on_gpu.values(), *on_node.values()), default=1) == 1


def slices_of(fleet: Iterable[FleetGpu]) -> dict[str, list[Slice]]:
    """By node what its driver would show."""
    found: dict[str, list[Slice]] = {}
    for number, gpu in enumerate(fleet):
        card = Gpu(gpu.id.partition("/")[2], number, "A30", 4)
        found.setdefault(gpu.node, [])
        for i in gpu.instances:
            size = 2**30 * (a30().profile(i.profile).memory_slices or 0)
            name = f"{card.uuid}/{i.placement}"
            found[gpu.node].append(Slice(name, SliceKind.MIG, i.profile, size, uuid=f"MIG-{name}", gpu=card))
    return found


def fit(model: str, there: Slice) -> SliceFit:
    holds = there.profile in FITS[model]
    return SliceFit(holds, "too small", there.memory_bytes, 0, 0, 0, 1, 1 if holds else -1)


def nobody_ends_alone_unasked(found: FleetPlan, asked: tuple[ModelDemand, ...]) -> None:
    """Without leave to dip nobody who is asked for loses the last replica while its slice is left, unless to another model."""
    then = {s.demand for g in found.gpus for s in g.slices if s.demand is not None}
    seats = {(g.gpu.id, s.placement): s for g in found.gpus for s in g.slices}
    lost = {d.name: d.model for d in asked if d.floor and d.name not in then}
    left = []
    for gpu in (g.gpu for g in found.gpus):
        for instance in (i for i in gpu.instances if i.demand in lost):
            there = seats.get((gpu.id, instance.placement))
            if there is not None and str(there.demand).partition("@")[0] in ("None", lost[str(instance.demand)]):
                left.append(instance.replica)
    event(f"ended alone: {len(left)}")
    if left:
        with pytest.raises(TransitionBlocked, match="since too many replicas of"):
            plan_transition(found, asked)


async def carried_out(fleet: FakeFleet, asked: tuple[ModelDemand, ...], folder: Path) -> FleetPlan:
    found = plan(Problem(fleet.state(), asked))
    fleet.demands = {d.name: d for d in asked}
    nobody_ends_alone_unasked(found, asked)
    transition = plan_transition(found, asked, allow_dip=True)
    assert (await Executor(fleet, TransitionJournal(folder / "transition.json"), FakeClock()).begin(transition)).ok
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=3), st.lists(workloads(), min_size=1, max_size=3))
def test_what_is_planned_is_apart_and_stays_where_it_is_whoever_looks_next(
    nodes: list[int], asked: list[Asked]
) -> None:
    fleet = FakeFleet.of(bare(nodes))
    with tempfile.TemporaryDirectory() as folder:
        for one in asked:
            found = asyncio.run(carried_out(fleet, demands(one), Path(folder)))
            assert held_apart(fleet.state(), one)
    last = asked[-1]
    again = plan(Problem(fleet.state(), demands(last)))
    assert not again.changed, [d for d in again.decisions if d.action != "keep"]
    if not found.unmet:
        stays_on_one_machine(fleet.state(), last)
        stays_in_a_cluster(fleet.state(), last)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), workloads(), st.sampled_from([None, 0, 1, 2]))
def test_who_runs_too_close_is_moved_or_asked_about(cards: int, asked: Asked, changes: int | None) -> None:
    close = tuple(replace(d, max_per_gpu=None, max_per_node=None) for d in demands(asked))
    runs = plan(Problem(tuple(bare(range(cards))), close)).after()
    nobody_ends_alone_unasked(
        plan(Problem(runs, demands(asked), Constraints(max_layout_changes=changes))), demands(asked)
    )


def stays_on_one_machine(fleet: tuple[FleetGpu, ...], asked: Asked) -> None:
    """A controller, which seats a model's replicas apart, moves nobody: GPU by GPU, and all of the machine as one node."""
    if any(model.spread == "nodes" for model, _ in asked):
        return
    slices = {f"{node}/{s.id}": s for node, own in slices_of(fleet).items() for s in (in_cluster(node, o) for o in own)}
    inventory = Inventory(tuple(slices.values()))
    runs = {str(i.replica): f"{g.id}/{i.placement}" for g in fleet for i in g.instances if i.replica is not None}
    apart = {
        m.name: Apart("GPU", {k: k.rpartition("/")[0] for k in runs.values()}) for m, _ in asked if m.spread != "none"
    }
    wanted = wanted_replicas([m for m, _ in asked], {m.name: tenants for m, tenants in asked}, sorted(runs))
    fits = {(m.name, s.id): fit(m.name, s) for m, _ in asked for s in inventory.slices}
    assert assign(wanted, fits, inventory, current=runs, apart=apart).complete() == runs


def stays_in_a_cluster(fleet: tuple[FleetGpu, ...], asked: Asked) -> None:
    """The head leaves everybody in the seat that the plan gave."""
    versions = Versions(sliceway="1", python="3.11", ray="2")
    reports = {
        node: NodeReport(node=node, address="10.0.0.1", versions=versions, boot="b", slices=tuple(own))
        for node, own in slices_of(fleet).items()
    }
    seats = {
        str(i.replica): Seat(
            replica=str(i.replica),
            model=str(i.demand).partition("@")[0],
            node=g.node,
            slice_id=f"{g.id.partition('/')[2]}/{i.placement}",
        )
        for g in fleet
        for i in g.instances
        if i.replica is not None
    }
    pools = {model.name: tenants for model, tenants in asked}
    found = seat_replicas([m for m, _ in asked], reports, fit, seats, pools=pools, names=sorted(seats))
    assert not found.unplaced
    assert found.seats == seats
