"""`doctor` on configurations with something wrong in them, with the real checks."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.config import Config, load_config
from gateway.doctor import Finding, examine
from placement.device_nodes import HostTree
from placement.gpu_slices import card_of
from placement.gpus import GpuState
from placement.slices import Inventory, Slice, SliceKind, SliceUser
from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, write_status
from placement.table import ReplicaState, SliceRow

EXAMPLES = Path(__file__).resolve().parents[3] / "configs" / "examples"
ENVIRON = {"SLICEWAY_ENGINE_PYTHON": sys.executable}


def configuration(tmp_path: Path, **sections: Any) -> Config:
    base: dict[str, Any] = {
        "version": "v1",
        "state_dir": str(tmp_path / "state"),
        "fleet": {"slices": [{"kind": "cpu", "cores": "0", "memory": "1GiB"}]},
        "gateway": {"listen": "127.0.0.1:0"},
    }
    return Config.model_validate(base | sections)


def of(findings: tuple[Finding, ...], check: str, verdict: str) -> list[Finding]:
    return [f for f in findings if f.check == check and f.verdict == verdict]


def test_every_problem_and_warning_about_the_input_names_a_remedy(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        models=[{"name": "m", "source": str(tmp_path / "missing"), "replicas": 3}],
        gateway={"listen": "0.0.0.0:0", "authentication": "none"},
    )
    findings = examine(config, environ=ENVIRON)
    problems = [f for f in findings if f.verdict == "problem"]
    assert {f.check for f in problems} == {"slices", "engine", "models", "gateway"}
    assert all(f.remedy for f in problems)


def test_an_interpreter_without_vllm_names_the_install_command(tmp_path: Path) -> None:
    config = configuration(tmp_path, models=[{"name": "m", "source": str(tmp_path)}])
    (problem,) = of(examine(config, environ=ENVIRON), "engine", "problem")
    assert problem.remedy == "sliceway engine install --kind cpu"


def test_endpoints_alone_need_no_engine(tmp_path: Path) -> None:
    config = configuration(tmp_path, models=[{"name": "m", "endpoints": ["http://127.0.0.1:9100"]}])
    findings = examine(config, environ={})
    assert of(findings, "engine", "ok")
    assert not of(findings, "engine", "problem")


@pytest.mark.parametrize(("program", "verdict"), [(sys.executable, "ok"), ("no-such-engine", "problem")])
def test_another_engine_is_looked_for_by_its_program(program: str, verdict: str, tmp_path: Path) -> None:
    config = configuration(
        tmp_path, engine={"command": [program, "--port", "1"]}, models=[{"name": "m", "source": str(tmp_path)}]
    )
    assert of(examine(config, environ={}), "engine", verdict)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_told(taken_port: int, tmp_path: Path) -> None:
    config = configuration(tmp_path, gateway={"listen": f"127.0.0.1:{taken_port}"})
    (warning,) = of(examine(config, environ={}), "gateway", "warning")
    assert str(taken_port) in warning.message
    assert "gateway.listen" in warning.remedy


def test_a_broken_fleet_does_not_stop_the_other_checks(tmp_path: Path) -> None:
    fleet = {"discover": "cpu", "cpu": {"slices": 1, "memory": "100000TiB"}}
    findings = examine(configuration(tmp_path, fleet=fleet), environ={})
    assert of(findings, "slices", "problem")
    assert of(findings, "state", "ok") or of(findings, "state", "warning")


def test_the_command_prints_json_and_exits_1_on_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text("version: v1\nstate_dir: state\nmodels: [{name: m, source: ./missing}]\n", encoding="utf-8")
    answer = CliRunner().invoke(app, ["doctor", str(path), "--json"])
    assert answer.exit_code == 1
    report = json.loads(answer.stdout)
    assert report["problems"] >= 1
    assert {"check", "verdict", "message", "remedy"} == set(report["findings"][0])


def test_device_files_and_past_errors_of_gpus_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuState(
        uuid="GPU-1",
        index=0,
        name="NVIDIA L4",
        product="NVIDIA L4",
        memory_bytes=2**34,
        usable_bytes=2**34,
        driver="610.0",
        minor=0,
        pci_bus="00000000:4F:00.0",
    )
    whole = Slice("GPU-1", SliceKind.GPU, None, 2**34, uuid="GPU-1", gpu=card_of(gpu))
    monkeypatch.setattr("gateway.doctor.observe", lambda _: Inventory((whole,), gpus=(gpu,)))
    log = ["NVRM: Xid (PCI:0000:4f:00): 119, pid=1, Timeout", "NVRM: Xid (PCI:0000:4f:00): 13, pid=1, Graphics"]
    findings = examine(configuration(tmp_path), environ=ENVIRON, tree=HostTree(tmp_path), read_log=lambda: log)
    missing = of(findings, "devices", "problem")
    assert [f.message.split()[0] for f in missing] == ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0"]
    assert all(f.remedy.startswith("sudo nvidia-modprobe") for f in missing)
    (error,) = of(findings, "xid", "problem")
    assert error.message == "GPU 0 (NVIDIA L4): the GPU's system processor does not answer (XID 119)"
    assert "--gpu-reset -i 0" in error.remedy

    (tmp_path / "dev").mkdir()
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        (tmp_path / "dev" / name).touch()
    findings = examine(configuration(tmp_path), environ=ENVIRON, tree=HostTree(tmp_path), read_log=lambda: None)
    assert of(findings, "devices", "ok")
    assert "sudo dmesg" in of(findings, "xid", "ok")[0].message


def test_without_gpus_nothing_is_said_of_device_files(tmp_path: Path) -> None:
    findings = examine(configuration(tmp_path), environ=ENVIRON, tree=HostTree(tmp_path), read_log=lambda: None)
    assert not [f for f in findings if f.check in {"devices", "xid"}]


def test_a_worked_example_has_nothing_wrong_with_it(
    tmp_path: Path, simulator_binding: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On simulated GPUs: slices come with the plan, engines are simulated, and `metadata` stands for the hub."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    monkeypatch.setenv("SLICEWAY_NVML_STATE", "")
    loaded = load_config(EXAMPLES / "three-medium-one-small.yaml")
    config = loaded.model_copy(update={"state_dir": tmp_path / "state"})
    found = examine(config, environ={"HF_HUB_OFFLINE": "1"})
    assert not [f for f in found if f.verdict == "problem" and f.check in ("slices", "models")]
    assert len(of(found, "models", "ok")) == 4
    assert "so far" in of(found, "slices", "ok")[0].message


def test_a_simulated_slice_needs_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Slice("GPU-1/1g.10gb@0", SliceKind.MIG, "1g.10gb", 2**30, uuid="MIG-1", simulated=True)
    monkeypatch.setattr("gateway.doctor.observe", lambda _: Inventory((there,)))
    config = configuration(tmp_path, models=[{"name": "m", "source": str(tmp_path)}])
    assert "simulated engines" in of(examine(config, environ={}), "engine", "ok")[0].message


def test_engines_of_ours_are_no_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = 2**22 + 1  # beyond the largest pid that Linux gives
    users = tuple(
        SliceUser(slice_id="cpu-0", pid=pid, name="engine", memory_bytes=1) for pid in (os.getpid(), stranger)
    )
    here = Slice(id="cpu-0", kind=SliceKind.CPU, profile=None, memory_bytes=2**30, cores=(0,))
    monkeypatch.setattr("gateway.doctor.observe", lambda _: Inventory((here,), users=users))
    config = configuration(tmp_path)
    assert [f.message.split()[1] for f in of(examine(config, environ={}), "slices", "warning")] == [
        str(os.getpid()),
        str(stranger),
    ]
    paths = StatePaths(config.state)
    paths.prepare({})
    row = ReplicaStatus(
        replica="m-0",
        model="m",
        slice=SliceRow(id="cpu-0", kind="cpu"),
        memory_bytes=1,
        state=ReplicaState.READY,
        since=datetime(2026, 1, 1, tzinfo=UTC),
        log="",
        engine_pid=os.getpid(),
    )
    at = datetime(2026, 1, 1, tzinfo=UTC)
    status = ControllerStatus(
        pid=1, started_at=at, updated_at=at, state="running", config="", generation=1, replicas=(row,)
    )
    write_status(status, paths.controller_status)
    assert [f.message.split()[1] for f in of(examine(config, environ={}), "slices", "warning")] == [str(stranger)]
