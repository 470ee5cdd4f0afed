"""What reading GPUs guarantees, on simulated machines and, where there is one, on a real driver. Changes nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_registry.geometry import Layout
from placement.exports import export_config, export_labels, export_mig_parted
from placement.nvml import read_activity, read_nvidia
from placement.nvml.partition import NvmlPartitioner
from placement.partition import LayoutRule, apply, plan
from placement.slices import SliceKind

MACHINES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "whole": ("h100-sxm:2", {}, None),
    "cut": ("h200:2", {"mig": True}, {"1g.18gb": 3, "3g.71gb": 1}),
    "ampere": ("a100-40gb", {"mig": True}, {"1g.5gb": 2, "2g.10gb": 2}),
    "twelve": ("rtx-pro-6000", {"mig": True}, {"2g.48gb": 1, "1g.24gb+gfx": 1}),
    "mixed": ("a30,plain", {"mig": True}, {"1g.6gb": 4}),
    "unprivileged": ("h100-sxm:2", {"mig": True}, {"1g.10gb": 7}),
    "empty": ("h100-sxm", {"mig": True}, None),
}


def drivers_library() -> Path | None:
    try:
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, encoding="utf-8", check=False).stdout
    except FileNotFoundError:
        return None
    paths = [line.rsplit(" ", 1)[-1] for line in listed.splitlines() if "libnvidia-ml.so.1 " in line]
    return Path(paths[0]) if paths else None


@pytest.fixture(params=[*MACHINES, pytest.param("driver", marks=pytest.mark.gpu)])
def n(request: pytest.FixtureRequest, nvml: Callable[..., Any], bind: Callable[[Path], Any]) -> Iterator[Any]:
    """nvidia-ml-py on a simulated machine that was cut, or on the real driver as it is."""
    if request.param == "driver":
        library = drivers_library()
        if library is None:
            pytest.skip("no NVIDIA driver on this machine")
        yield bind(library)
        return
    fleet, options, layout = MACHINES[request.param]
    binding = nvml(fleet, **options)
    if layout:
        assert apply(NvmlPartitioner(binding), [LayoutRule(layout=layout)]).ok
    if request.param == "unprivileged":
        binding.machine.set_privilege("none")
    yield binding


def test_every_slice_can_be_pinned_to_and_named(n: Any) -> None:
    state = read_nvidia(n)
    assert state.driver
    ids = [s.id for s in state.slices]
    assert len(set(ids)) == len(ids)
    assert len({s.uuid for s in state.slices}) == len(ids)
    for one in state.slices:
        assert one.gpu is not None
        assert one.id.startswith(one.gpu.uuid)
        assert 0 < one.memory_bytes <= one.gpu.memory_bytes
        assert str(one.uuid).startswith("MIG-" if one.kind is SliceKind.MIG else "GPU-")


def test_reading_twice_gives_the_same(n: Any) -> None:
    first, second = read_nvidia(n), read_nvidia(n)
    assert [s.id for s in first.slices] == [s.id for s in second.slices]
    assert [g.placements for g in first.gpus] == [g.placements for g in second.gpus]


def test_instances_lie_as_geometry_allows(n: Any) -> None:
    for gpu in NvmlPartitioner(n).observe():
        if gpu.mig and gpu.instances_known:
            assert gpu.geometry is not None
            assert len(Layout(gpu.geometry, gpu.placements)) == len(gpu.instances)
        elif not gpu.mig:
            assert gpu.instances == ()


def test_the_geometry_is_complete_where_there_is_mig(n: Any) -> None:
    for gpu in NvmlPartitioner(n).observe():
        if gpu.mode is None:
            continue
        assert gpu.geometry is not None, f"{gpu.name}: no profile is known"
        for profile in gpu.geometry.profiles:
            assert profile.id is not None
            assert profile.memory_bytes is not None
            assert profile.memory_bytes <= gpu.memory_bytes
            assert profile.max_instances >= 1


def test_what_is_there_is_no_difference_to_what_is_there(n: Any) -> None:
    gpus = NvmlPartitioner(n).observe()
    rules = [LayoutRule.model_validate(r) for r in export_config(gpus)["fleet"]["layouts"]]  # type: ignore[index]
    assert [p.actions for p in plan(gpus, rules)] == [()] * len(gpus)


def test_every_export_can_be_written(n: Any) -> None:
    gpus = NvmlPartitioner(n).observe()
    assert export_mig_parted(gpus)["version"] == "v1"
    assert sum(export_labels(gpus).resources.values()) == len(read_nvidia(n).slices)


def test_a_simulated_gpu_says_so_and_a_real_one_does_not(n: Any) -> None:
    simulated = hasattr(n, "machine") and "sliceway" in str(getattr(n.nvmlLib, "_name", ""))
    assert {g.simulated for g in read_nvidia(n).gpus} == {simulated}


def test_every_slice_tells_its_memory_and_shares_of_one(n: Any) -> None:
    found = {one.uuid: one for one in read_activity(n, pause=lambda _: None)}
    assert {one.uuid for one in read_nvidia(n).slices} <= set(found)
    for one in found.values():
        assert 0 <= one.used_bytes <= one.total_bytes
        assert all(0 <= share <= 1 for share in one.busy.values())
