"""What Ray's books hold of a node: a resource for each slice, and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from placement.cluster.offers import node_resource, offered, resource_of
from placement.cluster.testing import made_gpu
from placement.gpu_slices import slices_of
from placement.nvml import read_nvidia
from placement.nvml.partition import NvmlPartitioner
from placement.partition import LayoutRule, apply
from placement.slices import Inventory, Slice, SliceKind

Nvml = Callable[..., Any]
CPUS = tuple(Slice(f"cpu-{n}", SliceKind.CPU, None, 2**32, cores=(n,)) for n in range(2))


def test_every_slice_is_one_resource_of_its_node() -> None:
    resources = offered("node-a", Inventory(CPUS))
    slices = [resource_of("node-a/cpu-0"), resource_of("node-a/cpu-1")]
    assert set(resources) == {node_resource("node-a"), *slices}
    assert [resources[name] for name in slices] == [1.0, 1.0], "one replica has it, and no second one"


def test_a_gpu_offers_every_slice_it_may_ever_be_cut_into_and_never_itself(nvml: Nvml) -> None:
    """Ray fixes a node's resources when it joins, and cannot see slices: what is cut later must be in its books before."""
    n = nvml("h100-sxm", mig=True)
    bare = read_nvidia(n)
    before = offered("node-a", Inventory(bare.slices, gpus=bare.gpus))
    assert apply(NvmlPartitioner(n), [LayoutRule(layout={"1g.10gb": 4, "3g.40gb": 1})]).ok
    cut = read_nvidia(n)
    assert len(cut.slices) == 5
    assert {resource_of(f"node-a/{one.id}") for one in cut.slices} <= set(before)
    assert offered("node-a", Inventory(cut.slices, gpus=cut.gpus)) == before
    assert not any(name.lower() in ("gpu", "num_gpus") for name in before)


def test_what_a_gpu_offers_does_not_depend_on_its_mode_which_a_plan_may_change() -> None:
    on, off = (made_gpu(0, mig=mig) for mig in (True, False))
    before = offered("node-a", Inventory(slices_of(off), gpus=(off,)))
    assert offered("node-a", Inventory(slices_of(on), gpus=(on,))) == before
    assert {resource_of("node-a/GPU-0"), resource_of("node-a/GPU-0/3g.40gb@4")} <= set(before)
