"""Plan, carry out, plan again: nothing is left to do, nothing was promised in vain, whatever was asked for before."""

from __future__ import annotations

import asyncio
import tempfile
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.catalogue import Product, load_catalogue
from placement.planner.plan import plan
from placement.planner.types import Constraints, FleetGpu, ModelDemand, Option, Problem, Reservation
from placement.testing import FakeClock
from placement.transition import Executor, TransitionJournal, plan_transition
from placement.transition.testing import FakeFleet

NAMES = ("chat", "code", "embed")
PROFILES = {
    "a30": ("1g.6gb", "2g.12gb", "4g.24gb"),
    "a100-80gb": ("1g.10gb", "2g.20gb", "3g.40gb", "7g.80gb"),
}


@cache
def product_of(name: str) -> Product:
    return load_catalogue().product(name)


@st.composite
def demands(draw: st.DrawFn, product: Product, allowed: tuple[str, ...]) -> tuple[ModelDemand, ...]:
    """Some of three models, by rate or by number, on some of the profiles that are `allowed`."""
    found = []
    for name in NAMES:
        profiles = draw(st.sets(st.sampled_from(allowed), min_size=1))
        options = tuple(
            Option(product.name, p, float(product.profile(p).g), product.profile(p).g / 20) for p in profiles
        )
        match draw(st.sampled_from(["none", "rate", "number"])):
            case "rate":
                found.append(ModelDemand(name, name, options, rate=draw(st.floats(0.5, 8)), min_replicas=1))
            case "number":
                found.append(ModelDemand(name, name, options, replicas=draw(st.integers(0, 3))))
    return tuple(found)


async def carried_out(fleet: FakeFleet, asked: tuple[ModelDemand, ...], rules: Constraints, folder: Path) -> None:
    """Plan for `asked` on what there is, carry it out, and see that every promise on the way was kept."""
    found = plan(Problem(fleet.state(), asked, rules))
    transition = plan_transition(found, asked, allow_dip=True)
    fleet.demands = {d.name: d for d in asked}
    fleet.lowest = fleet.capacity()
    outcome = await Executor(fleet, TransitionJournal(folder / "transition.json"), FakeClock()).begin(transition)
    assert outcome.ok
    dips = {d.demand: d.lowest for d in transition.dips}
    for name, promised in transition.guaranteed.items():
        assert fleet.lowest.get(name, 0.0) >= min(promised, dips.get(name, promised)) - 1e-6


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(name, number) for name in PROFILES for number in (1, 2)]), st.booleans(), st.data())
def test_after_a_plan_is_carried_out_the_next_one_has_nothing_to_do(
    gpus: tuple[str, int], reserve: bool, data: st.DataObject
) -> None:
    product, allowed = product_of(gpus[0]), PROFILES[gpus[0]]
    asked = data.draw(st.lists(demands(product, allowed), min_size=1, max_size=3), label="asked")
    rules = Constraints(reserve=(Reservation(allowed[0], 1, "notebooks"),) if reserve else ())
    fleet = FakeFleet.of(FleetGpu(f"GPU-{n}", product.name, product, whole=False) for n in range(gpus[1]))
    with tempfile.TemporaryDirectory() as folder:
        for target in asked:
            asyncio.run(carried_out(fleet, target, rules, Path(folder)))
    again = plan(Problem(fleet.state(), asked[-1], rules))
    assert not again.changed, [d for d in again.decisions if d.action != "keep"]
    assert plan_transition(again, asked[-1]).steps == ()
    if reserve and not again.unmet:
        assert sum(i.reserved == "notebooks" for g in fleet.state() for i in g.instances) == 1
