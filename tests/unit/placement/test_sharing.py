"""GPUs without MIG, shared by several engines: what they get, and what is said about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from model_registry.errors import ConfigError
from placement.errors import PlacementError
from placement.inventory import Sources, observe
from placement.mps import end_servers, ensure_server, running
from placement.nvml import read_nvidia
from placement.schema import FleetConfig
from placement.sharing import SharingRule, mps_directory, share_environment, utilization_of_card
from placement.slices import Inventory, SliceKind

Nvml = Callable[..., Any]


def seen(n: Any, *rules: dict[str, Any]) -> Inventory:
    fleet = FleetConfig.model_validate({"discover": "nvidia", "sharing": list(rules)})
    return observe(fleet, Sources(nvidia=lambda: read_nvidia(n)))


@pytest.mark.parametrize("kind", ["mps", "time-slice"])
def test_a_shared_gpu_is_several_slices_that_say_they_are_not_isolated(nvml: Nvml, kind: str) -> None:
    n = nvml("plain:2")
    inventory = seen(n, {"gpus": [0], "kind": kind, "slices": 3})
    uuid = n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(0))
    shares, whole = inventory.slices[:3], inventory.slices[3]
    assert [s.id for s in shares] == [f"{uuid}/{kind}-{i}" for i in range(3)]
    assert {(s.uuid, s.kind, s.sharers) for s in shares} == {(uuid, SliceKind(kind), 3)}
    assert whole.kind is SliceKind.GPU
    assert sum(s.memory_bytes for s in shares) <= whole.memory_bytes
    assert all("not isolated" in s.kind.isolation for s in shares)
    assert "not isolated from each other" in " ".join(inventory.notes)


def test_all_means_gpus_that_mig_does_not_cut_and_the_last_rule_counts(nvml: Nvml) -> None:
    n = nvml("h100-sxm,plain:2", mig=True)
    inventory = seen(n, {"kind": "mps", "slices": 2}, {"gpus": [2], "kind": "time-slice", "slices": 4})
    assert [s.kind.value for s in inventory.slices] == ["mps"] * 2 + ["time-slice"] * 4


def test_gpus_that_cannot_be_shared_are_refused(nvml: Nvml) -> None:
    n = nvml("h100-sxm,plain", mig=True)
    with pytest.raises(ConfigError, match="has MIG on"):
        seen(n, {"gpus": [0], "kind": "mps", "slices": 2})
    with pytest.raises(ConfigError, match="there is no GPU 4"):
        seen(n, {"gpus": [4], "kind": "mps", "slices": 2})
    for wrong in ({"kind": "mig", "slices": 2}, {"kind": "mps", "slices": 1}, {"kind": "mps", "slices": 49}, {}):
        with pytest.raises(ValidationError):
            SharingRule.model_validate(wrong)


def test_mps_caps_processors_and_memory_and_time_slicing_nothing(nvml: Nvml, tmp_path: Path) -> None:
    n = nvml("plain:2")
    inventory = seen(n, {"gpus": [0], "kind": "mps", "slices": 3}, {"gpus": [1], "kind": "time-slice", "slices": 2})
    mps, timed = inventory.slices[0], inventory.slices[-1]
    assert mps.gpu is not None
    environment = share_environment(mps, tmp_path)
    assert environment == {
        "CUDA_MPS_PIPE_DIRECTORY": str(mps_directory(mps.gpu.uuid, tmp_path)),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "33.33",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={mps.memory_bytes // 2**20}M",
    }
    assert share_environment(timed, tmp_path) == {}


def test_vllm_counts_its_share_from_the_whole_card(nvml: Nvml) -> None:
    n = nvml("plain:2")
    (half, _, whole) = seen(n, {"gpus": [0], "kind": "mps", "slices": 2}).slices
    assert half.gpu is not None
    assert utilization_of_card(whole, 0.9) == 0.9
    assert utilization_of_card(half, 0.9) == pytest.approx(0.9 * half.memory_bytes / half.gpu.memory_bytes, abs=1e-4)
    assert 2 * utilization_of_card(half, 1.0) <= 1


# ---------------------------------------------------------------- the server

DAEMON = """#!{python}
import os, subprocess, sys
home = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
pid = os.path.join(home, "nvidia-cuda-mps-control.pid")
if sys.argv[1:] == ["-d"]:
    if os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bad":
        sys.exit("no such device")
    child = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    open(pid, "w").write(str(child.pid))
elif sys.stdin.read() == "quit\\n":
    os.kill(int(open(pid).read()), 9)
    os.remove(pid)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[str]:
    """Stands in for nvidia-cuda-mps-control."""
    path = tmp_path / "control"
    path.write_text(DAEMON.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    yield str(path)
    end_servers(tmp_path, os.environ, program=str(path))


def test_a_server_is_started_once_and_ended(tmp_path: Path, program: str) -> None:
    directory = tmp_path / "mps-12345678"
    ensure_server("GPU-1", directory, os.environ, program=program)
    first = (directory / "nvidia-cuda-mps-control.pid").read_text(encoding="utf-8")
    ensure_server("GPU-1", directory, os.environ, program=program)
    assert (directory / "nvidia-cuda-mps-control.pid").read_text(encoding="utf-8") == first
    assert running(directory)
    end_servers(tmp_path, os.environ, program=program)
    assert not running(directory)


def test_a_server_that_cannot_be_started_says_why(tmp_path: Path, program: str) -> None:
    with pytest.raises(PlacementError, match="no such device"):
        ensure_server("GPU-bad", tmp_path / "mps-bad", os.environ, program=program)
    with pytest.raises(PlacementError, match="could not be started") as refused:
        ensure_server("GPU-1", tmp_path / "mps-none", os.environ, program=str(tmp_path / "none"))
    assert "time-slice" in str(refused.value.remedy)
