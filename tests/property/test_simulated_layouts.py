"""Every maximal layout of every product can be made and taken away on the simulator, in any order and beside anything.

The simulator's C and the geometry's Python know the rules separately: they must agree on what is free at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_registry.catalogue import Product, load_catalogue
from model_registry.geometry import Geometry, Layout, Placement

CATALOGUE = load_catalogue()
PRODUCTS = {p.short_names[0]: p for p in CATALOGUE.products if Geometry(p).options}
WHOLE = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
Nvml = Callable[..., Any]


class Gpu:
    """One simulated GPU, driven with nvidia-ml-py."""

    def __init__(self, n: Any, product: Product) -> None:
        self.n, self.product, self.handle = n, product, n.nvmlDeviceGetHandleByIndex(0)
        self.made: dict[Placement, tuple[Any, Any]] = {}

    def create(self, placement: Placement) -> None:
        n, profile = self.n, self.product.profile(placement.profile)
        where = n.c_nvmlGpuInstancePlacement_t(placement.start, profile.memory_slices)
        instance = n.nvmlDeviceCreateGpuInstanceWithPlacement(self.handle, profile.id, n.byref(where))
        self.made[placement] = instance, n.nvmlGpuInstanceCreateComputeInstance(instance, WHOLE[profile.g])

    def destroy(self, placement: Placement) -> None:
        instance, compute = self.made.pop(placement)
        self.n.nvmlComputeInstanceDestroy(compute)
        self.n.nvmlGpuInstanceDestroy(instance)

    def observed(self) -> Layout:
        n, found = self.n, []
        for profile in self.product.profiles:
            room, count = (n.c_nvmlGpuInstance_t * profile.max_instances)(), n.c_uint()
            n.nvmlDeviceGetGpuInstances(self.handle, profile.id, room, n.byref(count))
            starts = [n.nvmlGpuInstanceGetInfo(g).placement.start for g in room[: count.value]]
            found += [Placement(start, profile.name) for start in starts]
        return Layout(self.product, tuple(found))


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_maximal_layout_in_random_orders(nvml: Nvml, name: str) -> None:
    product, random = PRODUCTS[name], Random(name)
    gpu = Gpu(nvml(name, mig=True, gi_ids=random.choice(["tree", "sequential"])), product)
    for layout in Geometry(product).maximal_layouts:
        for placement in random.sample(layout.placements, len(layout)):
            gpu.create(placement)
        assert gpu.observed() == layout
        assert all(
            gpu.n.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu.handle, p.id) == 0 for p in product.base_profiles
        )
        for placement in random.sample(layout.placements, len(layout)):
            gpu.destroy(placement)
        assert gpu.observed() == Layout(product)


@pytest.mark.parametrize("name", ["a30", "h100-sxm", "rtx-pro-6000"])
def test_every_maximal_layout_with_media_and_graphics_variants(nvml: Nvml, name: str) -> None:
    product, random = PRODUCTS[name], Random(name)
    gpu = Gpu(nvml(name, mig=True), product)
    for layout in Geometry.with_variants(product).maximal_layouts:
        for placement in random.sample(layout.placements, len(layout)):
            gpu.create(placement)
        assert gpu.observed() == layout
        for placement in random.sample(layout.placements, len(layout)):
            gpu.destroy(placement)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_from_any_occupied_state_the_driver_allows_what_geometry_allows(
    nvml: Nvml, tmp_path_factory: Any, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(PRODUCTS)))
    product = PRODUCTS[name]
    geometry = Geometry.with_variants(product)
    n = nvml(name, mig=True, directory=tmp_path_factory.mktemp("machine") / "m")
    try:
        gpu = Gpu(n, product)
        for _ in range(data.draw(st.integers(0, 12))):
            removable, free = sorted(gpu.made), geometry.free_starts(gpu.made)
            if removable and data.draw(st.booleans()):
                gpu.destroy(data.draw(st.sampled_from(removable)))
            elif free:
                profile = data.draw(st.sampled_from(sorted(free)))
                gpu.create(Placement(data.draw(st.sampled_from(free[profile])), profile))
        occupied = gpu.observed()
        assert set(occupied) == set(gpu.made)
        for profile in product.profiles:
            room = n.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu.handle, profile.id)
            assert room == geometry.remaining_capacity(profile.name, occupied), f"{profile.name} beside {occupied}"
            for start in set(profile.placements) - set(geometry.free_starts(occupied).get(profile.name, ())):
                with pytest.raises(n.NVMLError_InsufficientResources):
                    gpu.create(Placement(start, profile.name))
        target = data.draw(st.sampled_from(Geometry(product).extensions(occupied) or (occupied,)))
        for placement in data.draw(st.permutations([p for p in target if p not in occupied])):
            gpu.create(placement)
        assert gpu.observed() == target
    finally:
        n.nvmlShutdown()


def test_left_to_itself_the_driver_loses_layouts_that_explicit_placement_keeps(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    product = PRODUCTS["h100-sxm"]
    gpu, lost = n.nvmlDeviceGetHandleByIndex(0), 0
    for counts in Geometry(product).undominated_multisets:
        order = sorted(
            (name for name, count in counts.items() for _ in range(count)), key=lambda p: product.profile(p).g
        )
        try:
            for name in order:
                n.nvmlDeviceCreateGpuInstance(gpu, product.profile(name).id)
        except n.NVMLError_InsufficientResources:
            lost += 1
        n.machine.reset(0)
    assert lost > 0
