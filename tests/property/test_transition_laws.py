"""Whatever the fleets: no promise is broken on the way, no instance overlaps another, and a kill at any step costs nothing."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from model_registry.catalogue import Product, load_catalogue
from model_registry.geometry import Geometry, Layout, Placement
from placement.errors import TransitionBlocked
from placement.planner.types import (
    WHOLE,
    FleetGpu,
    FleetPlan,
    Instance,
    ModelDemand,
    Option,
    PlannedGpu,
    PlannedSlice,
    fingerprint,
)
from placement.testing import FakeClock
from placement.transition import Executor, Transition, TransitionJournal, forecast, plan_transition, with_own_names
from placement.transition.steps import Step
from placement.transition.testing import FakeFleet, Killed

PRODUCTS = ("a30", "a100-80gb")
DEMANDS = ("chat", "code", "embed")


@cache
def product(name: str) -> Product:
    return load_catalogue().product(name)


@cache
def layouts(name: str) -> tuple[Layout, ...]:
    return Geometry(product(name)).layouts


@dataclass(frozen=True)
class Case:
    plan: FleetPlan
    demands: tuple[ModelDemand, ...]


def _demands(wanted: dict[str, float]) -> Iterator[ModelDemand]:
    for name in DEMANDS:
        options = tuple(
            Option(product(p).name, profile.name, float(profile.g))
            for p in PRODUCTS
            for profile in product(p).base_profiles
        )
        yield ModelDemand(name, name, options, rate=wanted[name])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two random layouts per GPU, with engines of the same names moved about between them."""
    gpus: list[PlannedGpu] = []
    taken: set[str] = set()
    planned: set[str] = set()

    def name(demand: str, used: set[str]) -> str:
        number = draw(st.integers(0, 12))
        while f"{demand}-{number}" in used:
            number += 1
        used.add(f"{demand}-{number}")
        return f"{demand}-{number}"

    def instance(placement: Placement) -> Instance:
        demand = draw(st.sampled_from((None, *DEMANDS)))
        return Instance(placement, name(demand, taken), demand) if demand else Instance(placement)

    for index in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(PRODUCTS))
        now = draw(st.sampled_from(layouts(kind)))
        then = draw(st.one_of(st.just(now), st.sampled_from(layouts(kind)), st.just(None)))
        gpu = FleetGpu(f"GPU-{index}", product(kind).name, product(kind), instances=tuple(map(instance, now)))
        placements = (WHOLE,) if then is None else tuple(then)
        slices: list[PlannedSlice] = []
        for placement in placements:
            old = next((i for i in gpu.instances if i.placement == placement), None)
            if old is not None and old.replica and old.replica not in planned and draw(st.booleans()):
                planned.add(old.replica)
                slices.append(PlannedSlice(placement, "keep", old.replica, old.demand))
                continue
            demand = draw(st.sampled_from((None, *DEMANDS)))
            replica = name(demand, planned) if demand else None
            change = "create" if old is None else "reuse" if replica else "idle"
            slices.append(PlannedSlice(placement, change, replica, demand))  # type: ignore[arg-type]
        destroyed = tuple(i.placement for i in gpu.instances if i.placement not in placements)
        gpus.append(PlannedGpu(gpu, tuple(slices), destroyed))
    wanted = {demand: float(draw(st.integers(0, 12))) for demand in DEMANDS}
    fleet = tuple(g.gpu for g in gpus)
    return Case(FleetPlan(tuple(gpus), (), (), (), fingerprint(fleet)), tuple(_demands(wanted)))


def transition_of(case: Case) -> Transition:
    try:
        return plan_transition(case.plan, case.demands)
    except TransitionBlocked:
        event("no order keeps everything")
        return plan_transition(case.plan, case.demands, allow_dip=True)


async def _carried_out(case: Case, transition: Transition, kills: list[int], folder: Path) -> FakeFleet:
    fleet = FakeFleet.of((g.gpu for g in case.plan.gpus), case.demands)
    left = list(kills)
    seen = 0

    async def perhaps_die(_: Step) -> None:
        nonlocal seen
        seen += 1
        if left and seen >= left[0]:
            left.pop(0)
            raise Killed

    fleet.before = fleet.after = perhaps_die
    journal = TransitionJournal(folder / "transition.json")
    begun = False
    while True:
        executor = Executor(fleet, journal, FakeClock())
        try:
            outcome = await (executor.resume() if begun and journal.read() else executor.begin(transition))
        except Killed:
            begun = True
            fleet.starting.clear()
            continue
        assert outcome is not None
        assert outcome.ok
        return fleet


@settings(max_examples=150, deadline=None)
@given(cases(), st.lists(st.integers(1, 60), max_size=5).map(sorted))
def test_a_transition_ends_at_its_target_and_keeps_its_promises_whoever_is_killed(case: Case, kills: list[int]) -> None:
    transition = transition_of(case)
    dips = {d.demand: d.lowest for d in transition.dips}
    with tempfile.TemporaryDirectory() as folder:
        fleet = asyncio.run(_carried_out(case, transition, kills, Path(folder)))
    assert fingerprint(fleet.state()) == transition.target == fingerprint(with_own_names(case.plan).after())
    for demand, promised in transition.guaranteed.items():
        assert fleet.lowest.get(demand, 0.0) >= min(promised, dips.get(demand, promised)) - 1e-6


@settings(max_examples=100, deadline=None)
@given(cases())
def test_what_is_at_its_target_needs_no_step(case: Case) -> None:
    then = case.plan.after()
    stays = FleetPlan(
        tuple(
            PlannedGpu(g, tuple(PlannedSlice(i.placement, "keep", i.replica, i.demand) for i in g.instances))
            for g in then
        ),
        (),
        (),
        (),
        fingerprint(then),
    )
    assert plan_transition(stays, case.demands).steps == ()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_step_waits_only_for_earlier_ones_and_the_forecast_covers_them_all(case: Case) -> None:
    transition = transition_of(case)
    for step in transition.steps:
        assert all(n < step.number for n in step.after)
    told = forecast(transition, case.plan, {d.name: d for d in case.demands})
    assert len(told.ends_seconds) == len(transition.steps)
    for model in told.models:
        assert model.lowest <= model.before
        assert model.lowest >= 0


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_transition_is_refused_only_where_a_dip_is_the_price(case: Case) -> None:
    with_leave = plan_transition(case.plan, case.demands, allow_dip=True)
    if with_leave.dips:
        with pytest.raises(TransitionBlocked, match="it is guaranteed"):
            plan_transition(case.plan, case.demands)
    else:
        assert plan_transition(case.plan, case.demands) == with_leave


@pytest.mark.parametrize("kind", PRODUCTS)
def test_there_are_layouts_to_choose_from(kind: str) -> None:
    assert len(layouts(kind)) > 10
