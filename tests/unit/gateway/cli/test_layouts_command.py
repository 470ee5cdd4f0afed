"""`plan`, `apply`, `assert`, `export` and `import` as an operator types them, on simulated machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.layout_view import show_replicas
from gateway.cli.layouts import yaml_text
from gateway.config import load_config
from gateway.layouts import ReplicaDifference, machine_of, one_at_a_time, replica_difference
from model_registry.errors import ConfigError, SlicewayError
from placement.errors import ModeChangeNeeded, NotPrivileged, SliceInUse
from placement.nvml.partition import NvmlPartitioner
from placement.simulate import enter, machine_directory
from placement.simulator import Simulation

LAYOUT = "layouts: [{layout: {1g.10gb: 4, 3g.40gb: 1}}]"


@pytest.fixture(autouse=True)
def simulator(simulator_binding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML is the simulator's, and the environment is put back."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    monkeypatch.setenv("SLICEWAY_NVML_STATE", "")
    monkeypatch.delenv("SLICEWAY_NVML_PRIVILEGE", raising=False)
    monkeypatch.setattr("gateway.layouts.NvmlPartitioner", lambda: NvmlPartitioner(simulator_binding))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration: `config(fleet="...", rest="...")`."""

    def write(fleet: str = LAYOUT, rest: str = "", discover: str = "{simulate: {h100-sxm: 2}}") -> Path:
        path = tmp_path / "sliceway.yaml"
        path.write_text(
            f"version: v1\nstate_dir: {tmp_path}/state\nfleet:\n  discover: {discover}\n  {fleet}\n{rest}\n",
            encoding="utf-8",
        )
        return path

    return write


def run(*words: Any, code: int = 0) -> Any:
    """What the command printed; it must end with `code`."""
    done = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "160"})
    if isinstance(done.exception, SlicewayError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def machine(path: Path) -> Simulation:
    """The simulated machine of a configuration."""
    loaded = load_config(path)
    simulation = enter(loaded.fleet, loaded.state)
    assert simulation is not None
    return simulation


def test_a_plan_is_drawn_as_a_difference_and_changes_nothing(config: Callable[..., Path]) -> None:
    path = config()
    shown = run("plan", path).stdout
    assert "GPU 0-1 H100-80GB-SXM (simulated) fleet.layouts[0]" in shown
    assert "+ 3g.40gb@4" in shown
    then = next(line for line in shown.splitlines() if line.startswith(" then"))
    assert [part.strip() for part in then.split("▏")[1:]] == ["1g.10gb"] * 4 + ["3g.40gb"]
    assert machine(path).journal() == ()


def test_plan_as_json(config: Callable[..., Path]) -> None:
    told = json.loads(run("plan", config(), "--json").stdout)
    assert set(told) == {"changes", "blocked", "simulated", "gpus", "replicas", "engines"}
    assert (told["changes"], told["blocked"], told["simulated"]) == (True, False, True)
    gpu = told["gpus"][1]
    assert (gpu["index"], gpu["product"], gpu["now"], gpu["then"][-1]) == (1, "H100-80GB-SXM", [], "3g.40gb@4")
    assert gpu["actions"][0] == {"action": "create", "slice": "1g.10gb@0"}
    assert gpu["mig"] == {"current": True, "pending": True, "then": True}


def test_apply_then_assert_then_apply_again(config: Callable[..., Path]) -> None:
    path = config()
    run("assert", path, code=1)
    first = json.loads(run("apply", path, "--json").stdout)
    assert (first["ok"], first["changed"], first["simulated"]) == (True, True, True)
    assert [g["result"] for g in first["gpus"]] == ["changed", "changed"]
    assert [s["profile"] for s in first["gpus"][0]["slices"]] == ["1g.10gb"] * 4 + ["3g.40gb"]
    assert "as configured" in run("assert", path).stdout
    assert json.loads(run("assert", path, "--json").stdout)["same"] is True
    again = json.loads(run("apply", path, "--json").stdout)
    assert (again["ok"], again["changed"]) == (True, False)
    assert "GPU 0-1 H100-80GB-SXM (simulated) as it should be" in run("apply", path).stdout


def test_a_layout_that_changes_is_shown_with_what_stays(config: Callable[..., Path]) -> None:
    run("apply", config())
    path = config("layouts: [{layout: {1g.10gb: 2, 2g.20gb: 1, 3g.40gb: 1}}]")
    shown = run("plan", path).stdout
    assert "- 1g.10gb@2" in shown
    assert "+ 2g.20gb@2" in shown
    assert "3g.40gb@4 stays" in shown
    assert "- 1g.10gb@2" in run("assert", path, code=1).stdout


def test_a_busy_slice_is_refused_with_its_process(config: Callable[..., Path]) -> None:
    path = config()
    slices = json.loads(run("apply", path, "--json").stdout)["gpus"][0]["slices"]
    uuid = next(s["compute_instances"][0]["uuid"] for s in slices if s["profile"] == "3g.40gb")
    machine(path).attach(4242, uuid, ghost=True, name="VLLM::EngineCore")
    path = config("layouts: [{layout: {7g.80gb: 1}}]")
    plan = json.loads(run("plan", path, "--json").stdout)
    assert plan["blocked"] is True
    assert plan["gpus"][0]["obstacles"][0]["processes"][0]["pid"] == 4242
    assert "VLLM::EngineCore (pid 4242" in run("plan", path).stdout
    for words in (["apply", path], ["apply", path, "--drain"]):  # no controller: whatever runs is not ours to stop
        with pytest.raises(SliceInUse, match="VLLM::EngineCore"):
            run(*words)


def test_the_mode_takes_its_option(config: Callable[..., Path]) -> None:
    path = config(discover="{simulate: {h100-sxm: 1}, mig: false}")
    assert "Allow it with --allow-mode-change" in run("plan", path).stdout
    with pytest.raises(ModeChangeNeeded):
        run("apply", path)
    run("apply", path, "--allow-mode-change")
    run("assert", path)


def test_ampere_is_reset_on_a_simulated_machine(config: Callable[..., Path]) -> None:
    path = config("layouts: [{layout: {1g.6gb: 4}}]", discover="{simulate: {a30: 1}, mig: false}")
    run("apply", path, "--allow-mode-change")
    run("assert", path)


def test_a_failure_is_told_and_is_the_exit_code(config: Callable[..., Path]) -> None:
    path = config()
    machine(path).inject("nvmlDeviceCreateGpuInstanceWithPlacement", 999, gpu=1, times=0)
    told = run("apply", path, code=1).stdout
    assert "GPU 0 H100-80GB-SXM (simulated) changed" in told
    assert "GPU 1 H100-80GB-SXM (simulated) not changed (what was begun is undone): MIG on, no instances" in told
    assert "creating 1g.10gb@0 failed: Unknown Error" in told


def test_without_the_right(config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICEWAY_NVML_PRIVILEGE", "none")
    with pytest.raises(NotPrivileged, match="root only") as refused:
        run("apply", config())
    assert "--layouts-only" in str(refused.value.remedy)


def test_what_is_simulated_is_said_and_kept_by_fleet(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(discover="auto")
    run("apply", path, "--simulate", "h100-sxm:4")
    done = run("plan", path, "--simulate", "h100-sxm:4")
    assert "simulated: h100-sxm:4" in done.stderr
    assert "GPU 0-3 H100-80GB-SXM (simulated) as it should be" in done.stdout
    run("assert", path, "--simulate", "h100-sxm:1", code=1)
    assert sorted(p.name for p in (tmp_path / "state" / "simulated").iterdir()) == ["h100-sxm-1", "h100-sxm-4"]


def test_without_layouts_no_driver_is_asked(config: Callable[..., Path]) -> None:
    path = config("slices: []", discover="cpu")
    assert "all stay as they are" in run("plan", path).stdout
    assert "all stay as they are" in run("apply", path).stdout
    run("assert", path)


def test_one_apply_at_a_time(config: Callable[..., Path]) -> None:
    path = config()
    loaded = load_config(path)
    held = machine_of(loaded)
    with one_at_a_time(loaded, held):
        done = subprocess.run(
            [sys.executable, "-m", "gateway.cli", "apply", str(path)],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    assert done.returncode == 1
    assert "a change of layouts is at work already" in done.stderr


# ---------------------------------------------------------------- replicas

MODELS = "models: [{name: chat, source: org/chat, replicas: 2}]"


def test_replicas_that_are_missing_differ_unless_only_layouts_are_asked_for(config: Callable[..., Path]) -> None:
    path = config(rest=MODELS)
    run("apply", path)
    run("assert", path, "--layouts-only")
    told = run("assert", path, code=1).stdout
    assert "no controller runs; `sliceway up CONFIG` starts as many of 2 as find a slice" in told
    replicas = json.loads(run("plan", path, "--json").stdout)["replicas"]
    assert replicas["controller"] is False
    assert replicas["missing"] == ["chat-0", "chat-1"]
    assert json.loads(run("plan", path, "--layouts-only", "--json").stdout)["replicas"] is None
    assert not replica_difference(load_config(path)).same


# ---------------------------------------------------------------- export, import


def test_what_is_exported_is_so_when_asserted(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config("layouts: [{layout: {1g.10gb: 4}}, {gpus: [1], layout: [3g.40gb@4]}]")
    run("apply", path)
    exported = tmp_path / "exported.yaml"
    exported.write_text(run("export", path).stdout + f"state_dir: {tmp_path}/state\n", encoding="utf-8")
    run("assert", exported)
    assert json.loads(run("export", path, "--json").stdout)["fleet"]["discover"] == {
        "simulate": {"h100-sxm": 2},
        "mig": True,
    }


def test_the_formats(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    run("apply", path)
    parted = tmp_path / "parted.yaml"
    parted.write_text(run("export", "mig-parted", path, "--label", "mine").stdout, encoding="utf-8")
    assert YAML(typ="safe").load(parted)["mig-configs"]["mine"][0]["mig-devices"] == {"1g.10gb": 4, "3g.40gb": 1}
    imported = json.loads(run("import", parted, "--json").stdout)["fleet"]
    assert imported == {"layouts": [{"gpus": "all", "layout": {"1g.10gb": 4, "3g.40gb": 1}}]}
    assert "nvidia.com/mig-3g.40gb.count=2\n" in run("export", "--format", "labels", path).stdout
    assert json.loads(run("export", "labels", path, "--json").stdout)["strategy"] == "mixed"
    unit = run("export", "systemd", path).stdout
    assert f"apply {path} --layouts-only --allow-mode-change" in unit
    assert json.loads(run("export", path, "--format", "systemd", "--json").stdout)["unit"] == unit


def test_a_unit_needs_a_configuration_with_layouts(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a unit needs a configuration"):
        run("export", "systemd")
    with pytest.raises(ConfigError, match=r"fleet\.layouts is empty") as refused:
        run("export", "systemd", config("slices: []"))
    assert "under fleet.layouts" in str(refused.value.remedy)
    with pytest.raises(ConfigError, match="one word too many"):
        run("export", "labels", "a.yaml", "b.yaml")


def test_an_imported_rule_round_trips(tmp_path: Path) -> None:
    entries = [
        {"device-filter": ["0x233010DE"], "devices": [0, 1], "mig-enabled": True, "mig-devices": {}},
        {"devices": [2], "mig-enabled": False},
    ]
    file = tmp_path / "parted.yaml"
    file.write_text(json.dumps({"version": "v1", "mig-configs": {"x": entries}}), encoding="utf-8")
    written = tmp_path / "sliceway.yaml"
    written.write_text(run("import", file).stdout, encoding="utf-8")
    first, second = load_config(written).fleet.layouts
    assert (first.gpus, first.products, first.mig, first.layout) == ((0, 1), ("0x233010DE",), True, {})
    assert (second.gpus, second.mig) == ((2,), False)


def test_short_lists_stay_on_one_line() -> None:
    content = {"a": [1, 2], "b": {"c": [{"d": 1}]}}
    assert yaml_text(content) == "a: [1, 2]\nb:\n  c:\n  - {d: 1}\n"
    assert YAML(typ="safe").load(StringIO(yaml_text(content))) == content


# ---------------------------------------------------------------- slices, as a process of its own


def test_slices_of_a_simulated_machine_say_so(config: Callable[..., Path]) -> None:
    path = config()
    run("apply", path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "slices", str(path), "--json"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["slices"]) == 10
    assert all(s["simulated"] and s["id"].rpartition("@")[2].isdigit() for s in told["slices"])
    assert [g["product"] for g in told["gpus"]] == ["H100-80GB-SXM"] * 2
    assert told["driver"]


def test_machines_of_other_kinds_lie_apart(config: Callable[..., Path], tmp_path: Path) -> None:
    names = set()
    for discover in ("{simulate: {a30: 1}}", "{simulate: {a30: 1}, mig: false}", "{simulate: {a30: 1, plain: 2}}"):
        loaded = load_config(config(discover=discover))
        names.add(machine_directory(loaded.fleet.discover, tmp_path).name)  # type: ignore[arg-type]
    assert names == {"a30-1", "a30-1+whole", "a30-1+plain-2"}


def test_the_sentence_counts_only_replicas_that_the_plan_has_a_slice_for(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ReplicaDifference(controller=False, missing=("chat-0", "chat-1", "chat-2"))
    show_replicas(missing, 2, met=False)
    show_replicas(missing, 3)
    told = capsys.readouterr().out
    assert "starts 2, without what finds no slice" in told
    assert told.rstrip().endswith("starts 3")
