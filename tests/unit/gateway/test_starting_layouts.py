"""What `up` does about `fleet.layouts` before anything starts, on simulated machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gateway.config import Config, load_config
from gateway.starting_layouts import StartingLayouts, cut_at_start
from model_registry.errors import IllegalLayout, SlicewayError
from placement.errors import CannotBeCut, NoFreeSlice
from placement.nvml.partition import NvmlPartitioner
from placement.simulate import enter, machine_directory
from placement.simulator import MachineOptions, Simulation

Write = Callable[..., tuple[Config, Path]]


@pytest.fixture(autouse=True)
def simulator(simulator_binding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML is the simulator's, and the environment is put back."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    monkeypatch.setenv("SLICEWAY_NVML_STATE", "")
    monkeypatch.delenv("SLICEWAY_NVML_PRIVILEGE", raising=False)
    monkeypatch.setattr("gateway.layouts.NvmlPartitioner", lambda: NvmlPartitioner(simulator_binding))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(layout: str, *, fleet: str = "h100-sxm: 1", mig: bool = True) -> tuple[Config, Path]:
        path = tmp_path / "sliceway.yaml"
        discover = f"{{simulate: {{{fleet}}}, mig: {str(mig).lower()}}}"
        path.write_text(
            f"version: v1\nstate_dir: {tmp_path}/state\nfleet: {{discover: {discover}, layouts: [{{layout: {layout}}}]}}\n",
            encoding="utf-8",
        )
        return load_config(path), path

    return written


def machine(config: Config) -> Simulation:
    found = enter(config.fleet, config.state)
    assert found is not None
    return found


def changes(config: Config) -> list[str]:
    return [line.split(" ")[0] for line in machine(config).journal() if "-gi" in line]


def test_gpus_are_cut_once_and_by_difference(write: Write) -> None:
    config, path = write("[1g.10gb@0, 3g.40gb@4]")
    first = cut_at_start(config, path)
    assert first.missing is None
    assert first.said == ("GPU 0 (H100-80GB-SXM) changed: 1g.10gb@0 3g.40gb@4",)
    assert cut_at_start(config, path) == StartingLayouts(), "nothing is left to do, and nothing is said"
    assert changes(config) == ["create-gi"] * 2
    config, path = write("[1g.10gb@0, 2g.20gb@4]")
    assert "2g.20gb@4" in cut_at_start(config, path).said[0]
    assert changes(config)[2:] == ["destroy-gi", "create-gi"], "the first slice was not touched"


def test_what_runs_on_a_slice_that_must_go_is_left_alone_and_the_way_out_is_told(
    write: Write, simulator_binding: ModuleType
) -> None:
    config, path = write("[3g.40gb@4]")
    cut_at_start(config, path)
    simulated = machine(config)
    (slice_uuid,) = (i.compute[0].uuid for i in NvmlPartitioner(simulator_binding).observe()[0].instances)
    simulated.attach(os.getpid(), slice_uuid, memory_bytes=2**20)
    config, path = write("[2g.20gb@4]")
    refused = cut_at_start(config, path)
    assert refused.missing == f"sliceway apply {path} --drain"
    assert f"(pid {os.getpid()}" in refused.said[0]
    assert changes(config) == ["create-gi"]


def test_without_the_right_the_command_that_has_it_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = write("{1g.10gb: 7}")
    machine(config)
    monkeypatch.setenv("SLICEWAY_NVML_PRIVILEGE", "none")
    refused = cut_at_start(config, path)
    assert refused.missing == f"sudo sliceway apply {path} --layouts-only"
    assert refused.said[-1] == f"to apply it: {refused.missing}"
    explained = refused.explain(NoFreeSlice("there is no slice at all", remedy="See `sliceway slices`."))
    assert explained.remedy == f"First: {refused.missing}\nSee `sliceway slices`."


def test_mig_is_never_switched_on_by_the_way(write: Write) -> None:
    config, path = write("{1g.10gb: 7}", mig=False)
    refused = cut_at_start(config, path)
    assert refused.missing == f"sudo sliceway apply {path} --layouts-only --allow-mode-change"
    assert machine(config).journal() == ()


def test_layouts_that_no_right_makes_possible_stop_the_start(write: Write) -> None:
    with pytest.raises(SlicewayError) as impossible:
        cut_at_start(*write("[3g.40gb@0, 1g.10gb@3]"))
    assert isinstance(impossible.value, IllegalLayout) or "memory slice" in str(impossible.value)
    config, path = write("{1g.10gb: 7}", mig=False)
    discover = config.fleet.discover
    assert not isinstance(discover, str)
    Simulation.create(machine_directory(discover, config.state), "h100-sxm:1", MachineOptions(driver="470.1"))
    with pytest.raises(CannotBeCut, match=r"driver 470\.1 is too old"):
        cut_at_start(config, path)


def test_no_layouts_ask_no_driver(tmp_path: Path) -> None:
    assert cut_at_start(Config(version="v1"), tmp_path) == StartingLayouts()
