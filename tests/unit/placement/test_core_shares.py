"""Cores for GPU slices: which, how many, and what moves when a GPU is cut anew."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Geometry, Placement
from placement.core_shares import share_cores
from placement.errors import InventoryError
from placement.gpu_slices import slices_of
from placement.gpus import ComputeInstance, GpuInstance, GpuState, MigMode
from placement.host import Host
from placement.inventory import Sources, observe
from placement.launch import thread_environment
from placement.nvml import NvidiaState
from placement.schema import FleetConfig
from placement.sharing import SharingRule, share
from placement.slices import Inventory, Slice

H100 = load_catalogue().product("h100-sxm")
GIB = 2**30


def gpu(index: int, *layout: str, cpus: Sequence[int] = (), mig: bool = True, starts_known: bool = True) -> GpuState:
    """An H100 holding `layout` (`1g.10gb@0`), next to `cpus`."""
    placements = [Placement.parse(text) for text in layout]
    instances = tuple(
        GpuInstance(
            id=number,
            profile=p.profile,
            g=H100.profile(p.profile).g,
            start=p.start if starts_known else None,
            compute=(ComputeInstance(0, H100.profile(p.profile).g, f"MIG-{index}-{p}", 9 * GIB),),
        )
        for number, p in enumerate(placements, start=7)
    )
    return GpuState(
        uuid=f"GPU-{index}",
        index=index,
        name="NVIDIA H100",
        product=H100.name,
        memory_bytes=80 * GIB,
        usable_bytes=79 * GIB,
        driver="610.0",
        geometry=H100,
        mode=MigMode(mig, mig),
        instances=instances,
        instances_known=starts_known,
        cpus=tuple(cpus),
    )


def host(physical: int, threads_per_core: int = 1, *, first: int = 0) -> Host:
    """`physical` cores; hardware thread i and i + physical are siblings, as Linux numbers them."""
    cores = range(first, first + physical)
    return Host(tuple(tuple(c + physical * t for t in range(threads_per_core)) for c in cores), 64 * GIB)


def shared_out(gpus: Sequence[GpuState], machine: Host) -> Inventory:
    return share_cores(Inventory(tuple(s for g in gpus for s in slices_of(g)), gpus=tuple(gpus)), machine)


def cores(inventory: Inventory) -> dict[str, tuple[int, ...]]:
    return {s.id: s.cores for s in inventory.slices}


def disjoint(slices: Sequence[Slice]) -> bool:
    return not any(set(a.cores) & set(b.cores) for a, b in itertools.combinations(slices, 2))


def test_an_eight_gpu_host_gives_each_slice_cores_of_its_own_node() -> None:
    layout = [f"1g.10gb@{i}" for i in range(7)]
    machine = host(112, 2)
    node = {0: [*range(56), *range(112, 168)], 1: [*range(56, 112), *range(168, 224)]}
    found = shared_out([gpu(i, *layout, cpus=node[i // 4]) for i in range(8)], machine)
    assert len(found.slices) == 56
    assert disjoint(found.slices)
    for one in found.slices:
        assert one.gpu is not None
        assert len(one.cores) == 4, "two physical cores, both hardware threads of each"
        assert set(one.cores) <= set(node[one.gpu.index // 4])
        assert {c - 112 for c in one.cores if c >= 112} == {c for c in one.cores if c < 112}, "siblings stay together"
        assert not one.shared_cores
    assert found.notes == ()


def test_cores_follow_compute_slices() -> None:
    found = shared_out([gpu(0, "4g.40gb@0", "2g.20gb@4", "1g.10gb@6")], host(14))
    assert {p: len(c) for p, c in zip(("4g", "2g", "1g"), cores(found).values(), strict=True)} == {
        "4g": 8,
        "2g": 4,
        "1g": 2,
    }
    (whole,) = shared_out([gpu(0, mig=False)], host(14)).slices
    assert whole.cores == tuple(range(14))


def test_cutting_one_gpu_anew_moves_no_cores_of_what_stays() -> None:
    machine, near = host(28), range(28)
    before = shared_out([gpu(0, "1g.10gb@0", "3g.40gb@4", cpus=near), gpu(1, "7g.80gb@0", cpus=near)], machine)
    after = shared_out(
        [gpu(0, "1g.10gb@0", "2g.20gb@4", "1g.10gb@2", cpus=near), gpu(1, "1g.10gb@5", cpus=near)], machine
    )
    assert cores(before)["GPU-0/1g.10gb@0"] == cores(after)["GPU-0/1g.10gb@0"] == (0, 1)
    assert set(cores(after)["GPU-0/2g.20gb@4"]) < set(cores(before)["GPU-0/3g.40gb@4"])


def test_a_slice_never_ends_without_a_core_while_there_are_enough() -> None:
    layout = [f"1g.10gb@{i}" for i in range(7)]
    found = shared_out([gpu(0, *layout), gpu(1, *layout)], host(15))
    assert disjoint(found.slices)
    assert sorted(len(s.cores) for s in found.slices) == [1] * 13 + [2]


def test_too_few_cores_are_shared_and_said_to_be() -> None:
    found = shared_out([gpu(i, *(f"1g.10gb@{p}" for p in range(7))) for i in range(8)], host(2))
    assert all(s.cores == (0, 1) and s.shared_cores for s in found.slices)
    assert found.notes == (
        "GPU 0-7: 56 slices share cores 0-1, fewer than there are slices: their engines are not kept apart on the host.",
    )
    assert thread_environment(found.slices[0])["OMP_NUM_THREADS"] == "1"


def test_only_cores_that_this_process_may_use_are_given_out() -> None:
    found = shared_out(
        [gpu(0, "1g.10gb@0", cpus=range(56)), gpu(1, "1g.10gb@0", cpus=range(56, 112))], host(4, first=50)
    )
    assert set(cores(found)["GPU-0/1g.10gb@0"]) <= {50, 51, 52, 53}
    assert "none of the cores next to it (56-111) may be used here" in found.notes[0]


def test_where_starts_may_not_be_read_instances_lie_side_by_side() -> None:
    found = shared_out([gpu(0, "3g.40gb@4", "1g.10gb@0", "1g.10gb@1", starts_known=False)], host(14))
    assert disjoint(found.slices)
    assert [len(s.cores) for s in found.slices] == [6, 2, 2]


def test_engines_that_share_a_gpu_do_not_share_its_cores() -> None:
    whole = gpu(0, mig=False)
    rule = SharingRule(kind="mps", slices=3)
    inventory = Inventory(slices_of(whole), gpus=(whole,))
    # `all` passes over GPUs that MIG can cut only when it is on.
    found = share_cores(share(inventory, [rule]), host(9))
    assert [s.cores for s in found.slices] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]


def test_pinning_can_be_left_to_others_and_a_silent_host_costs_no_slice() -> None:
    found = gpu(0, "1g.10gb@0")
    nvidia = NvidiaState("610.0", slices_of(found), (), (), (found,))
    sources = Sources(host=lambda: host(4), nvidia=lambda: nvidia)
    assert observe(FleetConfig(), sources).slices[0].cores == (0, 1, 2, 3)
    assert observe(FleetConfig(pin_cores=False), sources).slices[0].cores == ()

    def silent() -> Host:
        raise InventoryError("this machine's memory is not told")

    quiet = observe(FleetConfig(), Sources(host=silent, nvidia=lambda: nvidia))
    assert quiet.slices[0].cores == ()
    assert "not pinned to cores" in quiet.notes[0]


LAYOUTS = [tuple(map(str, layout.placements)) for layout in Geometry(H100).maximal_layouts]


@given(
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4),
    physical=st.integers(1, 40),
    per_core=st.integers(1, 2),
    nodes=st.integers(1, 2),
)
def test_every_slice_has_cores_of_its_own_or_says_that_it_shares(
    layouts: list[tuple[str, ...]], physical: int, per_core: int, nodes: int
) -> None:
    machine = host(physical, per_core)
    halves = [[t for core in machine.cores[n::nodes] for t in core] for n in range(nodes)]
    found = shared_out([gpu(i, *layout, cpus=halves[i % nodes]) for i, layout in enumerate(layouts)], machine)
    assert all(s.cores for s in found.slices)
    assert set().union(*(s.cores for s in found.slices)) <= set(machine.threads)
    apart = [s for s in found.slices if not s.shared_cores]
    assert disjoint(apart)
    for one in found.slices:
        near = halves[one.gpu.index % nodes] if one.gpu else []
        assert not near or set(one.cores) <= set(near)
        if one.shared_cores:
            assert len(one.cores) < sum(o.cores == one.cores for o in found.slices)
