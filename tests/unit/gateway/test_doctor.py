"""`doctor` on configurations with something wrong in them, with the real checks."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.config import Config
from gateway.doctor import Finding, examine
from placement.device_nodes import HostTree
from placement.gpu_slices import card_of
from placement.gpus import GpuState
from placement.slices import Inventory, Slice, SliceKind

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
    path.write_text("version: v1\nstate_dir: state\nmodels: [{name: m, source: ./missing}]\n")
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
