"""Laws of the difference: it leads to what was wanted, once; what stays is in no step and in no call to the driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_registry.catalogue import Product, load_catalogue
from model_registry.geometry import Geometry, Layout, Placement
from placement.gpus import ComputeInstance, GpuInstance, GpuProcess, GpuState, MigMode
from placement.nvml.partition import NvmlPartitioner
from placement.partition import Complete, Create, Destroy, LayoutRule, Wanted, apply, diff
from placement.partition.diff import after

CATALOGUE = load_catalogue()
PRODUCTS = {p.short_names[0]: p for p in CATALOGUE.products if Geometry(p).options}
LAYOUTS = {name: (Layout(p), *Geometry(p).layouts) for name, p in PRODUCTS.items()}
ENGINE = GpuProcess(4242, "engine")
Nvml = Callable[..., Any]


def state(product: Product, held: Layout, busy: frozenset[Placement] = frozenset(), parts: Any = None) -> GpuState:
    """A GPU that holds `held`; `parts` are placements without a whole compute instance."""
    instances = []
    for number, placement in enumerate(held):
        g = product.profile(placement.profile).g
        processes = (ENGINE,) if placement in busy else ()
        whole = ComputeInstance(0, g, f"MIG-{number}", 2**30, processes)
        compute = () if placement in (parts or ()) else (whole,)
        instances.append(GpuInstance(number, placement.profile, g, placement.start, compute))
    return GpuState(
        "GPU-0", 0, product.name, product.name, 2**36, 2**36, "999.0", geometry=product, mode=MigMode(True, True),
        instances=tuple(instances),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A GPU, what is wanted there, and the layout that this was taken from."""

    gpu: GpuState
    wanted: Wanted
    target: Layout

    @property
    def product(self) -> Product:
        return self.target.product

    def __repr__(self) -> str:
        there = [f"{i.name}{'!' * bool(i.processes)}{'?' * (not i.complete)}" for i in self.gpu.instances]
        return f"{self.product.name}: {there} -> {[str(p) for p in self.wanted.exact]} {dict(self.wanted.counts)}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A product, what it holds, and a layout that is wanted partly by starts and partly by count."""
    name = draw(st.sampled_from(sorted(PRODUCTS)))
    product, layouts = PRODUCTS[name], LAYOUTS[name]
    held, target = draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))
    busy = frozenset(draw(st.sets(st.sampled_from(held.placements))) if held.placements else ())
    parts = draw(st.sets(st.sampled_from(held.placements))) - busy if held.placements else set()
    exact = tuple(p for p in target if draw(st.booleans()))
    counts = Counter(p.profile for p in target if p not in exact)
    return Case(state(product, held, busy, parts), Wanted(exact=exact, counts=dict(counts)), target)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_the_steps_lead_to_what_was_wanted_and_then_there_are_none(
    case: Case,
) -> None:
    product, gpu, wanted = case.product, case.gpu, case.wanted
    actions = diff(gpu, wanted)
    _, held = after(gpu, actions)
    layout = Layout(product, held)
    assert set(wanted.exact) <= set(layout)
    assert layout.counts == wanted.all_counts
    assert diff(state(product, layout), wanted) == ()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_what_stays_is_in_no_step_and_what_could_stay_does(case: Case) -> None:
    product, gpu, wanted, target = case.product, case.gpu, case.wanted, case.target
    actions = diff(gpu, wanted)
    gone = {a.instance.placement for a in actions if isinstance(a, Destroy)}
    made = {a.placement for a in actions if isinstance(a, Create)}
    assert not gone & made, "nothing is made again where it was"
    mended = [a.instance for a in actions if isinstance(a, Complete)]
    assert all(not i.complete for i in mended)
    # The layout that the counts were taken from is one way; ours loses no more engines than that does.
    busy = {i.placement for i in gpu.instances if i.processes}
    assert len(gone & busy) <= len(busy - set(target))
    Layout(product, after(gpu, actions)[1])  # which it cannot be if it is not legal


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), seed=st.randoms(use_true_random=False))
def test_the_order_of_what_is_there_and_of_what_is_wanted_makes_no_difference(case: Case, seed: Random) -> None:
    gpu, wanted = case.gpu, case.wanted
    instances, exact, counts = list(gpu.instances), list(wanted.exact), list(wanted.counts.items())
    for shuffled in (instances, exact, counts):
        seed.shuffle(shuffled)
    other = replace(gpu, instances=tuple(instances))
    assert diff(other, Wanted(exact=tuple(exact), counts=dict(counts))) == diff(gpu, wanted)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_on_a_driver_a_walk_through_layouts_never_touches_what_stays(
    nvml: Nvml, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(PRODUCTS)))
    ids = data.draw(st.sampled_from(["tree", "sequential"]))
    n = nvml(name, mig=True, gi_ids=ids, directory=tmp_path_factory.mktemp("machine") / "m")
    try:
        driver = NvmlPartitioner(n)
        for _ in range(data.draw(st.integers(1, 4))):
            before = {i.placement: i for i in driver.observe()[0].instances}
            target = data.draw(st.sampled_from(LAYOUTS[name]))
            entries = [str(p) if data.draw(st.booleans()) else p.profile for p in target]
            lines = len(n.machine.journal())
            done = apply(driver, [LayoutRule(layout=tuple(data.draw(st.permutations(entries))))])
            assert done.ok, done.gpus[0].error
            now = {i.placement: i for i in driver.observe()[0].instances}
            assert Counter(p.profile for p in now if p) == target.counts
            assert all(i.complete for i in now.values())
            kept = {p: i for p, i in before.items() if p in now}
            assert all(now[p] == i for p, i in kept.items()), "same ids, same UUIDs"
            touched = n.machine.journal()[lines:]
            assert not {f"gi={i.id}" for i in kept.values()} & {w for line in touched for w in line.split()}
    finally:
        n.nvmlShutdown()


FAULTS = [
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceDestroy",
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_fails_the_report_is_what_is_there_and_the_next_apply_mends_it(
    nvml: Nvml, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    n = nvml("h100-sxm", mig=True, directory=tmp_path_factory.mktemp("machine") / "m")
    try:
        driver = NvmlPartitioner(n)
        first, second = (data.draw(st.sampled_from(LAYOUTS["h100-sxm"])) for _ in range(2))
        assert apply(driver, [LayoutRule(layout=tuple(map(str, first)))]).ok
        before = driver.observe()[0]
        for _ in range(data.draw(st.integers(1, 3))):
            n.machine.inject(
                data.draw(st.sampled_from(FAULTS)),
                n.NVML_ERROR_UNKNOWN,
                nth=data.draw(st.integers(1, 4)),
                times=data.draw(st.sampled_from([1, 2, 5])),
                after=data.draw(st.booleans()),
            )
        (gpu,) = apply(driver, [LayoutRule(layout=tuple(map(str, second)))]).gpus
        now = driver.observe()[0]
        assert gpu.now == now
        if gpu.ok:
            assert set(now.placements) == set(second)
        elif gpu.result == "rolled-back":
            assert now.placements == before.placements
            assert all(i.complete for i in now.instances)
        kept = [i for i in before.instances if i.placement in second]
        assert all(i in now.instances for i in kept), "what was to stay did, with its UUID"
        n.machine.clear_faults()
        assert apply(driver, [LayoutRule(layout=tuple(map(str, second)))]).ok
        assert set(driver.observe()[0].placements) == set(second)
    finally:
        n.nvmlShutdown()
