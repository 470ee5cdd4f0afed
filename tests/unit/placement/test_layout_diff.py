"""The difference between what a GPU holds and what it is to hold, on values alone."""

from __future__ import annotations

from typing import Any

import pytest

from model_registry.catalogue import MIB, load_catalogue
from model_registry.errors import IllegalLayout
from model_registry.geometry import Placement
from placement.errors import CannotBeCut, NotPrivileged
from placement.gpus import ComputeInstance, GpuInstance, GpuProcess, GpuState, MigMode
from placement.partition.diff import after, diff, obstacles, restore
from placement.partition.wanted import Wanted, wanted_on

CATALOGUE = load_catalogue()
H100 = CATALOGUE.product("h100-sxm")
ENGINE = GpuProcess(4242, "VLLM::EngineCore", 7 * 2**30)


def instance(text: str, *, busy: bool = False, parts: int = 1, known: bool = True) -> GpuInstance:
    """`1g.10gb@3`, complete unless it has another number of parts."""
    placement = Placement.parse(text)
    g = H100.profile(placement.profile).g
    compute = tuple(
        ComputeInstance(i, g if parts == 1 else 1, f"MIG-{text}-{i}", 2**30, (ENGINE,) if busy else ())
        for i in range(parts)
    )
    return GpuInstance(placement.start + 7, placement.profile, g, placement.start if known else None, compute)


def gpu(*instances: GpuInstance | str, **changes: Any) -> GpuState:
    held = tuple(instance(i) if isinstance(i, str) else i for i in instances)
    settings: dict[str, Any] = {
        "uuid": "GPU-0",
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "product": H100.name,
        "memory_bytes": 81559 * MIB,
        "usable_bytes": 81000 * MIB,
        "driver": "610.43.02",
        "geometry": H100,
        "mode": MigMode(True, True),
        "instances": held,
    }
    return GpuState(**settings | changes)


def want(*entries: str, **counts: int) -> Wanted:
    named = {name.replace("_", "."): count for name, count in counts.items()}
    return wanted_on(H100, [*((e, 1) for e in entries), *named.items()], where="fleet.layouts[0]")


def steps(state: GpuState, wanted: Wanted) -> list[str]:
    return [str(a) for a in diff(state, wanted)]


G1, G2, G3 = "1g.10gb", "2g.20gb", "3g.40gb"


def test_nothing_to_do() -> None:
    assert steps(gpu(f"{G1}@0", f"{G3}@4"), want(**{"1g_10gb": 1, "3g_40gb": 1})) == []
    assert steps(gpu(), want()) == []


def test_a_lone_3g_goes_to_start_4() -> None:
    assert steps(gpu(), want(**{"3g_40gb": 1})) == ["create 3g.40gb@4"]


def test_small_ones_go_to_the_edge_so_that_a_wide_one_still_fits() -> None:
    (_, held) = after(gpu(), diff(gpu(), want(**{"1g_10gb": 3})))
    assert [p.start for p in held] == [4, 5, 6], "4g@0 still fits"


def test_what_is_wanted_by_count_stays_where_it_is() -> None:
    state = gpu(f"{G1}@1", f"{G1}@2")
    assert steps(state, want(**{"1g_10gb": 3})) == ["create 1g.10gb@0"], "in half a GPU that is broken into anyway"
    assert steps(state, want(**{"1g_10gb": 2, "3g_40gb": 1})) == ["create 3g.40gb@4"]


def test_exact_starts_move_what_lies_elsewhere() -> None:
    assert steps(gpu(f"{G3}@0"), want(f"{G3}@4")) == ["destroy 3g.40gb@0", "create 3g.40gb@4"]


def test_as_little_as_possible_goes_and_the_idle_first() -> None:
    state = gpu(instance(f"{G1}@0", busy=True), f"{G1}@4", instance(f"{G1}@1"))
    assert steps(state, want(**{"1g_10gb": 1, "3g_40gb": 1})) == [
        "destroy 1g.10gb@1",
        "destroy 1g.10gb@4",
        "create 3g.40gb@4",
    ]
    # Losing the idle pair is better than losing the one that is busy, though that would be one less.
    state = gpu(f"{G1}@0", f"{G1}@1", instance(f"{G1}@4", busy=True))
    wanted = want(**{"1g_10gb": 3, "3g_40gb": 1})
    assert [s for s in steps(state, wanted) if "@4" in s and "1g" in s] == []


def test_a_mix_of_starts_and_counts() -> None:
    state = gpu(f"{G1}@5")
    assert steps(state, want(f"{G3}@4", **{"1g_10gb": 1}))[0] == "destroy 1g.10gb@5", "it is in the way of 3g@4"
    assert steps(gpu(f"{G1}@2"), want(f"{G3}@4", **{"1g_10gb": 1})) == ["create 3g.40gb@4"]


def test_what_is_wanted_in_another_variant_goes() -> None:
    assert steps(gpu(f"{G1}@6"), want("1g.10gb+me@6")) == ["destroy 1g.10gb@6", "create 1g.10gb+me@6"]
    assert len(steps(gpu(f"{G1}@6"), want(**{"1g_10gb": 1}, **{"1g_10gb+me": 1}))) == 1


@pytest.mark.parametrize("parts", [0, 2, 3])
def test_a_half_finished_instance_is_completed_where_it_is_wanted(parts: int) -> None:
    state = gpu(instance(f"{G3}@4", parts=parts), f"{G1}@0")
    assert steps(state, want(**{"3g_40gb": 1, "1g_10gb": 1})) == ["complete 3g.40gb@4"]
    assert steps(state, want(**{"1g_10gb": 1})) == ["destroy 3g.40gb@4"]


def test_mode_comes_before_instances_and_goes_after_them() -> None:
    off = gpu(mode=MigMode(False, False))
    assert steps(off, want(**{"3g_40gb": 1})) == ["switch MIG on", "create 3g.40gb@4"]
    assert steps(gpu(f"{G1}@0"), Wanted(mig=False)) == ["destroy 1g.10gb@0", "switch MIG off"]
    assert steps(off, Wanted(mig=False)) == []


def test_a_pending_mode_that_is_not_wanted_is_taken_back() -> None:
    assert steps(gpu(f"{G1}@0", mode=MigMode(True, False)), want(**{"1g_10gb": 1})) == ["switch MIG on"]
    assert steps(gpu(mode=MigMode(False, True)), Wanted(mig=False)) == ["switch MIG off"]


def test_where_starts_may_not_be_read_counts_alone_can_be_checked() -> None:
    state = gpu(instance(f"{G1}@3", known=False), instance(f"{G3}@4", known=False), instances_known=False)
    assert steps(state, want(**{"1g_10gb": 1, "3g_40gb": 1})) == []
    for wanted in (want(**{"1g_10gb": 2}), want(f"{G1}@3", f"{G3}@4"), Wanted(mig=False)):
        with pytest.raises(NotPrivileged, match="root only") as refused:
            diff(state, wanted)
        assert "nvidia-cap2" in str(refused.value.remedy)


def test_gpus_that_cannot_be_cut_say_why() -> None:
    old = gpu(mode=None, driver="470.57.02")
    with pytest.raises(CannotBeCut, match=r"driver 470.57.02 is too old to cut a H100") as refused:
        diff(old, want(**{"1g_10gb": 1}))
    assert "525.85" in str(refused.value.remedy)
    with pytest.raises(CannotBeCut, match="offers no MIG"):
        diff(gpu(mode=None), want())
    with pytest.raises(CannotBeCut, match="has no MIG"):
        diff(gpu(mode=None, geometry=None), want())
    unknown = CATALOGUE.product("rtx-pro-5000")
    with pytest.raises(CannotBeCut, match="nobody has published"):
        diff(gpu(geometry=unknown, product=unknown.name), Wanted())


def test_what_cannot_be_together_is_drawn() -> None:
    with pytest.raises(IllegalLayout, match=r"(?s)finds no room.*memory slice"):
        diff(gpu(), want(**{"3g_40gb": 2, "1g_10gb": 1}))


def test_busy_slices_that_must_go_are_obstacles_and_others_are_not() -> None:
    state = gpu(instance(f"{G1}@0", busy=True), instance(f"{G1}@1", busy=True), instance(f"{G3}@4", parts=2, busy=True))
    actions = diff(state, want(f"{G1}@0", f"{G3}@4"))
    found = obstacles(state, actions, allow_mode_change=False)
    assert [(o.kind, o.slice) for o in found] == [
        ("process", "GPU-0/1g.10gb@1"),
        ("process", "GPU-0/3g.40gb@4"),
    ]
    assert "VLLM::EngineCore (pid 4242, 7.0 GiB)" in found[0].message


def test_a_change_of_mode_names_all_that_stands_in_its_way() -> None:
    state = gpu(
        mode=MigMode(False, False),
        processes=(ENGINE, GpuProcess(7, "Xorg", how="graphics")),
        display=True,
        mode_needs_reset=True,
    )
    daemon = GpuProcess(88, "nv-hostengine [DCGM]", how="open")
    found = obstacles(state, diff(state, want()), allow_mode_change=False, clients=[daemon])
    assert [o.kind for o in found] == ["mode-change", "process", "display"]
    assert "takes a reset" in found[0].message
    assert "nv-hostengine [DCGM] (pid 88)" in found[0].message
    assert "Xorg" in found[1].message
    assert [o.kind for o in obstacles(state, diff(state, want()), allow_mode_change=True)] == ["process", "display"]


def test_the_way_back_undoes_ours_and_leaves_the_rest() -> None:
    before = gpu(f"{G1}@0", instance(f"{G3}@4"), instance(f"{G1}@3", parts=0))
    now = gpu(f"{G1}@0", f"{G2}@4", f"{G1}@6")  # 2g@4 is ours, 1g@6 somebody else's; 3g@4 and the half 1g@3 are gone
    back = restore(before, now, [Placement(4, G2)])
    assert [str(a) for a in back] == ["destroy 2g.20gb@4", "create 3g.40gb@4"]
    assert restore(before, before, []) == ()
    half = gpu(f"{G1}@0", instance(f"{G3}@4", parts=0))
    assert [str(a) for a in restore(gpu(f"{G1}@0", f"{G3}@4"), half, [])] == ["complete 3g.40gb@4"]
    off = gpu(mode=MigMode(False, False))
    on = gpu(f"{G1}@0")
    assert [str(a) for a in restore(off, on, [Placement(0, G1)])] == ["destroy 1g.10gb@0", "switch MIG off"]
